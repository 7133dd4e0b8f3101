package overlay

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
)

// inUserNamespace says whether root here is not root of the machine, whose
// first namespace alone maps all ids to themselves.
var inUserNamespace = sync.OnceValue(func() bool {
	data, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false // a kernel without user namespaces
	}
	return strings.Join(strings.Fields(string(data)), " ") != "0 0 4294967295"
})

// mapsIDs says whether the kernel mounts overlays over id-mapped layers, as
// Linux does since 5.19 for who is root of the machine.
func mapsIDs() bool {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	return err == nil && atLeast(string(release), 5, 19) && !inUserNamespace()
}

// atLeast compares the first two numbers of a kernel release such as
// `6.18.44-amd64`.
func atLeast(release string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}

// onTmpfs says whether a directory, or the nearest one above that exists, is
// on tmpfs, which keeps no user attributes.
func onTmpfs(dir string) bool {
	const tmpfsMagic = 0x01021994 // linux/magic.h
	var st syscall.Statfs_t
	for {
		err := syscall.Statfs(dir, &st)
		if err == nil {
			return st.Type == tmpfsMagic
		}
		if i := strings.LastIndexByte(dir, '/'); err == syscall.ENOENT && i > 0 {
			dir = dir[:i]
			continue
		}
		return false
	}
}

// tellsTypes says whether reading a directory tells the types of its entries
// (d_type of getdents64(2)), without which overlayfs doesn't see whiteouts.
func tellsTypes(dir string) (bool, error) {
	d, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer d.Close()
	buf := make([]byte, 4096)
	n, err := syscall.ReadDirent(int(d.Fd()), buf)
	if err != nil {
		return false, err
	}
	const lengthAt, typeAt = 16, 18 // in struct linux_dirent64
	for at := 0; at+typeAt < n; {
		if buf[at+typeAt] == syscall.DT_UNKNOWN {
			return false, nil
		}
		length := int(binary.NativeEndian.Uint16(buf[at+lengthAt:]))
		if length == 0 {
			break
		}
		at += length
	}
	return n > 0, nil
}
