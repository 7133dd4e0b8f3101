package forgetful

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Memory makes a file of size bytes, all holes, that lives in memory and
// has no name. It is gone with the last descriptor, whatever happens to the test.
func Memory(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := memory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func memory(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("forgetful", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory")
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("grow a memory file to %d bytes: %w", size, err)
	}
	return f, nil
}

// Loop puts a loop device over file and returns its path. The device goes
// when the test has ended and nothing is mounted from it any more; the kernel
// sees to that even if the test is killed.
func Loop(t testing.TB, file *os.File) string {
	t.Helper()
	dev, err := attach(file)
	if err != nil {
		t.Fatalf("loop device over %s: %v", file.Name(), err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev.Name()
}

// loopAttempts bounds the races with others for a free device that one attach may lose.
const loopAttempts = 100

func attach(file *os.File) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	config := unix.LoopConfig{
		Fd:   uint32(file.Fd()),
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO},
	}
	for range loopAttempts {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("ask for a free loop device: %w", err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("configure %s: %w", dev.Name(), err)
		}
	}
	return nil, errors.New("no free loop device")
}

// Mount mounts a device below the test's temporary directory and returns where.
// It is unmounted when the test ends, or earlier by the func that Mount returns too.
func Mount(t testing.TB, device, fstype, options string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount(device, dir, fstype, unix.MS_NOATIME, options); err != nil {
		t.Fatalf("mount %s (%s) of %s: %v", device, fstype, options, err)
	}
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}
