package meta

import (
	"bytes"
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// TestMigrations builds files as each version of the schema left them, with
// raw buckets, and looks at what Open makes of them.
func TestMigrations(t *testing.T) {
	created, err := time.Unix(1700000000, 0).UTC().MarshalBinary()
	ok(t, err)
	snapshots := map[string][]byte{
		"v1|ns|snapshots|mem|base|name":        []byte("ns/1/base"),
		"v1|ns|snapshots|mem|base|createdat":   created,
		"v1|ns|snapshots|mem|top|name":         []byte("ns/2/top"),
		"v1|ns|snapshots|mem|top|parent":       []byte("base"),
		"v1|ns|snapshots|gone|orphan|name":     []byte("ns/3/orphan"),
		"v1|ns|snapshots|gone|orphan|parent":   []byte("nobody"),
		"v1|ns|labels|purpose":                 []byte("test"),
		"v1|ns|leases|holds|createdat":         created,
		"v1|ns|leases|holds|snapshots|mem|top": nil,
	}
	linked := map[string][]byte{"v1|ns|snapshots|mem|base|children|top": nil}
	oldIngest := map[string][]byte{"v1|ns|content|ingest|ref": []byte("ns/7/ref")}
	newIngest := map[string][]byte{"v1|ns|content|ingests|ref|ref": []byte("ns/7/ref")}
	oldSandbox := map[string][]byte{
		"ns|sandboxes|box|spec":         []byte("any"),
		"ns|sandboxes|box|runtime|name": []byte("runc"),
		"late|sandboxes|box|labels|a":   []byte("b"),
		"stray|key":                     []byte("x"),
	}
	newSandbox := map[string][]byte{
		"v1|ns|sandboxes|box|spec":         []byte("any"),
		"v1|ns|sandboxes|box|runtime|name": []byte("runc"),
		"v1|late|sandboxes|box|labels|a":   []byte("b"),
	}
	version := func(v byte) map[string][]byte { return map[string][]byte{"v1|version": {2 * v}} }
	for _, c := range []struct {
		name         string
		before, then []map[string][]byte
	}{
		{"version 0", []map[string][]byte{snapshots, oldIngest, oldSandbox}, []map[string][]byte{snapshots, linked, newIngest, newSandbox, version(4)}},
		{"version 1", []map[string][]byte{version(1), snapshots, oldIngest, oldSandbox}, []map[string][]byte{snapshots, newIngest, newSandbox, version(4)}},
		{"version 2", []map[string][]byte{version(2), snapshots, linked, newIngest, oldSandbox}, []map[string][]byte{snapshots, linked, newIngest, newSandbox, version(4)}},
		{"version 3", []map[string][]byte{version(3), snapshots, linked, newIngest, oldSandbox}, []map[string][]byte{snapshots, linked, newIngest, newSandbox, version(4)}},
		{"version 4", []map[string][]byte{version(4), snapshots, linked, newIngest}, []map[string][]byte{snapshots, linked, newIngest, version(4)}},
		{"a later version", []map[string][]byte{version(9), snapshots, linked}, []map[string][]byte{snapshots, linked, version(9)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			join := func(maps []map[string][]byte) map[string][]byte {
				all := make(map[string][]byte)
				for _, m := range maps {
					for k, v := range m {
						all[k] = v
					}
				}
				return all
			}
			h := &house{t: t, dir: t.TempDir(), drivers: map[string]*memory{"mem": newMemory()}}
			h.drivers["mem"].put("ns/1/base", "", snapshot.KindCommitted)
			h.drivers["mem"].put("ns/2/top", "ns/1/base", snapshot.KindActive)
			raw(t, h.path(), join(c.before))
			h.open()
			defer func() { ok(t, h.Close()) }()
			got, want := dumpFile(t, h.bolt), join(c.then)
			if !maps.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("got  %v\nwant %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
			}
		})
	}
}

// TestUpToDateFileIsNotWritten compares the very bytes.
func TestUpToDateFileIsNotWritten(t *testing.T) {
	h := newHouse(t, Options{})
	write(t, h.Space("ns"), "blob", nil)
	var before []byte
	h.reopen(func() {
		var err error
		before, err = os.ReadFile(h.path())
		ok(t, err)
	})
	after, err := os.ReadFile(h.path())
	ok(t, err)
	if !bytes.Equal(before, after) {
		t.Error("opening wrote to the file")
	}
	if lines := h.Recovered(); len(lines) > 0 {
		t.Errorf("recovered %q", lines)
	}
	if info, err := os.Stat(h.path()); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}
