package inroot

import (
	"path"

	"golang.org/x/sys/unix"
)

// Mkdir makes a directory with exactly these permission, set-id and sticky bits.
func (r *Root) Mkdir(name string, mode uint32) error {
	n, err := r.MakeDir(name, mode)
	if err != nil {
		return err
	}
	return named("set mode of", name, n.Chmod(mode&0o7777))
}

// MakeDir makes a directory and returns it open. Of mode only the permission
// bits count, and the umask, the directory above (its set-group-id bit, its
// default ACL) and the owner's need to open it may change them: Stat tells, and
// Chmod settles it. The Node is the root's own, and good until the root is used
// for something else.
func (r *Root) MakeDir(name string, mode uint32) (*Node, error) {
	p, base, err := r.split(name)
	if err != nil {
		return nil, named("make directory", name, err)
	}
	fd, err := mkdirat(p.fd, base, mode)
	if err != nil {
		return nil, named("make directory", name, err)
	}
	name, _ = Clean(name) // split has checked it
	r.keep(&parent{fd: fd, name: name, real: path.Join(p.real, base)})
	return &Node{fd: fd, kept: true}, nil
}

// MkdirAll makes a directory and those above it that are missing, each with
// these mode bits, and says which it made, by their real names, top first. A
// link that leads to nothing yet is followed and its target made, inside the
// root.
func (r *Root) MkdirAll(name string, mode uint32) (made []string, err error) {
	links := 0
	_, err = r.ensure(name, mode, &links, &made)
	return made, named("make directory", name, err)
}

// ensure is MkdirAll for one level: what is there is opened, what is missing
// is made in the parent, which is ensured first.
func (r *Root) ensure(name string, mode uint32, links *int, made *[]string) (*parent, error) {
	p, err := r.dir(name)
	if err != unix.ENOENT {
		return p, err
	}
	name, _ = Clean(name) // dir has checked it
	above, err := r.ensure(path.Dir(name), mode, links, made)
	if err != nil {
		return nil, err
	}
	base := path.Base(name)
	fd, err := mkdirat(above.fd, base, mode)
	if err == unix.EEXIST {
		return r.ensureLinked(above, base, mode, links, made)
	}
	if err == nil {
		if err = unix.Fchmod(fd, mode&0o7777); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		return nil, err
	}
	p = &parent{fd: fd, name: name, real: path.Join(above.real, base)}
	*made = append(*made, p.real)
	r.keep(p)
	return p, nil
}

// ensureLinked makes what a dangling link points to. The target is taken as a
// name from the root, or from the link's own directory.
func (r *Root) ensureLinked(at *parent, base string, mode uint32, links *int, made *[]string) (*parent, error) {
	target, err := readlinkat(at.fd, base)
	if err == unix.EINVAL {
		return nil, unix.ENOTDIR
	}
	if err != nil {
		return nil, err
	}
	if *links++; *links > maxLinks {
		return nil, unix.ELOOP
	}
	if !path.IsAbs(target) {
		target = path.Join("/", at.real, target)
	}
	return r.ensure(target, mode, links, made)
}

// mkdirat makes a directory with about that mode and returns it open.
func mkdirat(at int, base string, mode uint32) (int, error) {
	if err := unix.Mkdirat(at, base, mode&0o777|0o700); err != nil {
		return -1, err
	}
	return retry(func() (int, error) {
		return unix.Openat(at, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

// Create makes a regular file that must not exist. Of mode only the permission
// bits count, and the umask and the directory's default ACL may change them:
// Stat tells, and Chmod settles it when the bytes are in.
func (r *Root) Create(name string, mode uint32) (*File, error) {
	p, base, err := r.split(name)
	if err != nil {
		return nil, named("create", name, err)
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(p.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode&0o777)
	})
	if err != nil {
		return nil, named("create", name, err)
	}
	return &File{Node{fd: fd}}, nil
}

// Symlink makes a symbolic link; target is stored as it is and not looked at.
func (r *Root) Symlink(target, name string) error {
	p, base, err := r.split(name)
	if err == nil {
		err = unix.Symlinkat(target, p.fd, base)
	}
	return named("make link", name, err)
}

// Link makes name another name of target, which is not followed when it is a
// symbolic link.
func (r *Root) Link(target, name string) error {
	from, old, err := r.split(target)
	if err != nil {
		return named("link to", target, err)
	}
	to, base, err := r.split(name)
	if err == nil {
		err = unix.Linkat(from.fd, old, to.fd, base, 0)
	}
	return named("link", name, err)
}

// Mknod makes a device, FIFO or socket; mode holds the type, and the bits 07777
// that the node gets in spite of the umask.
func (r *Root) Mknod(name string, mode uint32, dev uint64) error {
	p, base, err := r.split(name)
	if err != nil {
		return named("make node", name, err)
	}
	if err := unix.Mknodat(p.fd, base, mode&unix.S_IFMT, int(dev)); err != nil {
		return named("make node", name, err)
	}
	if mode&0o7777 == 0 {
		return nil
	}
	n, err := r.Node(name)
	if err != nil {
		return err
	}
	defer n.Close()
	return named("set mode of", name, n.Chmod(mode&0o7777))
}

// Rename moves old to name, replacing what rename(2) replaces.
func (r *Root) Rename(old, name string) error {
	from, base, err := r.split(old)
	if err != nil {
		return named("rename", old, err)
	}
	to, new, err := r.split(name)
	if err == nil {
		err = unix.Renameat(from.fd, base, to.fd, new)
		r.forget()
	}
	return named("rename to", name, err)
}

// LinkNode makes name another name of an open node that still has one.
func (r *Root) LinkNode(n *Node, name string) error {
	p, base, err := r.split(name)
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, procPath(n.fd), p.fd, base, unix.AT_SYMLINK_FOLLOW)
	}
	return named("link", name, err)
}
