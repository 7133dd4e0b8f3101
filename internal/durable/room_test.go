package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRoomOf: what is written is missing from what is free, and a small file system says how small it is.
func TestRoomOf(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m,nr_inodes=100"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	empty, err := RoomOf(dir)
	if err != nil {
		t.Fatal(err)
	}
	if empty.Size != 8<<20 || empty.Free != 8<<20 || empty.Inodes != 100 || empty.Unused == 0 || empty.Unused >= 100 {
		t.Errorf("an empty one of 8 MiB and 100 inodes has %+v", empty)
	}
	if err := os.WriteFile(filepath.Join(dir, "f"), make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := RoomOf(filepath.Join(dir, "f"))
	if err != nil || got.Free != 5<<20 || got.Unused != empty.Unused-1 || got.Device != empty.Device {
		t.Errorf("with 3 MiB in it it has %+v, %v", got, err)
	}
	if above, err := RoomOf(filepath.Dir(dir)); err != nil || above.Device == got.Device {
		t.Errorf("the file system around it is %d, %v, the same", above.Device, err)
	}
	if _, err := RoomOf(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("err = %v, want ErrNotExist", err)
	}
}
