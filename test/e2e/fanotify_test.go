package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// happening is one thing that happened to a name.
type happening struct {
	what string // CREATE, MODIFY, MOVED or DELETE
	dir  string // below the watched directory
	name string // directories end in a slash
}

func (h happening) String() string { return h.what + " " + filepath.Join(h.dir, h.name) }

// fanotify watches everything below one mount point, by fanotify(7): unlike inotify it needs no watch on each
// directory, so it misses nothing in new ones.
//
// The kernel may put two things that happen to one name into one event as long as nobody has read the first. They
// come in the order of what below. Whoever wants the order of things that lie further apart calls settle between them.
type fanotify struct {
	t     *testing.T
	fd    int
	mount *os.File
	dirs  map[string]string // file handle -> path, for directories that may be gone

	mu   sync.Mutex
	seen []happening
	idle chan struct{} // gets a token when everything is read
}

var whats = []struct {
	mask uint64
	what string
}{
	{unix.FAN_CREATE, "CREATE"}, {unix.FAN_MODIFY, "MODIFY"},
	{unix.FAN_MOVED_FROM, "MOVED"}, {unix.FAN_MOVED_TO, "MOVED"}, {unix.FAN_DELETE, "DELETE"},
}

// watchMount begins to watch the file system mounted at dir.
func watchMount(t *testing.T, dir string) *fanotify {
	t.Helper()
	fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_DFID_NAME|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK|unix.FAN_UNLIMITED_QUEUE, unix.O_RDONLY)
	if err != nil {
		t.Fatalf("fanotify: %v", err)
	}
	mask := uint64(unix.FAN_ONDIR)
	for _, w := range whats {
		mask |= w.mask
	}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, mask, unix.AT_FDCWD, dir); err != nil {
		t.Fatalf("fanotify on %s: %v", dir, err)
	}
	mount, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	f := &fanotify{t: t, fd: fd, mount: mount, dirs: map[string]string{}, idle: make(chan struct{})}
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() { f.read(stop) })
	t.Cleanup(func() {
		close(stop)
		reader.Wait()
		mount.Close()
		unix.Close(fd)
	})
	return f
}

// read takes events as fast as it can.
func (f *fanotify) read(stop chan struct{}) {
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(f.fd, buf)
		if err == unix.EAGAIN {
			select {
			case f.idle <- struct{}{}:
			case <-stop:
				return
			default:
				unix.Poll([]unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}}, 20)
			}
			continue
		}
		if err != nil {
			f.t.Errorf("read fanotify events: %v", err)
			return
		}
		f.take(buf[:n])
	}
}

// settle returns when all that happened before is read.
func (f *fanotify) settle() {
	for range 2 { // the first token may be from before
		select {
		case <-f.idle:
		case <-time.After(20 * time.Second):
			f.t.Fatal("fanotify events without end")
		}
	}
}

// all is what happened so far, in order.
func (f *fanotify) all() []happening {
	f.settle()
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]happening(nil), f.seen...)
}

// take splits what one read returned: struct fanotify_event_metadata, each with one information record of type
// FAN_EVENT_INFO_TYPE_DFID_NAME: file system id, handle of the directory, name.
func (f *fanotify) take(events []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(events) >= 24 {
		length := binary.NativeEndian.Uint32(events)
		event := events[:length]
		events = events[length:]
		meta := binary.NativeEndian.Uint16(event[6:])
		mask := binary.NativeEndian.Uint64(event[8:])
		info := event[meta:]
		if mask&unix.FAN_Q_OVERFLOW != 0 || len(info) < 20 {
			f.t.Errorf("fanotify event of mask %#x with %d bytes of information", mask, len(info))
			continue
		}
		size := binary.NativeEndian.Uint32(info[12:])
		kind := int32(binary.NativeEndian.Uint32(info[16:]))
		handle := info[20 : 20+size]
		name, _, _ := bytes.Cut(info[20+size:], []byte{0})
		dir := f.dir(kind, handle)
		suffix := ""
		if mask&unix.FAN_ONDIR != 0 {
			suffix = "/"
		}
		last := happening{}
		for _, w := range whats {
			h := happening{w.what, dir, string(name) + suffix}
			if mask&w.mask != 0 && h != last {
				f.seen = append(f.seen, h)
				last = h
			}
		}
	}
}

// dir names a directory by its handle.
func (f *fanotify) dir(kind int32, handle []byte) string {
	key := fmt.Sprint(kind, handle)
	if path, ok := f.dirs[key]; ok {
		return path
	}
	fd, err := unix.OpenByHandleAt(int(f.mount.Fd()), unix.NewFileHandle(kind, handle), unix.O_PATH)
	if err != nil {
		return "?" // removed before anybody asked
	}
	defer unix.Close(fd)
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "?"
	}
	path = strings.TrimPrefix(strings.TrimPrefix(path, f.mount.Name()), "/")
	f.dirs[key] = path
	return path
}
