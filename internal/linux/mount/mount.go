// Package mount turns mount descriptions into kernel mounts, and back.
package mount

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/undo"
)

// Mount describes one call of mount(2): what to mount, from where, with which
// options. Options use the words of mount(8): flags (`ro`, `rbind`) and file
// system data (`lowerdir=...`) together, as in containerd's API. An element
// may hold several options separated by commas; a comma inside a value is
// quoted ("a,b") or escaped (\,), and overlay's paths escape colons (\:).
type Mount struct {
	Type    string
	Source  string
	Target  string // below the mount point; "" for the mount point itself
	Options []string
}

// ReadOnly says whether nothing can be written through the mount.
func (m Mount) ReadOnly() bool {
	opts := splitOptions(m.Options)
	if m.Type == "overlay" && !slices.ContainsFunc(opts, isUpper) {
		return true
	}
	return slices.Contains(opts, "ro")
}

// All mounts the descriptions in order, each at its Target below target, which
// must exist. A Target is resolved as in a chroot at target (inv 9), after
// what was mounted before it. When one fails, those before it are unmounted.
//
// Options that need more than the kernel's mount calls (`loop`, `uidmap=`,
// `gidmap=`, FUSE types, mount-manager types such as `format/overlay`) are
// errdefs.ErrNotImplemented; options that make no sense are
// errdefs.ErrInvalidArgument.
func All(ctx context.Context, target string, mounts []Mount) error {
	return all(ctx, target, mounts, kernel())
}

func all(ctx context.Context, target string, mounts []Mount, k ability) (err error) {
	var u undo.Stack
	defer u.Unwind(&err)
	for _, m := range mounts {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		path, err := m.place(target, k)
		if err != nil {
			return fmt.Errorf("mount %s %s at %s: %w", m.Type, m.Source, target, err)
		}
		u.Add("unmount "+path, func(ctx context.Context) error { return UnmountAll(ctx, path) })
	}
	return nil
}

// UnmountEach takes down what All has mounted, last first. It goes on after
// an error and returns the first.
func UnmountEach(ctx context.Context, target string, mounts []Mount) error {
	var first error
	for _, m := range slices.Backward(mounts) {
		if err := m.displace(ctx, target); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// place mounts m and returns the path that its mount point has now.
func (m Mount) place(target string, k ability) (string, error) {
	p, err := parse(m)
	if err != nil {
		return "", err
	}
	at, err := openTarget(target, m.Target)
	if err != nil {
		return "", err
	}
	defer unix.Close(at)
	path, err := pathOf(at)
	if err != nil {
		return "", err
	}
	return path, p.attach(at, k)
}

func (m Mount) displace(ctx context.Context, target string) error {
	at, err := openTarget(target, m.Target)
	if err != nil {
		if err == unix.ENOENT {
			return nil
		}
		return fmt.Errorf("unmount %s below %s: %w", m.Target, target, err)
	}
	path, err := pathOf(at)
	unix.Close(at) // or the mount stays busy
	if err != nil {
		return err
	}
	return UnmountAll(ctx, path)
}

// openTarget opens the mount point sub below target without reaching outside
// of target, whatever links stand there (inv 9).
func openTarget(target, sub string) (int, error) {
	root, err := unix.Open(target, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil || sub == "" {
		return root, err
	}
	defer unix.Close(root)
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for range resolveTries {
		var fd int
		// EAGAIN: a rename elsewhere raced with "..", says openat2(2).
		if fd, err = unix.Openat2(root, sub, &how); err != unix.EAGAIN {
			return fd, err
		}
	}
	return -1, err
}

// resolveTries bounds how often one name is resolved again because of renames.
const resolveTries = 32

func pathOf(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlink(procPath(fd), buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// procPath names an open file by a path that the kernel follows to it.
func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// ReadOnly returns descriptions of the same trees through which nothing can
// be written: an overlay loses its upper directory to its lower ones, and
// anything else is mounted `ro`.
func ReadOnly(mounts []Mount) []Mount {
	out := slices.Clone(mounts)
	for i, m := range out {
		opts := splitOptions(m.Options)
		if m.Type == "overlay" {
			out[i].Options = lowerOnly(opts)
			continue
		}
		opts = slices.DeleteFunc(opts, func(o string) bool { return o == "rw" || o == "ro" })
		out[i].Options = append(opts, "ro")
	}
	return out
}

func lowerOnly(opts []string) []string {
	var out []string
	var upper string
	for _, o := range opts {
		switch key, value, _ := strings.Cut(o, "="); key {
		case "upperdir":
			upper = value
		case "workdir", "uidmap", "gidmap", "rw", "volatile":
		default:
			out = append(out, o)
		}
	}
	if upper == "" {
		return out
	}
	for i, o := range out {
		if lower, ok := strings.CutPrefix(o, "lowerdir="); ok {
			// In lowerdir, and only there, a colon separates.
			upper = strings.ReplaceAll(upper, `\:`, ":")
			out[i] = "lowerdir=" + strings.ReplaceAll(upper, ":", `\:`) + ":" + lower
		}
	}
	return out
}

func isUpper(o string) bool { return strings.HasPrefix(o, "upperdir=") }
