package compat

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// other is the daemon that takes over a root.
func (k kind) other() kind {
	if k == ours {
		return theirs
	}
	return ours
}

// TestRootsAreExchanged: a root that one daemon has filled says the same when
// the other one opens it, and again when it goes back.
func TestRootsAreExchanged(t *testing.T) {
	t.Parallel()
	for _, first := range []kind{theirs, ours} {
		t.Run("from "+string(first), func(t *testing.T) {
			srv, r := registrytest.New(t), newRoot(t)
			d := r.start(t, first)
			f := filling{srv: srv, one: push(srv, "one", baseLayer, nextLayer), two: push(srv, "two", baseLayer, sideLayer)}
			f.fill(t, d)
			want, trees := d.records(t), f.trees(t, d)
			f.checkWhole(t, d)
			for round := range 3 {
				d.stop()
				d = r.start(t, d.other())
				if d.kind == ours {
					if err := d.holdfast.Check(); err != nil {
						t.Errorf("round %d: the store is not sound: %v", round, err)
					}
				}
				if got := d.records(t); got != want {
					t.Errorf("round %d: %s finds other records than %s left:%s", round, d.kind, d.other(), lineDifferences(want, got))
				}
				f.checkWhole(t, d)
				for name, before := range trees {
					if lines := before.differences(f.trees(t, d)[name], never); len(lines) > 0 {
						t.Errorf("round %d: %s shows %s otherwise:%s", round, d.kind, name, listing(lines))
					}
				}
			}
			f.finishIngests(t, d)
		})
	}
}

func never(string) bool { return false }

// filling is what a root is filled with.
type filling struct {
	srv      *registrytest.Server
	one, two string // images: one with overlayfs, two with native

	byContainerd bool // pull by containerd's client only
}

const halfWritten = "the first half, the second half"

func (f filling) chain(layers ...[]byte) string {
	var diffIDs []digest.Digest
	for _, layer := range layers {
		diffIDs = append(diffIDs, digest.FromBytes(layer))
	}
	return identity.ChainID(diffIDs).String()
}

// fill leaves something of every kind.
func (f filling) fill(t *testing.T, d *daemon) {
	t.Helper()
	manifest, config := documents(t, f.srv, f.one)
	ctr := func(args ...string) { t.Helper(); d.mustCtr(t, append([]string{"-n", "default"}, args...)...) }
	ctr("namespaces", "create", "blue", "colour=azure", "deep=1")
	ctr("namespaces", "create", "empty")
	if d.kind == ours && !f.byContainerd {
		if _, err := d.holdfast.Ctl("-n", "default", "pull", "--plain-http", f.one); err != nil {
			t.Fatal(err)
		}
	} else {
		ctr("images", "pull", "--local", "--plain-http", f.one)
	}
	ctr("images", "pull", "--local", "--plain-http", "--snapshotter", native, "--label", "team=red", f.two)
	d.mustCtr(t, "-n", "blue", "images", "pull", "--local", "--plain-http", f.one)
	ctr("images", "tag", "--local", f.one, "example.com/other/name:1")
	ctr("images", "label", f.one, "mine=yes", "empty=")
	ctr("content", "label", config, "mine=yes")
	ctr("leases", "create", "--id", "lasting", "--expires", "0", "a=b")
	ctr("leases", "create", "--id", "short", "--expires", "3h", "containerd.io/gc.flat=1")
	ctr("snapshots", "prepare", "work", f.chain(baseLayer, nextLayer))
	ctr("snapshots", "label", "work", "mine=yes")
	ctr("snapshots", "prepare", "made", f.chain(baseLayer))
	ctr("snapshots", "--snapshotter", native, "prepare", "work", f.chain(baseLayer, sideLayer))
	ctr("snapshots", "view", "look", f.chain(baseLayer, nextLayer))
	ctr("snapshots", "label", "look", "containerd.io/gc.root=yes")
	f.write(t, d, overlay, "work")
	f.write(t, d, overlay, "made")
	f.write(t, d, native, "work")
	ctr("snapshots", "commit", "done", "made")
	ctr("snapshots", "label", "done", "containerd.io/gc.root=yes")
	if out := d.ctrInput(t, "forty-two", "-n", "default", "content", "ingest", "upload"); out.code != 0 {
		t.Fatalf("ingest: %s", out.stderr)
	}
	ctr("content", "label", digest.FromString("forty-two").String(), "containerd.io/gc.root=yes")

	ctx := in(t, "default")
	service := d.client.LeasesService()
	for _, resource := range []leases.Resource{
		{ID: manifest, Type: "content"},
		{ID: "work", Type: "snapshots/" + overlay},
		{ID: "a-ref", Type: "ingests"},
		{ID: f.two, Type: "images"},
	} {
		if err := service.AddResource(ctx, leases.Lease{ID: "short"}, resource); err != nil {
			t.Fatalf("add %v to a lease of %s: %v", resource, d.kind, err)
		}
	}
	// One ingest is held by a lease, the other by its expiry.
	for _, lease := range []string{"lasting", ""} {
		ctx := ctx
		if lease != "" {
			ctx = leases.WithLease(ctx, lease)
		}
		w, err := content.OpenWriter(ctx, d.client.ContentStore(), content.WithRef("half "+lease),
			content.WithDescriptor(ocispec.Descriptor{Size: int64(len(halfWritten)), Digest: digest.FromString(halfWritten)}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(halfWritten[:15])); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// write puts a file into an active snapshot.
func (f filling) write(t *testing.T, d *daemon, snapshotter, key string) {
	t.Helper()
	mounts, err := d.client.SnapshotService(snapshotter).Mounts(in(t, "default"), key)
	if err != nil {
		t.Fatal(err)
	}
	dir := harness.TempDir(t)
	if err := mount.All(mounts, dir); err != nil {
		t.Fatal(err)
	}
	defer mount.UnmountAll(dir, 0)
	if err := os.WriteFile(filepath.Join(dir, "etc", "written"), bytes.Repeat([]byte("w"), 5000), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "etc", "release")); err != nil {
		t.Fatal(err)
	}
}

// trees reads what containers would see.
func (f filling) trees(t *testing.T, d *daemon) map[string]tree {
	t.Helper()
	done, err := d.snapshotTree(t, "default", overlay, "done")
	if err != nil {
		t.Fatalf("%s: %v", d.kind, err)
	}
	return map[string]tree{
		f.one:              d.imageTree(t, "default", overlay, f.one),
		f.two:              d.imageTree(t, "default", native, f.two),
		f.one + " in blue": d.imageTree(t, "blue", overlay, f.one),
		"done":             done,
	}
}

// checkWhole: `ctr images check` finds all images complete and unpacked.
func (f filling) checkWhole(t *testing.T, d *daemon) {
	t.Helper()
	for _, c := range []struct{ ns, snapshotter, image string }{{"default", overlay, f.one}, {"default", native, f.two}, {"blue", overlay, f.one}} {
		out := d.mustCtr(t, "-n", c.ns, "images", "check", "--snapshotter", c.snapshotter, "name=="+c.image)
		if !regexp.MustCompile(`complete \(3/3\).* true`).MatchString(out) {
			t.Errorf("%s: image %s in %s is not whole: %s", d.kind, c.image, c.ns, out)
		}
	}
}

// finishIngests goes on with the interrupted ingests and commits them.
func (f filling) finishIngests(t *testing.T, d *daemon) {
	t.Helper()
	for i, lease := range []string{"lasting", ""} {
		ctx := in(t, "default")
		if lease != "" {
			ctx = leases.WithLease(ctx, lease)
		}
		desc := ocispec.Descriptor{Size: int64(len(halfWritten)), Digest: digest.FromString(halfWritten)}
		if i > 0 {
			desc.Digest = "" // it is there by now
		}
		w, err := content.OpenWriter(ctx, d.client.ContentStore(), content.WithRef("half "+lease), content.WithDescriptor(desc))
		if err != nil {
			t.Fatalf("%s: resume an ingest: %v", d.kind, err)
		}
		status, err := w.Status()
		if err != nil || status.Offset != 15 {
			t.Fatalf("%s: resume an ingest: %v, at %d bytes of 15", d.kind, err, status.Offset)
		}
		if _, err := w.Write([]byte(halfWritten[15:])); err != nil {
			t.Fatal(err)
		}
		err = w.Commit(ctx, int64(len(halfWritten)), digest.FromString(halfWritten))
		if i == 0 && err != nil || i > 0 && !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s: commit an ingest: %v", d.kind, err)
		}
		w.Close()
	}
}

// records is everything that a daemon tells of its store, through containerd's
// client, with exact times.
func (d *daemon) records(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	note := func(what string, v any, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s of %s: %v", what, d.kind, err)
		}
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %s\n", what, text)
	}
	names, err := d.client.NamespaceService().List(t.Context())
	note("namespaces", names, err)
	for _, ns := range names {
		ctx := in(t, ns)
		labels, err := d.client.NamespaceService().Labels(ctx, ns)
		note(ns+" labels", labels, err)
		images, err := d.client.ImageService().List(ctx)
		note(ns+" images", images, err)
		note(ns+" blobs", nil, d.client.ContentStore().Walk(ctx, func(info content.Info) error {
			note(ns+" blob", info, nil)
			return nil
		}))
		ingests, err := d.client.ContentStore().ListStatuses(ctx)
		for i := range ingests {
			ingests[i].UpdatedAt = time.Time{} // daemons write it when they notice that the client is gone, a moment later
		}
		slices.SortFunc(ingests, func(x, y content.Status) int { return strings.Compare(x.Ref, y.Ref) })
		note(ns+" ingests", ingests, err)
		for _, snapshotter := range []string{overlay, native} {
			service := d.client.SnapshotService(snapshotter)
			var infos []snapshots.Info
			note(ns+" "+snapshotter, nil, service.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
				infos = append(infos, info)
				return nil
			}))
			for _, info := range infos {
				usage, err := service.Usage(ctx, info.Name)
				note(ns+" "+snapshotter+" snapshot", []any{info, usage}, err)
			}
		}
		list, err := d.client.LeasesService().List(ctx)
		note(ns+" leases", list, err)
		for _, l := range list {
			resources, err := d.client.LeasesService().ListResources(ctx, l)
			slices.SortFunc(resources, func(x, y leases.Resource) int { return strings.Compare(x.Type+x.ID, y.Type+y.ID) })
			note(ns+" lease "+l.ID, resources, err)
		}
	}
	return b.String()
}

// lineDifferences lists the lines that only one of two texts has.
func lineDifferences(want, got string) string {
	var b strings.Builder
	for _, side := range []struct{ sign, of, in string }{{"-", want, got}, {"+", got, want}} {
		has := make(map[string]bool)
		for line := range strings.Lines(side.in) {
			has[line] = true
		}
		for line := range strings.Lines(side.of) {
			if !has[line] {
				fmt.Fprintf(&b, "\n%s %s", side.sign, strings.TrimSuffix(line, "\n"))
			}
		}
	}
	return b.String()
}

// TestCollectionsOnOneRoot: three times to and fro, each daemon removes what
// the other one has pulled, and what is left on disk is what the images left need.
func TestCollectionsOnOneRoot(t *testing.T) {
	t.Parallel()
	srv, r := registrytest.New(t), newRoot(t)
	var references []string
	for i := range 7 {
		own := bytes.Repeat(fmt.Appendf(nil, "%d", i), 3000)
		references = append(references, push(srv, fmt.Sprintf("image%d", i), baseLayer, layertest.Archive(layertest.File("own", string(own)))))
	}
	d := r.start(t, theirs)
	pull := func(i int) {
		t.Helper()
		snapshotter := []string{overlay, native}[i/2%2]
		if d.kind == ours && i%4 < 2 {
			if _, err := d.holdfast.Ctl("-n", "default", "pull", "--plain-http", "--snapshotter", snapshotter, references[i]); err != nil {
				t.Fatal(err)
			}
			return
		}
		d.mustCtr(t, "-n", "default", "images", "pull", "--local", "--plain-http", "--snapshotter", snapshotter, references[i])
	}
	pull(0)
	for round := range 6 {
		d.stop()
		d = r.start(t, d.other())
		pull(round + 1)
		d.mustCtr(t, "-n", "default", "images", "rm", "--sync", references[round])
		snapshotter := []string{overlay, native}[(round+1)/2%2]
		r.expect(t, fmt.Sprintf("round %d, by %s", round, d.kind), 4, map[string]int{snapshotter: 2})
		if out := d.mustCtr(t, "-n", "default", "images", "check", "--snapshotter", snapshotter); strings.Count(out, "complete (3/3)") != 1 || !strings.Contains(out, "true") {
			t.Errorf("round %d: %s says %s", round, d.kind, out)
		}
		d.mustBeSound(t)
	}
	d.mustCtr(t, "-n", "default", "images", "rm", "--sync", references[6])
	r.expect(t, "at the end", 0, nil)
	if d.kind != theirs {
		d.stop()
		d = r.start(t, d.other())
		r.expect(t, "in the end", 0, nil)
	}
}

// expect counts blobs and snapshot directories on disk. Both daemons may
// remove directories a moment after they have answered.
func (r root) expect(t *testing.T, when string, blobs int, directories map[string]int) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		var wrong []string
		count := func(what, pattern string, want int) {
			found, err := filepath.Glob(filepath.Join(r.dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			if len(found) != want {
				wrong = append(wrong, fmt.Sprintf("%d %s, want %d: %s", len(found), what, want, found))
			}
		}
		count("blobs", "io.containerd.content.v1.content/blobs/sha256/*", blobs)
		count("ingests", "io.containerd.content.v1.content/ingest/*", 0)
		count("overlay directories", "io.containerd.snapshotter.v1.overlayfs/snapshots/*", directories[overlay])
		count("native directories", "io.containerd.snapshotter.v1.native/snapshots/*", directories[native])
		if len(wrong) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: %s", when, strings.Join(wrong, "; "))
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}
