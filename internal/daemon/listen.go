package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/config"
)

// maxSocketPath is what a Unix address can hold, less the closing zero and
// what containerd's clients keep free, in bytes.
const maxSocketPath = 104

// listen makes the socket, 0660 and owned as configured. One that a dead
// daemon has left is replaced.
func listen(cfg config.GRPC) (net.Listener, error) {
	path := cfg.Address
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("address %s has %d bytes and a socket's path at most %d: choose a shorter one: %w", path, len(path), maxSocketPath, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if err := refuseLiveSocket(path); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// Made in a directory of its own, which nobody else may enter, and renamed: at no moment has it a wider mode.
	// That directory's path may be longer than an address may be, so it is named by its descriptor.
	tmp, err := os.MkdirTemp(filepath.Dir(path), ".sock")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	dir, err := os.Open(tmp)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/s", dir.Fd()), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("address %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	err = errors.Join(
		os.Chmod(filepath.Join(tmp, "s"), 0o660),
		os.Chown(filepath.Join(tmp, "s"), cfg.UID, cfg.GID),
	)
	if err == nil {
		err = os.Rename(filepath.Join(tmp, "s"), path)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("address %s: %w", path, err)
	}
	return l, nil
}
