package meta

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/native"
)

// TestNativeDriver is the life of a chain with a driver that has a disk: the
// directories come and go with the records, also when the process ends between
// the two.
func TestNativeDriver(t *testing.T) {
	dir := t.TempDir()
	var db *DB
	var driver *native.Driver
	open := func() {
		var err error
		driver, err = native.Open(filepath.Join(dir, "native"), native.Options{})
		ok(t, err)
		blobs, err := content.Open(filepath.Join(dir, "content"), filepath.Join(dir, "trash"), content.Options{})
		ok(t, err)
		db, err = Open(t.Context(), filepath.Join(dir, "meta.db"), blobs, map[string]snapshot.Driver{"native": driver}, Options{})
		ok(t, err)
	}
	reopen := func() {
		ok(t, db.Close())
		ok(t, driver.Close())
		open()
	}
	directories := func() int {
		entries, err := os.ReadDir(filepath.Join(dir, "native", "snapshots"))
		ok(t, err)
		return len(entries)
	}
	open()
	defer func() { ok(t, db.Close()); ok(t, driver.Close()) }()
	native := func() Snapshots { return must[Snapshots](t)(db.Space("ns").Leased("l").Snapshots("native")) }
	must[Lease](t)(db.Space("ns").CreateLease(t.Context(), Lease{ID: "l"}))
	prepare(t, native(), "a", "", nil)
	at, _, err := native().Dir(t.Context(), "a")
	ok(t, err)
	ok(t, os.WriteFile(filepath.Join(at, "file"), []byte("x"), 0o644))
	ok(t, native().Commit(t.Context(), "A", "a", "", nil))
	prepare(t, native(), "b", "A", nil)
	at, _, err = native().Dir(t.Context(), "b")
	ok(t, err)
	if p, err := os.ReadFile(filepath.Join(at, "file")); err != nil || string(p) != "x" {
		t.Errorf("%q, %v", p, err)
	}

	// Ends after the driver's work and before the record.
	_, _, err = native().CommitChain(t.Context(), snapshot.Commit{Key: "b", Name: "B"})
	ok(t, err)
	_, _, err = native().Create(t.Context(), snapshot.New{Key: "c", Parent: "A", Kind: snapshot.KindActive})
	ok(t, err)
	reopen()
	if n := directories(); n != 1 || len(db.Recovered()) != 3 {
		t.Errorf("%d directories, %q", n, db.Recovered())
	}
	must[snapshot.Info](t)(native().Stat(t.Context(), "A"))
	prepare(t, native(), "b", "A", nil) // once more
	ok(t, native().Commit(t.Context(), "B", "b", "", nil))
	reopen()
	if n := directories(); n != 2 || len(db.Recovered()) != 0 {
		t.Errorf("%d directories, %q", n, db.Recovered())
	}
	ok(t, db.Space("ns").DeleteLease(t.Context(), "l"))
	c, err := db.Collect(t.Context())
	ok(t, err)
	if n := directories(); n != 0 || c.Snapshots != 2 || c.Left != 0 {
		t.Errorf("%d directories, %+v", n, c)
	}
}

// TestNewFileIsWhole: what a power cut left of the making of a first meta.db
// is in nobody's way.
func TestNewFileIsWhole(t *testing.T) {
	h := &house{t: t, dir: t.TempDir()}
	ok(t, os.WriteFile(h.path()+".new", []byte("half a database"), 0o644))
	h.open()
	defer func() { ok(t, h.Close()) }()
	if _, err := os.Stat(h.path() + ".new"); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
	if v := dumpFile(t, h.bolt)["v1|version"]; string(v) != "\x08" {
		t.Errorf("version %x", v)
	}
}
