package cri

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/cri/image"
	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
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

// house is a whole store on disk, a registry, and the kubelet's connection to
// both services.
type house struct {
	t       *testing.T
	dir     string
	srv     *registrytest.Server
	blobs   *content.Store
	drivers map[string]snapshot.Driver
	db      *meta.DB
	puller  *pull.Puller
	images  runtimeapi.ImageServiceClient
	runtime runtimeapi.RuntimeServiceClient
	commits atomic.Int64 // transactions of meta.db
}

// newHouse opens an empty store. When the test ends it is closed, and must be
// whole.
func newHouse(t *testing.T, opts image.Options) *house {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked with their owners, which needs root")
	}
	h := &house{t: t, dir: t.TempDir(), srv: registrytest.New(t)}
	h.open()
	opts.Disks = image.Disks{ContentDir: h.path("content"), Snapshotters: map[string]image.Snapshotter{}}
	for name, drv := range h.drivers {
		opts.Disks.Snapshotters[name] = image.Snapshotter{Dir: h.path(name), Driver: drv}
	}
	opts.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	srv := grpc.NewServer()
	Register(srv, Options{Images: image.New(h.db, h.puller, opts), Version: "v2.4.2+holdfast.test"})
	h.serve(srv)
	return h
}

func (h *house) open() {
	h.t.Helper()
	var err error
	closing := func(err error, close func() error) {
		h.t.Helper()
		h.must(err)
		h.t.Cleanup(func() { h.must(close()) })
	}
	h.blobs, err = content.Open(h.path("content"), h.path("trash"), content.Options{})
	closing(err, h.blobs.Close)
	over, err := overlay.Open(h.path("overlayfs"), overlay.Options{})
	closing(err, over.Close)
	plain, err := native.Open(h.path("native"), native.Options{})
	closing(err, plain.Close)
	h.drivers = map[string]snapshot.Driver{"overlayfs": over, "native": plain}
	h.db, err = meta.Open(h.t.Context(), h.path("meta.db"), h.blobs, h.drivers, meta.Options{
		NoSync: true, Committed: func(int) { h.commits.Add(1) },
	})
	closing(err, h.db.Close)
	h.t.Cleanup(h.check)
	fs, err := durable.OpenFS(h.dir)
	closing(err, fs.Close)
	client := registry.New(registry.Options{Hosts: plainHTTP, Stall: 5 * time.Second, Backoff: time.Millisecond})
	remote := func(reference string, s registry.Session) (*registry.Repository, string, string, error) {
		r, err := ref.Parse(reference)
		if err != nil {
			return nil, "", "", err
		}
		repo, err := client.Repository(r, s)
		return repo, r.Host, r.Path, err
	}
	h.puller = pull.New(h.db, remote, []pull.Disk{disk{fs}}, pull.Options{})
	closing(nil, h.puller.Close)
}

func plainHTTP(_ context.Context, host string) ([]hosts.Host, error) {
	return []hosts.Host{{Scheme: "http", Host: host, Path: "/v2", Capabilities: hosts.Everything}}, nil
}

// disk is the daemon's.
type disk struct{ fs *durable.FS }

func (d disk) Begin() func(context.Context) error {
	mark := d.fs.Mark()
	return func(ctx context.Context) error { return d.fs.SyncSince(ctx, mark) }
}

func (h *house) serve(srv *grpc.Server) {
	h.t.Helper()
	lis := bufconn.Listen(1 << 20)
	go srv.Serve(lis)
	h.t.Cleanup(srv.Stop)
	conn, err := grpc.NewClient("passthrough:///house", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	h.must(err)
	h.t.Cleanup(func() { conn.Close() })
	h.images, h.runtime = runtimeapi.NewImageServiceClient(conn), runtimeapi.NewRuntimeServiceClient(conn)
}

// check is the whole consistency check after a collection.
func (h *house) check() {
	ctx := context.Background()
	_, err := h.db.Collect(ctx)
	h.must(err)
	rep, err := fsck.Check(ctx, fsck.Store{DB: h.db, Content: h.blobs, Drivers: h.drivers}, fsck.Options{Deep: true, Patience: 10 * time.Millisecond})
	h.must(err)
	for _, f := range rep.Findings {
		h.t.Errorf("store: %s %s %s: %s", f.Class, f.Namespace, f.Subject, f.Detail)
	}
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) path(name string) string { return filepath.Join(h.dir, name) }

func (h *house) space() meta.Space { return h.db.Space(image.Namespace) }

// ref is the name of an image in the registry.
func (h *house) ref(name string) string { return h.srv.Host() + "/" + name }

// push puts an image into the registry that runs as user.
func (h *house) push(repo, tag, user string, layers ...registrytest.Layer) registrytest.Image {
	platform := ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	config := oci.Image{Platform: platform, RootFS: ocispec.RootFS{Type: "layers"}, Config: ocispec.ImageConfig{User: user, Labels: map[string]string{"made-for": repo + tag}}}
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l.Data))
	}
	return h.srv.PushFormat(repo, tag, registrytest.Format{Platform: platform, Config: encode(h.t, config)}, layers...)
}

// layer is an archive of one file of so many bytes.
func layer(t *testing.T, name string, size int) registrytest.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	body := bytes.Repeat([]byte(name+" "), size/(len(name)+1)+1)[:size]
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size)}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(body); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return registrytest.Layer{Data: buf.Bytes()}
}

func spec(name string) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: name} }

// pull pulls as the kubelet does and returns the id.
func (h *house) pull(name string, auth *runtimeapi.AuthConfig) (string, error) {
	resp, err := h.images.PullImage(h.t.Context(), &runtimeapi.PullImageRequest{Image: spec(name), Auth: auth})
	return resp.GetImageRef(), err
}

func (h *house) mustPull(name string) string {
	h.t.Helper()
	id, err := h.pull(name, nil)
	h.must(err)
	return id
}

// status is nil for an image that isn't there.
func (h *house) status(name string) *runtimeapi.Image {
	h.t.Helper()
	resp, err := h.images.ImageStatus(h.t.Context(), &runtimeapi.ImageStatusRequest{Image: spec(name)})
	h.must(err)
	if len(resp.Info) > 0 {
		h.t.Errorf("unasked, the status of %s has the information %v", name, resp.Info)
	}
	return resp.Image
}

func (h *house) remove(name string) {
	h.t.Helper()
	_, err := h.images.RemoveImage(h.t.Context(), &runtimeapi.RemoveImageRequest{Image: spec(name)})
	h.must(err)
}

func (h *house) list() []*runtimeapi.Image {
	h.t.Helper()
	resp, err := h.images.ListImages(h.t.Context(), &runtimeapi.ListImagesRequest{})
	h.must(err)
	return resp.Images
}

// ids are those of the list.
func (h *house) ids() (ids []string) {
	h.t.Helper()
	for _, img := range h.list() {
		ids = append(ids, img.Id)
	}
	return ids
}

// names are those of the records.
func (h *house) names() (names []string) {
	h.t.Helper()
	all, err := h.space().Images(h.t.Context())
	h.must(err)
	for _, img := range all {
		names = append(names, img.Name)
	}
	return names
}

func same[T comparable](t *testing.T, what string, got []T, want ...T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func sorted(names ...string) []string { return slices.Sorted(slices.Values(names)) }

func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// fsUsage is the one entry of ImageFsInfo.
func (h *house) fsUsage() (dir string, size, inodes uint64) {
	h.t.Helper()
	resp, err := h.images.ImageFsInfo(h.t.Context(), &runtimeapi.ImageFsInfoRequest{})
	h.must(err)
	if len(resp.ImageFilesystems) != 1 || len(resp.ContainerFilesystems) != 0 {
		h.t.Fatalf("image file systems %v", resp)
	}
	u := resp.ImageFilesystems[0]
	if age := time.Since(time.Unix(0, u.Timestamp)); age < 0 || age > time.Minute {
		h.t.Errorf("the answer is of %s ago", age)
	}
	return u.FsId.Mountpoint, u.UsedBytes.Value, u.InodesUsed.Value
}
