package content

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// On a full disk the error says so, nothing is left behind, what was written
// counts, and the same Writer goes on once there is room.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,nr_inodes=64"); err != nil {
		t.Fatal("mount tmpfs:", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, dir)
	put(t, s, "so that blobs/sha256 is there")

	data := strings.Repeat("0123456789abcdef", 10<<10) // 160 KiB
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 128<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	w := writer(t, s, "ref", WriterOptions{Total: int64(len(data))})
	n, err := w.Write([]byte(data))
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "make room on the file system of "+s.dir) {
		t.Errorf("write: %v", err)
	}
	if int64(n) != w.Offset() || w.Digest() != digest.FromString(data[:n]) {
		t.Errorf("%d bytes written, offset %d, digest %s", n, w.Offset(), w.Digest())
	}
	var files []*os.File
	for i := 0; ; i++ { // no more inodes
		f, err := os.Create(filepath.Join(dir, "inode"+string(rune('0'+i))))
		if err != nil {
			break
		}
		files = append(files, f)
	}
	if _, err := s.Writer(t.Context(), "other", WriterOptions{}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("open: %v", err)
	}
	for i := range 4 { // a directory fits, then its first file, ...
		os.Remove(files[i].Name())
		files[i].Close()
		if w, err := s.Writer(t.Context(), "other", WriterOptions{}); err == nil {
			w.Close()
			s.Abort("other")
		} else if !errdefs.IsResourceExhausted(err) {
			t.Errorf("open: %v", err)
		}
		if _, err := os.Stat(string(s.ingest("other"))); err == nil {
			t.Error("a failed Writer leaves its directory")
		}
	}
	for _, f := range files[4:] {
		os.Remove(f.Name())
		f.Close()
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	write(t, w, data[w.Offset():])
	if err := w.Commit(t.Context(), int64(len(data)), digest.FromString(data), CommitOptions{}); err != nil {
		t.Error(err)
	}
}
