package layer

import (
	"os"
	"strings"
	"sync"
)

// inUserNamespace reports whether the process is in a user namespace other
// than the machine's first, whose map covers every id.
var inUserNamespace = sync.OnceValue(func() bool {
	data, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	f := strings.Fields(string(data))
	return len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295"
})
