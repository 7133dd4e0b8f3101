package tree

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxXattr is the most that Linux keeps of one extended attribute, and of the
// list of their names, in bytes (linux/limits.h).
const maxXattr = 64 << 10

// Copy makes the directory dst, which must be empty, equal to src: types,
// owners, modes, times, extended attributes, devices, and hard links among
// the files. Holes stay holes, and blocks are shared where the file system
// can. It syncs nothing. Extended attributes of the `security` class that
// may not be set are left out, as is any class that the file system lacks.
func Copy(ctx context.Context, dst, src string) error {
	from, err := open(src)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := open(dst)
	if err != nil {
		return err
	}
	defer unix.Close(to)
	c := copier{
		root: to, first: make(map[inode]string), reflink: true,
		list: make([]byte, maxXattr), value: make([]byte, maxXattr),
	}
	defer c.way.close()
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return fmt.Errorf("copy %s: %w", src, err)
	}
	if err := walk(ctx, from, &c); err != nil {
		return fmt.Errorf("copy %s to %s: %w", src, dst, err)
	}
	if err := c.attributes(from, ".", to, ".", st); err != nil {
		return fmt.Errorf("copy %s to %s: %w", src, dst, err)
	}
	return nil
}

// copier writes what the walk meets into the same place below root.
type copier struct {
	root        int              // of the copy
	way         descent          // in the copy
	opened      []unix.Stat_t    // the directories on way, as they were when they were entered
	first       map[inode]string // files of several names: where in the copy the first one is
	reflink     bool             // until the file system has said no
	list, value []byte           // buffers for extended attributes
}

func (c *copier) file(ctx context.Context, parent int, name string) (bool, error) {
	st, err := stat(parent, name)
	if err != nil {
		return false, err
	}
	here := c.way.top(c.root)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return true, nil
	case unix.S_IFREG:
		if st.Nlink > 1 {
			id := inode{uint64(st.Dev), st.Ino}
			if old, ok := c.first[id]; ok {
				return false, c.link(old, here, name)
			}
			c.first[id] = c.path(name)
		}
		err = c.regular(ctx, parent, here, name, st)
	case unix.S_IFLNK:
		err = symlink(parent, here, name)
	default:
		err = unix.Mknodat(here, name, st.Mode&^0o7777|0o600, int(st.Rdev))
	}
	if err != nil {
		return false, err
	}
	return false, c.attributes(parent, name, here, name, st)
}

func (c *copier) enter(parent int, name string, dir int) error {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return err
	}
	here := c.way.top(c.root)
	if err := unix.Mkdirat(here, name, 0o700); err != nil {
		return err
	}
	fd, err := openDirectory(here, name)
	if err != nil {
		return err
	}
	c.opened = append(c.opened, st)
	return c.way.down(name, fd)
}

// leave gives the directory its attributes: earlier, its time would change
// again, and its mode or default ACL might stand in the way.
func (c *copier) leave(parent int, name string) error {
	if _, err := c.way.up(c.root); err != nil {
		return err
	}
	last := len(c.opened) - 1
	st := c.opened[last]
	c.opened = c.opened[:last]
	return c.attributes(parent, name, c.way.top(c.root), name, st)
}

func (c *copier) skip(error) bool { return false }

func (c *copier) path(name string) string {
	names := make([]string, 0, len(c.way.steps)+1)
	for _, s := range c.way.steps {
		names = append(names, s.name)
	}
	return strings.Join(append(names, name), "/")
}

// link makes name in here another name of old, a path below the root.
func (c *copier) link(old string, here int, name string) error {
	const most = unix.PathMax / 2
	from := c.root
	for len(old) > most { // too long for one call: go nearer
		cut := strings.LastIndexByte(old[:most], '/')
		fd, err := unix.Openat(from, old[:cut], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if from != c.root {
			unix.Close(from)
		}
		if err != nil {
			return err
		}
		from, old = fd, old[cut+1:]
	}
	err := unix.Linkat(from, old, here, name, 0)
	if from != c.root {
		unix.Close(from)
	}
	return err
}

func symlink(parent, here int, name string) error {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(parent, name, buf)
	if err != nil {
		return err
	}
	return unix.Symlinkat(string(buf[:n]), here, name)
}

// attributes copies owner, extended attributes, mode and times, in this
// order: a change of owner drops the set-uid bit and file capabilities.
func (c *copier) attributes(from int, name string, to int, copied string, st unix.Stat_t) error {
	if err := unix.Fchownat(to, copied, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if err := c.xattrs(fdPath(from, name), fdPath(to, copied)); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Fchmodat(to, copied, st.Mode&0o7777, 0); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	times := []unix.Timespec{st.Atim, st.Mtim}
	if err := unix.UtimesNanoAt(to, copied, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// fdPath is a path to an entry of an open directory, for the calls that have
// no *at form.
func fdPath(dir int, name string) string {
	return path.Join(fmt.Sprintf("/proc/self/fd/%d", dir), name)
}

func (c *copier) xattrs(from, to string) error {
	n, err := unix.Llistxattr(from, c.list)
	if err == unix.ENOTSUP || n == 0 && err == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes: %w", err)
	}
	for key := range strings.SplitSeq(strings.TrimSuffix(string(c.list[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(from, key, c.value)
		if err == nil {
			err = unix.Lsetxattr(to, key, c.value[:n], 0)
		}
		refused := err == unix.EPERM && strings.HasPrefix(key, "security.")
		if err != nil && err != unix.ENOTSUP && !refused {
			return fmt.Errorf("extended attribute %s: %w", key, err)
		}
	}
	return nil
}

func (c *copier) regular(ctx context.Context, parent, here int, name string, st unix.Stat_t) error {
	from, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := unix.Openat(here, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	err = c.contents(ctx, to, from, st.Size)
	if e := unix.Close(to); err == nil {
		err = e
	}
	return err
}

func (c *copier) contents(ctx context.Context, to, from int, size int64) error {
	if size == 0 {
		return nil
	}
	if c.reflink {
		if unix.IoctlFileClone(to, from) == nil {
			return nil
		}
		c.reflink = false
	}
	if err := unix.Ftruncate(to, size); err != nil {
		return err
	}
	for offset := int64(0); offset < size; {
		start, end, err := data(from, offset, size)
		if err != nil {
			return err
		}
		if err := extent(ctx, to, from, start, end); err != nil {
			return err
		}
		offset = end
	}
	return nil
}

// data finds the first bytes at or after offset that are not a hole.
func data(fd int, offset, size int64) (start, end int64, err error) {
	start, err = unix.Seek(fd, offset, unix.SEEK_DATA)
	if err == unix.ENXIO {
		return size, size, nil
	}
	if err != nil { // a file system that knows no holes
		return offset, size, nil
	}
	end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, err
	}
	return start, end, nil
}

// chunk bounds one call of copy_file_range, in bytes, so that a copy can be cancelled.
const chunk = 64 << 20

func extent(ctx context.Context, to, from int, start, end int64) error {
	in, out := start, start
	for in < end {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := unix.CopyFileRange(from, &in, to, &out, int(min(end-in, chunk)), 0)
		if err == nil && n == 0 {
			return errors.New("file became shorter while it was copied")
		}
		if err == unix.EXDEV || err == unix.ENOSYS || err == unix.EOPNOTSUPP || err == unix.EINVAL {
			return byHand(ctx, to, from, in, end)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func byHand(ctx context.Context, to, from int, start, end int64) error {
	buf := make([]byte, 256<<10)
	for start < end {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := unix.Pread(from, buf[:min(end-start, int64(len(buf)))], start)
		if err != nil {
			return err
		}
		if n == 0 {
			return errors.New("file became shorter while it was copied")
		}
		for done := 0; done < n; {
			w, err := unix.Pwrite(to, buf[done:n], start+int64(done))
			if err != nil {
				return err
			}
			done += w
		}
		start += int64(n)
	}
	return nil
}
