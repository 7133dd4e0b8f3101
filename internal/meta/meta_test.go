package meta

import (
	"bytes"
	"context"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// house is a store on disk that can be closed and opened again, as by a new
// process.
type house struct {
	t       *testing.T
	dir     string
	opts    Options
	drivers map[string]*memory

	*DB
	blobs   *content.Store
	commits atomic.Int64
}

// newHouse opens an empty store with one driver, "mem". When the test ends
// the store is closed and checked.
func newHouse(t *testing.T, opts Options) *house {
	h := &house{t: t, dir: t.TempDir(), opts: opts, drivers: map[string]*memory{"mem": newMemory()}}
	h.opts.NoSync = true // of the kernel's crash other tests tell
	h.opts.Committed = func(int) { h.commits.Add(1) }
	h.open()
	t.Cleanup(h.close)
	return h
}

func (h *house) path() string { return filepath.Join(h.dir, "meta.db") }

func (h *house) openContent() *content.Store {
	h.t.Helper()
	blobs, err := content.Open(filepath.Join(h.dir, "content"), filepath.Join(h.dir, "trash"), content.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	return blobs
}

func (h *house) tryOpen() error {
	h.t.Helper()
	h.blobs = h.openContent()
	drivers := make(map[string]snapshot.Driver)
	for name, d := range h.drivers {
		drivers[name] = d
	}
	db, err := Open(h.t.Context(), h.path(), h.blobs, drivers, h.opts)
	h.DB = db
	return err
}

func (h *house) open() {
	h.t.Helper()
	if err := h.tryOpen(); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) close() {
	if h.DB == nil {
		return
	}
	h.check()
	if err := h.DB.Close(); err != nil {
		h.t.Error(err)
	}
	h.blobs.Close()
	h.DB = nil
}

// reopen is a restart; between the two, while nothing is open, may happen to
// the store what a crash does.
func (h *house) reopen(between func()) {
	h.t.Helper()
	h.close()
	if between != nil {
		between()
	}
	h.open()
}

// check holds records against bytes and records against each other.
func (h *house) check() {
	h.t.Helper()
	d, err := h.Dump(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	for _, b := range d.Blobs {
		if info, err := h.blobs.Info(b.Digest); err != nil || info.Size != b.Size {
			h.t.Errorf("blob %s in %s: file %+v, %v", b.Digest, b.Namespace, info, err)
		}
	}
	records := make(map[string]DumpSnapshot)
	for _, s := range d.Snapshots {
		records[s.Namespace+"/"+s.Driver+"/"+s.Key] = s
	}
	for at, s := range records {
		prefix := s.Namespace + "/" + s.Driver + "/"
		if driver := h.drivers[s.Driver]; driver != nil && !slices.Contains(driver.keys(), s.Backend) {
			h.t.Errorf("snapshot %s: the driver hasn't %s", at, s.Backend)
		}
		if s.Parent != "" && !slices.Contains(records[prefix+s.Parent].Children, s.Key) {
			h.t.Errorf("snapshot %s: its parent doesn't know it", at)
		}
		for _, child := range s.Children {
			if records[prefix+child].Parent != s.Key {
				h.t.Errorf("snapshot %s: %s isn't its child", at, child)
			}
		}
	}
}

// files lists the digests of the files, without their algorithm.
func (h *house) files() []string {
	var all []string
	for info, err := range h.blobs.Blobs() {
		if err != nil {
			h.t.Fatal(err)
		}
		all = append(all, string(info.Digest))
	}
	return all
}

func (h *house) collect() Collected {
	h.t.Helper()
	c, err := h.Collect(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

// write makes text a blob of sp and returns its digest.
func write(t *testing.T, sp Space, text string, labels map[string]string) digest.Digest {
	t.Helper()
	dgst := digest.FromString(text)
	w, err := sp.OpenWriter(t.Context(), "write-"+text, WriterOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(t.Context(), int64(len(text)), dgst, labels); err != nil {
		t.Fatal(err)
	}
	return dgst
}

func image(name string, dgst digest.Digest, labels map[string]string) Image {
	return Image{Name: name, Labels: labels, Target: oci.Descriptor{MediaType: "application/x", Digest: dgst, Size: 1}}
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func is(t *testing.T, is func(error) bool, err error) {
	t.Helper()
	if !is(err) {
		t.Fatalf("wrong kind of error: %v", err)
	}
}

func equal[T any](t *testing.T, got, want []T, same func(a, b T) bool) {
	t.Helper()
	if !slices.EqualFunc(got, want, same) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func equalStrings(t *testing.T, got []string, want ...string) {
	t.Helper()
	equal(t, got, want, func(a, b string) bool { return a == b })
}

// raw changes the file behind the back of a closed store; tree maps paths to
// values.
func raw(t *testing.T, path string, tree map[string][]byte) {
	t.Helper()
	b, err := bolt.Open(path, 0o644, nil)
	ok(t, err)
	defer b.Close()
	ok(t, b.Update(func(btx *bolt.Tx) error {
		for _, at := range slices.Sorted(maps.Keys(tree)) {
			steps := strings.Split(at, "|")
			b, err := btx.CreateBucketIfNotExists([]byte(steps[0]))
			if err != nil {
				return err
			}
			for _, s := range steps[1 : len(steps)-1] {
				if b, err = b.CreateBucketIfNotExists([]byte(s)); err != nil {
					return err
				}
			}
			if err := b.Put([]byte(steps[len(steps)-1]), tree[at]); err != nil {
				return err
			}
		}
		return nil
	}))
}

// rawDelete removes a bucket behind the back of a closed store.
func rawDelete(t *testing.T, path string, at ...string) {
	t.Helper()
	b, err := bolt.Open(path, 0o644, nil)
	ok(t, err)
	defer b.Close()
	ok(t, b.Update(func(btx *bolt.Tx) error {
		wrote := false
		return bucket{btx.Bucket([]byte(at[0])), &wrote}.sub(at[1 : len(at)-1]...).drop(at[len(at)-1])
	}))
}

// dumpFile lists every key of the file as path|path|key, with its value.
func dumpFile(t *testing.T, b *bolt.DB) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	var walk func(prefix string, b *bolt.Bucket) error
	walk = func(prefix string, b *bolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			if v == nil {
				return walk(prefix+string(k)+"|", b.Bucket(k))
			}
			all[prefix+string(k)] = bytes.Clone(v)
			return nil
		})
	}
	ok(t, b.View(func(btx *bolt.Tx) error {
		return btx.ForEach(func(name []byte, b *bolt.Bucket) error { return walk(string(name)+"|", b) })
	}))
	return all
}
