package tree

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Usage is what a tree takes on disk.
type Usage struct {
	Inodes int64 // the root and each file once, however many links it has
	Size   int64 // bytes of the blocks that they occupy
}

// blockSize is the unit of st_blocks, in bytes, says stat(2).
const blockSize = 512

// Measure walks dir and adds up what it takes on disk, as du(1) does. What is
// removed meanwhile may or may not be counted; what is mounted inside is not.
func Measure(ctx context.Context, dir string) (Usage, error) {
	root, err := open(dir)
	if err != nil {
		return Usage{}, err
	}
	defer unix.Close(root)
	m := meter{linked: make(map[inode]bool)}
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return Usage{}, fmt.Errorf("measure %s: %w", dir, err)
	}
	m.add(st)
	if err := walk(ctx, root, &m); err != nil {
		return Usage{}, fmt.Errorf("measure %s: %w", dir, err)
	}
	return m.Usage, nil
}

type meter struct {
	Usage
	linked map[inode]bool // files of several names that were counted
}

func (m *meter) add(st unix.Stat_t) {
	m.Inodes++
	m.Size += st.Blocks * blockSize
}

func (m *meter) file(_ context.Context, parent int, name string) (bool, error) {
	st, err := stat(parent, name)
	if err != nil || isDirectory(st) {
		return err == nil, err
	}
	if st.Nlink > 1 {
		id := inode{uint64(st.Dev), st.Ino}
		if m.linked[id] {
			return false, nil
		}
		m.linked[id] = true
	}
	m.add(st)
	return false, nil
}

func (m *meter) enter(_ int, _ string, dir int) error {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return err
	}
	m.add(st)
	return nil
}

func (m *meter) leave(int, string) error { return nil }

func (m *meter) skip(err error) bool {
	return errors.Is(err, errMount) || errors.Is(err, unix.ENOENT) || err == unix.ENOTDIR || err == unix.ELOOP
}
