package durable

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Room is what a file system has left.
type Room struct {
	Device   uint64 // tells file systems apart
	Size     int64  // bytes in all
	Free     int64  // bytes that anybody may still write
	RootOnly int64  // bytes that are kept back for root beside those
	Inodes   uint64 // in all; 0 if the file system doesn't count them
	Unused   uint64 // of these
}

// RoomOf measures the file system on which dir lies.
func RoomOf(dir string) (Room, error) {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(dir, &st) }); err != nil {
		return Room{}, fmt.Errorf("measure the file system of %s: %w", dir, err)
	}
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(dir, &fs) }); err != nil {
		return Room{}, fmt.Errorf("measure the file system of %s: %w", dir, err)
	}
	block := int64(fs.Bsize)
	if fs.Frsize > 0 {
		block = int64(fs.Frsize)
	}
	return Room{
		Device:   uint64(st.Dev),
		Size:     int64(fs.Blocks) * block,
		Free:     int64(fs.Bavail) * block,
		RootOnly: max(0, int64(fs.Bfree)-int64(fs.Bavail)) * block,
		Inodes:   fs.Files,
		Unused:   fs.Ffree,
	}, nil
}

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
