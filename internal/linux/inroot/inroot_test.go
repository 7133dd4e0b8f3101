package inroot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func open(t *testing.T, dir string) *Root {
	t.Helper()
	r, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, r *Root, name, body string) {
	t.Helper()
	f, err := r.Create(name, 0o644)
	must(t, err)
	_, err = f.Write([]byte(body))
	must(t, err)
	must(t, f.Close())
}

func TestClean(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", "."}, {"/", "."}, {".", "."}, {"a/", "a"}, {"/a//b/./c/", "a/b/c"},
		{"../../a", "a"}, {"a/../../b", "b"}, {"...", "..."}, {"a/..", "."},
	} {
		if got, err := Clean(c.in); got != c.want || err != nil {
			t.Errorf("Clean(%q) = %q, %v; want %q", c.in, got, err, c.want)
		}
	}
	for _, bad := range []string{"a\x00b", strings.Repeat("x/", 2048) + "x"} {
		if _, err := Clean(bad); err == nil {
			t.Errorf("Clean took %.20q", bad)
		}
	}
}

// Absolute links and those with `..` start again at the root.
func TestLinksStayInRoot(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "root")
	must(t, os.MkdirAll(filepath.Join(dir, "etc/sub"), 0o755))
	must(t, os.Mkdir(filepath.Join(top, "etc"), 0o755))
	r := open(t, dir)
	for _, l := range [][2]string{{"abs", "/etc"}, {"up", "../../../etc"}, {"deep/l", "../../../../etc"}, {"chain", "abs/sub/../../up"}} {
		name, target := l[0], l[1]
		if strings.Contains(name, "/") {
			_, err := r.MkdirAll(filepath.Dir(name), 0o755)
			must(t, err)
		}
		must(t, r.Symlink(target, name))
		create(t, r, name+"/by-"+filepath.Base(name), "x")
		if _, err := os.Lstat(filepath.Join(dir, "etc/by-"+filepath.Base(name))); err != nil {
			t.Errorf("through %s -> %s: %v", name, target, err)
		}
		if real, err := r.Real(name + "/sub"); real != "etc/sub" || err != nil {
			t.Errorf("Real(%s/sub) = %q, %v", name, real, err)
		}
	}
	outside, _ := os.ReadDir(filepath.Join(top, "etc"))
	if len(outside) > 0 {
		t.Errorf("outside: %v", outside)
	}
	must(t, r.Symlink("loop", "loop"))
	if _, err := r.Create("loop/x", 0o644); !errors.Is(err, unix.ELOOP) {
		t.Errorf("through a loop: %v", err)
	}
	must(t, r.Symlink("/proc/self/root", "magic"))
	if _, err := r.Lstat("magic/etc"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("through a magic link: %v", err)
	}
}

func TestMkdirAll(t *testing.T) {
	old := syscall.Umask(0o077) // the mode must not depend on it
	defer syscall.Umask(old)
	dir := t.TempDir()
	r := open(t, dir)
	made, err := r.MkdirAll("a/b/c", 0o1755)
	must(t, err)
	if want := []string{"a", "a/b", "a/b/c"}; !slices.Equal(made, want) {
		t.Errorf("made %v, want %v", made, want)
	}
	st, err := r.Lstat("a/b")
	must(t, err)
	if st.Mode != unix.S_IFDIR|0o1755 {
		t.Errorf("mode %#o", st.Mode)
	}
	must(t, r.Symlink("/x/y", "dangling"))
	made, err = r.MkdirAll("dangling/z", 0o755)
	must(t, err)
	if want := []string{"x", "x/y", "x/y/z"}; !slices.Equal(made, want) {
		t.Errorf("through a dangling link: made %v, want %v", made, want)
	}
	create(t, r, "file", "")
	if _, err := r.MkdirAll("file/d", 0o755); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
	must(t, r.Symlink("pong/a", "ping"))
	must(t, r.Symlink("ping/b", "pong"))
	if _, err := r.MkdirAll("ping/c", 0o755); !errors.Is(err, unix.ELOOP) {
		t.Errorf("links to each other: %v", err)
	}
}

// Descriptors of directories that are gone or replaced are not used any more.
func TestCacheForgets(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	_, err := r.MkdirAll("a/b", 0o755)
	must(t, err)
	must(t, r.Symlink("a", "l"))
	create(t, r, "l/b/1", "")
	_, err = r.RemoveAll("a")
	must(t, err)
	if _, err := r.Create("l/b/2", 0o644); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a removed directory: %v", err)
	}
	_, err = r.MkdirAll("a/b", 0o755)
	must(t, err)
	create(t, r, "l/b/3", "")
	must(t, r.Rename("a", "c"))
	if _, err := r.Create("a/b/4", 0o644); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a renamed directory: %v", err)
	}
	must(t, r.Remove("l"))
	must(t, r.Symlink("c", "l"))
	create(t, r, "l/b/5", "")
	if _, err := os.Lstat(filepath.Join(dir, "c/b/5")); err != nil {
		t.Error(err)
	}
}

func TestCacheIsBounded(t *testing.T) {
	r := open(t, t.TempDir())
	for i := range 3 * maxCached {
		_, err := r.MkdirAll(strings.Repeat("d/", i%7)+string(rune('A'+i%50))+strings.Repeat("x", i/50), 0o755)
		must(t, err)
	}
	if n := r.recent.Len(); n > maxCached || n != len(r.cached) {
		t.Errorf("%d descriptors kept, %d names", n, len(r.cached))
	}
}

func TestNodes(t *testing.T) {
	r := open(t, t.TempDir())
	create(t, r, "file", "x")
	must(t, r.Symlink("file", "link"))
	must(t, r.Mknod("fifo", unix.S_IFIFO|0o642, 0))
	must(t, r.Mkdir("dir", 0o2751))
	at, mt := unix.Timespec{Sec: 5, Nsec: 6}, unix.Timespec{Sec: 7, Nsec: 8}
	for _, name := range []string{"file", "link", "fifo", "dir", "."} {
		n, err := r.Node(name)
		must(t, err)
		must(t, n.Utimes(at, mt))
		if name != "link" {
			must(t, n.Chmod(0o4701))
		}
		st, err := n.Stat()
		must(t, err)
		if st.Mtim != mt || st.Atim != at {
			t.Errorf("%s: times %v %v", name, st.Atim, st.Mtim)
		}
		if name != "link" && st.Mode&0o7777 != 0o4701 {
			t.Errorf("%s: mode %#o", name, st.Mode)
		}
		must(t, n.Close())
	}
	if st, _ := r.Lstat("file"); st.Mode&0o7777 != 0o4701 || st.Mtim != mt {
		t.Errorf("file, by name: %#o %v", st.Mode, st.Mtim)
	}
	n, err := r.Node("file")
	must(t, err)
	defer n.Close()
	big := strings.Repeat("v", 1000)
	for k, v := range map[string]string{"user.a": "1", "user.empty": "", "user.big": big} {
		must(t, n.Setxattr(k, []byte(v)))
		if got, err := n.Getxattr(k); string(got) != v || err != nil {
			t.Errorf("%s is %q, %v", k, got, err)
		}
	}
	keys, err := n.Listxattr()
	must(t, err)
	slices.Sort(keys)
	if want := []string{"user.a", "user.big", "user.empty"}; !slices.Equal(slices.DeleteFunc(keys, func(k string) bool { return !strings.HasPrefix(k, "user.") }), want) {
		t.Errorf("keys %q", keys)
	}
	if _, err := r.Open("fifo"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("opened a FIFO: %v", err)
	}
	if _, err := r.Open("link"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("opened a link: %v", err)
	}
}

// A hard link to a symbolic link is one more name of it.
func TestLinkDoesNotFollow(t *testing.T) {
	r := open(t, t.TempDir())
	must(t, r.Symlink("/etc/passwd", "s"))
	must(t, r.Link("s", "t"))
	if target, err := r.Readlink("t"); target != "/etc/passwd" || err != nil {
		t.Errorf("%q, %v", target, err)
	}
}

// Removal copes with a tree deeper than any name may be long, counts, and
// follows no link.
func TestRemoveAll(t *testing.T) {
	top := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(top, "root/d"), 0o755))
	must(t, os.WriteFile(filepath.Join(top, "precious"), nil, 0o600))
	r := open(t, filepath.Join(top, "root"))
	const depth = 2500
	fd, err := unix.Open(filepath.Join(top, "root/d"), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	must(t, err)
	for range depth {
		must(t, unix.Mkdirat(fd, "sub", 0o755))
		must(t, unix.Symlinkat("/", fd, "out"))
		must(t, unix.Symlinkat("../../../precious", fd, "up"))
		next, err := unix.Openat(fd, "sub", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		must(t, err)
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	create(t, r, "d/two", "12345")
	must(t, r.Link("d/two", "stays"))
	got, err := r.RemoveAll("d")
	must(t, err)
	if want := int64(1 + 3*depth); got.Inodes != want {
		t.Errorf("removed %d inodes, want %d", got.Inodes, want)
	}
	if _, err := r.Lstat("d"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	if got, err := r.RemoveAll("d/e/f"); got != (Removed{}) || err != nil {
		t.Errorf("removing nothing: %v, %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(top, "precious")); err != nil {
		t.Error(err)
	}
}

// While one side works in the root, another swaps a directory for a link that
// leads out, again and again. Nothing outside changes.
func TestRacingSwap(t *testing.T) {
	top := t.TempDir()
	outside := filepath.Join(top, "outside")
	dir := filepath.Join(top, "root")
	for _, d := range []string{outside, filepath.Join(outside, "sub"), dir, filepath.Join(dir, "a"), filepath.Join(dir, "a/sub")} {
		must(t, os.Mkdir(d, 0o755))
	}
	must(t, os.WriteFile(filepath.Join(outside, "sub/f"), []byte("precious"), 0o640))
	var before, after unix.Stat_t
	must(t, unix.Stat(filepath.Join(outside, "sub/f"), &before))

	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		_ = os.Symlink(outside, b)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
			}
		}
	})
	r := open(t, dir)
	for range 3000 {
		r.forget() // so that each name is resolved anew
		if f, err := r.Create("a/sub/f", 0o644); err == nil {
			_, _ = f.Write([]byte("evil"))
			_ = f.Chown(1, 1)
			f.Close()
		}
		if n, err := r.Node("a/sub/f"); err == nil {
			_ = n.Chmod(0o777)
			n.Close()
		}
		_, _ = r.MkdirAll("a/sub/made/here", 0o755)
		_ = r.Link("a/sub/f", "stolen")
		_, _ = r.RemoveAll("a/sub/f")
		_, _ = r.RemoveAll("a/sub/made")
		_, _ = r.RemoveAll("stolen")
	}
	close(stop)
	swapper.Wait()
	must(t, unix.Stat(filepath.Join(outside, "sub/f"), &after))
	if before != after {
		t.Errorf("outside changed: %+v, was %+v", after, before)
	}
	names, err := os.ReadDir(filepath.Join(outside, "sub"))
	must(t, err)
	if len(names) != 1 {
		t.Errorf("outside holds %v", names)
	}
	if body, _ := os.ReadFile(filepath.Join(outside, "sub/f")); string(body) != "precious" {
		t.Errorf("outside reads %q", body)
	}
}
