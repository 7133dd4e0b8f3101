package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Temp makes mounts that last for one call, in directories of its own:
//
//	<root>/tmpmounts                   0700
//	<root>/tmpmounts/containerd-mount* one per call, as containerd names them
//
// A directory is removed with rmdir(2) and never with what is in it: if an
// unmount went wrong, what is in it is somebody's image.
type Temp struct {
	Dir string // <root>/tmpmounts
}

// With mounts what the descriptions say, calls f with the directory, and
// unmounts, whatever f returns. An overlay's `volatile` is left out: such an
// overlay can't be mounted a second time.
func (t Temp) With(ctx context.Context, mounts []Mount, f func(dir string) error) (err error) {
	if err := os.MkdirAll(t.Dir, 0o700); err != nil {
		return fmt.Errorf("temporary mount: %w", err)
	}
	dir, err := os.MkdirTemp(t.Dir, "containerd-mount")
	if err != nil {
		return fmt.Errorf("temporary mount: %w", err)
	}
	defer func() {
		ctx := context.WithoutCancel(ctx) // cancelled or not, it goes
		if e := UnmountTree(ctx, dir); e != nil {
			err = errors.Join(err, e)
			return
		}
		if e := unix.Rmdir(dir); e != nil {
			err = errors.Join(err, fmt.Errorf("remove temporary mount point %s: %w", dir, e))
		}
	}()
	mounts = slices.Clone(mounts)
	for i, m := range mounts {
		if m.Type == "overlay" {
			mounts[i].Options = slices.DeleteFunc(splitOptions(m.Options), isVolatile)
		}
	}
	if err := All(ctx, dir, mounts); err != nil {
		return err
	}
	return f(dir)
}

func isVolatile(o string) bool { return o == "volatile" || o == "fsync=volatile" }

// Clean makes Dir if it is missing, and removes what a crash left in it:
// everything mounted below, deepest first, then the empty directories. It
// goes on after a failure and joins the errors. No call of With may be under way.
func (t Temp) Clean(ctx context.Context) error {
	if err := os.MkdirAll(t.Dir, 0o700); err != nil {
		return fmt.Errorf("clean temporary mounts: %w", err)
	}
	real, err := filepath.EvalSymlinks(t.Dir)
	if err != nil {
		return fmt.Errorf("clean temporary mounts: %w", err)
	}
	errs := []error{unmountBelow(ctx, real, func(point string) bool { return point != real })}
	entries, err := os.ReadDir(real)
	errs = append(errs, err)
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := unix.Rmdir(filepath.Join(real, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("clean temporary mount point %s: %w; look inside before removing it", filepath.Join(real, e.Name()), err))
		}
	}
	return errors.Join(errs...)
}
