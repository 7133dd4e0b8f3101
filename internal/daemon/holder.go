package daemon

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A root belongs to whoever holds the lock that bolt takes on its meta.db:
// containerd and Holdfast both do, so each keeps the other out. But bolt takes it
// late, after other parts have tidied up what they found, and doesn't say who has it.
// So Holdfast first locks the directory itself, which keeps a second Holdfast out from
// the first moment on, and then asks whether a containerd has meta.db.

// lockDirectory makes dir if needed and locks it until unlock, or returns
// errdefs.ErrUnavailable, naming the process that has it. Nothing is written: the
// lock is on the directory, and goes with the process.
func lockDirectory(what, dir, advice string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directories: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%s %s is in use by %s: stop it, or give this daemon %s: %w", what, dir, lockHolder(f), advice, errdefs.ErrUnavailable)
	} else if err != nil {
		err = fmt.Errorf("lock %s %s: %w", what, dir, err)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f.Close, nil
}

// refuseHeldRoot returns errdefs.ErrUnavailable, naming the process, when a
// daemon has the meta.db at path open.
func refuseHeldRoot(root, path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	return fmt.Errorf("root %s is in use by %s: stop it, or give this daemon another --root and --state: %w",
		root, lockHolder(f), errdefs.ErrUnavailable)
}

// lockHolder names the process that has a lock on f, from /proc/locks. A
// process of another pid namespace can't be named.
func lockHolder(f *os.File) string {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "another process"
	}
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return "another process"
	}
	defer locks.Close()
	// `1: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF`
	for sc := bufio.NewScanner(locks); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) < 6 || fields[1] != "FLOCK" || fields[5] != id {
			continue
		}
		if pid, err := strconv.Atoi(fields[4]); err == nil && pid > 0 {
			return process(pid)
		}
	}
	return "another process"
}

// process is a pid with the name of its program.
func process(pid int) string {
	name, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	if err != nil {
		return fmt.Sprintf("pid %d", pid)
	}
	return fmt.Sprintf("pid %d (%s)", pid, strings.TrimSpace(string(name)))
}

// refuseLiveSocket returns errdefs.ErrUnavailable, naming the process, when
// somebody answers on the socket at path.
func refuseLiveSocket(path string) error {
	c, err := net.DialTimeout("unix", path, time.Second)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil // absent, or left behind
	}
	if err != nil {
		return fmt.Errorf("address %s: %w", path, err)
	}
	defer c.Close()
	who := "another process"
	if raw, err := c.(*net.UnixConn).SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && cred.Pid > 0 {
				who = process(int(cred.Pid))
			}
		})
	}
	return fmt.Errorf("address %s is served by %s: stop it, or give this daemon another --address: %w", path, who, errdefs.ErrUnavailable)
}
