package overlay

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// maxMappings bounds the mappings of one label: what the kernel takes (user_namespaces(7)).
const maxMappings = 340

// hostRoot is the host's id for id 0 in a mapping `container:host:size[,...]`.
// An empty mapping maps every id to itself.
func hostRoot(mapping string) (int, error) {
	if mapping == "" {
		return 0, nil
	}
	root, count := -1, 0
	for m := range strings.SplitSeq(mapping, ",") {
		if count++; count > maxMappings {
			return -1, fmt.Errorf("more than %d id mappings: %w", maxMappings, errdefs.ErrInvalidArgument)
		}
		parts := strings.Split(m, ":")
		if len(parts) != 3 {
			return -1, fmt.Errorf("id mapping %.64q is not container:host:size: %w", m, errdefs.ErrInvalidArgument)
		}
		var n [3]uint64
		for i, p := range parts {
			var err error
			if n[i], err = strconv.ParseUint(p, 10, 32); err != nil {
				return -1, fmt.Errorf("id mapping %.64q: %q is no id: %w", m, p, errdefs.ErrInvalidArgument)
			}
		}
		container, host, size := n[0], n[1], n[2]
		if container+size > noID || host+size > noID {
			return -1, fmt.Errorf("id mapping %.64q goes beyond the last id: %w", m, errdefs.ErrInvalidArgument)
		}
		if container == 0 && size > 0 && root < 0 {
			root = int(host)
		}
	}
	if root < 0 {
		return -1, fmt.Errorf("id mapping %.64q does not map id 0: %w", mapping, errdefs.ErrInvalidArgument)
	}
	return root, nil
}

// noID is the id that the kernel keeps for "none".
const noID = 1<<32 - 1
