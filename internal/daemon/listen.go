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

// checkAddress says why no socket can be made at path: it is too long, somebody
// answers there, or something else than a socket is there.
func checkAddress(path string) error {
	if len(path) > maxSocketPath {
		return fmt.Errorf("address %s has %d bytes and a socket's path at most %d: choose a shorter one: %w", path, len(path), maxSocketPath, errdefs.ErrInvalidArgument)
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("address: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("address %s is taken by something that is no socket: choose another one: %w", path, errdefs.ErrInvalidArgument)
	}
	return refuseLiveSocket(path)
}

// listen makes the socket, 0660 and owned as configured. One that a dead
// daemon has left is replaced.
func listen(cfg config.GRPC) (net.Listener, error) {
	path := cfg.Address
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if err := checkAddress(path); err != nil { // again: a daemon may have come since
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
