package inroot

import (
	"errors"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"
)

// Lstat describes what name is; "." is the root. It is unix.ENOENT (and
// fs.ErrNotExist) when there is nothing, ENOTDIR when something on the way is
// no directory.
func (r *Root) Lstat(name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	name, err := Clean(name)
	if err != nil {
		return st, named("look at", name, err)
	}
	if name == "." {
		return st, unix.Fstat(r.top.fd, &st)
	}
	p, base, err := r.split(name)
	if err == nil {
		err = unix.Fstatat(p.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	return st, named("look at", name, err)
}

// Readlink returns the target of a symbolic link as it is stored.
func (r *Root) Readlink(name string) (string, error) {
	p, base, err := r.split(name)
	if err != nil {
		return "", named("read link", name, err)
	}
	target, err := readlinkat(p.fd, base)
	return target, named("read link", name, err)
}

// Names yields the names in a directory, in the directory's order and a few
// hundred at a time. The directory itself is not followed when it is a link.
func (r *Root) Names(dir string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		fd, err := r.openReal(dir, unix.O_DIRECTORY)
		if err != nil {
			yield("", named("read directory", dir, err))
			return
		}
		f := os.NewFile(uintptr(fd), dir)
		defer f.Close()
		for {
			names, err := f.Readdirnames(512)
			for _, name := range names {
				if !yield(name, nil) {
					return
				}
			}
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield("", err)
				return
			}
		}
	}
}

// Sync makes a regular file or directory durable (fsync); other types have
// nothing of their own to sync.
func (r *Root) Sync(name string) error {
	st, err := r.Lstat(name)
	if err != nil {
		return err
	}
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return nil
	}
	fd, err := r.openReal(name, 0)
	if err != nil {
		return named("sync", name, err)
	}
	defer unix.Close(fd)
	return named("sync", name, unix.Fsync(fd))
}

// SyncFS makes the whole file system of the root durable.
func (r *Root) SyncFS() error { return unix.Syncfs(r.top.fd) }

// openReal opens a file or directory for reading, not following it and not
// waiting for it.
func (r *Root) openReal(name string, flags int) (int, error) {
	name, err := Clean(name)
	if err != nil {
		return -1, err
	}
	at, base := r.top.fd, "."
	if name != "." {
		p, b, err := r.split(name)
		if err != nil {
			return -1, err
		}
		at, base = p.fd, b
	}
	return retry(func() (int, error) {
		return unix.Openat(at, base, flags|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
}
