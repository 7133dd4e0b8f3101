package meta

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestNamespaceNames(t *testing.T) {
	h := newHouse(t, Options{})
	for name, kind := range map[string]func(error) bool{
		"":                      errdefs.IsFailedPrecondition,
		"k8s.io":                nil,
		"a":                     nil,
		"a-b_c.d":               nil,
		"a..b":                  errdefs.IsInvalidArgument,
		"-a":                    errdefs.IsInvalidArgument,
		"a/b":                   errdefs.IsInvalidArgument,
		"a b":                   errdefs.IsInvalidArgument,
		"version":               errdefs.IsInvalidArgument,
		strings.Repeat("a", 76): nil,
		strings.Repeat("a", 77): errdefs.IsInvalidArgument,
	} {
		for what, err := range map[string]error{
			"read":  errOf(h.Space(name).Images(t.Context())),
			"write": errOf(h.Space(name).CreateLease(t.Context(), Lease{})),
		} {
			if kind == nil && err != nil || kind != nil && !kind(err) {
				t.Errorf("%s in %q: %v", what, name, err)
			}
		}
	}
	_, err := h.Space("").Images(t.Context())
	if !strings.Contains(err.Error(), "namespace is required") {
		t.Errorf("%v", err)
	}
}

func TestNamespaces(t *testing.T) {
	h := newHouse(t, Options{})
	ns := must[Namespace](t)(h.Namespace(t.Context(), "nobody"))
	if ns.Name != "nobody" || len(ns.Labels) != 0 {
		t.Errorf("%+v", ns)
	}
	ok(t, h.CreateNamespace(t.Context(), Namespace{Name: "a", Labels: map[string]string{"k": "v", "empty": ""}}))
	is(t, errdefs.IsAlreadyExists, h.CreateNamespace(t.Context(), Namespace{Name: "a"}))
	is(t, errdefs.IsInvalidArgument, h.CreateNamespace(t.Context(), Namespace{Name: "a/b"}))
	is(t, errdefs.IsInvalidArgument, h.CreateNamespace(t.Context(), Namespace{Name: "b", Labels: map[string]string{"k": strings.Repeat("v", 4096)}}))
	must[Lease](t)(h.Space("implicit").CreateLease(t.Context(), Lease{}))
	for _, c := range []struct {
		labels map[string]string
		fields []string
		want   string
		kind   func(error) bool
	}{
		{map[string]string{"l": "1", "k": "2"}, []string{"labels.l"}, "map[k:v l:1]", nil},
		{nil, []string{"labels.l"}, "map[k:v]", nil},
		{nil, []string{"labels"}, "map[k:v]", errdefs.IsInvalidArgument},
		{map[string]string{"x": "y"}, nil, "map[x:y]", nil},
	} {
		_, err := h.UpdateNamespace(t.Context(), Namespace{Name: "a", Labels: c.labels}, c.fields...)
		if c.kind != nil {
			is(t, c.kind, err)
		} else {
			ok(t, err)
		}
		if got := fmt.Sprint(must[Namespace](t)(h.Namespace(t.Context(), "a")).Labels); got != c.want {
			t.Errorf("%v: got %s, want %s", c.fields, got, c.want)
		}
	}
	var names []string
	for _, ns := range must[[]Namespace](t)(h.Namespaces(t.Context())) {
		names = append(names, ns.Name)
	}
	equalStrings(t, names, "a", "implicit")
}

// TestDeleteNamespace: only images, blobs, containers and snapshots keep it.
func TestDeleteNamespace(t *testing.T) {
	h := newHouse(t, Options{})
	is(t, errdefs.IsNotFound, h.DeleteNamespace(t.Context(), "ns"))
	sp := h.Space("ns")
	dgst := write(t, sp, "blob", nil)
	must[Image](t)(sp.CreateImage(t.Context(), image("img", dgst, nil)))
	prepare(t, mem(t, sp), "key", "", nil)
	must[Lease](t)(sp.CreateLease(t.Context(), Lease{}))
	open(t, sp, "ref", WriterOptions{}).Close()
	err := h.DeleteNamespace(t.Context(), "ns")
	is(t, errdefs.IsFailedPrecondition, err)
	for _, word := range []string{"images", "blobs", `snapshots on "mem"`} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%v: not a word about %s", err, word)
		}
	}
	ok(t, sp.DeleteBlob(t.Context(), dgst))
	ok(t, sp.DeleteImage(t.Context(), "img", ""))
	ok(t, mem(t, sp).Remove(t.Context(), "key"))
	h.reopen(func() { raw(t, h.path(), map[string][]byte{"v1|ns|containers|box|image": []byte("img")}) })
	is(t, errdefs.IsFailedPrecondition, h.DeleteNamespace(t.Context(), "ns"))
	h.reopen(func() { rawDelete(t, h.path(), "v1", "ns", "containers", "box") })
	equalStrings(t, refs(t, h), "ns/1/ref")
	ok(t, h.DeleteNamespace(t.Context(), "ns"))
	h.collect()
	equalStrings(t, refs(t, h))
	equalStrings(t, h.files())
	equalStrings(t, h.drivers["mem"].keys())
}

func TestImages(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	dgst, other := digest.FromString("one"), digest.FromString("two")
	good := image("img", dgst, map[string]string{"a": "1"})
	for what, spoil := range map[string]func(*Image){
		"no name":       func(i *Image) { i.Name = "" },
		"no digest":     func(i *Image) { i.Target.Digest = "" },
		"bad digest":    func(i *Image) { i.Target.Digest = "sha256:abc" },
		"no size":       func(i *Image) { i.Target.Size = 0 },
		"negative size": func(i *Image) { i.Target.Size = -1 },
		"no media type": func(i *Image) { i.Target.MediaType = "" },
		"long label":    func(i *Image) { i.Labels = map[string]string{"k": strings.Repeat("v", 4096)} },
		"long name":     func(i *Image) { i.Name = strings.Repeat("n", 1<<16) },
	} {
		img := good
		spoil(&img)
		if _, err := sp.CreateImage(t.Context(), img); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	is(t, errdefs.IsNotFound, errOf(sp.Image(t.Context(), "img")))
	is(t, errdefs.IsNotFound, errOf(sp.UpdateImage(t.Context(), good)))
	is(t, errdefs.IsInvalidArgument, errOf(sp.UpdateImage(t.Context(), Image{})))
	created := must[Image](t)(sp.CreateImage(t.Context(), good))
	is(t, errdefs.IsAlreadyExists, errOf(sp.CreateImage(t.Context(), good)))
	next := image("img", other, map[string]string{"a": "9", "b": "9"})
	next.Target.Annotations = map[string]string{"x": "9"}
	for _, c := range []struct {
		img    Image
		fields []string
		want   string
		kind   func(error) bool
	}{
		{next, []string{"labels.b"}, "map[a:1 b:9] one map[]", nil},
		{next, []string{"annotations.x"}, "map[a:1 b:9] one map[x:9]", nil},
		{good, []string{"annotations", "labels"}, "map[a:1] one map[]", nil},
		{next, []string{"target"}, "map[a:1] two map[x:9]", nil},
		{next, []string{"name"}, "map[a:1] two map[x:9]", errdefs.IsInvalidArgument},
		{good, nil, "map[a:1] one map[]", nil},
	} {
		_, err := sp.UpdateImage(t.Context(), c.img, c.fields...)
		if c.kind != nil {
			is(t, c.kind, err)
		} else {
			ok(t, err)
		}
		got := must[Image](t)(sp.Image(t.Context(), "img"))
		target := map[digest.Digest]string{dgst: "one", other: "two"}[got.Target.Digest]
		if s := fmt.Sprintf("%v %s %v", got.Labels, target, got.Target.Annotations); s != c.want {
			t.Errorf("%v: got %s, want %s", c.fields, s, c.want)
		}
		if !got.Created.Equal(created.Created) {
			t.Error("created has changed")
		}
	}
	is(t, errdefs.IsNotFound, sp.DeleteImage(t.Context(), "img", other))
	ok(t, sp.DeleteImage(t.Context(), "img", dgst))
	is(t, errdefs.IsNotFound, sp.DeleteImage(t.Context(), "img", ""))
}

// TestImagesInTransaction: one transaction reads and deletes several names, or
// none of them.
func TestImagesInTransaction(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	dgst := write(t, sp, "blob", nil)
	for _, name := range []string{"a", "b", "c"} {
		must[Image](t)(sp.CreateImage(t.Context(), image(name, dgst, nil)))
	}
	names := func(all []Image) (list []string) {
		for _, img := range all {
			list = append(list, img.Name)
		}
		return list
	}
	broken := errors.New("broken")
	remove := func(end error) error {
		return sp.Update(t.Context(), func(tx *Tx) error {
			equalStrings(t, names(must[[]Image](t)(tx.Images())), "a", "b", "c")
			ok(t, tx.DeleteImage("a", dgst))
			ok(t, tx.DeleteImage("c", ""))
			is(t, errdefs.IsNotFound, tx.DeleteImage("a", ""))
			_, err := tx.Image("a")
			is(t, errdefs.IsNotFound, err)
			if img := must[Image](t)(tx.Image("b")); img.Target.Digest != dgst {
				t.Errorf("b is %+v", img)
			}
			return end
		})
	}
	if err := remove(broken); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	equalStrings(t, names(must[[]Image](t)(sp.Images(t.Context()))), "a", "b", "c")
	ok(t, remove(nil))
	equalStrings(t, names(must[[]Image](t)(sp.Images(t.Context()))), "b")
}

func TestImageFilters(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	for _, name := range []string{"a", "b", "c"} {
		img := image(name, digest.FromString(name), map[string]string{"l.is": name})
		img.Target.Annotations = map[string]string{"n": name}
		must[Image](t)(sp.CreateImage(t.Context(), img))
	}
	for filter, want := range map[string]string{
		"":                         "[a b c]",
		"name==b":                  "[b]",
		"name!=b":                  "[a c]",
		"labels.l.is==c":           "[c]",
		"annotations.n==a":         "[a]",
		"target.mediatype~=/appl/": "[a b c]",
		fmt.Sprintf("target.digest==%q", digest.FromString("a")): "[a]",
		"target.size": "[]",
		"size==1":     "[]",
	} {
		var names []string
		for _, img := range must[[]Image](t)(sp.Images(t.Context(), filter)) {
			names = append(names, img.Name)
		}
		if got := fmt.Sprint(names); got != want {
			t.Errorf("%s: %s, want %s", filter, got, want)
		}
	}
	is(t, errdefs.IsInvalidArgument, errOf(sp.Images(t.Context(), "name==")))
}

// TestImageLease: only images that expire are leased, also when they begin to.
func TestImageLease(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	expire := map[string]string{labelExpire: "2001-01-01T00:00:00Z"}
	must[Image](t)(sp.CreateImage(t.Context(), image("stays", digest.FromString("x"), nil)))
	must[Image](t)(sp.CreateImage(t.Context(), image("expires", digest.FromString("x"), expire)))
	equalStrings(t, held(t, sp), "images expires")
	must[Image](t)(sp.UpdateImage(t.Context(), image("stays", digest.FromString("x"), expire), "labels"))
	equalStrings(t, held(t, sp), "images expires", "images stays")
	h.collect()
	if n := len(must[[]Image](t)(sp.Images(t.Context()))); n != 2 {
		t.Errorf("%d images", n)
	}
	ok(t, sp.DeleteImage(t.Context(), "expires", ""))
	equalStrings(t, held(t, sp), "images stays")
	ok(t, sp.DeleteLease(t.Context(), "l"))
	h.collect()
	if n := len(must[[]Image](t)(sp.Images(t.Context()))); n != 0 {
		t.Errorf("%d images", n)
	}
}

func TestPutImage(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	var first, second Image
	for _, img := range []*Image{&first, &second} {
		ok(t, sp.Update(t.Context(), func(tx *Tx) (err error) {
			*img, err = tx.PutImage(image("img", digest.FromString("x"), map[string]string{"a": fmt.Sprint(len(first.Name))}))
			return err
		}))
	}
	got := must[Image](t)(sp.Image(t.Context(), "img"))
	if !got.Created.Equal(first.Created) || !got.Updated.Equal(second.Updated) || got.Labels["a"] != "3" {
		t.Errorf("%+v", got)
	}
}

func TestLeases(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	random := must[Lease](t)(sp.CreateLease(t.Context(), Lease{}))
	again := must[Lease](t)(sp.CreateLease(t.Context(), Lease{}))
	if random.ID == "" || random.ID == again.ID || random.Created.IsZero() {
		t.Errorf("%+v %+v", random, again)
	}
	ok(t, sp.DeleteLease(t.Context(), again.ID))
	ok(t, sp.DeleteLease(t.Context(), random.ID))
	must[Lease](t)(sp.CreateLease(t.Context(), Lease{ID: "a", Labels: map[string]string{"k": "1"}}))
	must[Lease](t)(sp.CreateLease(t.Context(), Lease{ID: "b"}))
	is(t, errdefs.IsAlreadyExists, errOf(sp.CreateLease(t.Context(), Lease{ID: "a"})))
	is(t, errdefs.IsInvalidArgument, errOf(sp.CreateLease(t.Context(), Lease{Labels: map[string]string{"k": strings.Repeat("v", 4096)}})))
	for filter, want := range map[string]string{"": "[a b]", "id==b": "[b]", "labels.k==1": "[a]"} {
		var ids []string
		for _, l := range must[[]Lease](t)(sp.Leases(t.Context(), filter)) {
			ids = append(ids, l.ID)
		}
		if got := fmt.Sprint(ids); got != want {
			t.Errorf("%s: %s", filter, got)
		}
	}
	dgst := digest.FromString("x")
	for _, r := range []struct {
		Resource
		kind func(error) bool
	}{
		{Resource{string(dgst), "content"}, nil},
		{Resource{"ref", "ingests"}, nil},
		{Resource{"img", "images"}, nil},
		{Resource{"key", "snapshots/mem"}, nil},
		{Resource{"key/with/slashes", "snapshots/other"}, nil},
		{Resource{"nodigest", "content"}, errdefs.IsInvalidArgument},
		{Resource{"key", "snapshots"}, errdefs.IsInvalidArgument},
		{Resource{"key", "snapshots/"}, errdefs.IsInvalidArgument},
		{Resource{"key", "snapshots/a/b"}, errdefs.IsInvalidArgument},
		{Resource{"img", "images/x"}, errdefs.IsInvalidArgument},
		{Resource{"x", "streams"}, errdefs.IsNotImplemented},
		{Resource{"x", ""}, errdefs.IsNotImplemented},
		{Resource{"", "images"}, errdefs.IsInvalidArgument},
	} {
		for what, err := range map[string]error{
			"add":    sp.AddLeaseResource(t.Context(), "a", r.Resource),
			"delete": errDeleteOnly(r.ID == "", sp.DeleteLeaseResource(t.Context(), "b", r.Resource)),
		} {
			if r.kind == nil && err != nil || r.kind != nil && !r.kind(err) {
				t.Errorf("%s %v: %v", what, r.Resource, err)
			}
		}
		is(t, errdefs.IsNotFound, onlyIf(r.kind == nil, sp.AddLeaseResource(t.Context(), "none", r.Resource)))
		is(t, errdefs.IsNotFound, onlyIf(r.kind == nil, sp.DeleteLeaseResource(t.Context(), "none", r.Resource)))
	}
	a := sp.Leased("a")
	equalStrings(t, held(t, a), "content "+string(dgst), "images img", "ingests ref", "snapshots/mem key", "snapshots/other key/with/slashes")
	ok(t, sp.DeleteLeaseResource(t.Context(), "a", Resource{"key", "snapshots/mem"}))
	equalStrings(t, held(t, a), "content "+string(dgst), "images img", "ingests ref", "snapshots/other key/with/slashes")
	is(t, errdefs.IsNotFound, errOf(sp.LeaseResources(t.Context(), "none")))
	is(t, errdefs.IsNotFound, sp.DeleteLease(t.Context(), "none"))
	is(t, errdefs.IsNotFound, h.Space("elsewhere").DeleteLease(t.Context(), "a"))
}

// onlyIf is err, or what the caller expects when the case isn't of interest.
func onlyIf(of bool, err error) error {
	if of {
		return err
	}
	return errdefs.ErrNotFound
}

// errDeleteOnly: deleting the empty name from a lease finds nothing, which is
// no error.
func errDeleteOnly(empty bool, err error) error {
	if empty && err == nil {
		return errdefs.ErrInvalidArgument
	}
	return err
}

// TestLeaseInOneTransaction: a pull makes its lease and what it holds at once.
func TestLeaseInOneTransaction(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns").Leased("pull")
	ok(t, sp.Update(t.Context(), func(tx *Tx) error {
		if _, err := tx.CreateLease(Lease{ID: "pull"}); err != nil {
			return err
		}
		return tx.AddIngest("ref", "")
	}))
	equalStrings(t, held(t, sp), "ingests ref")
	ok(t, sp.Update(t.Context(), func(tx *Tx) error { return tx.DeleteLease("pull") }))
	is(t, errdefs.IsNotFound, sp.Update(t.Context(), func(tx *Tx) error { return tx.AddIngest("ref", "") }))
}

func TestDump(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	dgst := write(t, sp, "blob", map[string]string{"a": "b"})
	must[Image](t)(sp.CreateImage(t.Context(), image("img", dgst, nil)))
	chain(t, mem(t, sp), "base", "top")
	open(t, sp, "ref", WriterOptions{}).Close()
	h.reopen(func() {
		raw(t, h.path(), map[string][]byte{
			"v1|ns|containers|box|image":       []byte("img"),
			"v1|ns|containers|box|snapshotter": []byte("mem"),
			"v1|ns|containers|box|snapshotKey": []byte("top"),
			"v1|ns|sandboxes|pod|labels|x":     []byte("y"),
		})
	})
	d := must[Dump](t)(h.Dump(t.Context()))
	if len(d.Namespaces) != 1 || len(d.Images) != 1 || len(d.Blobs) != 1 || len(d.Ingests) != 1 || len(d.Snapshots) != 2 ||
		len(d.Leases) != 1 || len(d.Containers) != 1 || len(d.Sandboxes) != 1 {
		t.Fatalf("%+v", d)
	}
	if s := d.Snapshots[0]; s.Key != "base" || s.Driver != "mem" || s.Backend != "ns/2/base" || fmt.Sprint(s.Children) != "[top]" {
		t.Errorf("%+v", s)
	}
	if s := d.Snapshots[1]; s.Parent != "base" {
		t.Errorf("%+v", s)
	}
	if l := d.Leases[0]; l.ID != "l" || len(l.Resources) != 4 {
		t.Errorf("%+v", l)
	}
	if c := d.Containers[0]; c.ID != "box" || c.Image != "img" || c.Driver != "mem" || c.SnapshotKey != "top" {
		t.Errorf("%+v", c)
	}
	if b := d.Blobs[0]; !maps.Equal(b.Labels, map[string]string{"a": "b"}) || b.Namespace != "ns" || b.Size != 4 {
		t.Errorf("%+v", b)
	}
	if i := d.Ingests[0]; i.Ref != "ref" || i.Backend != "ns/1/ref" {
		t.Errorf("%+v", i)
	}
}
