package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A mount is often busy for an instant, because a process that starts
// inherits descriptors; it is tried again this often, this far apart.
const (
	busyTries = 50
	busyPause = 50 * time.Millisecond
)

// UnmountAll unmounts whatever is mounted on target, one mount after the
// other until it is a mount point no more. A target that is none, or is not
// there, or is "", is no error. A last component that is a link is not followed. A mount that
// stays busy for 2.5 s is unix.EBUSY.
func UnmountAll(ctx context.Context, target string) error {
	if target == "" {
		return nil
	}
	for busy := 0; ; {
		switch err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err {
		case nil:
		case unix.EINVAL, unix.ENOENT: // EINVAL: not a mount point
			return nil
		case unix.EBUSY:
			if busy++; busy == busyTries {
				return fmt.Errorf("unmount %s: %w; a process has files open there (see fuser -vm)", target, err)
			}
			select {
			case <-time.After(busyPause):
			case <-ctx.Done():
				return fmt.Errorf("unmount %s: %w", target, context.Cause(ctx))
			}
		default:
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
}

// UnmountTree unmounts everything mounted at and below dir, deepest first. It
// goes on after a failure and joins the errors.
func UnmountTree(ctx context.Context, dir string) error {
	return unmountBelow(ctx, dir, func(string) bool { return true })
}

func unmountBelow(ctx context.Context, dir string, which func(point string) bool) error {
	points, err := mountPoints(dir)
	if err != nil {
		return fmt.Errorf("unmount below %s: %w", dir, err)
	}
	var errs []error
	for _, point := range points {
		if which(point) {
			errs = append(errs, UnmountAll(ctx, point))
		}
	}
	return errors.Join(errs...)
}

// mountPoints lists the mount points at and below dir, deepest first, each once.
func mountPoints(dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir) // the kernel lists real paths
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, err
	}
	points := make([]string, len(infos))
	for i, info := range infos {
		points[i] = info.Mountpoint
	}
	slices.Sort(points)
	points = slices.Compact(points)
	slices.SortStableFunc(points, func(a, b string) int { return strings.Count(b, "/") - strings.Count(a, "/") })
	return points, nil
}
