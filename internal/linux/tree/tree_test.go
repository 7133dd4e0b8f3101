package tree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/linux/mount/mounttest"
)

func TestMain(m *testing.M) { mounttest.Main(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// deep makes a chain of directories that no path can name, with a file in
// each and a hard link from the bottom to a file half-way down.
func deep(t *testing.T, root string, depth int) {
	t.Helper()
	at, err := open(root)
	must(t, err)
	var held int
	for i := range depth {
		must(t, unix.Mkdirat(at, "directory", 0o755))
		next, err := openDirectory(at, "directory")
		must(t, err)
		if i != depth/2 {
			unix.Close(at)
		} else {
			held = at
		}
		at = next
		fd, err := unix.Openat(at, "file", unix.O_CREAT|unix.O_WRONLY, 0o644)
		must(t, err)
		unix.Close(fd)
	}
	must(t, unix.Linkat(held, "file", at, "link", 0))
	unix.Close(held)
	unix.Close(at)
}

// everything makes one entry of each sort. The times are those of 2001.
func everything(t *testing.T, root string) {
	t.Helper()
	must(t, os.MkdirAll(root+"/bin/deeper", 0o755))
	must(t, os.WriteFile(root+"/bin/su", []byte("set uid"), 0o644))
	must(t, os.Chown(root+"/bin/su", 0, 8))
	must(t, unix.Chmod(root+"/bin/su", 0o4755))
	must(t, unix.Setxattr(root+"/bin/su", "user.note", []byte("kept"), 0))
	must(t, unix.Setxattr(root+"/bin/su", "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
	must(t, os.Link(root+"/bin/su", root+"/bin/deeper/also-su"))
	must(t, os.Symlink("/etc/passwd", root+"/link"))
	must(t, os.Lchown(root+"/link", 12, 13))
	must(t, unix.Lsetxattr(root+"/link", "trusted.note", []byte("on a link"), 0))
	must(t, unix.Mknod(root+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(root+"/fifo", unix.S_IFIFO|0o600, 0))
	must(t, unix.Mknod(root+"/socket", unix.S_IFSOCK|0o600, 0))
	f, err := os.Create(root + "/sparse")
	must(t, err)
	_, err = f.WriteAt([]byte("middle"), 1<<20)
	must(t, err)
	must(t, f.Truncate(4<<20))
	must(t, f.Close())
	must(t, os.WriteFile(root+"/empty", nil, 0o000))
	must(t, os.Mkdir(root+"/closed", 0o000))
	must(t, os.Chmod(root, 0o1777))
	old := []unix.Timespec{{Sec: 978307200, Nsec: 5}, {Sec: 978307201, Nsec: 7}}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		must(t, err)
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, old, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// describe lists a tree with all that Copy promises to keep.
func describe(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	links := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		must(t, err)
		var st unix.Stat_t
		must(t, unix.Lstat(path, &st))
		name, _ := filepath.Rel(root, path)
		first, ok := links[st.Ino]
		if !ok {
			links[st.Ino] = name
			first = name
		}
		line := fmt.Sprintf("%s = %s %o %d:%d dev %d mtime %d.%d", name, first, st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			must(t, err)
			line += fmt.Sprintf(" blocks %d %q", st.Blocks, strings.Trim(string(data), "\x00"))
		case unix.S_IFLNK:
			to, _ := os.Readlink(path)
			line += " -> " + to
		}
		buf := make([]byte, 4096)
		n, _ := unix.Llistxattr(path, buf)
		for key := range strings.SplitSeq(strings.Trim(string(buf[:n]), "\x00"), "\x00") {
			if key == "" {
				continue
			}
			n, err := unix.Lgetxattr(path, key, buf[2048:])
			must(t, err)
			line += fmt.Sprintf(" %s=%q", key, buf[2048:2048+n])
		}
		out = append(out, line)
		return nil
	}))
	return out
}

func TestCopyKeepsEverything(t *testing.T) {
	mounttest.Root(t)
	src, dst := t.TempDir(), t.TempDir()
	everything(t, src)
	must(t, Copy(t.Context(), dst, src))
	got, want := describe(t, dst), describe(t, src)
	if !slices.Equal(got, want) {
		t.Errorf("copy:\n%s\n\noriginal:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if len(want) != 12 {
		t.Errorf("%d entries described; want 12", len(want))
	}
}

func TestCopyAcrossFileSystems(t *testing.T) {
	mounttest.Root(t)
	src, dst := t.TempDir(), t.TempDir()
	must(t, mount.All(t.Context(), dst, []mount.Mount{{Type: "tmpfs", Source: "tmpfs"}}))
	defer mount.UnmountAll(context.Background(), dst)
	must(t, os.WriteFile(src+"/file", []byte(strings.Repeat("0123456789", 1e5)), 0o600))
	must(t, Copy(t.Context(), dst, src))
	a, err := os.ReadFile(src + "/file")
	must(t, err)
	b, err := os.ReadFile(dst + "/file")
	must(t, err)
	if string(a) != string(b) {
		t.Error("contents differ")
	}
}

func TestMeasureAgreesWithDu(t *testing.T) {
	mounttest.Root(t)
	dir := t.TempDir()
	everything(t, dir)
	u, err := Measure(t.Context(), dir)
	must(t, err)
	var size, inodes int64
	for _, c := range []struct {
		flag string
		to   *int64
	}{{"-B1", &size}, {"--inodes", &inodes}} {
		out, err := exec.Command("du", "-s", c.flag, dir).Output()
		must(t, err)
		fmt.Sscan(string(out), c.to)
	}
	if u.Size != size || u.Inodes != inodes {
		t.Errorf("measured %+v; du says %d bytes, %d inodes", u, size, inodes)
	}
}

func TestTreesDeeperThanAnyPath(t *testing.T) {
	mounttest.Root(t)
	const depth = 3000
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	low := limit
	low.Cur = 200 // far fewer than directories
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)

	src, dst := t.TempDir(), t.TempDir()
	deep(t, src, depth)
	must(t, Copy(t.Context(), dst, src))
	for _, dir := range []string{src, dst} {
		u, err := Measure(t.Context(), dir)
		must(t, err)
		if u.Inodes != 1+2*depth {
			t.Errorf("%d inodes; want %d: each directory, each file, the link not again", u.Inodes, 1+2*depth)
		}
		must(t, Remove(t.Context(), dir+"/directory"))
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("%v, %v left", left, err)
		}
	}
}

func TestRemoveOfAWideDirectory(t *testing.T) {
	dir := t.TempDir() + "/wide"
	must(t, os.Mkdir(dir, 0o755))
	for i := range 3 * batch {
		must(t, os.WriteFile(fmt.Sprintf("%s/%d", dir, i), nil, 0o644))
	}
	must(t, Remove(t.Context(), dir))
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	must(t, Remove(t.Context(), dir)) // a second time is no error
}

func TestRemoveFollowsNoLink(t *testing.T) {
	base := t.TempDir()
	must(t, os.WriteFile(base+"/precious", []byte("x"), 0o644))
	must(t, os.Mkdir(base+"/tree", 0o755))
	must(t, os.Symlink(base, base+"/tree/up"))
	must(t, os.Symlink(base, base+"/link"))
	must(t, Remove(t.Context(), base+"/tree"))
	must(t, Remove(t.Context(), base+"/link"))
	names, err := os.ReadDir(base)
	must(t, err)
	if len(names) != 1 || names[0].Name() != "precious" {
		t.Errorf("left: %v; want precious alone", names)
	}
}

func TestRemoveStopsAtAMount(t *testing.T) {
	mounttest.Root(t)
	base := t.TempDir()
	must(t, os.MkdirAll(base+"/tree/a/mnt", 0o755))
	must(t, os.MkdirAll(base+"/precious", 0o755))
	must(t, os.WriteFile(base+"/precious/file", []byte("x"), 0o644))
	must(t, mount.All(t.Context(), base+"/tree/a/mnt", []mount.Mount{{Type: "bind", Source: base + "/precious"}}))
	err := Remove(t.Context(), base+"/tree")
	if !errors.Is(err, errMount) || !strings.Contains(err.Error(), "a/mnt") {
		t.Errorf("error %v; want one that names the mount", err)
	}
	if u, err := Measure(t.Context(), base+"/tree"); err != nil || u.Inodes != 2 {
		t.Errorf("measured %+v, %v; want the two directories outside of the mount", u, err)
	}
	must(t, mount.UnmountAll(t.Context(), base+"/tree/a/mnt"))
	must(t, Remove(t.Context(), base+"/tree"))
	if _, err := os.Stat(base + "/precious/file"); err != nil {
		t.Error(err)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/file", nil, 0o644))
	if _, err := Measure(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("measure: %v", err)
	}
	if err := Copy(ctx, t.TempDir(), dir); !errors.Is(err, context.Canceled) {
		t.Errorf("copy: %v", err)
	}
	if err := Remove(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("remove: %v", err)
	}
}
