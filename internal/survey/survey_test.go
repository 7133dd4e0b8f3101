package survey

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/native"
	"github.com/holdfast-dev/holdfast/internal/snapshot/overlay"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

const driver = "overlayfs"

// house is a store on disk by containerd's names.
type house struct {
	t       *testing.T
	srv     *registrytest.Server
	closers []func() error
	Store
}

func newHouse(t *testing.T) *house {
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked with their owners, which needs root")
	}
	h := &house{t: t, srv: registrytest.New(t), Store: Store{Root: t.TempDir()}}
	h.open()
	t.Cleanup(h.close)
	return h
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) path(name string) string { return filepath.Join(h.Root, name) }

func (h *house) open() {
	over, err := overlay.Open(h.path("io.containerd.snapshotter.v1.overlayfs"), overlay.Options{})
	h.must(err)
	plain, err := native.Open(h.path("io.containerd.snapshotter.v1.native"), native.Options{})
	h.must(err)
	h.Drivers = map[string]snapshot.Driver{driver: over, "native": plain}
	h.Content, err = content.Open(h.path("io.containerd.content.v1.content"), h.path("trash"), content.Options{})
	h.must(err)
	h.must(os.MkdirAll(h.path("io.containerd.metadata.v1.bolt"), 0o700))
	h.DB, err = meta.Open(h.t.Context(), h.path("io.containerd.metadata.v1.bolt/meta.db"), h.Content, h.Drivers, meta.Options{NoSync: true})
	h.must(err)
	h.closers = []func() error{over.Close, plain.Close, h.Content.Close, h.DB.Close}
}

func (h *house) close() {
	for i := range h.closers {
		h.must(h.closers[len(h.closers)-1-i]())
	}
	h.closers = nil
}

// pull pulls into a namespace; every registry is ours, whatever its name.
func (h *house) pull(ns, reference string, req pull.Request) {
	h.t.Helper()
	client := registry.New(registry.Options{Hosts: func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "http", Host: h.srv.Host(), Path: "/v2", Capabilities: hosts.Everything}}, nil
	}})
	p := pull.New(h.DB, func(reference string, s registry.Session) (*registry.Repository, string, string, error) {
		r, err := ref.Parse(reference)
		h.must(err)
		repo, err := client.Repository(r, s)
		return repo, r.Host, r.Path, err
	}, nil, pull.Options{})
	_, err := p.Pull(h.t.Context(), h.DB.Space(ns), reference, req)
	h.must(errors.Join(err, p.Close()))
}

func layer(text string) registrytest.Layer {
	return registrytest.Layer{Data: layertest.Archive(layertest.Dir(text, 0o755), layertest.File(text+"/file", text))}
}

func (h *house) create(sp meta.Space, n snapshot.New) {
	h.t.Helper()
	snaps, err := sp.Snapshots(driver)
	h.must(err)
	made, release, err := snaps.Create(h.t.Context(), n)
	h.must(err)
	defer release()
	h.must(sp.Update(h.t.Context(), func(tx *meta.Tx) error { return tx.RecordSnapshot(made[0]) }))
}

// container writes the record of a container as containerd would, into the
// closed file.
func (h *house) container(ns, id, image, snapshotKey string) {
	h.t.Helper()
	h.close()
	db, err := bolt.Open(h.path("io.containerd.metadata.v1.bolt/meta.db"), 0o600, nil)
	h.must(err)
	h.must(db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("v1"))
		for _, name := range []string{ns, "containers", id} {
			if b, err = b.CreateBucketIfNotExists([]byte(name)); err != nil {
				return err
			}
		}
		return errors.Join(b.Put([]byte("image"), []byte(image)), b.Put([]byte("snapshotter"), []byte(driver)), b.Put([]byte("snapshotKey"), []byte(snapshotKey)))
	}))
	h.must(db.Close())
	h.open()
}

// full has one of everything: images of one and of two platforms, in two
// namespaces that share blobs, a container, views, leases, ingests.
func full(t *testing.T) *house {
	h := newHouse(t)
	base, top := layer("base"), layer("top")
	amd := registrytest.Format{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}
	arm := registrytest.Format{Platform: ocispec.Platform{OS: "linux", Architecture: "arm64"}}
	h.srv.PushFormat("single", "1", amd, base)
	h.srv.PushIndex("many", "1", h.srv.PushFormat("many", "", amd, base, top), h.srv.PushFormat("many", "", arm, base, layer("arm")))
	h.pull("default", "registry.example/single:1", pull.Request{Snapshotter: driver})
	h.pull("k8s.io", "registry.example/many:1", pull.Request{Snapshotter: driver, Platform: "linux/amd64",
		Labels: map[string]string{"io.cri-containerd.image": "managed"}})

	chain := base.Data // one layer: the chain is its own digest
	id := digest.FromBytes(chain).String()
	h.create(h.DB.Space("default"), snapshot.New{Key: "web", Parent: id, Kind: snapshot.KindActive})
	h.container("default", "web", "registry.example/single:1", "web")

	sp := h.DB.Space("default")
	_, err := sp.CreateLease(t.Context(), meta.Lease{ID: "forever"})
	h.must(err)
	_, err = sp.CreateLease(t.Context(), meta.Lease{ID: "pull-1", Labels: map[string]string{
		"containerd.io/gc.expire": "2099-01-01T00:00:00Z", "io.holdfast/pull.ref": "registry.example/big:1"}})
	h.must(err)
	h.create(sp.Leased("forever"), snapshot.New{Key: "look", Parent: id, Kind: snapshot.KindView})
	h.create(sp, snapshot.New{Key: "nobody's", Kind: snapshot.KindActive, Labels: map[string]string{
		"containerd.io/gc.bref.image.any": "registry.example/single:1"}})
	h.put(sp, "pinned", map[string]string{"containerd.io/gc.root": "yes"})
	h.put(sp, "loose", nil)
	w, err := sp.Leased("pull-1").OpenWriter(t.Context(), "layer-sha256:half", meta.WriterOptions{Total: 1000})
	h.must(err)
	t.Cleanup(func() { w.Close() })
	_, err = w.Write(make([]byte, 600))
	h.must(err)
	h.must(sp.Leased("pull-1").Update(t.Context(), func(tx *meta.Tx) error {
		return tx.AddIngest("layer-sha256:later", digest.FromString("later"))
	}))
	return h
}

func (h *house) put(sp meta.Space, text string, labels map[string]string) {
	h.t.Helper()
	w, err := sp.OpenWriter(h.t.Context(), "put-"+text, meta.WriterOptions{})
	h.must(err)
	_, err = w.Write([]byte(text))
	h.must(err)
	h.must(w.Commit(h.t.Context(), 0, digest.FromString(text), labels))
	h.must(w.Close())
}

// TestTree compares with testdata/<name>.txt, a line for each node: kind,
// name, place, size, note, holders. Sizes that the file system has a say in
// are only told from none.
func TestTree(t *testing.T) {
	h := full(t)
	for _, test := range []struct{ file, ns string }{{"all", ""}, {"default", "default"}, {"k8s.io", "k8s.io"}, {"none", "elsewhere"}} {
		t.Run(test.file, func(t *testing.T) {
			nodes, err := Tree(t.Context(), h.Store, test.ns)
			h.must(err)
			var b strings.Builder
			for i, n := range nodes {
				if n.Note == "" {
					t.Errorf("nothing is said of %s", n.Name)
				}
				if i > 0 && n.Depth > nodes[i-1].Depth+1 || i > 0 && n.Depth == 0 {
					t.Errorf("%s has depth %d after %d", n.Name, n.Depth, nodes[i-1].Depth)
				}
				size := fmt.Sprint(n.Size)
				if n.Size > 0 && (n.Kind == "snapshot" || n.Kind == "file") {
					size = "some"
				}
				fmt.Fprintf(&b, "%s%s %s | %s | %s | %s | %s\n", strings.Repeat("  ", n.Depth), n.Kind, n.Name, n.Path, size, n.Note, strings.Join(n.Holders, ", "))
			}
			got := strings.ReplaceAll(b.String(), h.Root, "ROOT")
			golden := filepath.Join("testdata", test.file+".txt")
			if *rewrite {
				h.must(os.WriteFile(golden, []byte(got), 0o644))
			}
			want, err := os.ReadFile(golden)
			h.must(err)
			if got != string(want) {
				t.Errorf("the tree is\n%s\nwant (regenerate with -rewrite)\n%s", got, want)
			}
			for _, n := range nodes {
				if n.Path == "" || n.Kind == "ingest" && n.Size < 0 {
					continue
				}
				if _, err := os.Lstat(n.Path); err != nil {
					t.Errorf("%s does not lie there: %v", n.Name, err)
				}
			}
		})
	}
}

// TestDamagedTree shows what is broken and goes on.
func TestDamagedTree(t *testing.T) {
	h := newHouse(t)
	img := h.srv.Push("demo", "1", layer("one"))
	h.pull("default", "registry.example/demo:1", pull.Request{Snapshotter: driver})
	chain := img.Layers[0].Digest
	snaps, err := h.DB.Space("default").Snapshots(driver)
	h.must(err)
	dir, _, err := snaps.Dir(t.Context(), chain.String())
	h.must(err)
	h.must(os.RemoveAll(filepath.Dir(dir)))
	h.must(os.Remove(h.path("io.containerd.content.v1.content/blobs/sha256/" + img.Config.Digest.Encoded())))
	delete(h.Drivers, "native")
	nodes, err := Tree(t.Context(), h.Store, "default")
	h.must(err)
	notes := make(map[string]string)
	for _, n := range nodes {
		notes[n.Kind+" "+n.Name] = n.Note
	}
	for name, want := range map[string]string{
		"snapshot " + chain.String():             "gone from the snapshotter: run `holdfast store check`",
		"blob " + img.Config.Digest.String():     "part of no image that is here; its file is gone: run `holdfast store check`",
		"blob " + img.Descriptor.Digest.String(): "manifest",
	} {
		if notes[name] != want {
			t.Errorf("%s: %q, want %q", name, notes[name], want)
		}
	}

	h.Drivers = nil
	nodes, err = Tree(t.Context(), h.Store, "")
	h.must(err)
	if last := nodes[len(nodes)-1]; last.Note != "of a snapshotter that this daemon doesn't offer, in default" {
		t.Errorf("snapshots of a driver that is not there: %+v", last)
	}
}

func TestCancelled(t *testing.T) {
	h := newHouse(t)
	h.srv.Push("demo", "1", layer("one"))
	h.pull("default", "registry.example/demo:1", pull.Request{Snapshotter: driver})
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if _, err := Tree(ctx, h.Store, ""); !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
}
