package compat

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// graphs is how many random graphs are collected.
const graphs = 8

// TestSameCollection: of the same random graph of blobs, snapshots, images and
// leases, with every label that holds something, both daemons keep the same.
func TestSameCollection(t *testing.T) {
	t.Parallel()
	first := firstSeed()
	t.Logf("the first seed is %d", first)
	their, our := newRoot(t).start(t, theirs), newRoot(t).start(t, ours)
	kept, made := 0, 0
	for n := range uint64(graphs) {
		g := randomGraph(first + n)
		want, got := g.collect(t, their), g.collect(t, our)
		if want != got {
			t.Errorf("seed %d: ours keeps otherwise (- only containerd, + only ours):%s\nof\n%s", first+n, lineDifferences(want, got), g)
		}
		kept += strings.Count(want, "\n")
		made += len(g.objects)
	}
	t.Logf("of %d objects %d are kept", made, kept)
	if kept == 0 || kept == made {
		t.Errorf("of %d objects %d are kept: the graphs show nothing", made, kept)
	}
	our.mustBeSound(t)
}

// graph is objects to make, in order, in a namespace of its own.
type graph struct {
	ns      string
	objects []object
}

// object is a blob, snapshot, image or lease.
type object struct {
	kind   string // "content", "snapshot", "image" or "lease"
	id     string // of a blob its content; its digest is what others call it
	parent string // of a snapshot; of an image the content of its target
	labels map[string]string
	holds  []leases.Resource // of a lease
}

func (g graph) String() string {
	var b strings.Builder
	for _, o := range g.objects {
		fmt.Fprintf(&b, "%s %s of %q with %q holds %v\n", o.kind, o.name(), o.parent, o.labels, o.holds)
	}
	return b.String()
}

// name is how other objects call it.
func (o object) name() string {
	if o.kind == "content" {
		return digest.FromString(o.id).String()
	}
	return o.id
}

func randomGraph(seed uint64) graph {
	rnd := rand.New(rand.NewPCG(seed, 3))
	g := graph{ns: fmt.Sprintf("graph%d", seed)}
	for i := range 12 {
		g.objects = append(g.objects, object{kind: "content", id: fmt.Sprintf("blob %d of %d", i, seed)})
	}
	for i := range 8 {
		o := object{kind: "snapshot", id: fmt.Sprintf("snapshot%d", i)}
		if i > 0 && rnd.IntN(2) == 0 {
			o.parent = fmt.Sprintf("snapshot%d", rnd.IntN(i))
		}
		g.objects = append(g.objects, o)
	}
	for i := range 3 {
		g.objects = append(g.objects, object{kind: "image", id: fmt.Sprintf("image%d", i), parent: g.objects[rnd.IntN(12)].id})
	}
	for i := range 2 {
		g.objects = append(g.objects, object{kind: "lease", id: fmt.Sprintf("lease%d", i)})
	}
	for i := range g.objects {
		g.label(rnd, &g.objects[i])
	}
	return g
}

// some picks the name of an object of a kind, which need not be there.
func (g graph) some(rnd *rand.Rand, kind string) string {
	names := []string{"nothing"}
	if kind == "content" {
		names[0] = digest.FromString("nothing").String()
	}
	for _, o := range g.objects {
		if o.kind == kind {
			names = append(names, o.name())
		}
	}
	return names[rnd.IntN(len(names))]
}

// label gives an object reasons to stay and to go.
func (g graph) label(rnd *rand.Rand, o *object) {
	const prefix = "containerd.io/gc."
	o.labels = map[string]string{"other": "label"}
	suffix := func() string { return []string{"", ".x", "/y", ".z.0"}[rnd.IntN(4)] }
	when := func() string {
		return time.Now().Add(time.Duration(rnd.IntN(2)*48-24) * time.Hour).UTC().Format(time.RFC3339)
	}
	if o.kind == "lease" {
		if rnd.IntN(2) == 0 {
			o.labels[prefix+"flat"] = "1"
		}
		if rnd.IntN(3) > 0 {
			o.labels[prefix+"expire"] = when()
		}
		for range rnd.IntN(4) {
			kind := []string{"content", "snapshot", "image"}[rnd.IntN(3)]
			typ := map[string]string{"content": "content", "snapshot": "snapshots/" + overlay, "image": "images"}[kind]
			o.holds = append(o.holds, leases.Resource{ID: g.some(rnd, kind), Type: typ})
		}
		return
	}
	for range rnd.IntN(4) {
		switch rnd.IntN(10) {
		case 0:
			if o.kind != "image" {
				o.labels[prefix+"root"] = "yes"
			}
		case 1, 2:
			o.labels[prefix+"ref.content"+suffix()] = g.some(rnd, "content")
		case 3:
			o.labels[prefix+"ref.snapshot."+overlay+[]string{"", "/x"}[rnd.IntN(2)]] = g.some(rnd, "snapshot")
		case 4:
			o.labels[prefix+"ref.image"+suffix()] = g.some(rnd, "image")
		case 5:
			o.labels[prefix+"bref.content"+suffix()] = g.some(rnd, "content")
		case 6:
			o.labels[prefix+"bref.image"+suffix()] = g.some(rnd, "image")
		case 7:
			o.labels[prefix+"bref.snapshot."+overlay+[]string{"", "/x"}[rnd.IntN(2)]] = g.some(rnd, "snapshot")
		case 8:
			if o.kind == "snapshot" {
				o.labels[prefix+"cond.value-usedat"] = when()
			} else {
				o.labels[prefix+"cond.snapshot."+overlay] = []string{"usedat<1h|", "usedat>1h|", "usedat<1h,usedat>36h|"}[rnd.IntN(3)] + g.some(rnd, "snapshot")
			}
		case 9:
			if o.kind == "image" {
				o.labels[prefix+"expire"] = when()
			} else {
				o.labels[prefix+"ref.contents"] = g.some(rnd, "content") // nothing that means something
			}
		}
	}
}

// collect makes the graph under a lease, ends the lease, waits for the
// collection, and lists what is left.
func (g graph) collect(t *testing.T, d *daemon) string {
	t.Helper()
	ctx := in(t, g.ns)
	holder, err := d.client.LeasesService().Create(ctx, leases.WithID("holder"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range g.objects {
		if err := d.create(leases.WithLease(ctx, holder.ID), o); err != nil {
			t.Fatalf("%s: make %s %s: %v", d.kind, o.kind, o.id, err)
		}
	}
	if err := d.client.LeasesService().Delete(ctx, holder, leases.SynchronousDelete); err != nil {
		t.Fatalf("%s: end the lease: %v", d.kind, err)
	}
	return d.left(t, g.ns)
}

func (d *daemon) create(ctx context.Context, o object) error {
	switch o.kind {
	case "content":
		desc := ocispec.Descriptor{Size: int64(len(o.id)), Digest: digest.FromString(o.id)}
		return content.WriteBlob(ctx, d.client.ContentStore(), o.id, bytes.NewReader([]byte(o.id)), desc, content.WithLabels(o.labels))
	case "snapshot":
		service := d.client.SnapshotService(overlay)
		if _, err := service.Prepare(ctx, "making "+o.id, o.parent); err != nil {
			return err
		}
		return service.Commit(ctx, o.id, "making "+o.id, snapshots.WithLabels(o.labels))
	case "image":
		target := ocispec.Descriptor{MediaType: "application/octet-stream", Size: int64(len(o.parent)), Digest: digest.FromString(o.parent)}
		_, err := d.client.ImageService().Create(ctx, images.Image{Name: o.id, Labels: o.labels, Target: target})
		return err
	case "lease":
		l, err := d.client.LeasesService().Create(ctx, leases.WithID(o.id), leases.WithLabels(o.labels))
		for _, r := range o.holds {
			err = errors.Join(err, d.client.LeasesService().AddResource(ctx, l, r))
		}
		return err
	}
	return errdefs.ErrInvalidArgument
}

// left lists the names of all objects of a namespace.
func (d *daemon) left(t *testing.T, ns string) string {
	t.Helper()
	ctx := in(t, ns)
	found := make(map[string]bool)
	err := d.client.ContentStore().Walk(ctx, func(info content.Info) error {
		found["content "+info.Digest.String()] = true
		return nil
	})
	err = errors.Join(err, d.client.SnapshotService(overlay).Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		found["snapshot "+info.Name] = true
		return nil
	}))
	imgs, listing := d.client.ImageService().List(ctx)
	for _, img := range imgs {
		found["image "+img.Name] = true
	}
	err = errors.Join(err, listing)
	list, listing := d.client.LeasesService().List(ctx)
	for _, l := range list {
		found["lease "+l.ID] = true
	}
	if err := errors.Join(err, listing); err != nil {
		t.Fatalf("list what %s keeps: %v", d.kind, err)
	}
	return strings.Join(slices.Sorted(maps.Keys(found)), "\n") + "\n"
}
