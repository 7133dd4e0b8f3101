// Package snapshottest checks that a snapshot driver behaves as the interface says.
package snapshottest

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/linux/mount/mounttest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/index"
)

// Subject is a driver to be tested.
type Subject struct {
	// Open opens the driver on root, which may hold snapshots already.
	Open func(root string) (snapshot.Driver, error)
	// Bare says which snapshots have no directory of their own; nil = none.
	Bare func(snapshot.Info) bool
}

// Suite runs every test on a driver. The package's TestMain must be
// mounttest.Main, since most of them mount. After each test the driver is closed, and
// every key must have its directory and every directory its key.
func Suite(t *testing.T, s Subject) {
	mounttest.Root(t)
	for name, test := range map[string]func(*harness){
		"lifecycle":             lifecycle,
		"refusals":              refusals,
		"labels":                labels,
		"walk":                  walk,
		"usage":                 usage,
		"directories":           directories,
		"changes across layers": changes,
		"owner of the root":     rootOwner,
		"deep chain":            deepChain,
		"concurrent creation":   concurrent,
		"chain is one commit":   chainIsOneCommit,
		"rebase":                rebase,
		"rebase completes":      rebaseCompletes,
		"crash remnants":        crashRemnants,
		"missing directory":     missingDirectory,
		"lost index":            lostIndex,
		"reopen":                reopen,
		"removal":               removal,
	} {
		t.Run(name, func(t *testing.T) { test(newHarness(t, s)) })
	}
}

// harness is one driver in its own directory, and shorthands to use it with.
type harness struct {
	*testing.T
	subject Subject
	root    string
	d       snapshot.Driver
	tmp     mount.Temp
}

func newHarness(t *testing.T, s Subject) *harness {
	h := &harness{T: t, subject: s, root: filepath.Join(t.TempDir(), "driver"), tmp: mount.Temp{Dir: t.TempDir()}}
	h.open()
	t.Cleanup(func() {
		h.close()
		Check(t, h.root, s.Bare)
	})
	return h
}

func (h *harness) open() {
	h.Helper()
	d, err := h.subject.Open(h.root)
	h.must(err)
	h.d = d
}

func (h *harness) close() {
	h.Helper()
	h.must(h.d.Close())
	h.must(h.d.Close()) // twice is once
}

func (h *harness) must(err error) {
	h.Helper()
	if err != nil {
		h.Fatal(err)
	}
}

func (h *harness) prepare(key, parent string) {
	h.Helper()
	h.must(h.d.Create(h.Context(), snapshot.New{Key: key, Parent: parent, Kind: snapshot.KindActive}))
}

func (h *harness) view(key, parent string) {
	h.Helper()
	h.must(h.d.Create(h.Context(), snapshot.New{Key: key, Parent: parent, Kind: snapshot.KindView}))
}

func (h *harness) commit(name, key string) {
	h.Helper()
	h.must(h.d.CommitChain(h.Context(), snapshot.Commit{Key: key, Name: name}))
}

// mounted calls f with a snapshot mounted.
func (h *harness) mounted(key string, f func(dir string)) {
	h.Helper()
	mounts, err := h.d.Mounts(h.Context(), key)
	h.must(err)
	h.must(h.tmp.With(h.Context(), mounts, func(dir string) error { f(dir); return nil }))
}

// layer makes a committed snapshot with one more file, of the same name.
func (h *harness) layer(name, parent string) {
	h.Helper()
	h.prepare("make "+name, parent)
	h.mounted("make "+name, func(dir string) { h.write(filepath.Join(dir, name), name) })
	h.commit(name, "make "+name)
}

func (h *harness) write(path, text string) {
	h.Helper()
	h.must(os.MkdirAll(filepath.Dir(path), 0o755))
	h.must(os.WriteFile(path, []byte(text), 0o644))
}

func (h *harness) wantFiles(dir string, want ...string) {
	h.Helper()
	var got []string
	h.must(filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			name, _ := filepath.Rel(dir, path)
			got = append(got, name)
		}
		return err
	}))
	slices.Sort(want)
	if !slices.Equal(got, want) {
		h.Errorf("files %q; want %q", got, want)
	}
}

func (h *harness) stat(path string) unix.Stat_t {
	h.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		h.Fatalf("lstat %s: %v", path, err)
	}
	return st
}

// Check holds a closed driver's index against its directories: every key but
// those that are bare has one, and every directory has a key.
func Check(t *testing.T, root string, bare func(snapshot.Info) bool) {
	t.Helper()
	x := index.New(filepath.Join(root, "metadata.db"), index.Options{})
	defer x.Close()
	want := map[string]string{}
	for r, err := range x.Walk() {
		if err != nil {
			t.Fatal(err)
		}
		if bare == nil || !bare(r.Info) {
			want[strconv.FormatUint(r.ID, 10)] = r.Key
		}
	}
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, ok := want[e.Name()]; !ok {
			t.Errorf("directory %s has no key", e.Name())
		}
		delete(want, e.Name())
	}
	for id, key := range want {
		t.Errorf("key %s has no directory %s", key, id)
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) > 2 {
		t.Errorf("%v, %v in the root; want metadata.db and snapshots", entries, err)
	}
}

// Fill makes a few snapshots of every kind: `base` and `top` committed,
// `active` and `view` above, and `bottom`, an active one without parent. It
// returns the first error, as a process that is killed on the way doesn't.
func Fill(ctx context.Context, d snapshot.Driver) error {
	rebase := d.Traits().Rebase
	parent := "base"
	if rebase {
		parent = ""
	}
	if err := d.Create(ctx, snapshot.New{Key: "a", Kind: snapshot.KindActive}); err != nil {
		return err
	}
	if !rebase {
		if err := d.CommitChain(ctx, snapshot.Commit{Key: "a", Name: "base"}); err != nil {
			return err
		}
	}
	if err := d.Create(ctx, snapshot.New{Key: "b", Kind: snapshot.KindActive, Parent: parent}); err != nil {
		return err
	}
	steps := []snapshot.Commit{{Key: "b", Name: "top", Parent: "base"}}
	if rebase {
		steps = append([]snapshot.Commit{{Key: "a", Name: "base"}}, steps...)
	}
	if err := d.CommitChain(ctx, steps...); err != nil {
		return err
	}
	err := d.Create(ctx,
		snapshot.New{Key: "active", Kind: snapshot.KindActive, Parent: "top"},
		snapshot.New{Key: "view", Kind: snapshot.KindView, Parent: "top"},
		snapshot.New{Key: "bottom", Kind: snapshot.KindActive},
		snapshot.New{Key: "gone", Kind: snapshot.KindActive, Parent: "base"})
	if err != nil {
		return fmt.Errorf("create four: %w", err)
	}
	return d.Remove(ctx, "gone")
}
