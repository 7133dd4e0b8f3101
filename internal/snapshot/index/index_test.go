package index

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// create reserves ids and records snapshots with them.
func create(t *testing.T, x *Index, news ...snapshot.New) error {
	t.Helper()
	first, err := x.Reserve(len(news))
	must(t, err)
	var all []Creation
	for i, n := range news {
		all = append(all, Creation{New: n, ID: first + uint64(i)})
	}
	return x.Create(all...)
}

func open(t *testing.T) *Index {
	t.Helper()
	x := New(filepath.Join(t.TempDir(), "metadata.db"), Options{})
	t.Cleanup(func() { check(t, x); must(t, x.Close()) })
	return x
}

// check holds parents and snapshots against each other: every parent link
// has its child and every child its link, ids are used once, parents are
// committed.
func check(t *testing.T, x *Index) {
	t.Helper()
	links := map[string]string{}
	must(t, x.view(func(b buckets) error {
		if b.parents == nil {
			return nil
		}
		return b.parents.ForEach(func(k, v []byte) error { links[string(k)] = string(v); return nil })
	}))
	byKey, ids := map[string]Record{}, map[uint64]bool{}
	for r, err := range x.Walk() {
		must(t, err)
		if ids[r.ID] {
			t.Errorf("id %d is used twice", r.ID)
		}
		ids[r.ID] = true
		byKey[r.Key] = r
	}
	for _, r := range byKey {
		if r.Parent == "" {
			continue
		}
		p, ok := byKey[r.Parent]
		if !ok || p.Kind != snapshot.KindCommitted {
			t.Errorf("parent %q of %q is %v", r.Parent, r.Key, p.Kind)
		}
		k := string(parentKey(p.ID, r.ID))
		if links[k] != r.Key {
			t.Errorf("link %x is %q; want %q", k, links[k], r.Key)
		}
		delete(links, k)
	}
	if len(links) > 0 {
		t.Errorf("links without a child: %q", links)
	}
}

// dump lists a file as the package comment draws it, times apart.
func dump(t *testing.T, path string) string {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	must(t, err)
	defer db.Close()
	var b strings.Builder
	var walk func(at *bolt.Bucket, indent string) error
	walk = func(at *bolt.Bucket, indent string) error {
		return at.ForEach(func(k, v []byte) error {
			if v == nil {
				fmt.Fprintf(&b, "%s%q seq %d\n", indent, k, at.Bucket(k).Sequence())
				return walk(at.Bucket(k), indent+"  ")
			}
			if key := string(k); key == "createdat" || key == "updatedat" {
				v = fmt.Appendf(nil, "%d bytes", len(v))
			}
			fmt.Fprintf(&b, "%s%q: %q\n", indent, k, v)
			return nil
		})
	}
	must(t, db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(k []byte, at *bolt.Bucket) error {
			fmt.Fprintf(&b, "%q\n", k)
			return walk(at, "  ")
		})
	}))
	return b.String()
}

// The file of testdata is containerd 2.4.2's, after the operations that this
// test repeats. Ours must be the same, byte for byte but for the times.
func TestFileIsTheOneThatContainerdWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	x := New(path, Options{})
	active, view := snapshot.KindActive, snapshot.KindView
	const note = "containerd.io/snapshot/note"
	empty := snapshot.Usage{Inodes: 1, Size: 4096}
	must(t, create(t, x, snapshot.New{Key: "test/1/one", Kind: active}))
	must(t, x.CommitChain(Committal{Key: "test/1/one", Name: "test/2/base", Usage: empty}))
	must(t, create(t, x, snapshot.New{Key: "test/3/two", Kind: active, Parent: "test/2/base"}))
	must(t, x.CommitChain(Committal{Key: "test/3/two", Name: "test/4/middle", Usage: empty}))
	must(t, create(t, x, snapshot.New{Key: "test/5/look", Kind: view, Parent: "test/2/base"},
		snapshot.New{Key: "test/6/lookover", Kind: view, Parent: "test/4/middle"},
		snapshot.New{Key: "test/7/lookempty", Kind: view},
		snapshot.New{Key: "test/8/three", Kind: active, Parent: "test/4/middle"}))
	_, err := x.Update("test/8/three", map[string]string{note: "yes"}, "labels."+note)
	must(t, err)
	must(t, create(t, x, snapshot.New{Key: "test/9/gone", Kind: active, Parent: "test/4/middle"}))
	check(t, x)
	must(t, x.Close())
	if got, want := dump(t, path), dump(t, "testdata/containerd-2.4.2.db"); got != want {
		t.Errorf("ours:\n%s\ncontainerd's:\n%s", got, want)
	}
}

func TestReadsWhatContainerdWrote(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	data, err := os.ReadFile("testdata/containerd-2.4.2.db")
	must(t, err)
	must(t, os.WriteFile(path, data, 0o600))
	x := New(path, Options{})
	defer x.Close()
	check(t, x)
	r, parents, err := x.Chain("test/8/three")
	must(t, err)
	if r.ID != 6 || r.Kind != snapshot.KindActive || r.Labels["containerd.io/snapshot/note"] != "yes" || r.Created.Year() != 2026 {
		t.Errorf("three is %+v", r)
	}
	if len(parents) != 2 || parents[0].Key != "test/4/middle" || parents[1].ID != 1 || parents[1].Usage != (snapshot.Usage{Inodes: 1, Size: 4096}) {
		t.Errorf("its parents are %+v", parents)
	}
	if id, err := x.Reserve(1); err != nil || id != 8 {
		t.Errorf("next id %d, %v; want 8", id, err)
	}
}

func TestFileAppearsAtTheFirstWrite(t *testing.T) {
	x := open(t)
	if _, err := x.Get("a"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("get: %v", err)
	}
	for range x.Walk() {
		t.Error("walk of nothing yields")
	}
	if _, err := os.Stat(x.path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("reading made the file: %v", err)
	}
	must(t, create(t, x, snapshot.New{Key: "a", Kind: snapshot.KindActive}))
	fi, err := os.Stat(x.path)
	must(t, err)
	if fi.Mode() != 0o600 {
		t.Errorf("mode %v; want 0600", fi.Mode())
	}
}

func TestRefusals(t *testing.T) {
	x := open(t)
	must(t, create(t, x, snapshot.New{Key: "bottom", Kind: snapshot.KindActive}, snapshot.New{Key: "other", Kind: snapshot.KindActive}))
	must(t, x.CommitChain(Committal{Key: "bottom", Name: "base"}, Committal{Key: "other", Name: "base2"}))
	must(t, create(t, x,
		snapshot.New{Key: "active", Kind: snapshot.KindActive, Parent: "base"},
		snapshot.New{Key: "view", Kind: snapshot.KindView, Parent: "base"}))
	before := keys(t, x)
	remove := func(key string) error { _, err := x.Remove(key); return err }
	update := func(key string, fields ...string) error { _, err := x.Update(key, nil, fields...); return err }
	for name, c := range map[string]struct{ err, want error }{
		"create twice":          {create(t, x, snapshot.New{Key: "active", Kind: snapshot.KindActive}), errdefs.ErrAlreadyExists},
		"create twice at once":  {create(t, x, snapshot.New{Key: "n", Kind: snapshot.KindActive}, snapshot.New{Key: "n", Kind: snapshot.KindView}), errdefs.ErrAlreadyExists},
		"create as committed":   {create(t, x, snapshot.New{Key: "n", Kind: snapshot.KindCommitted}), errdefs.ErrInvalidArgument},
		"create without key":    {create(t, x, snapshot.New{Kind: snapshot.KindActive}), errdefs.ErrInvalidArgument},
		"create with huge key":  {create(t, x, snapshot.New{Key: strings.Repeat("k", maxName+1), Kind: snapshot.KindActive}), errdefs.ErrInvalidArgument},
		"create on nothing":     {create(t, x, snapshot.New{Key: "n", Kind: snapshot.KindActive, Parent: "missing"}), errdefs.ErrNotFound},
		"create on active":      {create(t, x, snapshot.New{Key: "n", Kind: snapshot.KindActive, Parent: "active"}), errdefs.ErrInvalidArgument},
		"commit view":           {x.CommitChain(Committal{Key: "view", Name: "n"}), errdefs.ErrFailedPrecondition},
		"commit committed":      {x.CommitChain(Committal{Key: "base", Name: "n"}), errdefs.ErrFailedPrecondition},
		"commit missing":        {x.CommitChain(Committal{Key: "missing", Name: "n"}), errdefs.ErrNotFound},
		"commit to taken name":  {x.CommitChain(Committal{Key: "active", Name: "base2"}), errdefs.ErrAlreadyExists},
		"commit to own key":     {x.CommitChain(Committal{Key: "active", Name: "active"}), errdefs.ErrAlreadyExists},
		"commit without name":   {x.CommitChain(Committal{Key: "active"}), errdefs.ErrInvalidArgument},
		"commit to other base":  {x.CommitChain(Committal{Key: "active", Name: "n", Parent: "base2"}), errdefs.ErrInvalidArgument},
		"remove parent":         {remove("base"), errdefs.ErrFailedPrecondition},
		"remove missing":        {remove("missing"), errdefs.ErrNotFound},
		"update missing":        {update("missing"), errdefs.ErrNotFound},
		"update of a bad field": {update("active", "kind"), errdefs.ErrInvalidArgument},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: %v; want %v", name, c.err, c.want)
		}
	}
	if after := keys(t, x); !slices.Equal(before, after) {
		t.Errorf("refused operations changed %v to %v", before, after)
	}
}

func keys(t *testing.T, x *Index) (out []string) {
	for r, err := range x.Walk() {
		must(t, err)
		out = append(out, r.Key)
	}
	return out
}

func TestCommitChainIsOneTransaction(t *testing.T) {
	commits := 0
	x := New(filepath.Join(t.TempDir(), "metadata.db"), Options{Committed: func() { commits++ }})
	defer x.Close()
	var news []snapshot.New
	var steps []Committal
	for i := range 10 {
		news = append(news, snapshot.New{Key: fmt.Sprint("extract-", i), Kind: snapshot.KindActive})
		s := Committal{Key: fmt.Sprint("extract-", i), Name: fmt.Sprint("chain-", i), Usage: snapshot.Usage{Inodes: int64(i), Size: 1 << 40}}
		if i > 0 {
			s.Parent = fmt.Sprint("chain-", i-1)
		}
		steps = append(steps, s)
	}
	must(t, create(t, x, news...))
	bad := slices.Clone(steps)
	bad[9].Key = "missing"
	if err := x.CommitChain(bad...); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("chain with a missing key: %v", err)
	}
	if _, err := x.Get("chain-0"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("a part of a failed chain is there: %v", err)
	}
	must(t, x.CommitChain(steps...))
	if commits != 2 {
		t.Errorf("%d transactions; want 2", commits)
	}
	check(t, x)
	r, parents, err := x.Chain("chain-9")
	must(t, err)
	if len(parents) != 9 || r.Usage != (snapshot.Usage{Inodes: 9, Size: 1 << 40}) || r.Kind != snapshot.KindCommitted {
		t.Errorf("top is %+v with %d parents", r, len(parents))
	}
}

func TestUpdate(t *testing.T) {
	for _, c := range []struct {
		name   string
		labels map[string]string
		fields []string
		want   map[string]string
	}{
		{"all", map[string]string{"n": "1"}, nil, map[string]string{"n": "1"}},
		{"all by name", map[string]string{"n": "1"}, []string{"labels"}, map[string]string{"n": "1"}},
		{"one", map[string]string{"a": "9", "b": "9"}, []string{"labels.a"}, map[string]string{"a": "9", "b": "2"}},
		{"one new, with dots", map[string]string{"x.y/z": "3"}, []string{"labels.x.y/z"}, map[string]string{"a": "1", "b": "2", "x.y/z": "3"}},
		{"one removed", nil, []string{"labels.a"}, map[string]string{"b": "2"}},
		{"emptied", map[string]string{"a": ""}, nil, map[string]string{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := open(t)
			must(t, create(t, x, snapshot.New{Key: "k", Kind: snapshot.KindActive, Labels: map[string]string{"a": "1", "b": "2", "empty": ""}}))
			got, err := x.Update("k", c.labels, c.fields...)
			must(t, err)
			stored, err := x.Get("k")
			must(t, err)
			if !maps.Equal(got.Labels, c.want) || !maps.Equal(stored.Labels, c.want) {
				t.Errorf("labels %v, stored %v; want %v", got.Labels, stored.Labels, c.want)
			}
			if !got.Updated.After(got.Created) || !stored.Updated.Equal(got.Updated) {
				t.Errorf("created %v, updated %v, stored %v", got.Created, got.Updated, stored.Updated)
			}
		})
	}
}

// A walk of several batches, during which the snapshot last yielded goes away
// and new ones come.
func TestWalkHoldsNothing(t *testing.T) {
	x := open(t)
	var news []snapshot.New
	for i := range 3*walkBatch + 7 {
		news = append(news, snapshot.New{Key: fmt.Sprintf("k%04d", i), Kind: snapshot.KindActive})
	}
	must(t, create(t, x, news...))
	seen := 0
	last := ""
	for r, err := range x.Walk() {
		must(t, err)
		if r.Key <= last {
			t.Fatalf("%s after %s", r.Key, last)
		}
		last = r.Key
		seen++
		if seen%walkBatch == 0 {
			_, err := x.Remove(r.Key)
			must(t, err)
		}
	}
	if seen != len(news) {
		t.Errorf("%d seen; want %d", seen, len(news))
	}
}

func TestReserveGivesNoIDTwice(t *testing.T) {
	x := open(t)
	var mu sync.Mutex
	seen := map[uint64]bool{}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 5 {
				first, err := x.Reserve(3)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for id := first; id < first+3; id++ {
					if seen[id] {
						t.Errorf("id %d twice", id)
					}
					seen[id] = true
				}
				mu.Unlock()
				if err := x.Create(Creation{New: snapshot.New{Key: fmt.Sprint(g, "-", i), Kind: snapshot.KindActive}, ID: first}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestHeldByAnotherProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metadata.db")
	db, err := bolt.Open(path, 0o600, nil)
	must(t, err)
	defer db.Close()
	x := New(path, Options{OpenTimeout: 10 * time.Millisecond})
	defer x.Close()
	if _, err := x.Get("a"); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("error %v; want unavailable", err)
	}
}

func TestClosed(t *testing.T) {
	x := open(t)
	must(t, create(t, x, snapshot.New{Key: "a", Kind: snapshot.KindActive}))
	must(t, x.Close())
	if _, err := x.Get("a"); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("get after close: %v", err)
	}
	must(t, x.Close())
	y := New(x.path, Options{})
	defer y.Close()
	if _, err := y.Get("a"); err != nil {
		t.Errorf("after reopening: %v", err)
	}
	x.closed = false // for the check at the end
	must(t, y.Close())
}

// A file of anybody's making is an error or reads; it never panics.
func FuzzRecord(f *testing.F) {
	f.Add([]byte{6}, []byte{2}, []byte("\x01\x00\x00\x00\x0e\xd0\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff"), "parent")
	f.Fuzz(func(t *testing.T, id, kind, created []byte, parent string) {
		db, err := bolt.Open(filepath.Join(t.TempDir(), "db"), 0o600, &bolt.Options{NoSync: true})
		must(t, err)
		defer db.Close()
		must(t, db.Update(func(tx *bolt.Tx) error {
			b, err := createBuckets(tx)
			must(t, err)
			bkt, err := b.snapshots.CreateBucket([]byte("k"))
			must(t, err)
			for k, v := range map[string][]byte{"id": id, "kind": kind, "createdat": created, "parent": []byte(parent)} {
				must(t, bkt.Put([]byte(k), v))
			}
			r, err := b.get("k")
			if err != nil {
				if !errors.Is(err, errdefs.ErrDataLoss) {
					t.Errorf("%v isn't data loss", err)
				}
				return nil
			}
			if _, err := b.chain(r); parent == "k" && !errors.Is(err, errdefs.ErrDataLoss) {
				t.Errorf("a snapshot that is its own parent: %v", err)
			}
			return nil
		}))
	})
}
