package pull

import (
	"fmt"
	"maps"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestTransactions counts where bolt commits. An image of one layer costs four transactions of meta.db and two of
// metadata.db on overlay; containerd 2.4.2's count stands beside it in test/compat.
func TestTransactions(t *testing.T) {
	for _, driver := range drivers {
		for _, n := range []int{0, 1, 2, 10, 40} {
			t.Run(fmt.Sprintf("%s/%d", driver, n), func(t *testing.T) {
				h := newHouse(t, settings{})
				h.push("app", "1", many(1, n)...)
				h.metaCommits.Store(0)
				h.indexCommits.Store(0)
				h.mustPull("app:1", Request{Snapshotter: driver})
				inMeta, inIndex := h.metaCommits.Load(), h.indexCommits.Load()
				t.Logf("%d layers on %s: %d transactions in meta.db, %d in metadata.db, %d syncs of the file system", n, driver, inMeta, inIndex, h.syncs.Load())
				mostMeta, mostIndex := int64(4), int64(2)
				if n > 30 {
					mostMeta++ // more keys than the first one sees to
				}
				if driver == "native" { // each layer waits for its parent before it may be begun
					mostMeta, mostIndex = int64(3+2*n), int64(2*n)
				}
				if n <= 1 {
					mostMeta, mostIndex = 4, 2
				}
				if inMeta > mostMeta || inIndex > mostIndex {
					t.Errorf("%d transactions in meta.db, at most %d are allowed; %d in metadata.db, at most %d", inMeta, mostMeta, inIndex, mostIndex)
				}
				h.whole("app:1", driver)
			})
		}
	}
}

// TestUpToDate: an image that is here costs no byte of a layer.
func TestUpToDate(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", many(1, 3)...)
	h.mustPull("app:1", Request{})
	h.srv.Forget()
	h.mustPull("app:1", Request{})
	if n := h.srv.Count("/blobs/"); n > 0 {
		t.Errorf("%d requests for blobs of an image that is here", n)
	}
	h.whole("app:1", "overlayfs")
	rec, err := h.space().Image(t.Context(), h.ref("app:1"))
	if err != nil || rec.Target.Digest != img.Descriptor.Digest {
		t.Errorf("image stands for %s (%v), want %s", rec.Target.Digest, err, img.Descriptor.Digest)
	}
}

// TestFormats: every form that an image may have, with each driver and packed.
func TestFormats(t *testing.T) {
	archive := layertest.Archive(layertest.Dir("d", 0o750), layertest.File("d/f", "body"))
	for name, push := range map[string]func(h *house){
		"oci":    func(h *house) { h.push("app", "1", gzipped(archive), simple(2, 3000)) },
		"docker": func(h *house) { h.pushDocker("app", "1", gzipped(archive), simple(2, 3000)) },
		"zstd":   func(h *house) { h.push("app", "1", zstandard(archive), simple(2, 3000)) },
		"plain":  func(h *house) { h.push("app", "1", plain(archive), simple(2, 3000)) },
		"mixed":  func(h *house) { h.push("app", "1", zstandard(archive), plain(layertest.Archive()), simple(2, 3000)) },
		"twice": func(h *house) {
			h.push("app", "1", gzipped(archive), simple(2, 3000), simple(2, 3000), simple(2, 3000))
		},
		"index":  func(h *house) { h.pushIndex("app", "1", gzipped(archive), simple(2, 3000)) },
		"nested": func(h *house) { h.pushNested("app", "1", gzipped(archive)) },
	} {
		for _, driver := range append([]string{""}, drivers...) {
			t.Run(name+"/"+driver, func(t *testing.T) {
				t.Parallel()
				h := newHouse(t, settings{})
				push(h)
				h.mustPull("app:1", Request{Snapshotter: driver, NoUnpack: driver == ""})
				img := h.whole("app:1", driver)
				for _, l := range img.Layers {
					if _, err := h.space().Blob(t.Context(), l.Desc.Digest); err != nil {
						t.Error(err)
					}
				}
				if driver == "" {
					if n := len(h.dump().Snapshots); n > 0 {
						t.Errorf("%d snapshots of an image that was to stay packed", n)
					}
					return
				}
				if got := h.file(driver, img.Layers[0].ChainID, "d/f"); got != "body" {
					t.Errorf("the unpacked file holds %q", got)
				}
			})
		}
	}
}

func (h *house) pushDocker(repo, tag string, layers ...registrytest.Layer) registrytest.Image {
	return h.srv.PushFormat(repo, tag, registrytest.Format{Docker: true, Platform: host()}, layers...)
}

// pushIndex has an image of this machine's platform among others.
func (h *house) pushIndex(repo, tag string, layers ...registrytest.Layer) registrytest.Image {
	other := func(os, arch string, seed uint64) registrytest.Image {
		return h.srv.PushFormat(repo, "", registrytest.Format{Platform: ocispec.Platform{OS: os, Architecture: arch}}, simple(seed, 100))
	}
	img := h.push(repo, "", layers...)
	h.srv.PushIndex(repo, tag, other("linux", "riscv64", 50), other("windows", host().Architecture, 51), img, other("linux", "s390x", 52))
	return img
}

// pushNested has an index that lists an index.
func (h *house) pushNested(repo, tag string, layers ...registrytest.Layer) {
	inner := h.srv.PushIndex(repo, "", h.push(repo, "", layers...))
	h.srv.PushIndex(repo, tag, registrytest.Image{Descriptor: inner})
}

// TestPlatform: another platform is pulled when it is asked for, and one that the index lacks is an error.
func TestPlatform(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.pushIndex("app", "1", simple(1, 100))
	h.srv.Forget()
	h.mustPull("app:1", Request{Platform: "linux/s390x"})
	for _, l := range img.Layers {
		if h.srv.Count(l.Digest.String()) > 0 {
			t.Error("a layer of another platform was asked for")
		}
	}
	h.settled()
	err := h.pull("app:1", Request{Platform: "linux/mips64le"})
	wantError(t, err, "no image for this platform; there are linux/riscv64, windows")
	h.collect()
	h.settled()
}

// TestNoLayers: an image without layers is its documents.
func TestNoLayers(t *testing.T) {
	for _, driver := range drivers {
		h := newHouse(t, settings{})
		h.push("empty", "1")
		h.mustPull("empty:1", Request{Snapshotter: driver})
		if img := h.whole("empty:1", driver); len(img.Layers) != 0 {
			t.Errorf("%d layers", len(img.Layers))
		}
	}
}

// TestByDigest: an image that is asked for by digest has that name, and its tag is not looked at.
func TestByDigest(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", simple(1, 100))
	h.push("app", "1", simple(2, 100)) // moves the tag
	name := "app@" + img.Descriptor.Digest.String()
	h.mustPull(name, Request{})
	h.whole(name, "overlayfs")
}

// TestUnpackLater: an image that was fetched without unpacking is unpacked without fetching.
func TestUnpackLater(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			h.push("app", "1", many(1, 3)...)
			h.mustPull("app:1", Request{NoUnpack: true})
			h.settled()
			h.srv.Forget()
			h.mustPull("app:1", Request{Snapshotter: driver})
			if n := h.srv.Count("/blobs/"); n > 0 {
				t.Errorf("%d requests for blobs that are here", n)
			}
			h.whole("app:1", driver)
		})
	}
}

// TestLabels: what ties the documents to what they need is what containerd writes.
func TestLabels(t *testing.T) {
	h := newHouse(t, settings{})
	pushed := h.pushIndex("lib/app", "1", simple(1, 100), simple(2, 100))
	h.mustPull("lib/app:1", Request{Labels: map[string]string{"who": "me"}})
	img := h.whole("lib/app:1", "overlayfs")
	ctx := t.Context()
	const source = "containerd.io/distribution.source.127.0.0.1" // without the port
	label := func(dgst digest.Digest, key string) string {
		b, err := h.space().Blob(ctx, dgst)
		if err != nil {
			t.Fatal(err)
		}
		return b.Labels[key]
	}
	for _, check := range []struct {
		of        digest.Digest
		key, want string
	}{
		{img.Target().Digest, "containerd.io/gc.ref.content.m.2", pushed.Descriptor.Digest.String()},
		{pushed.Descriptor.Digest, "containerd.io/gc.ref.content.config", pushed.Config.Digest.String()},
		{pushed.Descriptor.Digest, "containerd.io/gc.ref.content.l.0", pushed.Layers[0].Digest.String()},
		{pushed.Descriptor.Digest, "containerd.io/gc.ref.content.l.1", pushed.Layers[1].Digest.String()},
		{pushed.Config.Digest, "containerd.io/gc.ref.snapshot.overlayfs", img.TopChain().String()},
		{pushed.Layers[1].Digest, oci.LabelUncompressed, img.Layers[1].DiffID.String()},
		{pushed.Layers[1].Digest, source, "lib/app"},
		{img.Target().Digest, source, "lib/app"},
	} {
		if got := label(check.of, check.key); got != check.want {
			t.Errorf("label %s of %s is %q, want %q", check.key, check.of, got, check.want)
		}
	}
	rec, err := h.space().Image(ctx, h.ref("lib/app:1"))
	if err != nil || rec.Labels["who"] != "me" {
		t.Errorf("image labels %v, %v", rec.Labels, err)
	}
	// A second name for the same bytes is added to the sources.
	h.pushIndex("other", "1", simple(1, 100), simple(2, 100))
	h.mustPull("other:1", Request{})
	if got := label(pushed.Config.Digest, source); got != "lib/app,other" {
		t.Errorf("sources are %q", got)
	}
}

// TestKeepLabels: what a user has put on an image's name outlives the next pull, where that is asked for.
func TestKeepLabels(t *testing.T) {
	h := newHouse(t, settings{})
	h.push("app", "1", simple(1, 100))
	h.mustPull("app:1", Request{Labels: map[string]string{"who": "me", "when": "before"}})
	for _, c := range []struct {
		req  Request
		want map[string]string
	}{
		{Request{KeepLabels: true}, map[string]string{"who": "me", "when": "before"}},
		{Request{KeepLabels: true, Labels: map[string]string{"when": "now"}}, map[string]string{"who": "me", "when": "now"}},
		{Request{Labels: map[string]string{"a": "b"}}, map[string]string{"a": "b"}},
		{Request{}, nil},
		{Request{KeepLabels: true}, nil},
	} {
		h.mustPull("app:1", c.req)
		img, err := h.space().Image(t.Context(), h.ref("app:1"))
		if err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(img.Labels, c.want) {
			t.Errorf("%+v: labels %v, want %v", c.req, img.Labels, c.want)
		}
	}
}
