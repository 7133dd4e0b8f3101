package inroot

import (
	"os"

	"golang.org/x/sys/unix"
)

// Node is one open object below a root, of any type, links included. Its
// methods act on that object whatever its name means meanwhile.
type Node struct {
	fd   int
	path bool // fd is O_PATH: calls that need a real descriptor go through /proc
	kept bool // fd is a Root's, which closes it
}

// File is a new regular file, open for writing.
type File struct{ Node }

// Node opens what name is, without following it; "." is the root. It doesn't
// need read permission, and opening a FIFO or device has no effect.
func (r *Root) Node(name string) (*Node, error) {
	name, err := Clean(name)
	if err != nil {
		return nil, named("open", name, err)
	}
	at, base := r.top.fd, "."
	if name != "." {
		p, b, err := r.split(name)
		if err != nil {
			return nil, named("open", name, err)
		}
		at, base = p.fd, b
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(at, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, named("open", name, err)
	}
	return &Node{fd: fd, path: true}, nil
}

// Close closes the node.
func (n *Node) Close() error {
	if n.kept {
		return nil
	}
	return unix.Close(n.fd)
}

// Stat describes the node.
func (n *Node) Stat() (st unix.Stat_t, err error) {
	err = unix.Fstat(n.fd, &st)
	return st, err
}

// Lchown sets the owner of what name is, without following or opening it.
func (r *Root) Lchown(name string, uid, gid int) error {
	p, base, err := r.split(name)
	if err == nil {
		err = unix.Fchownat(p.fd, base, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	}
	return named("set owner of", name, err)
}

// Lutimes sets the times of access and modification of what name is, without
// following or opening it; "." is the root.
func (r *Root) Lutimes(name string, atime, mtime unix.Timespec) error {
	name, err := Clean(name)
	if err != nil {
		return named("set times of", name, err)
	}
	at, base := r.top.fd, "."
	if name != "." {
		p, b, err := r.split(name)
		if err != nil {
			return named("set times of", name, err)
		}
		at, base = p.fd, b
	}
	return named("set times of", name, unix.UtimesNanoAt(at, base, []unix.Timespec{atime, mtime}, unix.AT_SYMLINK_NOFOLLOW))
}

// Chown sets the owner.
func (n *Node) Chown(uid, gid int) error {
	return unix.Fchownat(n.fd, "", uid, gid, unix.AT_EMPTY_PATH)
}

// Chmod sets the permission, set-id and sticky bits (07777). A link has none
// to set: that is the kernel's ENOTSUP.
func (n *Node) Chmod(mode uint32) error {
	if !n.path {
		return unix.Fchmod(n.fd, mode)
	}
	return unix.Chmod(procPath(n.fd), mode)
}

// Utimes sets the times of access and modification, to the nanosecond.
func (n *Node) Utimes(atime, mtime unix.Timespec) error {
	return unix.UtimesNanoAt(n.fd, "", []unix.Timespec{atime, mtime}, unix.AT_EMPTY_PATH)
}

// Setxattr sets an extended attribute.
func (n *Node) Setxattr(key string, value []byte) error {
	if !n.path {
		return unix.Fsetxattr(n.fd, key, value, 0)
	}
	return unix.Setxattr(procPath(n.fd), key, value, 0)
}

// Removexattr removes an extended attribute.
func (n *Node) Removexattr(key string) error {
	return unix.Removexattr(procPath(n.fd), key)
}

// Getxattr returns the value of an extended attribute; ENODATA if there is none.
func (n *Node) Getxattr(key string) ([]byte, error) {
	return sized(func(buf []byte) (int, error) { return unix.Getxattr(procPath(n.fd), key, buf) })
}

// Listxattr names the extended attributes that the process may see.
func (n *Node) Listxattr() ([]string, error) {
	buf, err := sized(func(buf []byte) (int, error) { return unix.Listxattr(procPath(n.fd), buf) })
	if err != nil {
		return nil, err
	}
	var keys []string
	for start, i := 0, 0; i < len(buf); i++ {
		if buf[i] == 0 {
			keys = append(keys, string(buf[start:i]))
			start = i + 1
		}
	}
	return keys, nil
}

// sized calls with a buffer that is large enough; the kernel's own limit is
// 64 KiB.
func sized(call func([]byte) (int, error)) ([]byte, error) {
	var small [256]byte
	n, err := call(small[:])
	if err == nil {
		return append([]byte(nil), small[:n]...), nil
	}
	if err != unix.ERANGE {
		return nil, err
	}
	buf := make([]byte, 64<<10)
	if n, err = call(buf); err != nil {
		return nil, err
	}
	return buf[:n], nil
}

// Fd returns the descriptor of the file.
func (f *File) Fd() int { return f.fd }

// Write appends at the file's position.
func (f *File) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Write(f.fd, p[done:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// Skip moves the position n bytes on, leaving a hole.
func (f *File) Skip(n int64) error {
	_, err := unix.Seek(f.fd, n, unix.SEEK_CUR)
	return err
}

// Truncate sets the size of the file in bytes.
func (f *File) Truncate(size int64) error { return unix.Ftruncate(f.fd, size) }

// Open opens a regular file for reading. Anything else is refused, and never
// waited for.
func (r *Root) Open(name string) (*os.File, error) {
	p, base, err := r.split(name)
	if err != nil {
		return nil, named("open", name, err)
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(p.fd, base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, named("open", name, err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = unix.EINVAL
	}
	if err != nil {
		unix.Close(fd)
		return nil, named("open", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
