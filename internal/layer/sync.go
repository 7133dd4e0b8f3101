package layer

import (
	"errors"
	"io/fs"
	"maps"
	"path"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

// fewFiles is up to how many files, and as many directories, are synced one by
// one. Beyond it a syncfs of the whole file system is cheaper.
const fewFiles = 32

// fewChanges remembers what was written, as long as it is little.
type fewChanges struct {
	files, dirs map[string]struct{}
	many        bool
}

func (c *fewChanges) file(name string) { c.add(&c.files, name) }
func (c *fewChanges) dir(name string)  { c.add(&c.dirs, path.Clean(name)) }

func (c *fewChanges) add(set *map[string]struct{}, name string) {
	if c.many {
		return
	}
	if *set == nil {
		*set = make(map[string]struct{})
	}
	(*set)[name] = struct{}{}
	if len(*set) > fewFiles {
		*c = fewChanges{many: true}
	}
}

// sync syncs the files and then the directories; done is false when they are
// too many. What was removed again, or is reached through a link now, needs
// nothing.
func (c *fewChanges) sync(root *inroot.Root) (done bool, err error) {
	if c.many {
		return false, nil
	}
	for _, set := range []map[string]struct{}{c.files, c.dirs} {
		for _, name := range slices.Sorted(maps.Keys(set)) {
			err := root.Sync(name)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
				return false, err
			}
		}
	}
	return true, nil
}

// Sync makes what Apply wrote durable, file by file, if it is little: at most
// 32 files in at most 32 directories. Otherwise done is false and nothing was
// synced: one syncfs is cheaper, and one for several layers cheaper still.
func (t *tree) Sync() (done bool, err error) {
	if t.few.many {
		return false, nil
	}
	root, err := inroot.Open(t.dir)
	if err != nil {
		return false, err
	}
	defer root.Close()
	return t.few.sync(root)
}
