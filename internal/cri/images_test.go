package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/cri/image"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestPull: one pull makes three names with one target and containerd's label,
// and the image can be asked for by each form of its name.
func TestPull(t *testing.T) {
	h := newHouse(t, image.Options{})
	pushed := h.push("lib/app", "1", "1000:50", layer(t, "a", 5000), layer(t, "b", 100))
	id := h.mustPull(h.ref("lib/app:1"))
	byDigest := h.ref("lib/app@" + pushed.Descriptor.Digest.String())
	if id != pushed.Config.Digest.String() {
		t.Errorf("the id is %s and the config %s", id, pushed.Config.Digest)
	}
	same(t, "names", h.names(), sorted(h.ref("lib/app:1"), byDigest, id)...)
	records, err := h.space().Images(t.Context())
	h.must(err)
	for _, rec := range records {
		if rec.Target.Digest != pushed.Descriptor.Digest || len(rec.Labels) != 1 || rec.Labels["io.cri-containerd.image"] != "managed" {
			t.Errorf("record %+v", rec)
		}
	}
	size := pushed.Descriptor.Size + pushed.Config.Size
	for _, l := range pushed.Layers {
		size += l.Size
	}
	for _, name := range []string{
		id, id[:len("sha256:")+6], id[len("sha256:"):], id[len("sha256:") : len("sha256:")+8],
		h.ref("lib/app:1"), byDigest, h.ref("lib/app:9@" + pushed.Descriptor.Digest.String()),
	} {
		img := h.status(name)
		if img.GetId() != id {
			t.Errorf("%s is %v", name, img)
			continue
		}
		same(t, "tags", img.RepoTags, h.ref("lib/app:1"))
		same(t, "digests", img.RepoDigests, byDigest)
		if img.Size != uint64(size) || img.Uid.GetValue() != 1000 || img.Username != "" || img.Pinned {
			t.Errorf("%s is %v, want %d bytes and user 1000", name, img, size)
		}
	}
	leases, err := h.space().Leases(t.Context())
	if err != nil || len(leases) > 0 {
		t.Errorf("leases %v are left, %v", leases, err)
	}
}

// TestPullByDigest makes no tag.
func TestPullByDigest(t *testing.T) {
	h := newHouse(t, image.Options{})
	pushed := h.push("app", "1", "", layer(t, "a", 10))
	byDigest := h.ref("app@" + pushed.Descriptor.Digest.String())
	id := h.mustPull(h.ref("app:7@" + pushed.Descriptor.Digest.String()))
	same(t, "names", h.names(), sorted(byDigest, id)...)
	same(t, "tags", h.status(id).RepoTags)
	same(t, "digests", h.status(id).RepoDigests, byDigest)
}

// TestPullIndex: the digest in the name is the index's, the id this platform's.
func TestPullIndex(t *testing.T) {
	h := newHouse(t, image.Options{})
	img := h.push("app", "", "daemon", layer(t, "a", 10))
	other := h.srv.PushFormat("app", "", registrytest.Format{Platform: ocispec.Platform{OS: "linux", Architecture: "s390x"}}, layer(t, "b", 10))
	idx := h.srv.PushIndex("app", "1", other, img)
	id := h.mustPull(h.ref("app:1"))
	if id != img.Config.Digest.String() {
		t.Errorf("the id is %s, want %s", id, img.Config.Digest)
	}
	same(t, "digests", h.status(id).RepoDigests, h.ref("app@"+idx.Digest.String()))
	size := idx.Size + img.Descriptor.Size + img.Config.Size + img.Layers[0].Size
	if got := h.status(id); got.Username != "daemon" || got.Uid != nil || got.Size != uint64(size) {
		t.Errorf("user %q, uid %v, %d bytes of %d", got.Username, got.Uid, got.Size, size)
	}
	// The same image by its own manifest is the same image with one more name.
	if again := h.mustPull(h.ref("app@" + img.Descriptor.Digest.String())); again != id {
		t.Errorf("by its manifest the id is %s", again)
	}
	same(t, "ids", h.ids(), id)
	if n := len(h.status(id).RepoDigests); n != 2 {
		t.Errorf("%d digests", n)
	}
	h.remove(id)
	same(t, "names", h.names())
}

// TestMovedTag: an image that has lost its tag stays under its digest until
// the kubelet removes it.
func TestMovedTag(t *testing.T) {
	h := newHouse(t, image.Options{})
	first := h.push("app", "1", "", layer(t, "a", 10))
	old := h.mustPull(h.ref("app:1"))
	h.push("app", "1", "", layer(t, "b", 10))
	id := h.mustPull(h.ref("app:1"))
	if id == old {
		t.Fatal("one id for two images")
	}
	same(t, "ids", h.ids(), sorted(old, id)...)
	same(t, "old tags", h.status(old).RepoTags)
	same(t, "old digests", h.status(old).RepoDigests, h.ref("app@"+first.Descriptor.Digest.String()))
	same(t, "tags", h.status(id).RepoTags, h.ref("app:1"))
	h.remove(old)
	same(t, "ids", h.ids(), id)
}

// TestNoImage: what isn't there is no error, and an empty name is one.
func TestNoImage(t *testing.T) {
	h := newHouse(t, image.Options{})
	h.push("app", "1", "", layer(t, "a", 10))
	id := h.mustPull(h.ref("app:1"))
	for _, name := range []string{
		"app", h.ref("app:2"), h.ref("app"), "sha256:", "sha512:" + id[len("sha256:"):len("sha256:")+4], digest.FromString("x").String(),
		"UPPER", "::", "a b", "zz", strings.Repeat("0", 64),
	} {
		if img := h.status(name); img != nil {
			t.Errorf("%q is %v", name, img)
		}
		h.remove(name)
	}
	same(t, "ids", h.ids(), id)
	for _, name := range []string{"", strings.Repeat("a", 2000)} {
		if _, err := h.images.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: spec(name)}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("status of %.10q: %v", name, err)
		}
		if _, err := h.images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: spec(name)}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("remove %.10q: %v", name, err)
		}
	}
	if _, err := h.images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("remove nothing: %v", err)
	}
	same(t, "ids", h.ids(), id)
	for _, name := range []string{"", "UPPER", h.ref("gone:1")} {
		if _, err := h.pull(name, nil); err == nil {
			t.Errorf("%q is pulled", name)
		}
	}
}

// TestVerbose: containerd's form, which crictl prints.
func TestVerbose(t *testing.T) {
	h := newHouse(t, image.Options{})
	h.push("app", "1", "", layer(t, "a", 10), layer(t, "b", 10))
	id := h.mustPull(h.ref("app:1"))
	resp, err := h.images.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: spec(id), Verbose: true})
	h.must(err)
	var info struct {
		ChainID   string    `json:"chainID"`
		ImageSpec oci.Image `json:"imageSpec"`
	}
	h.must(json.Unmarshal([]byte(resp.Info["info"]), &info))
	snaps, err := h.space().Snapshots("overlayfs")
	h.must(err)
	if _, err := snaps.Stat(t.Context(), info.ChainID); err != nil {
		t.Errorf("the chain id %s is no snapshot: %v", info.ChainID, err)
	}
	if len(info.ImageSpec.RootFS.DiffIDs) != 2 || info.ImageSpec.Config.Labels["made-for"] != "app1" {
		t.Errorf("spec %+v", info.ImageSpec)
	}
}

// TestOthersImages: what clients of containerd's API do in the namespace shows
// at once, without labels or ids of ours.
func TestOthersImages(t *testing.T) {
	h := newHouse(t, image.Options{Pinned: []string{"pause:3"}})
	pushed := h.push("app", "1", "", layer(t, "a", 10))
	ctx, sp := t.Context(), h.space()
	_, err := h.puller.Pull(ctx, sp, h.ref("app:1"), pull.Request{NoUnpack: true})
	h.must(err)
	id := pushed.Config.Digest.String()
	same(t, "ids", h.ids(), id)
	target, err := sp.Image(ctx, h.ref("app:1"))
	h.must(err)
	create := func(name string, labels map[string]string) {
		t.Helper()
		_, err := sp.CreateImage(ctx, meta.Image{Name: name, Target: target.Target, Labels: labels})
		h.must(err)
	}
	create("busybox", nil)
	create("not a reference", nil)
	if img := h.status("busybox:latest"); img.GetId() != id || img.Pinned {
		t.Errorf("busybox:latest is %v", img)
	}
	same(t, "tags", h.status(id).RepoTags, h.ref("app:1"), "docker.io/library/busybox:latest")
	create("docker.io/library/pause:3", nil)
	if !h.status("pause:3").GetPinned() {
		t.Error("an image of a pinned name isn't pinned")
	}
	h.must(sp.DeleteImage(ctx, "docker.io/library/pause:3", ""))
	create("mine", map[string]string{"io.cri-containerd.pinned": "pinned"})
	if !h.status(id).GetPinned() {
		t.Error("an image with the label isn't pinned")
	}
	h.must(sp.DeleteImage(ctx, "mine", ""))
	if h.status(id).GetPinned() {
		t.Error("the pin outlives its record")
	}
	// Another namespace is another machine's.
	_, err = h.db.Space("default").CreateImage(ctx, meta.Image{Name: "x", Target: target.Target})
	if err == nil {
		same(t, "ids", h.ids(), id)
		h.must(h.db.Space("default").DeleteImage(ctx, "x", ""))
	}
	h.remove("not a reference")
	same(t, "names", h.names())
}

// TestIncomplete: an image that can't be run isn't there, so that the kubelet
// pulls it; and it can be removed.
func TestIncomplete(t *testing.T) {
	h := newHouse(t, image.Options{})
	pushed := h.push("app", "1", "", layer(t, "a", 10), layer(t, "b", 10))
	ctx, sp := t.Context(), h.space()
	id := h.mustPull(h.ref("app:1"))
	snaps, err := sp.Snapshots("overlayfs")
	h.must(err)
	top := oci.ChainIDs([]digest.Digest{pushed.Layers[0].Digest, pushed.Layers[1].Digest})[1].String()
	h.must(snaps.Remove(ctx, top))
	same(t, "ids of an image that can be unpacked", h.ids(), id)
	h.must(sp.DeleteBlob(ctx, pushed.Layers[0].Digest))
	same(t, "ids of an image without a layer", h.ids())
	if img := h.status(id); img != nil {
		t.Errorf("status %v", img)
	}
	h.mustPull(h.ref("app:1"))
	same(t, "ids after another pull", h.ids(), id)

	h.must(sp.DeleteBlob(ctx, pushed.Config.Digest))
	same(t, "ids of an image without a config", h.ids())
	h.remove(h.ref("app:1"))
	same(t, "names", h.names())

	// One that was never readable: for another platform only.
	other := h.srv.PushFormat("app", "2", registrytest.Format{Platform: ocispec.Platform{OS: "linux", Architecture: "s390x"}}, layer(t, "c", 10))
	h.srv.PushIndex("app", "3", other)
	_, err = h.puller.Pull(ctx, sp, h.ref("app:3"), pull.Request{Platform: "linux/s390x", NoUnpack: true})
	h.must(err)
	same(t, "ids of an image for others", h.ids())
	h.remove(h.ref("app:3"))
	same(t, "names", h.names())
}

// TestRemove: all names go in one transaction, whatever name was given, and
// their bytes with them.
func TestRemove(t *testing.T) {
	for _, way := range []string{"tag", "second tag", "digest", "id", "prefix"} {
		t.Run(way, func(t *testing.T) {
			h := newHouse(t, image.Options{})
			pushed := h.push("app", "1", "", layer(t, "a", 1000))
			h.push("app", "2", "", layer(t, "b", 1000)) // another
			id, other := h.mustPull(h.ref("app:1")), h.mustPull(h.ref("app:2"))
			target, err := h.space().Image(t.Context(), id)
			h.must(err)
			_, err = h.space().CreateImage(t.Context(), meta.Image{Name: h.ref("second:1"), Target: target.Target})
			h.must(err)
			name := map[string]string{
				"tag": h.ref("app:1"), "second tag": h.ref("second:1"), "digest": h.ref("app@" + pushed.Descriptor.Digest.String()),
				"id": id, "prefix": id[:20],
			}[way]
			h.remove(name)
			same(t, "ids", h.ids(), other)
			if n := len(h.names()); n != 3 {
				t.Errorf("%d names are left: %v", n, h.names())
			}
			for _, l := range append(pushed.Layers, pushed.Config, pushed.Descriptor) {
				if _, err := h.blobs.Info(l.Digest); err == nil {
					t.Errorf("blob %s is still there", l.Digest)
				}
			}
			h.remove(name)
		})
	}
}

// TestRemoveIsOneTransaction: no reader ever sees a part of the names, and
// removal commits once before it collects.
func TestRemoveIsOneTransaction(t *testing.T) {
	var h *house
	before := int64(0)
	h = newHouse(t, image.Options{Collect: func(ctx context.Context) (meta.Collected, error) {
		if n := h.commits.Load() - before; n != 1 {
			t.Errorf("%d transactions", n)
		}
		return h.db.Collect(ctx)
	}})
	h.push("app", "1", "", layer(t, "a", 10))
	for range 5 {
		id := h.mustPull(h.ref("app:1"))
		before = h.commits.Load()
		ctx, cancel := context.WithCancel(t.Context())
		var reading sync.WaitGroup
		began := make(chan struct{})
		reading.Go(func() {
			close(began)
			for ctx.Err() == nil {
				all, err := h.space().Images(context.Background())
				if err != nil || len(all) != 0 && len(all) != 3 {
					t.Errorf("a reader sees %d names, %v", len(all), err)
					return
				}
			}
		})
		<-began
		h.remove(id)
		cancel()
		reading.Wait()
		same(t, "names", h.names())
	}
}

// TestPinned: configured names are labelled when they are pulled; a pin by hand
// outlives pulls; and a pinned image can be removed.
func TestPinned(t *testing.T) {
	srv := registrytest.New(t)
	h := newHouse(t, image.Options{Pinned: []string{srv.Host() + "/pause"}})
	h.srv = srv
	h.push("pause", "latest", "", layer(t, "a", 10))
	h.push("app", "1", "", layer(t, "b", 10))
	pause, app := h.mustPull(h.ref("pause:latest")), h.mustPull(h.ref("app:1"))
	if !h.status(pause).Pinned || h.status(app).Pinned {
		t.Errorf("pause %v, app %v", h.status(pause), h.status(app))
	}
	rec, err := h.space().Image(t.Context(), h.ref("pause:latest"))
	h.must(err)
	if rec.Labels["io.cri-containerd.pinned"] != "pinned" {
		t.Errorf("labels %v", rec.Labels)
	}
	_, err = h.space().UpdateImage(t.Context(), meta.Image{Name: h.ref("app:1"), Labels: map[string]string{"io.cri-containerd.pinned": "pinned"}}, "labels.io.cri-containerd.pinned")
	h.must(err)
	h.mustPull(h.ref("app:1"))
	if !h.status(app).Pinned {
		t.Error("a pull has taken the pin away")
	}
	h.remove(pause)
	same(t, "ids", h.ids(), app)
}

// TestAuth: each form of credentials against each kind of registry.
func TestAuth(t *testing.T) {
	const user, password, identity = "u", "p:w", "refresh"
	good := func(h *house) *runtimeapi.AuthConfig {
		return &runtimeapi.AuthConfig{Username: user, Password: password, ServerAddress: "http://" + h.srv.Host() + "/v1/"}
	}
	for _, c := range []struct {
		name  string
		auth  func(h *house) *runtimeapi.AuthConfig
		basic codes.Code // of a registry that wants Basic
		token codes.Code // of one that wants tokens
	}{
		{"user", func(*house) *runtimeapi.AuthConfig { return &runtimeapi.AuthConfig{Username: user, Password: password} }, codes.OK, codes.OK},
		{"server", good, codes.OK, codes.OK},
		{"bare server", func(h *house) *runtimeapi.AuthConfig { a := good(h); a.ServerAddress = h.srv.Host(); return a }, codes.OK, codes.OK},
		{"other server", func(h *house) *runtimeapi.AuthConfig {
			a := good(h)
			a.ServerAddress = "https://other.example"
			return a
		}, codes.Unauthenticated, codes.Unauthenticated},
		{"base64", func(*house) *runtimeapi.AuthConfig { return &runtimeapi.AuthConfig{Auth: "dTpwOncAAA=="} }, codes.OK, codes.OK}, // u:p:w\0\0
		{"no base64", func(*house) *runtimeapi.AuthConfig { return &runtimeapi.AuthConfig{Auth: "hush!"} }, codes.InvalidArgument, codes.InvalidArgument},
		{"no colon", func(*house) *runtimeapi.AuthConfig { return &runtimeapi.AuthConfig{Auth: "aHVzaA=="} }, codes.InvalidArgument, codes.InvalidArgument},
		{"identity token", func(*house) *runtimeapi.AuthConfig { return &runtimeapi.AuthConfig{IdentityToken: identity} }, codes.Unauthenticated, codes.OK},
		{"registry token", func(h *house) *runtimeapi.AuthConfig {
			return &runtimeapi.AuthConfig{RegistryToken: h.token(user, password)}
		}, codes.Unauthenticated, codes.OK},
		{"wrong password", func(*house) *runtimeapi.AuthConfig { return &runtimeapi.AuthConfig{Username: user, Password: "hush"} }, codes.Unauthenticated, codes.Unauthenticated},
		{"empty", func(*house) *runtimeapi.AuthConfig { return &runtimeapi.AuthConfig{} }, codes.Unauthenticated, codes.Unauthenticated},
		{"none", func(*house) *runtimeapi.AuthConfig { return nil }, codes.Unauthenticated, codes.Unauthenticated},
	} {
		for kind, want := range map[string]codes.Code{"basic": c.basic, "token": c.token} {
			t.Run(c.name+"/"+kind, func(t *testing.T) {
				h := newHouse(t, image.Options{})
				h.push("app", "1", "", layer(t, "a", 10))
				h.srv.Require(registrytest.Auth{User: user, Password: password, RefreshToken: identity})
				auth := c.auth(h)
				if kind == "basic" {
					h.srv.Require(registrytest.Auth{User: user, Password: password, Basic: true})
				}
				_, err := h.pull(h.ref("app:1"), auth)
				if status.Code(err) != want {
					t.Errorf("got %v, want %s", err, want)
				}
				if err != nil && (strings.Contains(err.Error(), "hush") || strings.Contains(err.Error(), "aHVzaA")) {
					t.Errorf("the error tells: %v", err)
				}
			})
		}
	}
}

// token is one that the registry's token server gives.
func (h *house) token(user, password string) string {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), "GET", h.srv.URL()+"/token?service=registrytest&scope=repository:app:pull", nil)
	h.must(err)
	req.SetBasicAuth(user, password)
	resp, err := http.DefaultClient.Do(req)
	h.must(err)
	defer resp.Body.Close()
	var answer struct{ Token string }
	h.must(json.NewDecoder(resp.Body).Decode(&answer))
	if answer.Token == "" {
		h.t.Fatalf("no token: %s", resp.Status)
	}
	return answer.Token
}

// TestHandlers: the runtime handler chooses the snapshotter, and an image of
// either is whole.
func TestHandlers(t *testing.T) {
	h := newHouse(t, image.Options{Handlers: map[string]string{"vm": "native"}})
	h.push("app", "1", "", layer(t, "a", 10))
	h.push("app", "2", "", layer(t, "b", 10))
	for i, c := range []struct{ handler, driver string }{{"vm", "native"}, {"unknown", "overlayfs"}} {
		_, err := h.images.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{
			Image: h.ref(fmt.Sprintf("app:%d", i+1)), RuntimeHandler: c.handler,
			Annotations: map[string]string{"io.containerd.cri.runtime-handler": "vm"},
		}, SandboxConfig: &runtimeapi.PodSandboxConfig{Annotations: map[string]string{"io.containerd.cri.runtime-handler": "vm"}}})
		h.must(err)
		n := 0
		for range h.drivers[c.driver].Walk(t.Context()) {
			n++
		}
		if n != 1 {
			t.Errorf("handler %s: %s has %d snapshots", c.handler, c.driver, n)
		}
	}
	if n := len(h.list()); n != 2 {
		t.Errorf("%d images", n)
	}
}

// TestProgressTimeout: a pull to which no byte comes ends and says why, and
// what it has fetched is kept.
func TestProgressTimeout(t *testing.T) {
	h := newHouse(t, image.Options{ProgressTimeout: 200 * time.Millisecond})
	big := layer(t, "a", 4<<20)
	h.push("app", "1", "", big)
	h.srv.Fault("/blobs/"+digest.FromBytes(big.Data).String(), registrytest.Fault{At: 1 << 20, Stall: true})
	_, err := h.pull(h.ref("app:1"), nil)
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "image_pull_progress_timeout") {
		t.Errorf("got %v", err)
	}
	h.srv.Heal()
	before := h.srv.Bytes("/blobs/")
	h.mustPull(h.ref("app:1"))
	if n := h.srv.Bytes("/blobs/") - before; n > 4<<20 {
		t.Errorf("%d bytes were fetched by the second pull", n)
	}
}

// TestRaces: pulls, removals and lists of the same images at once. Whoever
// pulls last has the whole image.
func TestRaces(t *testing.T) {
	h := newHouse(t, image.Options{})
	shared := layer(t, "shared", 50_000)
	for tag := range 3 {
		h.push("app", fmt.Sprint(tag), "", shared, layer(t, fmt.Sprint("own", tag), 1000))
	}
	var all sync.WaitGroup
	for tag := range 3 {
		name := h.ref(fmt.Sprintf("app:%d", tag))
		for range 2 {
			all.Go(func() {
				for range 8 {
					if _, err := h.pull(name, nil); err != nil {
						t.Errorf("pull: %v", err)
					}
				}
			})
		}
		all.Go(func() {
			for range 8 {
				if _, err := h.images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: spec(name)}); err != nil {
					t.Errorf("remove: %v", err)
				}
			}
		})
	}
	all.Go(func() {
		for range 20 {
			if _, err := h.images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{}); err != nil {
				t.Errorf("list: %v", err)
			}
			if _, err := h.images.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{}); err != nil {
				t.Errorf("info: %v", err)
			}
		}
	})
	all.Wait()
	var want []string
	for tag := range 3 {
		want = append(want, h.mustPull(h.ref(fmt.Sprintf("app:%d", tag))))
	}
	same(t, "ids", h.ids(), sorted(want...)...)
}

// TestJoin: many pulls of one image at once fetch each blob once.
func TestJoin(t *testing.T) {
	h := newHouse(t, image.Options{})
	pushed := h.push("app", "1", "", layer(t, "a", 2<<20))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if id, err := h.pull(h.ref("app:1"), nil); err != nil || id != pushed.Config.Digest.String() {
				t.Errorf("%s, %v", id, err)
			}
		})
	}
	all.Wait()
	if n := h.srv.Count("/blobs/" + pushed.Layers[0].Digest.String()); n != 1 {
		t.Errorf("the layer was asked for %d times", n)
	}
}

// TestImageFsInfo: what is counted is what is on disk, without active
// snapshots, and a shared blob counts once.
func TestImageFsInfo(t *testing.T) {
	h := newHouse(t, image.Options{})
	dir, size, inodes := h.fsUsage()
	if dir != h.path("overlayfs") || size != 0 || inodes != 0 {
		t.Errorf("an empty store has %d bytes and %d inodes in %s", size, inodes, dir)
	}
	pushed := h.push("app", "1", "", layer(t, "a", 100_000), layer(t, "b", 5000))
	id := h.mustPull(h.ref("app:1"))
	_, err := h.puller.Pull(t.Context(), h.db.Space("default"), h.ref("app:1"), pull.Request{})
	h.must(err)
	var wantSize, wantInodes uint64
	for _, d := range append(slices.Clone(pushed.Layers), pushed.Config, pushed.Descriptor) {
		wantSize += uint64(d.Size)
		wantInodes++
	}
	for in, err := range h.drivers["overlayfs"].Walk(t.Context()) {
		h.must(err)
		u, err := h.drivers["overlayfs"].Usage(t.Context(), in.Key)
		h.must(err)
		wantSize += uint64(u.Size)
		wantInodes += uint64(u.Inodes)
	}
	snaps, err := h.space().Snapshots("overlayfs")
	h.must(err)
	chain := oci.ChainIDs([]digest.Digest{pushed.Layers[0].Digest, pushed.Layers[1].Digest})[1].String()
	_, err = snaps.Prepare(t.Context(), "container", chain, nil)
	h.must(err)
	for range 2 { // the second time from memory
		if _, size, inodes := h.fsUsage(); size != wantSize || inodes != wantInodes {
			t.Errorf("%d bytes and %d inodes, want %d and %d", size, inodes, wantSize, wantInodes)
		}
	}
	h.must(snaps.Remove(t.Context(), "container"))
	h.must(h.db.Space("default").DeleteImage(t.Context(), h.ref("app:1"), ""))
	h.remove(id)
	if _, size, inodes := h.fsUsage(); size != 0 || inodes != 0 {
		t.Errorf("after removal %d bytes and %d inodes", size, inodes)
	}
}

// TestManyImages: a thousand images with three names each are listed from one
// look at the records, and streamed without loss.
func TestManyImages(t *testing.T) {
	const count = 1000
	h := newHouse(t, image.Options{})
	ids := h.fill(count)
	began := time.Now()
	same(t, "ids", h.ids(), ids...)
	first := time.Since(began)
	began = time.Now()
	same(t, "ids", h.ids(), ids...)
	second := time.Since(began)
	began = time.Now()
	if img := h.status(ids[500]); img.GetId() != ids[500] || len(img.RepoTags) != 1 || len(img.RepoDigests) != 1 {
		t.Errorf("status %v", img)
	}
	one := time.Since(began)
	began = time.Now()
	h.fsUsage()
	t.Logf("%d images: first list %s, second list %s, one status %s, disk %s", count, first, second, one, time.Since(began))
	if second > 2*time.Second {
		t.Errorf("a list takes %s", second)
	}

	stream, err := h.images.StreamImages(t.Context(), &runtimeapi.StreamImagesRequest{})
	h.must(err)
	var streamed []string
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		h.must(err)
		if len(resp.Images) == 0 {
			t.Error("an empty message")
		}
		for _, img := range resp.Images {
			streamed = append(streamed, img.Id)
		}
	}
	same(t, "streamed ids", streamed, ids...)
	if _, err := h.images.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: spec(commonPrefix(ids))}); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "ids of") {
		t.Errorf("an ambiguous prefix gives %v", err)
	}
}

// commonPrefix is the shortest prefix that two of the ids share.
func commonPrefix(ids []string) string {
	for i := 1; i < len(ids); i++ {
		if ids[i][:8] == ids[i-1][:8] {
			return ids[i][:8]
		}
	}
	return ""
}

// fill records so many images of one layer, with three names each, and returns
// their ids in order.
func (h *house) fill(count int) (ids []string) {
	h.t.Helper()
	base := h.push("base", "1", "", layer(h.t, "a", 1000))
	h.mustPull(h.ref("base:1"))
	lease, err := h.space().CreateLease(h.t.Context(), meta.Lease{})
	h.must(err)
	sp := h.space().Leased(lease.ID)
	write := func(mt string, doc any, children ...oci.Descriptor) oci.Descriptor {
		data := encode(h.t, doc)
		desc := oci.Descriptor{MediaType: mt, Digest: digest.FromBytes(data), Size: int64(len(data))}
		w, err := sp.OpenWriter(h.t.Context(), desc.Digest.String(), meta.WriterOptions{})
		h.must(err)
		defer w.Close()
		_, err = w.Write(data)
		h.must(err)
		h.must(w.Commit(h.t.Context(), desc.Size, desc.Digest, oci.ChildLabels(children)))
		return desc
	}
	one := func(i int) string {
		config := write(ocispec.MediaTypeImageConfig, oci.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
			RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{base.Layers[0].Digest}},
			Config:   ocispec.ImageConfig{User: fmt.Sprint(i)},
		})
		manifest := write(ocispec.MediaTypeImageManifest, oci.Manifest{
			MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: base.Layers,
		}, config, base.Layers[0])
		id := config.Digest.String()
		h.must(sp.Update(h.t.Context(), func(tx *meta.Tx) error {
			for _, name := range []string{id, fmt.Sprintf("example.com/app:%d", i), "example.com/app@" + manifest.Digest.String()} {
				if _, err := tx.PutImage(meta.Image{Name: name, Target: manifest}); err != nil {
					return err
				}
			}
			return nil
		}))
		return id
	}
	ids = make([]string, count)
	var all sync.WaitGroup
	const writers = 32
	for n := range writers {
		all.Go(func() {
			for i := n; i < count; i += writers {
				ids[i] = one(i)
			}
		})
	}
	all.Wait()
	h.remove(h.ref("base:1"))
	h.must(h.space().DeleteLease(h.t.Context(), lease.ID))
	slices.Sort(ids)
	return ids
}
