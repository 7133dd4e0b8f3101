package pull

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestPlatforms: several platforms are one image record, and what they share comes once.
func TestPlatforms(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			var imgs []registrytest.Image
			for i, arch := range []string{"amd64", "s390x", "riscv64"} {
				imgs = append(imgs, h.srv.PushFormat("app", "", registrytest.Format{Platform: ocispec.Platform{OS: "linux", Architecture: arch}},
					simple(1, 1000), simple(uint64(2+i), 1000)))
			}
			h.srv.PushIndex("app", "1", imgs...)
			w := watchFor(func(Event) bool { return false })
			h.mustPull("app:1", Request{Snapshotter: driver, Progress: w.hear,
				Platforms: []Platform{{Name: "linux/amd64"}, {Name: "linux/s390x", Packed: true}, {Name: "linux/mips64le"}, {Name: "linux/riscv64"}}})
			h.settled()
			for i, img := range imgs {
				for _, l := range img.Layers {
					if n := h.requests(l); n != 1 {
						t.Errorf("a layer of image %d was asked for %d times", i, n)
					}
				}
			}
			if n := len(h.dump().Snapshots); n != 3 {
				t.Errorf("%d snapshots, want the shared layer and two others", n)
			}
			for i, packed := range []bool{false, true, false} {
				desc := imgs[i].Layers[1].Digest
				j := slices.IndexFunc(w.all, func(e Event) bool { return e.Desc.Digest == desc && e.Stage == StageComplete })
				if j < 0 || w.all[j].Packed != packed {
					t.Errorf("image %d: packed should be %t, and the events are %v", i, packed, w.all)
				}
			}
			if !slices.ContainsFunc(w.all, func(e Event) bool { return e.Stage == StageMissing && e.Platform == "linux/mips64le" }) {
				t.Error("nothing says that there is no image for mips64le")
			}
			h.collect()
			if n := len(h.dump().Snapshots); n != 3 {
				t.Errorf("%d snapshots are left by a collection", n)
			}
		})
	}
}

// TestAll: everything that an index lists is fetched, images or not, and stays packed.
func TestAll(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.pushIndex("app", "1", simple(1, 1000), simple(2, 1000))
	artifact := []byte("anything")
	blob := h.srv.PushBlob("app", artifact)
	empty := h.srv.PushBlob("app", []byte("{}"))
	manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[{"mediaType":"text/x","digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageManifest, empty.Digest, blob.Digest, blob.Size)
	other := registrytest.Image{Descriptor: h.srv.PushManifest("app", "", ocispec.MediaTypeImageManifest, []byte(manifest))}
	inner := registrytest.Image{Descriptor: h.srv.PushIndex("app", "", img, other)}
	h.srv.PushIndex("app", "all", inner, img)
	w := watchFor(func(Event) bool { return false })
	h.mustPull("app:all", Request{All: true, Progress: w.hear})
	h.settled()
	h.collect()
	d := h.dump()
	if len(d.Snapshots) != 0 {
		t.Errorf("unpacked: %v", d.Snapshots)
	}
	here := map[digest.Digest]bool{}
	for _, b := range d.Blobs {
		here[b.Digest] = true
	}
	for _, desc := range append(img.Layers, img.Config, blob, empty, inner.Descriptor, other.Descriptor) {
		if !here[desc.Digest] {
			t.Errorf("%s %s is not here", desc.MediaType, desc.Digest)
		}
		if n := h.srv.Count("GET /v2/app/blobs/" + desc.Digest.String()); n > 1 {
			t.Errorf("%s was asked for %d times", desc.MediaType, n)
		}
	}
	if got := w.stages(inner.Descriptor.Digest); !slices.Equal(got, []Stage{StageReading, StageRead}) {
		t.Errorf("the inner index went through %v", got)
	}
	read := w.all[slices.IndexFunc(w.all, func(e Event) bool { return e.Stage == StageRead && e.Desc.Digest == inner.Descriptor.Digest })]
	if len(read.Children) != 2 || read.Children[1].Digest != other.Descriptor.Digest {
		t.Errorf("its children are %v", read.Children)
	}
	w = watchFor(func(Event) bool { return false })
	h.mustPull("app:all", Request{All: true, Progress: w.hear})
	if got := w.stages(inner.Descriptor.Digest); !slices.Equal(got, []Stage{StageKnown}) {
		t.Errorf("the second time the inner index went through %v", got)
	}
}

// TestRestIsBounded: nested indexes end somewhere, and so do blobs.
func TestRestIsBounded(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "", simple(1, 100))
	for range maxNesting + 4 {
		img = registrytest.Image{Descriptor: h.srv.PushIndex("app", "deep", img)}
	}
	wantError(t, h.pull("app:deep", Request{All: true}), "nest deeper")

	wide := func(seed int) registrytest.Image {
		var layers []string
		for i := range maxBlobs/2 + 1 {
			layers = append(layers, fmt.Sprintf(`{"mediaType":"text/x","digest":%q,"size":1}`, digest.FromString(fmt.Sprint(seed, i))))
		}
		doc := fmt.Sprintf(`{"schemaVersion":2,"config":{"mediaType":"text/y","digest":%q,"size":1},"layers":[%s]}`, digest.FromString("c"), strings.Join(layers, ","))
		return registrytest.Image{Descriptor: h.srv.PushManifest("app", "", ocispec.MediaTypeImageManifest, []byte(doc))}
	}
	h.srv.PushIndex("app", "wide", wide(1), wide(2))
	wantError(t, h.pull("app:wide", Request{All: true}), "more than 10000 blobs")
	h.nothing()
}
