package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/mount/mounttest"
)

func TestMain(m *testing.M) { mounttest.Main(m) }

var abilities = map[string]ability{"mount2": byMount2, "string": byString, "descriptor": byFD}

// each runs f with every set of calls, so that the ways of older kernels are
// tested on this one.
func each(t *testing.T, f func(t *testing.T, k ability)) {
	mounttest.Root(t)
	for name, k := range abilities {
		t.Run(name, func(t *testing.T) {
			if k > kernel() {
				t.Skipf("this kernel has no mounts by %s", name)
			}
			f(t, k)
		})
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func mkdir(t *testing.T, dir string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func mountAll(t *testing.T, k ability, target string, mounts ...Mount) {
	t.Helper()
	if err := all(t.Context(), target, mounts, k); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := UnmountTree(context.Background(), target); err != nil {
			t.Error(err)
		}
	})
}

func mounted(t *testing.T, dir string) []*mountinfo.Info {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Fatal(err)
	}
	return infos
}

func TestReadOnlyBindKeepsItsSourcesFlags(t *testing.T) {
	each(t, func(t *testing.T, k ability) {
		base := t.TempDir()
		src, dst := mkdir(t, base+"/src"), mkdir(t, base+"/dst")
		mountAll(t, k, src, Mount{Type: "tmpfs", Source: "tmpfs", Options: []string{"nodev", "size=1m"}})
		write(t, src+"/file", "here")
		mountAll(t, k, dst, Mount{Type: "bind", Source: src, Options: []string{"ro", "rbind", "noexec"}})
		if err := os.WriteFile(dst+"/new", nil, 0o644); !errors.Is(err, syscall.EROFS) {
			t.Errorf("write through a read-only bind: %v", err)
		}
		if err := os.WriteFile(src+"/new", nil, 0o644); err != nil {
			t.Errorf("the source became read-only too: %v", err)
		}
		options := mounted(t, dst)[0].Options
		for _, want := range []string{"ro", "nodev", "noexec"} {
			if !strings.Contains(","+options+",", ","+want+",") {
				t.Errorf("options %s lack %s", options, want)
			}
		}
	})
}

func TestOverlayOfManyLayers(t *testing.T) {
	each(t, func(t *testing.T, k ability) {
		base := t.TempDir()
		var lower []string
		for i := range 128 {
			dir := fmt.Sprintf("%s/io.containerd.snapshotter.v1.overlayfs/snapshots/%d/fs", base, i)
			write(t, fmt.Sprintf("%s/layer-%d", dir, i), "x")
			write(t, dir+"/top", fmt.Sprint(i))
			lower = append(lower, dir)
		}
		upper, work, target := mkdir(t, base+"/upper"), mkdir(t, base+"/work"), mkdir(t, base+"/target")
		mountAll(t, k, target, Mount{Type: "overlay", Source: "overlay", Options: []string{
			"workdir=" + work, "upperdir=" + upper, "lowerdir=" + strings.Join(lower, ":"), "index=off",
		}})
		entries, err := os.ReadDir(target)
		if err != nil || len(entries) != 129 {
			t.Fatalf("%d entries, %v; want 129", len(entries), err)
		}
		if got, _ := os.ReadFile(target + "/top"); string(got) != "0" {
			t.Errorf("top is %q; want the first layer's", got)
		}
		write(t, target+"/new", "up")
		if _, err := os.Stat(upper + "/new"); err != nil {
			t.Error(err)
		}
		if o := mounted(t, target)[0].VFSOptions; !strings.Contains(o, "upperdir="+upper) {
			t.Errorf("the kernel shows %.200s...", o)
		}
	})
}

func TestOverlayOfAwkwardPaths(t *testing.T) {
	each(t, func(t *testing.T, k ability) {
		base := t.TempDir()
		a, b := base+"/a:b,c", base+"/"+strings.Repeat("long", 60)
		write(t, a+"/a", "a")
		write(t, b+"/b", "b")
		target := mkdir(t, base+"/target")
		mountAll(t, k, target, Mount{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + Escape(a) + ":" + Escape(b), "ro",
		}})
		for _, name := range []string{"a", "b"} {
			if _, err := os.Stat(filepath.Join(target, name)); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestOverlayErrorSaysWhatTheKernelSaid(t *testing.T) {
	mounttest.Root(t)
	if kernel() == byMount2 {
		t.Skip("this kernel says nothing")
	}
	dir := t.TempDir()
	err := All(t.Context(), mkdir(t, dir+"/t"), []Mount{{Type: "overlay", Options: []string{"lowerdir=" + dir + ":/etc", "nonsense=1"}}})
	if err == nil || !strings.Contains(err.Error(), "Unknown parameter 'nonsense'") {
		t.Errorf("error is %v", err)
	}
}

func TestTargetIsResolvedInsideTheMount(t *testing.T) {
	mounttest.Root(t)
	base := t.TempDir()
	outside := mkdir(t, base+"/outside")
	image, target := mkdir(t, base+"/image"), mkdir(t, base+"/target")
	mkdir(t, image+outside) // what the links mean inside
	if err := os.Symlink(outside, image+"/absolute"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../../../../../../.."+outside, image+"/dots"); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"/absolute", "dots", "../../.." + outside} {
		mounts := []Mount{
			{Type: "bind", Source: image, Options: []string{"rbind"}},
			{Type: "tmpfs", Source: "tmpfs", Target: sub},
		}
		if err := All(t.Context(), target, mounts); err != nil {
			t.Fatalf("%s: %v", sub, err)
		}
		if got := mounted(t, target); len(got) != 2 || got[1].Mountpoint != target+outside {
			t.Errorf("%s: mounted on %v", sub, got)
		}
		if len(mounted(t, outside)) != 0 {
			t.Errorf("%s reached outside", sub)
		}
		if err := UnmountEach(t.Context(), target, mounts); err != nil {
			t.Errorf("%s: %v", sub, err)
		}
		if left := mounted(t, target); len(left) != 0 {
			t.Fatalf("%s: %d mounts left", sub, len(left))
		}
	}
}

func TestAllUndoesWhatItMounted(t *testing.T) {
	mounttest.Root(t)
	target := t.TempDir()
	err := All(t.Context(), target, []Mount{
		{Type: "tmpfs", Source: "tmpfs"},
		{Type: "tmpfs", Source: "tmpfs", Target: "missing"},
	})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v; want not exist", err)
	}
	if left := mounted(t, target); len(left) != 0 {
		t.Errorf("%d mounts left", len(left))
	}
}

func TestUnmountAllTakesAStackDown(t *testing.T) {
	mounttest.Root(t)
	target := t.TempDir()
	for range 3 {
		if err := All(t.Context(), target, []Mount{{Type: "tmpfs", Source: "tmpfs"}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := UnmountAll(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	if left := mounted(t, target); len(left) != 0 {
		t.Errorf("%d mounts left", len(left))
	}
	for _, target := range []string{"", target, target + "/missing"} {
		if err := UnmountAll(t.Context(), target); err != nil {
			t.Errorf("%q: %v", target, err)
		}
	}
}

func TestUnmountAllGivesUpWhenTheContextEnds(t *testing.T) {
	mounttest.Root(t)
	target := t.TempDir()
	mountAll(t, kernel(), target, Mount{Type: "tmpfs", Source: "tmpfs"})
	write(t, target+"/open", "")
	f, err := os.Open(target + "/open")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := UnmountAll(ctx, target); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v; want canceled", err)
	}
}

func TestTempIsGoneAfterwards(t *testing.T) {
	mounttest.Root(t)
	tmp := Temp{Dir: t.TempDir() + "/tmpmounts"}
	src := t.TempDir()
	write(t, src+"/precious", "data")
	failed := errors.New("f failed")
	var seen string
	err := tmp.With(t.Context(), []Mount{{Type: "bind", Source: src, Options: []string{"rbind", "rw"}}}, func(dir string) error {
		seen = dir
		if _, err := os.Stat(dir + "/precious"); err != nil {
			t.Error(err)
		}
		return failed
	})
	if !errors.Is(err, failed) {
		t.Errorf("error %v; want that of f", err)
	}
	if !strings.HasPrefix(filepath.Base(seen), "containerd-mount") {
		t.Errorf("directory %s", seen)
	}
	if entries, err := os.ReadDir(tmp.Dir); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v; want an empty directory", entries, err)
	}
	if _, err := os.Stat(src + "/precious"); err != nil {
		t.Error(err)
	}
}

// What a crash leaves: mounts within mounts, and a directory that holds files
// although nothing is mounted there.
func TestCleanNeverDeletesFiles(t *testing.T) {
	mounttest.Root(t)
	tmp := Temp{Dir: t.TempDir() + "/tmpmounts"}
	src := t.TempDir()
	write(t, src+"/precious", "data")
	mkdir(t, src+"/inner")
	a := mkdir(t, tmp.Dir+"/containerd-mount1")
	if err := All(t.Context(), a, []Mount{
		{Type: "bind", Source: src, Options: []string{"rbind"}},
		{Type: "tmpfs", Source: "tmpfs", Target: "inner"},
	}); err != nil {
		t.Fatal(err)
	}
	write(t, tmp.Dir+"/containerd-mount2/file", "unexpected")
	err := tmp.Clean(t.Context())
	if !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("error %v; want not empty", err)
	}
	if left := mounted(t, tmp.Dir); len(left) != 0 {
		t.Errorf("%d mounts left", len(left))
	}
	if _, err := os.Stat(a); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("mount point left: %v", err)
	}
	for _, kept := range []string{src + "/precious", tmp.Dir + "/containerd-mount2/file"} {
		if _, err := os.Stat(kept); err != nil {
			t.Error(err)
		}
	}
}
