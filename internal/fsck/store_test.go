package fsck

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
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

// soon is patience enough for what no writer is going to change.
var soon = Options{Patience: time.Millisecond}

// house is a store on disk with a registry to pull from.
type house struct {
	t      *testing.T
	dir    string
	srv    *registrytest.Server
	puller *pull.Puller
	Store
}

func newHouse(t *testing.T) *house {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked with their owners, which needs root")
	}
	h := &house{t: t, dir: t.TempDir(), srv: registrytest.New(t)}
	h.open()
	t.Cleanup(h.close)
	return h
}

func (h *house) path(parts ...string) string {
	return filepath.Join(append([]string{h.dir}, parts...)...)
}

func (h *house) open() {
	h.t.Helper()
	over, err := overlay.Open(h.path("overlayfs"), overlay.Options{})
	h.must(err)
	plain, err := native.Open(h.path("native"), native.Options{})
	h.must(err)
	h.Drivers = map[string]snapshot.Driver{"overlayfs": over, "native": plain}
	h.Content, err = content.Open(h.path("content"), h.path("trash"), content.Options{})
	h.must(err)
	h.DB, err = meta.Open(h.t.Context(), h.path("meta.db"), h.Content, h.Drivers, meta.Options{NoSync: true})
	h.must(err)
	client := registry.New(registry.Options{Hosts: func(_ context.Context, host string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "http", Host: host, Path: "/v2", Capabilities: hosts.Everything}}, nil
	}})
	h.puller = pull.New(h.DB, func(reference string, s registry.Session) (*registry.Repository, string, string, error) {
		r, err := ref.Parse(reference)
		h.must(err)
		repo, err := client.Repository(r, s)
		return repo, r.Host, r.Path, err
	}, nil, pull.Options{})
}

func (h *house) close() {
	h.puller.Close()
	h.must(h.DB.Close())
	h.must(h.Content.Close())
	for _, d := range h.Drivers {
		h.must(d.Close())
	}
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) sp() meta.Space { return h.DB.Space("default") }

// push puts an image of some layers into the registry.
func (h *house) push(name string, layers ...registrytest.Layer) registrytest.Image {
	platform := ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	return h.srv.PushFormat(name, "1", registrytest.Format{Platform: platform}, layers...)
}

func (h *house) ref(name string) string { return h.srv.Host() + "/" + name + ":1" }

func (h *house) pull(name string, req pull.Request) {
	h.t.Helper()
	_, err := h.puller.Pull(h.t.Context(), h.sp(), h.ref(name), req)
	h.must(err)
}

// layer is a small gzipped layer; text makes it unlike others.
func layer(text string) registrytest.Layer {
	archive := layertest.Archive(layertest.Dir(text, 0o755), layertest.File(text+"/file", text))
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(archive)
	w.Close()
	return registrytest.Layer{Data: buf.Bytes(), DiffID: digest.FromBytes(archive)}
}

func (h *house) blobFile(dgst digest.Digest) string {
	return h.path("content", "blobs", dgst.Algorithm().String(), dgst.Encoded())
}

// chain names the snapshots of layers, bottom first.
func chain(layers ...registrytest.Layer) (names []string) {
	var ids []digest.Digest
	for _, l := range layers {
		ids = append(ids, l.DiffID)
	}
	for _, id := range oci.ChainIDs(ids) {
		names = append(names, id.String())
	}
	return names
}

// record is what meta knows of a snapshot.
func (h *house) record(driver, key string) meta.DumpSnapshot {
	h.t.Helper()
	d, err := h.DB.Dump(h.t.Context())
	h.must(err)
	for _, s := range d.Snapshots {
		if s.Driver == driver && s.Key == key {
			return s
		}
	}
	h.t.Fatalf("no record of snapshot %s", key)
	return meta.DumpSnapshot{}
}

// dirOf is a snapshot's own directory.
func (h *house) dirOf(driver, key string) string {
	h.t.Helper()
	dir, err := h.Drivers[driver].Dir(h.t.Context(), h.record(driver, key).Backend)
	h.must(err)
	return dir
}

func (h *house) check(opts Options) Report {
	h.t.Helper()
	rep, err := Check(h.t.Context(), h.Store, opts)
	h.must(err)
	return rep
}

// finds fails unless a check finds exactly these, each `class namespace subject`.
func (h *house) finds(opts Options, want ...string) {
	h.t.Helper()
	var got []string
	for _, f := range h.check(opts).Findings {
		got = append(got, fmt.Sprint(f.Class, " ", f.Namespace, " ", f.Subject))
		if f.Detail == "" || f.Repair == "" {
			h.t.Errorf("%+v says too little", f)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		h.t.Errorf("found\n %q, want\n %q", got, want)
	}
}
