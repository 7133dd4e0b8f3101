package pull

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/native"
	"github.com/holdfast-dev/holdfast/internal/snapshot/overlay"
)

const testNamespace = "default"

// drivers are those that everything is tried with.
var drivers = []string{"overlayfs", "native"}

// settings of a house. The zero value is one registry at its word, and the Puller's defaults.
type settings struct {
	mirrors   []string // asked before the registry, in order: host:port
	downloads int
	limits    layer.Limits
	dir       string // that the store lies in; default: one of its own
}

// house is a whole store on disk, a Puller over it, and a registry.
type house struct {
	t       *testing.T
	dir     string
	set     settings
	srv     *registrytest.Server
	db      *meta.DB
	blobs   *content.Store
	drivers map[string]snapshot.Driver
	puller  *Puller
	closers []func() error

	metaCommits, indexCommits atomic.Int64 // transactions of meta.db and metadata.db
	syncs                     atomic.Int64 // of the whole file system
}

// newHouse opens an empty store. When the test ends it is closed, and must be whole.
func newHouse(t *testing.T, set settings) *house {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked with their owners, which needs root")
	}
	if set.dir == "" {
		set.dir = t.TempDir()
	}
	h := &house{t: t, dir: set.dir, set: set, srv: registrytest.New(t)}
	h.open()
	t.Cleanup(h.close)
	return h
}

func (h *house) open() {
	h.t.Helper()
	var err error
	must := func(err error) {
		h.t.Helper()
		if err != nil {
			h.t.Fatal(err)
		}
	}
	h.blobs, err = content.Open(h.path("content"), h.path("trash"), content.Options{})
	must(err)
	h.closers = append(h.closers, h.blobs.Close)
	committed := func() { h.indexCommits.Add(1) }
	over, err := overlay.Open(h.path("overlayfs"), overlay.Options{Committed: committed})
	must(err)
	h.closers = append(h.closers, over.Close)
	plain, err := native.Open(h.path("native"), native.Options{Committed: committed})
	must(err)
	h.closers = append(h.closers, plain.Close)
	h.drivers = map[string]snapshot.Driver{"overlayfs": over, "native": plain}
	h.db, err = meta.Open(h.t.Context(), h.path("meta.db"), h.blobs, h.drivers, meta.Options{
		NoSync:    true, // power cuts are for test/crash
		Committed: func(int) { h.metaCommits.Add(1) },
	})
	must(err)
	h.closers = append(h.closers, h.db.Close)
	fs, err := durable.OpenFS(h.dir)
	must(err)
	h.closers = append(h.closers, fs.Close)
	client := registry.New(registry.Options{Hosts: h.hosts, Stall: 300 * time.Millisecond, Backoff: time.Millisecond})
	remote := func(reference string, s registry.Session) (*registry.Repository, string, string, error) {
		r, err := ref.Parse(reference)
		if err != nil {
			return nil, "", "", err
		}
		repo, err := client.Repository(r, s)
		return repo, r.Host, r.Path, err
	}
	h.puller = New(h.db, remote, []Disk{testDisk{fs, &h.syncs}}, Options{
		Downloads: h.set.downloads, Limits: h.set.limits,
		Content: h.path("content"), Snapshots: map[string]string{"overlayfs": h.path("overlayfs"), "native": h.path("native")},
		Log: slog.New(slog.NewTextHandler(h.t.Output(), nil)),
	})
	h.closers = append(h.closers, h.puller.Close)
}

// testDisk is the daemon's disk, and counts.
type testDisk struct {
	fs    *durable.FS
	count *atomic.Int64
}

func (d testDisk) Begin() func(context.Context) error {
	mark := d.fs.Mark()
	return func(ctx context.Context) error {
		d.count.Add(1)
		return d.fs.SyncSince(ctx, mark)
	}
}

func (h *house) hosts(_ context.Context, host string) (list []hosts.Host, err error) {
	for _, m := range append(slices.Clone(h.set.mirrors), host) {
		list = append(list, hosts.Host{Scheme: "http", Host: m, Path: "/v2", Capabilities: hosts.Everything})
	}
	return list, nil
}

func (h *house) path(name string) string { return filepath.Join(h.dir, name) }

// close checks the store and lets it go.
func (h *house) close() {
	if h.puller == nil {
		return
	}
	h.closeParts(1) // the Puller: what it still does ends
	h.check()
	h.closeParts(len(h.closers))
	h.puller = nil
}

func (h *house) closeParts(n int) {
	h.t.Helper()
	for range n {
		last := len(h.closers) - 1
		if err := h.closers[last](); err != nil {
			h.t.Error(err)
		}
		h.closers = h.closers[:last]
	}
}

// reopen is a restart of the daemon.
func (h *house) reopen() {
	h.t.Helper()
	h.close()
	h.open()
}

// check is the whole consistency check after a collection: every record has its bytes and every byte a record.
func (h *house) check() {
	h.t.Helper()
	ctx := context.Background()
	h.collect()
	rep, err := fsck.Check(ctx, fsck.Store{DB: h.db, Content: h.blobs, Drivers: h.drivers}, fsck.Options{Deep: true})
	if err != nil {
		h.t.Errorf("check the store: %v", err)
	}
	for _, f := range rep.Findings {
		h.t.Errorf("store: %s %s %s: %s", f.Class, f.Namespace, f.Subject, f.Detail)
	}
	h.checkDirectories(ctx)
}

func (h *house) collect() {
	h.t.Helper()
	if _, err := h.db.Collect(context.Background()); err != nil {
		h.t.Errorf("collect: %v", err)
	}
}

// checkDirectories looks for snapshot directories that the driver's index doesn't know.
func (h *house) checkDirectories(ctx context.Context) {
	h.t.Helper()
	for name, d := range h.drivers {
		known := 0
		for _, err := range d.Walk(ctx) {
			if err != nil {
				h.t.Fatal(err)
			}
			known++
		}
		entries, err := os.ReadDir(filepath.Join(h.path(name), "snapshots"))
		if err != nil {
			h.t.Fatal(err)
		}
		if len(entries) != known {
			h.t.Errorf("driver %s knows %d snapshots and has %d directories", name, known, len(entries))
		}
	}
}

// dump is every record.
func (h *house) dump() meta.Dump {
	h.t.Helper()
	d, err := h.db.Dump(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	return d
}

func (h *house) space() meta.Space { return h.db.Space(testNamespace) }

// ref is the name of an image in the registry.
func (h *house) ref(name string) string { return h.srv.Host() + "/" + name }

// pull pulls name from the registry.
func (h *house) pull(name string, req Request) error {
	_, err := h.puller.Pull(h.t.Context(), h.space(), h.ref(name), req)
	return err
}

func (h *house) mustPull(name string, req Request) {
	h.t.Helper()
	if err := h.pull(name, req); err != nil {
		h.t.Fatal(err)
	}
}

// push puts an image for this machine into the registry.
func (h *house) push(repo, tag string, layers ...registrytest.Layer) registrytest.Image {
	return h.srv.PushFormat(repo, tag, registrytest.Format{Platform: host()}, layers...)
}

func host() ocispec.Platform { return ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH} }

// requests counts those for a blob.
func (h *house) requests(desc ocispec.Descriptor) int {
	return h.srv.Count("/blobs/" + desc.Digest.String())
}

// gzipped packs a layer archive.
func gzipped(archive []byte) registrytest.Layer {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(archive)
	w.Close()
	return registrytest.Layer{Data: buf.Bytes(), DiffID: digest.FromBytes(archive)}
}

func zstandard(archive []byte) registrytest.Layer {
	w, _ := zstd.NewWriter(nil)
	return registrytest.Layer{Data: w.EncodeAll(archive, nil), DiffID: digest.FromBytes(archive), MediaType: ocispec.MediaTypeImageLayerZstd}
}

func plain(archive []byte) registrytest.Layer {
	return registrytest.Layer{Data: archive, DiffID: digest.FromBytes(archive), MediaType: ocispec.MediaTypeImageLayer}
}

// noise is a body that doesn't compress, the same for the same seed.
func noise(seed uint64, size int) string {
	rnd := rand.New(rand.NewPCG(seed, 7))
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(rnd.Uint32())
	}
	return string(p)
}

// simple is a packed layer of a few files and size bytes, all of its own.
func simple(seed uint64, size int) registrytest.Layer {
	dir := fmt.Sprintf("layer%d", seed)
	return gzipped(layertest.Archive(
		layertest.Dir(dir, 0o755),
		layertest.File(dir+"/data", noise(seed, size)),
		layertest.File("shared/last", fmt.Sprint(seed)), // in a directory that has no entry
		layertest.Symlink(dir+"/link", "data"),
		layertest.Link(dir+"/hard", dir+"/data"),
	))
}

// many makes n simple layers of 1 KiB.
func many(from uint64, n int) (layers []registrytest.Layer) {
	for i := range n {
		layers = append(layers, simple(from+uint64(i), 1024))
	}
	return layers
}

// whole fails unless the image is here with all that belongs to it, and nothing of the pull is left.
func (h *house) whole(name, driver string) image.Image {
	h.t.Helper()
	h.settled()
	return h.complete(testNamespace, name, driver)
}

// complete fails unless the image is here with its documents, layers and, if driver isn't "", snapshots.
func (h *house) complete(ns, name, driver string) image.Image {
	h.t.Helper()
	ctx, sp := h.t.Context(), h.db.Space(ns)
	rec, err := sp.Image(ctx, h.ref(name))
	if err != nil {
		h.t.Fatal(err)
	}
	img, err := image.Load(ctx, storeDocuments{sp}, rec.Target, oci.Host())
	if err != nil {
		h.t.Fatal(err)
	}
	if driver == "" {
		return img
	}
	snaps, err := sp.Snapshots(driver)
	if err != nil {
		h.t.Fatal(err)
	}
	parent := ""
	for i, l := range img.Layers {
		info, err := snaps.Stat(ctx, l.ChainID.String())
		if err != nil {
			h.t.Fatalf("layer %d: %v", i, err)
		}
		if info.Kind != snapshot.KindCommitted || info.Parent != parent {
			h.t.Errorf("layer %d: snapshot is %s with parent %q, want a committed one with %q", i, info.Kind, info.Parent, parent)
		}
		if info.Labels[oci.LabelDiffID] != l.DiffID.String() {
			h.t.Errorf("layer %d: labels %v don't hold its diffID", i, info.Labels)
		}
		parent = l.ChainID.String()
		if b, err := sp.Blob(ctx, l.Desc.Digest); err == nil && b.Labels[oci.LabelUncompressed] != l.DiffID.String() {
			h.t.Errorf("layer %d: the blob's labels %v don't hold its diffID", i, b.Labels)
		}
	}
	return img
}

type storeDocuments struct{ sp meta.Space }

func (d storeDocuments) ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	return d.sp.ReadBlob(ctx, desc, oci.MaxDocument)
}

// settled fails if a pull has left a lease, an ingest or an active snapshot.
func (h *house) settled() {
	h.t.Helper()
	d := h.dump()
	for _, l := range d.Leases {
		h.t.Errorf("lease %s is left, holding %v", l.ID, l.Resources)
	}
	for _, in := range d.Ingests {
		h.t.Errorf("ingest %s is left", in.Ref)
	}
	for _, s := range d.Snapshots {
		if strings.HasPrefix(s.Key, "extract-") {
			h.t.Errorf("active snapshot %s is left", s.Key)
		}
	}
}

// nothing fails if a failed pull has committed anything.
func (h *house) nothing() {
	h.t.Helper()
	d := h.dump()
	for _, img := range d.Images {
		h.t.Errorf("image %s is recorded", img.Name)
	}
	for _, b := range d.Blobs {
		h.t.Errorf("blob %s is recorded", b.Digest)
	}
	for _, s := range d.Snapshots {
		h.t.Errorf("snapshot %s is recorded", s.Key)
	}
}

// file reads a file of a layer's own directory.
func (h *house) file(driver string, chain digest.Digest, name string) string {
	h.t.Helper()
	snaps, err := h.space().Snapshots(driver)
	if err != nil {
		h.t.Fatal(err)
	}
	dir, _, err := snaps.Dir(h.t.Context(), chain.String())
	if err != nil {
		h.t.Fatal(err)
	}
	body, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		h.t.Error(err)
	}
	return string(body)
}

// watch collects events, and tells of the first that matches.
type watch struct {
	mu   sync.Mutex
	all  []Event
	want func(Event) bool
	seen chan struct{}
	once sync.Once
}

func watchFor(want func(Event) bool) *watch { return &watch{want: want, seen: make(chan struct{})} }

func (w *watch) hear(e Event) {
	w.mu.Lock()
	w.all = append(w.all, e)
	w.mu.Unlock()
	if w.want(e) {
		w.once.Do(func() { close(w.seen) })
	}
}

// stages lists the stages that desc went through.
func (w *watch) stages(desc digest.Digest) (list []Stage) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.all {
		if e.Desc.Digest == desc && (len(list) == 0 || list[len(list)-1] != e.Stage) {
			list = append(list, e.Stage)
		}
	}
	return list
}

// wait fails the test when ch isn't closed in time.
func wait(t *testing.T, ch <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(20 * time.Second):
		t.Fatalf("no %s", what)
	}
}

// offset matches an event that at least n bytes of desc are here.
func offset(desc digest.Digest, n int64) func(Event) bool {
	return func(e Event) bool { return e.Stage == StageFetching && e.Desc.Digest == desc && e.Offset >= n }
}

func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

// wantError fails unless err says all of parts.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one with %q", parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q doesn't hold %q", err, part)
		}
	}
}
