package meta

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// mem are the snapshots of the house's driver.
func mem(t *testing.T, sp Space) Snapshots {
	t.Helper()
	return must[Snapshots](t)(sp.Snapshots("mem"))
}

func prepare(t *testing.T, s Snapshots, key, parent string, labels map[string]string) {
	t.Helper()
	must[[]mount.Mount](t)(s.Prepare(t.Context(), key, parent, labels))
}

// chain prepares and commits names, each above the one before.
func chain(t *testing.T, s Snapshots, names ...string) {
	t.Helper()
	parent := ""
	for _, name := range names {
		prepare(t, s, "active-"+name, parent, nil)
		ok(t, s.Commit(t.Context(), name, "active-"+name, "", nil))
		parent = name
	}
}

func TestSnapshotLife(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	s := mem(t, sp)
	labels := map[string]string{"mine": "1", "containerd.io/snapshot/theirs": "2", "containerd.io/snapshot.other": "3"}
	m := must[[]mount.Mount](t)(s.Prepare(t.Context(), "key", "", labels))
	if len(m) != 1 || m[0].Source != "/ns/1/key" {
		t.Errorf("mounts %v", m)
	}
	equalStrings(t, held(t, sp), "snapshots/mem key")
	if got := must[snapshot.Info](t)(h.drivers["mem"].Stat(t.Context(), "ns/1/key")).Labels; !maps.Equal(got, map[string]string{"containerd.io/snapshot/theirs": "2"}) {
		t.Errorf("the driver sees %v", got)
	}
	in := must[snapshot.Info](t)(s.Stat(t.Context(), "key"))
	if in.Key != "key" || in.Kind != snapshot.KindActive || !maps.Equal(in.Labels, labels) {
		t.Errorf("%+v", in)
	}
	ok(t, s.Commit(t.Context(), "name", "key", "", map[string]string{"mine": "4"}))
	equalStrings(t, held(t, sp), "snapshots/mem name")
	in = must[snapshot.Info](t)(s.Stat(t.Context(), "name"))
	if in.Kind != snapshot.KindCommitted || !maps.Equal(in.Labels, map[string]string{"mine": "4"}) {
		t.Errorf("%+v", in)
	}
	is(t, errdefs.IsNotFound, errOf(s.Stat(t.Context(), "key")))
	must[[]mount.Mount](t)(s.View(t.Context(), "view", "name", nil))
	in = must[snapshot.Info](t)(s.Stat(t.Context(), "view"))
	if in.Kind != snapshot.KindView || in.Parent != "name" {
		t.Errorf("%+v", in)
	}
	if u := must[snapshot.Usage](t)(s.Usage(t.Context(), "name")); u.Size != 42 {
		t.Errorf("%+v", u)
	}
	dir, parents, err := s.Dir(t.Context(), "view")
	if err != nil || dir != "/ns/3/view" || !slices.Equal(parents, []string{"/ns/2/name"}) {
		t.Errorf("%s %v %v", dir, parents, err)
	}
	is(t, errdefs.IsFailedPrecondition, s.Remove(t.Context(), "name"))
	ok(t, s.Remove(t.Context(), "view"))
	ok(t, s.Remove(t.Context(), "name"))
	is(t, errdefs.IsNotFound, s.Remove(t.Context(), "name"))
	equalStrings(t, held(t, sp))
	if n := len(h.drivers["mem"].keys()); n != 2 {
		t.Errorf("removed from the driver too early: %d left", n)
	}
	h.collect()
	equalStrings(t, h.drivers["mem"].keys())
}

func TestSnapshotErrors(t *testing.T) {
	h := newHouse(t, Options{})
	s := mem(t, h.Space("ns"))
	is(t, errdefs.IsInvalidArgument, errOf(h.Space("ns").Snapshots("none")))
	chain(t, s, "base")
	prepare(t, s, "key", "base", nil)
	long := map[string]string{"k": strings.Repeat("v", maxLabel)}
	for _, c := range []struct {
		what string
		kind func(error) bool
		err  error
	}{
		{"prepare on nothing", errdefs.IsNotFound, errOf(s.Prepare(t.Context(), "x", "nobody", nil))},
		{"prepare on an active one", errdefs.IsNotFound, errOf(s.Prepare(t.Context(), "x", "key", nil))},
		{"prepare again", errdefs.IsAlreadyExists, errOf(s.Prepare(t.Context(), "key", "", nil))},
		{"prepare without key", errdefs.IsInvalidArgument, errOf(s.Prepare(t.Context(), "", "", nil))},
		{"prepare with a long label", errdefs.IsInvalidArgument, errOf(s.Prepare(t.Context(), "x", "", long))},
		{"commit nothing", errdefs.IsNotFound, s.Commit(t.Context(), "name", "nobody", "", nil)},
		{"commit to what is there", errdefs.IsAlreadyExists, s.Commit(t.Context(), "base", "key", "", nil)},
		{"commit without name", errdefs.IsInvalidArgument, s.Commit(t.Context(), "", "key", "", nil)},
		{"commit with a long label", errdefs.IsInvalidArgument, s.Commit(t.Context(), "x", "key", "", long)},
		{"stat nothing", errdefs.IsNotFound, errOf(s.Stat(t.Context(), "nobody"))},
		{"mounts of nothing", errdefs.IsNotFound, errOf(s.Mounts(t.Context(), "nobody"))},
		{"usage of nothing", errdefs.IsNotFound, errOf(s.Usage(t.Context(), "nobody"))},
		{"update nothing", errdefs.IsNotFound, errOf(s.Update(t.Context(), "nobody", nil))},
		{"update of no field", errdefs.IsInvalidArgument, errOf(s.Update(t.Context(), "key", nil, "parent"))},
		{"a lease that isn't there", errdefs.IsNotFound, errOf(mem(t, h.Space("ns").Leased("none")).Prepare(t.Context(), "x", "", nil))},
	} {
		if !c.kind(c.err) {
			t.Errorf("%s: %v", c.what, c.err)
		}
	}
	h.collect()
	prepare(t, s, "key", "", nil) // gone with the collection: nothing held it
}

// TestSnapshotTarget: the label snapshot.ref, COMPATIBILITY §2.5.
func TestSnapshotTarget(t *testing.T) {
	h := newHouse(t, Options{})
	d := h.drivers["mem"]
	sp := lease(t, h.Space("ns"), "l")
	s := mem(t, sp)
	chain(t, s, "base")
	target := map[string]string{labelSnapshotRef: "layer", "mine": "1"}

	// The driver supplies it.
	d.supplies = map[string]string{"layer": "remote/layer"}
	is(t, errdefs.IsAlreadyExists, errOf(s.Prepare(t.Context(), "key", "base", target)))
	in := must[snapshot.Info](t)(s.Stat(t.Context(), "layer"))
	if in.Kind != snapshot.KindCommitted || in.Parent != "base" || in.Labels["mine"] != "1" {
		t.Errorf("%+v", in)
	}
	equalStrings(t, held(t, sp), "snapshots/mem base", "snapshots/mem layer")
	h.leftBehind(keySnapshots + "/mem")
	h.collect()
	must[snapshot.Info](t)(s.Stat(t.Context(), "layer"))

	// It is there already, in this namespace: it is leased.
	other := lease(t, h.Space("ns"), "l2")
	is(t, errdefs.IsAlreadyExists, errOf(mem(t, other).Prepare(t.Context(), "key", "base", target)))
	equalStrings(t, held(t, other), "snapshots/mem layer")

	// The driver says that it has it, but on another parent.
	d.supplies = map[string]string{"layer2": "remote/layer2"}
	is(t, errdefs.IsAlreadyExists, errOf(s.Prepare(t.Context(), "k", "", map[string]string{labelSnapshotRef: "layer2"})))
	chain(t, mem(t, h.Space("two")), "b")
	d.supplies = nil
	d.put("two/9/x", "", snapshot.KindActive)
	is(t, errdefs.IsUnknown, errOf(func() (int, error) {
		h.sequences = sequences{}
		h.sequences.add(pool{"two", "mem"}, 8, 1)
		_, err := mem(t, h.Space("two")).Prepare(t.Context(), "x", "b", nil)
		return 0, err
	}()))
	h.sequences.add(pool{"two", "mem"}, 8, 1)
	is(t, errdefs.IsNotFound, errOf(mem(t, h.Space("two")).Prepare(t.Context(), "x", "b", map[string]string{labelSnapshotRef: "layer2"})))
}

func TestSnapshotUpdate(t *testing.T) {
	h := newHouse(t, Options{})
	s := mem(t, h.Space("ns"))
	const theirs = "containerd.io/snapshot/theirs"
	prepare(t, s, "key", "", map[string]string{"a": "1", theirs: "1"})
	for _, c := range []struct {
		labels       map[string]string
		fields       []string
		want, driver string
	}{
		{map[string]string{"a": "2", theirs: "2"}, []string{"labels.a"}, "map[a:2 containerd.io/snapshot/theirs:1]", "map[containerd.io/snapshot/theirs:1]"},
		{map[string]string{"a": "3", theirs: "3"}, []string{"labels." + theirs}, "map[a:2 containerd.io/snapshot/theirs:3]", "map[containerd.io/snapshot/theirs:3]"},
		{map[string]string{"b": "1"}, nil, "map[b:1]", "map[]"},
		{map[string]string{theirs: "4"}, []string{"labels"}, "map[containerd.io/snapshot/theirs:4]", "map[containerd.io/snapshot/theirs:4]"},
	} {
		in := must[snapshot.Info](t)(s.Update(t.Context(), "key", c.labels, c.fields...))
		if got := fmt.Sprint(in.Labels); got != c.want {
			t.Errorf("%v: got %s, want %s", c.fields, got, c.want)
		}
		if got := fmt.Sprint(must[snapshot.Info](t)(h.drivers["mem"].Stat(t.Context(), "ns/1/key")).Labels); got != c.driver {
			t.Errorf("%v: the driver sees %s, want %s", c.fields, got, c.driver)
		}
	}
}

func TestSnapshotWalk(t *testing.T) {
	h := newHouse(t, Options{})
	s := mem(t, h.Space("ns"))
	chain(t, s, "base", "mid")
	news := make([]snapshot.New, 2*batchSize)
	for i := range news {
		news[i] = snapshot.New{Key: fmt.Sprintf("k%03d", i), Parent: "mid", Kind: snapshot.KindActive}
	}
	created, release, err := s.Create(t.Context(), news...)
	ok(t, err)
	ok(t, h.Space("ns").Update(t.Context(), func(tx *Tx) error {
		for _, c := range created {
			if err := tx.RecordSnapshot(c); err != nil {
				return err
			}
		}
		return nil
	}))
	release()
	lost := created[5].Backend
	h.drivers["mem"].lose(lost)
	count := func(filters ...string) (n int) {
		for in, err := range s.Walk(t.Context(), filters...) {
			ok(t, err)
			if n++; strings.HasSuffix(lost, in.Key) {
				t.Error("saw what the driver hasn't")
			}
		}
		return n
	}
	for _, c := range []struct {
		filter string
		want   int
	}{
		{"", 2*batchSize + 1}, {"kind==committed", 2}, {`parent==""`, 1}, {"parent==base", 1},
		{`name~="^k00"`, 9}, {"labels.x", 0},
	} {
		if n := count(c.filter); n != c.want {
			t.Errorf("%s: %d", c.filter, n)
		}
	}
	h.drivers["mem"].put(lost, created[5].backendParent, snapshot.KindActive)
}

// TestPullTransactions is how a pull unpacks three layers: two transactions
// around the driver's work, one of which others share.
func TestPullTransactions(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	s := mem(t, sp)
	ok(t, sp.Update(t.Context(), func(tx *Tx) error { return tx.ReserveKeys("mem", 6) }))
	before := h.commits.Load()
	var news []snapshot.New
	for _, key := range []string{"a", "b", "c"} {
		news = append(news, snapshot.New{Key: key, Kind: snapshot.KindActive})
	}
	created, release, err := s.Create(t.Context(), news...)
	ok(t, err)
	h.leftBehind(keySnapshots + "/mem")
	h.collect() // they are pinned
	ok(t, sp.Update(t.Context(), func(tx *Tx) error {
		for _, c := range created {
			if err := tx.RecordSnapshot(c); err != nil {
				return err
			}
		}
		return nil
	}))
	release()
	committed, release, err := s.CommitChain(t.Context(),
		snapshot.Commit{Key: "a", Name: "A"},
		snapshot.Commit{Key: "b", Name: "B", Parent: "A"},
		snapshot.Commit{Key: "c", Name: "C", Parent: "B"})
	ok(t, err)
	h.leftBehind(keySnapshots + "/mem")
	h.collect()
	ok(t, sp.Update(t.Context(), func(tx *Tx) error {
		for _, c := range committed {
			if err := tx.RecordSnapshot(c); err != nil {
				return err
			}
		}
		return nil
	}))
	release()
	if n := h.commits.Load() - before; n != 2 {
		t.Errorf("%d commits", n)
	}
	equalStrings(t, held(t, sp), "snapshots/mem A", "snapshots/mem B", "snapshots/mem C")
	if in := must[snapshot.Info](t)(s.Stat(t.Context(), "C")); in.Parent != "B" || in.Kind != snapshot.KindCommitted {
		t.Errorf("%+v", in)
	}
	equalStrings(t, h.drivers["mem"].keys(), "ns/4/A", "ns/5/B", "ns/6/C")
	h.collect()
	if n := len(h.drivers["mem"].keys()); n != 3 {
		t.Errorf("%d left", n)
	}
	ok(t, sp.DeleteLease(t.Context(), "l"))
	h.collect()
	equalStrings(t, h.drivers["mem"].keys())
}

// TestCommitLosesRace: somebody else recorded the name between the driver's
// commit and ours.
func TestCommitLosesRace(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	s := mem(t, sp)
	prepare(t, s, "mine", "", nil)
	prepare(t, s, "above", "", nil)
	created, release, err := s.CommitChain(t.Context(), snapshot.Commit{Key: "mine", Name: "N"}, snapshot.Commit{Key: "above", Name: "M", Parent: "N"})
	ok(t, err)
	chain(t, mem(t, h.Space("ns")), "N")
	var first, second error
	ok(t, sp.Update(t.Context(), func(tx *Tx) error {
		first, second = tx.RecordSnapshot(created[0]), tx.RecordSnapshot(created[1])
		return nil
	}))
	release()
	is(t, errdefs.IsAlreadyExists, first)
	is(t, errdefs.IsAborted, second)
	equalStrings(t, held(t, sp), "snapshots/mem M", "snapshots/mem N")
	is(t, errdefs.IsNotFound, errOf(s.Stat(t.Context(), "mine")))
	h.collect()
	equalStrings(t, h.drivers["mem"].keys(), "ns/6/N")
}

// TestPrepareIsUndone: what couldn't be recorded is removed from the driver.
func TestPrepareIsUndone(t *testing.T) {
	h := newHouse(t, Options{})
	s := mem(t, h.Space("ns").Leased("none"))
	is(t, errdefs.IsNotFound, errOf(s.Prepare(t.Context(), "key", "", nil)))
	equalStrings(t, h.drivers["mem"].keys())
}

// TestAbandoned: a caller that ends between the driver and the record leaves
// nothing for ever.
func TestAbandoned(t *testing.T) {
	deleted := false
	h := newHouse(t, Options{Changed: func(d bool) { deleted = d }})
	_, release, err := mem(t, h.Space("ns")).Create(t.Context(), snapshot.New{Key: "key", Kind: snapshot.KindActive})
	ok(t, err)
	h.leftBehind(keySnapshots + "/mem")
	if c := h.collect(); c.Left != 1 {
		t.Errorf("%+v", c)
	}
	deleted = false
	release()
	if !deleted {
		t.Error("nobody is told")
	}
	h.collect()
	equalStrings(t, h.drivers["mem"].keys())
}

// TestKeysAreNeverReused: neither after a restart, nor when a namespace
// begins again.
func TestKeysAreNeverReused(t *testing.T) {
	h := newHouse(t, Options{})
	seen := make(map[string]bool)
	use := func() {
		created, release, err := mem(t, h.Space("ns")).Create(t.Context(), snapshot.New{Key: "key", Kind: snapshot.KindActive})
		ok(t, err)
		release()
		if seen[created[0].Backend] {
			t.Errorf("%s again", created[0].Backend)
		}
		seen[created[0].Backend] = true
	}
	for range 3 {
		for range reserveBlock + 1 {
			use()
		}
		h.collect()
		ok(t, h.DeleteNamespace(t.Context(), "ns"))
		use()
		h.reopen(nil)
	}
	is(t, errdefs.IsInvalidArgument, h.Space("ns").Update(t.Context(), func(tx *Tx) error { return tx.ReserveKeys("mem", maxReserve+1) }))
}

// TestStaleChild: containerd's collector leaves links to children that are
// gone; they don't count.
func TestStaleChild(t *testing.T) {
	h := newHouse(t, Options{})
	chain(t, mem(t, h.Space("ns")), "base")
	h.close()
	raw(t, h.path(), map[string][]byte{"v1|ns|snapshots|mem|base|children|ghost": nil})
	h.open()
	ok(t, mem(t, h.Space("ns")).Remove(t.Context(), "base"))
}

// TestRebase needs a driver that can; the error is the driver's.
func TestRebase(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	s := mem(t, sp)
	chain(t, s, "base", "other")
	prepare(t, s, "key", "", nil)
	h.drivers["mem"].traits.Rebase = false
	is(t, errdefs.IsInvalidArgument, s.Commit(t.Context(), "name", "key", "base", nil))
	h.drivers["mem"].traits.Rebase = true
	is(t, errdefs.IsNotFound, s.Commit(t.Context(), "name", "key", "nobody", nil))
	ok(t, s.Commit(t.Context(), "name", "key", "base", nil))
	prepare(t, s, "key", "base", nil)
	ok(t, s.Commit(t.Context(), "name2", "key", "other", nil)) // has a parent already
	for _, name := range []string{"name", "name2"} {
		if in := must[snapshot.Info](t)(s.Stat(t.Context(), name)); in.Parent != "base" {
			t.Errorf("%+v", in)
		}
	}
}

func TestCleanup(t *testing.T) {
	h := newHouse(t, Options{})
	before := h.drivers["mem"].cleanups
	ok(t, mem(t, h.Space("ns")).Cleanup(context.Background()))
	if n := h.drivers["mem"].cleanups - before; n != 1 {
		t.Errorf("%d cleanups", n)
	}
	is(t, errdefs.IsFailedPrecondition, mem(t, h.Space("")).Cleanup(context.Background()))
}
