package mount

import (
	"fmt"
	"os"
	"path"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// mount2 calls mount(2) with data, in the working directory dir if not "".
func (p parsed) mount2(at int, dir string, data []string) error {
	joined := strings.Join(data, ",")
	if page := os.Getpagesize(); len(joined) >= page {
		return fmt.Errorf("%d bytes of mount options, and this kernel reads %d: %w", len(joined), page-1, errdefs.ErrInvalidArgument)
	}
	call := func() error {
		if err := unix.Mount(p.source, procPath(at), p.fstype, p.flags, joined); err != nil {
			return fmt.Errorf("mount with %q: %w", joined, err)
		}
		return nil
	}
	if dir == "" {
		return call()
	}
	return inDirectory(dir, call)
}

// bind2 binds without the calls of Linux 5.12. mount(2) ignores most flags of
// a bind, so a second call sets them; flags that the source has stay, since a
// user namespace may not drop them.
func (p parsed) bind2(at int) error {
	if err := unix.Mount(p.source, procPath(at), "", p.flags&(unix.MS_BIND|unix.MS_REC), ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	const perMount = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC |
		unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME | unix.MS_STRICTATIME
	if p.flags&perMount == 0 {
		return nil
	}
	top, err := reopen(at)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	kept, err := mountFlags(top)
	if err == nil {
		err = unix.Mount("", procPath(top), "", unix.MS_REMOUNT|unix.MS_BIND|p.flags&perMount|kept, "")
	}
	if err != nil {
		unix.Unmount(procPath(top), unix.MNT_DETACH) // nobody gets it writable
		return fmt.Errorf("remount bind: %w", err)
	}
	return nil
}

// mountFlags are those of the mount that fd is on; statfs(2) numbers them as
// mount(2) does, relatime apart.
func mountFlags(fd int) (uintptr, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return 0, err
	}
	const same = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC | unix.ST_NOATIME | unix.ST_NODIRATIME
	return uintptr(st.Flags) & same, nil
}

// overlay2 mounts an overlay by mount(2), which reads one page of options. If
// they are longer, the lower directories are named relative to the longest
// directory that holds them all: of `.../snapshots/12/fs` remains `12/fs`.
func (p parsed) overlay2(at int, l layers) error {
	if size := len(strings.Join(p.data, ",")); size < os.Getpagesize() {
		return p.mount2(at, "", p.data)
	}
	dir := commonDirectory(append(append([]string{}, l.lower...), l.data...))
	lower := relative(dir, l.lower)
	if data := relative(dir, l.data); data != "" {
		lower += "::" + strings.ReplaceAll(data, ":", "::")
	}
	options := append([]string{"lowerdir=" + lower}, l.rest...)
	if l.upper != "" {
		options = append(options, "upperdir="+l.upperRaw)
	}
	if l.work != "" {
		options = append(options, "workdir="+l.workRaw)
	}
	return p.mount2(at, dir, options)
}

func relative(dir string, paths []string) string {
	out := make([]string, len(paths))
	for i, p := range paths {
		out[i] = Escape(strings.TrimPrefix(strings.TrimPrefix(p, dir), "/"))
		if out[i] == "" {
			out[i] = "."
		}
	}
	return strings.Join(out, ":")
}

// commonDirectory is the deepest directory that is, or is above, every path.
func commonDirectory(paths []string) string {
	common := path.Clean(paths[0])
	for _, p := range paths[1:] {
		for common != "/" && p != common && !strings.HasPrefix(p, common+"/") {
			common = path.Dir(common)
		}
	}
	return common
}

// inDirectory runs f in a working directory that only its thread has.
func inDirectory(dir string, f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread's working directory can't be shared
		// again, so the thread ends with this goroutine.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Chdir(dir)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}
