package meta

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

func TestReferences(t *testing.T) {
	const p = "containerd.io/gc."
	for _, c := range []struct {
		key, value string
		want       string // direction type id
	}{
		{p + "ref.content", "d", "0 content d"},
		{p + "ref.content.0", "d", "0 content d"},
		{p + "ref.content/l.0", "d", "0 content d"},
		{p + "ref.contents", "d", ""},
		{p + "ref.image", "i", "0 images i"},
		{p + "ref.image.x", "i", "0 images i"},
		{p + "ref.imagex", "i", ""},
		{p + "ref.snapshot.overlayfs", "k", "0 snapshots/overlayfs k"},
		{p + "ref.snapshot.overlayfs/x", "k/l", "0 snapshots/overlayfs k/l"},
		{p + "ref.snapshot.over.layfs", "k", "0 snapshots/over.layfs k"},
		{p + "ref.snapshot", "k", ""},
		{p + "ref.snapshot.", "k", ""},
		{p + "ref.stream", "s", ""},
		{p + "bref.content", "d", "1 content d"},
		{p + "bref.content.x", "d", "1 content d"},
		{p + "bref.contentx", "d", ""},
		{p + "bref.image/x", "i", "1 images i"},
		{p + "bref.container", "c", "1 containers c"},
		{p + "bref.containers", "c", ""},
		{p + "bref.snapshot.native/x", "k", "1 snapshots/native k"},
		{p + "cond.snapshot.native", "usedat<1h|k", "2 snapshots/native k"},
		{p + "cond.snapshot/native/x", "usedat>1h,usedat<1s|k|l", "2 snapshots/native k|l"},
		{p + "cond.snapshot.native", "usedat<1h", ""},
		{p + "cond.snapshot.native", "usedat=1h|k", ""},
		{p + "cond.snapshot.native", "usedat<=1h|k", ""},
		{p + "cond.snapshot.native", "usedat<soon|k", ""},
		{p + "cond.snapshot.native", "size<1h|k", ""},
		{p + "cond.snapshot", "usedat<1h|k", ""},
		{p + "root", "x", ""},
		{p + "expire", "x", ""},
		{"containerd.io/distribution.source.docker.io", "x", ""},
		{"gc.ref.content", "d", ""},
	} {
		got := ""
		for _, r := range References(map[string]string{c.key: c.value}) {
			if r.Label != c.key {
				t.Errorf("%s: label %s", c.key, r.Label)
			}
			got += fmt.Sprintf("%d %s %s", r.Direction, r.Type, r.ID)
		}
		if got != c.want {
			t.Errorf("%s=%s: got %q, want %q", c.key, c.value, got, c.want)
		}
	}
	all := References(map[string]string{p + "ref.content.b": "2", p + "ref.content.a": "1"})
	if len(all) != 2 || all[0].ID != "1" {
		t.Errorf("not in order: %v", all)
	}
}

// FuzzReference: whatever a label says, what comes out can be found again.
func FuzzReference(f *testing.F) {
	f.Add("containerd.io/gc.ref.snapshot.overlayfs/x", "key")
	f.Add("containerd.io/gc.cond.snapshot/native", "usedat<1h,usedat>2h|key")
	f.Add("containerd.io/gc.bref.content.", "sha256:abc")
	f.Fuzz(func(t *testing.T, key, value string) {
		r, ok := parseReference(key, value)
		if !ok {
			return
		}
		if !strings.HasPrefix(key, labelPrefix) || !strings.HasSuffix(value, r.ID) {
			t.Errorf("%q=%q gave %+v", key, value, r)
		}
		n := r.target("ns")
		if n.kind == kindSnapshot {
			driver, id, ok := strings.Cut(n.id, "/")
			if !ok || driver == "" || id != r.ID || r.Type != "snapshots/"+driver {
				t.Errorf("%q=%q leads to %+v", key, value, n)
			}
		} else if n.id != value {
			t.Errorf("%q=%q leads to %+v", key, value, n)
		}
	})
}

func FuzzBackendKey(f *testing.F) {
	f.Add("k8s.io", uint64(1), "extract-1 sha256:abc/def")
	f.Fuzz(func(t *testing.T, ns string, seq uint64, key string) {
		gotNS, gotKey, ok := splitBackendKey(backendKey(ns, seq, key))
		if !strings.Contains(ns, "/") && (!ok || gotNS != ns || gotKey != key) {
			t.Errorf("%q %d %q came back as %q %q %v", ns, seq, key, gotNS, gotKey, ok)
		}
	})
}

// world writes records without any content behind them; what they are and
// what labels they have is all that marking looks at.
type world struct {
	t *testing.T
	b *bolt.DB
}

func newWorld(t *testing.T) *world {
	b, err := bolt.Open(t.TempDir()+"/meta.db", 0o644, &bolt.Options{NoSync: true, NoFreelistSync: true})
	ok(t, err)
	t.Cleanup(func() { b.Close() })
	return &world{t, b}
}

// put writes a record given as `kind id [label=value | parent=x | target=x | snapshot=driver/key | expected=x | holds=type:id]...`
// in namespace ns.
func (w *world) put(ns string, record ...string) {
	w.t.Helper()
	ok(w.t, w.b.Update(func(btx *bolt.Tx) error {
		if _, err := btx.CreateBucketIfNotExists([]byte(keyV1)); err != nil {
			return err
		}
		wrote := false
		at := map[string][]string{
			"blob": {keyContent, keyBlob}, "image": {keyImages}, "lease": {keyLeases}, "ingest": {keyContent, keyIngests},
			"container": {keyContainers}, "sandbox": {keySandboxes},
		}[record[0]]
		if driver, found := strings.CutPrefix(record[0], "snapshot/"); found {
			at = []string{keySnapshots, driver}
		}
		b, err := root(btx, &wrote).create(slices.Concat([]string{ns}, at, []string{record[1]})...)
		if err != nil {
			return err
		}
		labels := b.texts(keyLabels)
		if labels == nil {
			labels = make(map[string]string)
		}
		for _, attr := range record[2:] {
			k, v, _ := strings.Cut(attr, "=")
			switch k {
			case "parent", "expected":
				err = b.putText(k, v)
			case "expireat":
				d, _ := time.ParseDuration(v)
				err = b.putTime(keyExpireAt, time.Now().Add(d))
			case "target":
				var target bucket
				if target, err = b.create(keyTarget); err == nil {
					err = target.putText(keyDigest, v)
				}
			case "snapshot":
				driver, key, _ := strings.Cut(v, "/")
				if err = b.putText(keySnapshotter, driver); err == nil {
					err = b.putText(keySnapshotKey, key)
				}
			case "holds":
				typ, id, _ := strings.Cut(v, ":")
				var at bucket
				if at, err = b.create(strings.Split(typ, "/")...); err == nil {
					err = at.put(id, nil)
				}
			default:
				labels[labelPrefix+k] = v
			}
			if err != nil {
				return err
			}
		}
		return b.putTexts(keyLabels, labels)
	}))
}

// live lists, of the records, those that are needed.
func (w *world) live() (all []string) {
	ok(w.t, w.b.View(func(btx *bolt.Tx) error {
		v1 := root(btx, nil)
		live := mark(v1, time.Now())
		var c Collected
		s := sweeper{tx: &Tx{v1: v1}, live: live, c: &c}
		var everything sweeper
		for name, ns := range v1.subs() {
			s.find(name, ns)
			everything.find(name, ns)
		}
		for _, n := range everything.dead {
			if !slices.Contains(s.dead, n) {
				all = append(all, n.String())
			}
		}
		return nil
	}))
	slices.Sort(all)
	return all
}

func (n node) String() string {
	return [...]string{"blob", "snapshot", "image", "container", "lease", "ingest"}[n.kind] + " " + n.ns + " " + n.id
}

// TestMark has a row for each way to be needed, and for each that isn't one.
func TestMark(t *testing.T) {
	past, future := "2001-01-01T00:00:00Z", "2999-01-01T00:00:00Z"
	recently := time.Now().Add(-time.Minute).Format(time.RFC3339)
	for _, c := range []struct {
		name    string
		records [][]string
		want    string
	}{
		{"nothing", [][]string{{"blob", "b"}, {"snapshot/d", "s"}}, ""},
		{"root label", [][]string{{"blob", "b", "root=x"}, {"snapshot/d", "s", "rootfoo=x"}}, "blob b, snapshot d/s"},
		{"root label on an expired image", [][]string{{"image", "i", "root=x", "expire=" + past}}, ""},
		{"image", [][]string{{"image", "i", "target=b"}, {"blob", "b", "ref.content.0=c"}, {"blob", "c"}, {"blob", "d"}}, "blob b, blob c, image i"},
		{"image that will expire", [][]string{{"image", "i", "expire=" + future}}, "image i"},
		{"image that never expires", [][]string{{"image", "i", "expire=soon"}}, "image i"},
		{"expired image", [][]string{{"image", "i", "target=b", "expire=" + past}, {"blob", "b"}}, ""},
		{"expired image, referred to", [][]string{{"image", "i", "target=b", "expire=" + past}, {"blob", "b"}, {"container", "c", "ref.image=i"}}, "blob b, image i"},
		{"expired image of an image", [][]string{{"image", "i", "expire=" + past, "bref.image=j"}, {"image", "j"}}, "image i, image j"},
		{"its back reference to nobody", [][]string{{"image", "i", "expire=" + past, "bref.image=j"}}, ""},
		{"snapshot of a blob, with parents", [][]string{{"image", "i", "target=b"}, {"blob", "b", "ref.snapshot.d=s"}, {"snapshot/d", "s", "parent=p"}, {"snapshot/d", "p"}, {"snapshot/e", "s"}}, "blob b, image i, snapshot d/p, snapshot d/s"},
		{"a parent doesn't hold its child", [][]string{{"snapshot/d", "p", "root=x"}, {"snapshot/d", "c", "parent=p"}}, "snapshot d/p"},
		{"container", [][]string{{"container", "c", "snapshot=d/s", "ref.content=b", "ref.snapshot.e/x=t"}, {"snapshot/d", "s"}, {"snapshot/e", "t"}, {"blob", "b"}}, "blob b, snapshot d/s, snapshot e/t"},
		{"of a container", [][]string{{"container", "c"}, {"blob", "b", "bref.container=c"}, {"snapshot/d", "s", "bref.container.x=c"}, {"snapshot/d", "t", "bref.container=e"}}, "blob b, snapshot d/s"},
		{"sandbox", [][]string{{"sandbox", "p", "ref.content=b", "ref.image=i", "ref.snapshot.d=s"}, {"blob", "b", "ref.content=c"}, {"blob", "c"}, {"image", "i", "expire=" + past}, {"snapshot/d", "s"}}, "blob b, blob c, image i, snapshot d/s"},
		{"of a snapshot", [][]string{{"snapshot/d", "s", "root=x"}, {"blob", "b", "bref.snapshot.d=s"}, {"snapshot/e", "t", "bref.content=b"}}, "blob b, snapshot d/s, snapshot e/t"},
		{"back references to the dead", [][]string{{"snapshot/d", "s"}, {"blob", "b", "bref.snapshot.d=s"}}, ""},
		{"a circle", [][]string{{"blob", "a", "ref.content=b"}, {"blob", "b", "ref.content=a"}}, ""},
		{"a circle that is held", [][]string{{"blob", "a", "ref.content=b"}, {"blob", "b", "ref.content=a"}, {"image", "i", "target=b"}}, "blob a, blob b, image i"},
		{"ingest", [][]string{{"ingest", "i", "expireat=1h", "expected=b"}, {"blob", "b"}}, "blob b, ingest i"},
		{"expired ingest", [][]string{{"ingest", "i", "expireat=-1h", "expected=b"}, {"blob", "b"}}, ""},
		{"ingest without end", [][]string{{"ingest", "i", "expected=b"}, {"blob", "b"}}, ""},
		{"leased ingest", [][]string{{"ingest", "i", "expected=b"}, {"blob", "b"}, {"lease", "l", "holds=ingests:i"}}, "blob b, ingest i, lease l"},
		{"lease", [][]string{
			{"lease", "l", "holds=content:b", "holds=snapshots/d:s", "holds=images:i"},
			{"blob", "b", "ref.content=c"}, {"blob", "c"}, {"snapshot/d", "s", "parent=p", "ref.content=e"}, {"snapshot/d", "p"}, {"blob", "e"},
			{"image", "i", "expire=" + past, "target=f"}, {"blob", "f"},
		}, "blob b, blob c, blob e, blob f, image i, lease l, snapshot d/p, snapshot d/s"},
		{"flat lease", [][]string{
			{"lease", "l", "flat=x", "holds=content:b", "holds=snapshots/d:s", "holds=images:i"},
			{"blob", "b", "ref.content=c"}, {"blob", "c"}, {"snapshot/d", "s", "parent=p", "ref.content=e"}, {"snapshot/d", "p", "ref.content=e"}, {"blob", "e"},
			{"image", "i", "expire=" + past, "target=f", "ref.content=c"}, {"blob", "f", "ref.content=c"},
			{"blob", "g", "bref.content=b"},
		}, "blob b, blob f, image i, lease l, snapshot d/p, snapshot d/s"},
		{"flat and not", [][]string{{"lease", "l", "flat=x", "holds=content:b"}, {"lease", "m", "holds=content:b"}, {"blob", "b", "ref.content=c"}, {"blob", "c"}}, "blob b, blob c, lease l, lease m"},
		{"expired lease", [][]string{{"lease", "l", "expire=" + past, "holds=content:b"}, {"blob", "b"}}, ""},
		{"lease that will expire", [][]string{{"lease", "l", "expire=" + future, "holds=content:b"}, {"blob", "b"}}, "blob b, lease l"},
		{"lease that never expires", [][]string{{"lease", "l", "expire=soon", "holds=content:b"}, {"blob", "b"}}, "blob b, lease l"},
		{"condition that holds", [][]string{{"image", "i", "cond.snapshot.d=usedat<1h|s"}, {"snapshot/d", "s", "cond.value-usedat=" + recently}}, "image i, snapshot d/s"},
		{"condition that doesn't", [][]string{{"image", "i", "cond.snapshot.d=usedat>1h|s"}, {"snapshot/d", "s", "cond.value-usedat=" + recently}}, "image i"},
		{"one condition of two", [][]string{{"image", "i", "cond.snapshot.d=usedat>1h,usedat<1h|s"}, {"snapshot/d", "s", "cond.value-usedat=" + recently}}, "image i, snapshot d/s"},
		{"condition without a value", [][]string{{"image", "i", "cond.snapshot.d=usedat<1h|s"}, {"snapshot/d", "s"}}, "image i"},
		{"condition of the dead", [][]string{{"blob", "b", "cond.snapshot.d=usedat<1h|s"}, {"snapshot/d", "s", "cond.value-usedat=" + recently}}, ""},
		{"condition of a blob", [][]string{{"blob", "b", "root=x", "cond.snapshot.d/y=usedat<1h|s"}, {"snapshot/d", "s", "cond.value-usedat=" + recently}}, "blob b, snapshot d/s"},
		{"labels that aren't", [][]string{{"image", "i", "target=b"}, {"blob", "b", "ref.contents=c", "ref.stream=c", "ref.snapshot.d.x=s"}, {"blob", "c"}, {"snapshot/d", "s"}}, "blob b, image i"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			for _, r := range c.records {
				w.put("ns", r...)
			}
			w.put("ns2", "blob", "b") // of the same name, elsewhere
			var got []string
			for _, n := range w.live() {
				got = append(got, strings.Replace(n, " ns ", " ", 1))
			}
			if s := strings.Join(got, ", "); s != c.want {
				t.Errorf("got  %s\nwant %s", s, c.want)
			}
		})
	}
}

// TestMarkModel makes random graphs and compares with a model that knows
// nothing of buckets or labels: nodes, edges that it drew itself, and a loop
// until nothing changes.
func TestMarkModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 60 {
		randomGraph(t, rnd)
	}
}

func randomGraph(t *testing.T, rnd *rand.Rand) {
	type edge struct{ from, to string }
	var edges []edge
	roots := make(map[string]bool)
	records := make(map[string][]string)
	var names []string
	const past = "2001-01-01T00:00:00Z"
	for i := range 4 + rnd.IntN(20) {
		kind := []string{"blob", "image", "snapshot/d", "snapshot/e", "container"}[rnd.IntN(5)]
		name := fmt.Sprint(kind, " ", i)
		names = append(names, name)
		records[name] = []string{kind, fmt.Sprint(i)}
		add := func(attr string) { records[name] = append(records[name], attr) }
		switch {
		case kind == "container":
			roots[name] = true
		case kind == "image" && rnd.IntN(4) == 0:
			roots[name] = true
		case kind == "image":
			add("expire=" + past)
		case rnd.IntN(6) == 0:
			add("root=1")
			roots[name] = true
		}
	}
	types := map[string]string{"blob": "content", "image": "image", "snapshot/d": "snapshot.d", "snapshot/e": "snapshot.e", "container": "container"}
	for n := range 3 * len(names) {
		from, to := names[rnd.IntN(len(names))], names[rnd.IntN(len(names))]
		fromKind, fromID, _ := strings.Cut(from, " ")
		toKind, toID, _ := strings.Cut(to, " ")
		e := edge{from, to}
		switch how := rnd.IntN(3); {
		case how == 0 && toKind != "container":
			records[from] = append(records[from], fmt.Sprintf("ref.%s/%d=%s", types[toKind], n, toID))
		case how == 1 && toKind != "container":
			records[to] = append(records[to], fmt.Sprintf("bref.%s/%d=%s", types[fromKind], n, fromID))
			// What isn't expired is a root anyway.
		case how == 2 && fromKind == toKind && strings.HasPrefix(toKind, "snapshot") && !slices.ContainsFunc(records[from], isParent):
			records[from] = append(records[from], "parent="+toID)
		default:
			continue
		}
		edges = append(edges, e)
	}
	want := maps.Clone(roots)
	for changed := true; changed; {
		changed = false
		for _, e := range edges {
			if want[e.from] && !want[e.to] {
				want[e.to], changed = true, true
			}
		}
	}
	w := newWorld(t)
	for _, r := range records {
		w.put("ns", r...)
	}
	var wanted []string
	for name := range want {
		kind, id, _ := strings.Cut(name, " ")
		driver, isSnapshot := strings.CutPrefix(kind, "snapshot/")
		switch {
		case kind == "container":
		case isSnapshot:
			wanted = append(wanted, fmt.Sprintf("snapshot ns %s/%s", driver, id))
		default:
			wanted = append(wanted, kind+" ns "+id)
		}
	}
	slices.Sort(wanted)
	if got := w.live(); !slices.Equal(got, wanted) {
		t.Fatalf("records %v\ngot  %v\nwant %v", records, got, wanted)
	}
}

func isParent(attr string) bool { return strings.HasPrefix(attr, "parent=") }

// TestCollectFollowsTheGraph is one whole image from pull to removal.
func TestCollectFollowsTheGraph(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	pull := lease(t, sp, "pull")
	chain(t, mem(t, pull), "layer1", "layer2")
	blob := write(t, pull, "layer", nil)
	config := write(t, pull, "config", map[string]string{labelPrefix + "ref.snapshot.mem": "layer2"})
	manifest := write(t, pull, "manifest", map[string]string{
		labelPrefix + "ref.content.config": string(config), labelPrefix + "ref.content.l.0": string(blob),
	})
	must[Image](t)(pull.CreateImage(t.Context(), image("img", manifest, nil)))
	ok(t, pull.DeleteLease(t.Context(), "pull"))
	before := h.commits.Load()
	if c := h.collect(); c.Blobs+c.Snapshots+c.Images+c.Leases+c.Ingests > 0 || c.Bytes > 0 || c.Left > 0 {
		t.Errorf("%+v", c)
	}
	if n := h.commits.Load() - before; n != 0 {
		t.Errorf("a collection of nothing took %d commits", n)
	}
	other := h.Space("other")
	w := open(t, other, "ref", WriterOptions{Expected: blob})
	ok(t, w.Commit(t.Context(), 0, blob, map[string]string{labelRoot: "x"}))
	ok(t, sp.DeleteImage(t.Context(), "img", manifest))
	c := h.collect()
	if c.Blobs != 3 || c.Snapshots != 2 || c.Bytes != int64(len("config")+len("manifest")) || c.Elapsed < c.Pause || c.Pause <= 0 {
		t.Errorf("%+v", c)
	}
	equalStrings(t, h.files(), string(blob)) // the other namespace has it
	equalStrings(t, h.drivers["mem"].keys())
	ok(t, other.DeleteBlob(t.Context(), blob))
	h.collect()
	equalStrings(t, h.files())
}
