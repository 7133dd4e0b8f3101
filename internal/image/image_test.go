package image

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/oci"
)

// shelf is a store of documents in memory.
type shelf map[digest.Digest][]byte

func (s shelf) ReadDocument(_ context.Context, d oci.Descriptor) ([]byte, error) {
	if doc, ok := s[d.Digest]; ok {
		return doc, nil
	}
	return nil, fmt.Errorf("document %s: %w", d.Digest, errdefs.ErrNotFound)
}

func (s shelf) put(t *testing.T, mt string, v any) oci.Descriptor {
	t.Helper()
	doc, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromBytes(doc)
	s[d] = doc
	return oci.Descriptor{MediaType: mt, Digest: d, Size: int64(len(doc))}
}

// image puts an image of the given diff ids and as many layers, more or less.
func (s shelf) image(t *testing.T, diffIDs []digest.Digest, layers int) oci.Descriptor {
	var cfg oci.Image
	cfg.OS, cfg.Architecture = "linux", "amd64"
	cfg.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}
	m := oci.Manifest{Config: s.put(t, ocispec.MediaTypeImageConfig, cfg)}
	for i := range layers {
		m.Layers = append(m.Layers, oci.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString(fmt.Sprint("packed", i)), Size: 100})
	}
	return s.put(t, ocispec.MediaTypeImageManifest, m)
}

func TestLoadFollowsIndexesToTheLayers(t *testing.T) {
	s := shelf{}
	ids := []digest.Digest{digest.FromString("0"), digest.FromString("1")}
	m := s.image(t, ids, 2)
	m.Platform = &oci.Platform{OS: "linux", Architecture: "amd64"}
	inner := s.put(t, ocispec.MediaTypeImageIndex, oci.Index{Manifests: []oci.Descriptor{m}})
	outer := s.put(t, oci.MediaTypeDockerList, oci.Index{Manifests: []oci.Descriptor{inner}})
	img, err := Load(t.Context(), s, outer, platforms.Only(platforms.MustParse("linux/amd64")))
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Path) != 3 || img.Target().Digest != outer.Digest || img.Manifest().Digest != m.Digest {
		t.Errorf("path %v", img.Path)
	}
	if img.Layers[1].DiffID != ids[1] || img.TopChain() != oci.ChainIDs(ids)[1] {
		t.Errorf("layers %v", img.Layers)
	}
	if want := 200 + img.Config.Size + m.Size; img.Size() != want {
		t.Errorf("size %d, want %d", img.Size(), want)
	}
}

func TestLoadRefuses(t *testing.T) {
	s := shelf{}
	uneven := s.image(t, []digest.Digest{digest.FromString("0")}, 2)
	absent := oci.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("absent"), Size: 1}
	nested := s.image(t, nil, 0)
	for range maxNesting + 1 {
		nested = s.put(t, ocispec.MediaTypeImageIndex, oci.Index{Manifests: []oci.Descriptor{nested}})
	}
	for _, tt := range []struct {
		name   string
		target oci.Descriptor
		is     func(error) bool
		want   string
	}{
		{"layers and diff ids differ in number", uneven, errdefs.IsInvalidArgument, "2 layers and the config 1"},
		{"absent", absent, errdefs.IsNotFound, absent.Digest.String()},
		{"nested too deep", nested, errdefs.IsInvalidArgument, "nest deeper"},
	} {
		_, err := Load(t.Context(), s, tt.target, oci.Host())
		if err == nil || !tt.is(err) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
