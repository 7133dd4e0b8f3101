package overlay

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/linux/mount/mounttest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/snapshottest"
)

func TestMain(m *testing.M) { mounttest.Main(m) }

var subject = snapshottest.Subject{
	Open: func(root string) (snapshot.Driver, error) { return Open(root, Options{}) },
}

func TestDriver(t *testing.T) { snapshottest.Suite(t, subject) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The layout and the mounts are those that containerd 2.4.2 gave for the same
// operations.
func TestLayoutAndMountsAreContainerds(t *testing.T) {
	mounttest.Root(t)
	root := t.TempDir()
	d, err := Open(root, Options{MountOptions: []string{"metacopy=off"}, UpperdirLabel: true})
	must(t, err)
	defer d.Close()
	ctx := t.Context()
	must(t, d.Create(ctx, snapshot.New{Key: "one", Kind: snapshot.KindActive}))
	must(t, d.CommitChain(ctx, snapshot.Commit{Key: "one", Name: "base"}))
	must(t, d.Create(ctx, snapshot.New{Key: "two", Kind: snapshot.KindActive, Parent: "base"}))
	must(t, d.CommitChain(ctx, snapshot.Commit{Key: "two", Name: "top"}))
	must(t, d.Create(ctx,
		snapshot.New{Key: "view 0", Kind: snapshot.KindView},
		snapshot.New{Key: "view 1", Kind: snapshot.KindView, Parent: "base"},
		snapshot.New{Key: "view 2", Kind: snapshot.KindView, Parent: "top"},
		snapshot.New{Key: "active 0", Kind: snapshot.KindActive},
		snapshot.New{Key: "active 2", Kind: snapshot.KindActive, Parent: "top"},
		snapshot.New{Key: "mapped", Kind: snapshot.KindActive, Parent: "top", Labels: map[string]string{
			snapshot.LabelUIDMapping: "0:1000:65536", snapshot.LabelGIDMapping: "0:2000:65536"}},
	))
	s := root + "/snapshots"
	for key, want := range map[string]string{
		"view 0":   "bind " + s + "/3/fs ro,rbind",
		"view 1":   "bind " + s + "/1/fs ro,rbind",
		"view 2":   "overlay overlay lowerdir=" + s + "/2/fs:" + s + "/1/fs,metacopy=off,index=off",
		"active 0": "bind " + s + "/6/fs rw,rbind",
		"active 2": "overlay overlay workdir=" + s + "/7/work,upperdir=" + s + "/7/fs,lowerdir=" + s + "/2/fs:" + s + "/1/fs,metacopy=off,index=off",
		"mapped":   "overlay overlay uidmap=0:1000:65536,gidmap=0:2000:65536,workdir=" + s + "/8/work,upperdir=" + s + "/8/fs,lowerdir=" + s + "/2/fs:" + s + "/1/fs,metacopy=off,index=off",
	} {
		mounts, err := d.Mounts(ctx, key)
		must(t, err)
		if got := show(mounts); got != want {
			t.Errorf("%s:\n%s; want\n%s", key, got, want)
		}
	}
	var got []string
	must(t, filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		fi, _ := e.Info()
		got = append(got, strings.TrimPrefix(path, root)+" "+fi.Mode().String())
		return err
	}))
	want := []string{
		"/metadata.db -rw-------", "/snapshots drwx------",
		"/snapshots/1 drwx------", "/snapshots/1/fs drwxr-xr-x", "/snapshots/1/work drwx--x--x",
		"/snapshots/2 drwx------", "/snapshots/2/fs drwxr-xr-x", "/snapshots/2/work drwx--x--x",
		"/snapshots/3 drwx------", "/snapshots/3/fs drwxr-xr-x",
		"/snapshots/4 drwx------", "/snapshots/4/fs drwxr-xr-x",
		"/snapshots/5 drwx------", "/snapshots/5/fs drwxr-xr-x",
		"/snapshots/6 drwx------", "/snapshots/6/fs drwxr-xr-x", "/snapshots/6/work drwx--x--x",
		"/snapshots/7 drwx------", "/snapshots/7/fs drwxr-xr-x", "/snapshots/7/work drwx--x--x",
		"/snapshots/8 drwx------", "/snapshots/8/fs drwxr-xr-x", "/snapshots/8/work drwx--x--x",
	}
	if !slices.Equal(got[1:], want) {
		t.Errorf("layout:\n%s", strings.Join(got[1:], "\n"))
	}
	if uid, gid, err := owner(s + "/8/fs"); err != nil || uid != 1000 || gid != 2000 {
		t.Errorf("mapped root is owned by %d:%d, %v", uid, gid, err)
	}
	if info, err := d.Stat(ctx, "top"); err != nil || info.Labels[LabelUpperdir] != s+"/2/fs" {
		t.Errorf("stat: %v, %v; want the upper directory", info.Labels, err)
	}
}

func show(mounts []mount.Mount) string {
	var out []string
	for _, m := range mounts {
		out = append(out, m.Type+" "+m.Source+" "+strings.Join(m.Options, ","))
	}
	return strings.Join(out, "; ")
}

// A pull makes its snapshots in one transaction and commits them in another.
func TestTwoTransactionsPerPull(t *testing.T) {
	commits := 0
	d, err := Open(t.TempDir(), Options{Committed: func() { commits++ }})
	must(t, err)
	defer d.Close()
	must(t, d.Create(t.Context(), snapshot.New{Key: "a", Kind: snapshot.KindActive}, snapshot.New{Key: "b", Kind: snapshot.KindActive}))
	must(t, d.CommitChain(t.Context(), snapshot.Commit{Key: "a", Name: "1"}, snapshot.Commit{Key: "b", Name: "2", Parent: "1"}))
	if commits != 2 {
		t.Errorf("%d transactions of metadata.db; want 2", commits)
	}
}

func TestTraits(t *testing.T) {
	d, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer d.Close()
	slow, err := Open(t.TempDir(), Options{SlowChown: true})
	must(t, err)
	defer slow.Close()
	if d.Traits().Form != snapshot.FormOverlay || !d.Traits().OnlyRemapIDs || slow.Traits().OnlyRemapIDs {
		t.Errorf("traits %+v and, with slow chown, %+v", d.Traits(), slow.Traits())
	}
	for release, want := range map[string]bool{"5.19.0": true, "5.18.9-x": false, "6.1": true, "10.0": true, "4.20": false, "strange": false} {
		if atLeast(release, 5, 19) != want {
			t.Errorf("%s at least 5.19: %v", release, !want)
		}
	}
}

func TestHostRoot(t *testing.T) {
	for mapping, want := range map[string]int{
		"": 0, "0:1000:1": 1000, "1:5:9,0:7:1": 7, "0:0:4294967295": 0,
		"1:5:9": -1, "0:1000": -1, "0:1000:1:1": -1, "0:-1:1": -1, "0:1:4294967295": -1,
		"0:4294967295:1": -1, "0:1:0": -1, "a:b:c": -1, "0:1:1,": -1, "0: 1:1": -1,
	} {
		if got, err := hostRoot(mapping); got != want || (err != nil) != (want < 0) {
			t.Errorf("%q: %d, %v; want %d", mapping, got, err, want)
		}
	}
}

func FuzzHostRoot(f *testing.F) {
	f.Add("0:1000:65536,65536:1:2")
	f.Fuzz(func(t *testing.T, mapping string) {
		if got, err := hostRoot(mapping); err == nil && (got < 0 || got >= noID) {
			t.Errorf("%q maps root to %d", mapping, got)
		}
	})
}
