package inroot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// maxDescent bounds the directories that RemoveAll has open at once.
	maxDescent = 64
	// maxPasses bounds how often a directory is read again that is not empty
	// although nothing was left to remove: others write into it.
	maxPasses = 100
)

// Removed counts what a removal freed.
type Removed struct {
	Inodes int64 // objects whose last name went
	Bytes  int64 // of the disk, by st_blocks
}

// Remove removes one object; a directory must be empty. That there is nothing
// is an error (fs.ErrNotExist).
func (r *Root) Remove(name string) error {
	p, base, err := r.split(name)
	if err != nil {
		return named("remove", name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(p.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return named("remove", name, err)
	}
	flags := 0
	if isDir(&st) {
		flags = unix.AT_REMOVEDIR
	}
	err = unix.Unlinkat(p.fd, base, flags)
	if isDir(&st) || isLink(&st) {
		r.forget()
	}
	return named("remove", name, err)
}

// RemoveAll removes what name is and all below it, and follows no link. That
// there is nothing is fine. It holds at most 64 directories open, however deep
// the tree: one that lies deeper is first moved up beside the top, so each is
// moved at most once and the time stays linear.
func (r *Root) RemoveAll(name string) (Removed, error) {
	var got Removed
	p, base, err := r.split(name)
	if errors.Is(err, fs.ErrNotExist) {
		return got, nil
	}
	if err != nil {
		return got, named("remove", name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(p.fd, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			err = nil
		}
		return got, named("remove", name, err)
	}
	rm := remover{got: &got}
	err = rm.remove(p.fd, base, &st, 0)
	if isDir(&st) || isLink(&st) {
		r.forget()
	}
	return got, named("remove", name, err)
}

// remover empties one tree.
type remover struct {
	got   *Removed
	top   int // the directory that RemoveAll was asked for
	steps int // objects removed or moved up into top so far
}

// remove removes one object that lies depth levels below what was asked for.
func (rm *remover) remove(at int, base string, st *unix.Stat_t, depth int) error {
	if !isDir(st) {
		return rm.unlink(at, base, st, 0)
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(at, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	switch err {
	case nil:
	case unix.ENOENT:
		return nil
	case unix.ELOOP, unix.ENOTDIR: // swapped since it was looked at
		return rm.unlink(at, base, st, 0)
	default:
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	if depth == 0 {
		rm.top = fd
	}
	for idle := 0; idle < maxPasses; idle++ {
		before := rm.steps
		if err := rm.empty(f, depth); err != nil {
			return err
		}
		if err = rm.unlink(at, base, st, unix.AT_REMOVEDIR); err != unix.ENOTEMPTY {
			return err
		}
		if rm.steps > before {
			idle = 0
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
	return fmt.Errorf("directory is filled faster than it is emptied: %w", unix.ENOTEMPTY)
}

// empty reads a directory once and removes what it reads.
func (rm *remover) empty(f *os.File, depth int) error {
	for {
		names, err := f.Readdirnames(512)
		for _, name := range names {
			if err := rm.child(int(f.Fd()), name, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (rm *remover) child(at int, name string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return nil
		}
		return err
	}
	if isDir(&st) && depth+1 >= maxDescent {
		// An overlay refuses to move a directory that has a lower part (EXDEV).
		if err := rm.raise(at, name); err != unix.EXDEV {
			return err
		}
	}
	return rm.remove(at, name, &st, depth+1)
}

// raise moves a deep directory up into the top, where a later pass finds it.
// All that is in the top is going to be removed, so a name that is taken only
// means trying another.
func (rm *remover) raise(at int, name string) error {
	for {
		rm.steps++
		err := unix.Renameat(at, name, rm.top, fmt.Sprintf("raised-%d", rm.steps))
		switch err {
		case unix.EEXIST, unix.ENOTEMPTY, unix.ENOTDIR:
			continue
		default:
			return err
		}
	}
}

func (rm *remover) unlink(at int, base string, st *unix.Stat_t, flags int) error {
	err := unix.Unlinkat(at, base, flags)
	if err == unix.ENOENT {
		return nil
	}
	if err == nil {
		rm.steps++
	}
	if err == nil && (isDir(st) || st.Nlink == 1) {
		rm.got.Inodes++
		rm.got.Bytes += st.Blocks * 512
	}
	return err
}

func isDir(st *unix.Stat_t) bool  { return st.Mode&unix.S_IFMT == unix.S_IFDIR }
func isLink(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFLNK }
