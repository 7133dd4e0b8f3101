// Package tree measures, copies and removes directory trees without following a link.
//
// Trees come from images and containers, so nothing about them is trusted:
// they may be deeper than any path or descriptor table, wider than memory,
// change while they are walked, and have something mounted in them. The walk
// therefore goes by descriptors, of which it holds a bounded number, keeps no
// more than the names of the subdirectories along one path, does not recurse,
// and never enters a mount.
package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

const (
	maxOpen = 32   // directories of one path that are open at once
	batch   = 1024 // names read from a directory at once
)

// errMount is met where something is mounted inside of a tree.
var errMount = errors.New("something is mounted there; unmount it first")

// visitor is told what the walk meets. Every method gets the directory that
// holds name. Non-directories are visited before subdirectories.
type visitor interface {
	// file visits an entry. It answers with dir = true, and has done nothing,
	// if the entry is a directory.
	file(ctx context.Context, parent int, name string) (dir bool, err error)
	// enter is called when a subdirectory has been opened, before its entries.
	enter(parent int, name string, dir int) error
	// leave is called after the last entry of the subdirectory.
	leave(parent int, name string) error
	// skip says whether the walk goes on after err.
	skip(err error) bool
}

// walk visits everything below the open directory root, which stays open.
func walk(ctx context.Context, root int, v visitor) error {
	var way descent // as deep as pending, less one
	defer way.close()
	subs, err := readDirectory(ctx, root, v)
	if err != nil {
		return err
	}
	pending := [][]string{subs} // the subdirectories yet to enter, for each level of way
	for {
		here := way.top(root)
		last := len(pending) - 1
		if len(pending[last]) == 0 {
			if last == 0 {
				return nil
			}
			pending = pending[:last]
			name, err := way.up(root)
			if err != nil {
				return err
			}
			if err := v.leave(way.top(root), name); err != nil && !v.skip(err) {
				return fmt.Errorf("%s: %w", way.name(name), err)
			}
			continue
		}
		name := pending[last][0]
		pending[last] = pending[last][1:]
		fd, err := openDirectory(here, name)
		if err == nil {
			if err = v.enter(here, name, fd); err != nil {
				unix.Close(fd)
			}
		}
		if err != nil {
			if v.skip(err) {
				continue
			}
			return fmt.Errorf("%s: %w", way.name(name), err)
		}
		if err := way.down(name, fd); err != nil {
			return err
		}
		subs, err := readDirectory(ctx, fd, v)
		if err != nil {
			return fmt.Errorf("%s: %w", way.name(""), err)
		}
		pending = append(pending, subs)
	}
}

// readDirectory visits the entries of dir and returns the names of those that
// are directories.
func readDirectory(ctx context.Context, dir int, v visitor) ([]string, error) {
	fd, err := unix.FcntlInt(uintptr(dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	d := os.NewFile(uintptr(fd), "directory")
	defer d.Close()
	if _, err := d.Seek(0, io.SeekStart); err != nil { // the duplicate shares its position
		return nil, err
	}
	var subs []string
	for {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		names, err := d.Readdirnames(batch)
		for _, name := range names {
			isDir, err := v.file(ctx, dir, name)
			if isDir {
				subs = append(subs, name)
			} else if err != nil && !v.skip(err) {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		if err == io.EOF || err != nil && v.skip(err) {
			return subs, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// openDirectory opens a subdirectory of parent: not a link to one, and not
// one that something is mounted on.
func openDirectory(parent int, name string) (int, error) {
	fd, err := unix.Openat2(parent, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH,
	})
	if err == unix.EXDEV {
		err = errMount
	}
	return fd, err
}

// open opens the directory at path.
func open(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// descent is the way from a root to where a walk is. Of the directories on it
// the lowest maxOpen are open; higher ones are opened again through ".." on
// the way up, and must then be the same directory.
type descent struct {
	steps []step
}

type step struct {
	name string
	fd   int // -1 while closed
	id   inode
}

type inode struct{ dev, ino uint64 }

func identify(fd int) (inode, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return inode{}, err
	}
	return inode{uint64(st.Dev), st.Ino}, nil
}

// top is the directory where the walk is.
func (d *descent) top(root int) int {
	if len(d.steps) == 0 {
		return root
	}
	return d.steps[len(d.steps)-1].fd
}

// name is the path of an entry of the directory where the walk is, for errors.
func (d *descent) name(entry string) string {
	const most = 16 // names; a hostile tree has no end of them
	names := []string{}
	if len(d.steps) > most {
		names = append(names, "...")
	}
	for _, s := range d.steps[max(0, len(d.steps)-most):] {
		names = append(names, s.name)
	}
	return path.Join(append(names, entry)...)
}

// down goes into the subdirectory name, and owns fd from now on.
func (d *descent) down(name string, fd int) error {
	id, err := identify(fd)
	d.steps = append(d.steps, step{name, fd, id})
	if far := len(d.steps) - 1 - maxOpen; far >= 0 && d.steps[far].fd >= 0 {
		unix.Close(d.steps[far].fd)
		d.steps[far].fd = -1
	}
	return err
}

// up leaves the subdirectory that the walk is in and returns its name.
func (d *descent) up(root int) (string, error) {
	last := len(d.steps) - 1
	s := d.steps[last]
	if last > 0 && d.steps[last-1].fd < 0 {
		above := &d.steps[last-1]
		fd, err := unix.Openat(s.fd, "..", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", fmt.Errorf("directory above %s: %w", s.name, err)
		}
		if id, err := identify(fd); err != nil || id != above.id {
			unix.Close(fd)
			return "", errors.Join(err, fmt.Errorf("directory %s was moved while its tree was walked", s.name))
		}
		above.fd = fd
	}
	unix.Close(s.fd)
	d.steps = d.steps[:last]
	return s.name, nil
}

func (d *descent) close() {
	for _, s := range d.steps {
		if s.fd >= 0 {
			unix.Close(s.fd)
		}
	}
}

func stat(parent int, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstatat(parent, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

func isDirectory(st unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFDIR }
