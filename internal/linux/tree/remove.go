package tree

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Remove removes path and all below it. It is no error if path is not there,
// or if somebody else removes the same at the same time. Where something is
// mounted inside, it stops with an error, and what is mounted is untouched.
//
// A crash leaves a part of the tree; the next Remove takes the rest.
func Remove(ctx context.Context, path string) error {
	parent, err := unix.Open(filepath.Dir(path), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	defer unix.Close(parent)
	name := filepath.Base(path)
	if err := remove(ctx, parent, name); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

func remove(ctx context.Context, parent int, name string) error {
	dir, err := eraser{}.file(ctx, parent, name)
	if !dir {
		return ignoreMissing(err)
	}
	root, err := openDirectory(parent, name)
	if err != nil {
		return ignoreMissing(err)
	}
	defer unix.Close(root)
	for range passes {
		if err = walk(ctx, root, eraser{}); err != nil {
			return err
		}
		if err = unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != unix.ENOTEMPTY {
			break
		}
	}
	return ignoreMissing(err)
}

// passes bounds how often a tree is walked. One is enough, unless a file
// system skips entries in a directory that shrinks while it is read, or
// somebody still writes into the tree.
const passes = 8

func ignoreMissing(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// eraser removes everything that it visits.
type eraser struct{}

// file unlinks first and asks afterwards: Linux answers EISDIR for directories.
func (eraser) file(_ context.Context, parent int, name string) (bool, error) {
	err := unix.Unlinkat(parent, name, 0)
	if err == unix.EISDIR {
		return true, nil
	}
	if err == unix.EBUSY { // a file that something is mounted on
		err = errMount
	}
	return false, err
}

func (eraser) enter(int, string, int) error { return nil }

func (eraser) leave(parent int, name string) error {
	return unix.Unlinkat(parent, name, unix.AT_REMOVEDIR)
}

func (eraser) skip(err error) bool {
	return errors.Is(err, unix.ENOENT) || err == unix.ENOTEMPTY // the next pass sees to it
}
