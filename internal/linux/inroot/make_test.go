package inroot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A directory that was made is at hand for what goes into it, and is looked up
// again when others have put another in its place.
func TestMakeDirIsKept(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	n, err := r.MakeDir("d", 0o750)
	must(t, err)
	must(t, n.Chmod(0o2711))
	must(t, n.Close())
	create(t, r, "d/f", "f")
	if st, err := r.Lstat("d"); err != nil || st.Mode != unix.S_IFDIR|0o2711 {
		t.Errorf("mode %#o, %v", st.Mode, err)
	}
	if _, err := r.MakeDir("d", 0o750); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	must(t, os.RemoveAll(filepath.Join(dir, "d")))
	for range 3 {
		_, err = r.MakeDir("d", 0o750)
		must(t, err)
		create(t, r, "d/f", "f")
		if _, err := os.Lstat(filepath.Join(dir, "d/f")); err != nil {
			t.Error(err)
		}
		if len(r.cached) != r.recent.Len() {
			t.Errorf("%d names for %d descriptors", len(r.cached), r.recent.Len())
		}
		must(t, os.RemoveAll(filepath.Join(dir, "d")))
	}
}

// Owner and times are a link's own, not those of what it points to.
func TestLchownAndLutimesDoNotFollow(t *testing.T) {
	r := open(t, t.TempDir())
	create(t, r, "f", "f")
	must(t, r.Symlink("f", "l"))
	before, err := r.Lstat("f")
	must(t, err)
	if os.Geteuid() == 0 {
		must(t, r.Lchown("l", 7, 8))
	}
	at, mt := unix.Timespec{Sec: 5, Nsec: 6}, unix.Timespec{Sec: 7, Nsec: 8}
	must(t, r.Lutimes("l", at, mt))
	must(t, r.Lutimes(".", at, mt))
	for _, name := range []string{"l", "."} {
		st, err := r.Lstat(name)
		must(t, err)
		if st.Mtim != mt || name == "l" && os.Geteuid() == 0 && (st.Uid != 7 || st.Gid != 8) {
			t.Errorf("%s: %+v", name, st)
		}
	}
	after, err := r.Lstat("f")
	must(t, err)
	if after != before {
		t.Errorf("the target was %+v and is %+v", before, after)
	}
	if err := r.Lutimes("none/x", at, mt); err == nil {
		t.Error("times of nothing were set")
	}
}
