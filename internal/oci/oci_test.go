package oci

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	sha1 = "sha256:ec99f8b99825a742d50fb3ce173d291378a46ab54b8ef7dd75e5654e2a296e99"
	sha2 = "sha256:a606584aa9aa875552092ec9e1d62cb98d486f51f389609914039aabd9414687"
)

func desc(mt, dgst string) string {
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":10}`, mt, dgst)
}

func manifest(extra string) string {
	return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]%s}`,
		desc(ocispec.MediaTypeImageConfig, sha2), desc(ocispec.MediaTypeImageLayerGzip, sha1), extra)
}

func TestParseManifest(t *testing.T) {
	tests := []struct {
		name, mt, doc string
		want          string // part of the error; "" for none
		ambiguous     bool
	}{
		{"plain", ocispec.MediaTypeImageManifest, manifest(""), "", false},
		{"docker", MediaTypeDockerManifest, manifest(`,"mediaType":"` + MediaTypeDockerManifest + `"`), "", false},
		{"annotations may differ by case", ocispec.MediaTypeImageManifest, manifest(`,"annotations":{"a":"1","A":"2"}`), "", false},
		{"manifests too", ocispec.MediaTypeImageManifest, manifest(`,"manifests":[]`), `"manifests"`, true},
		{"fsLayers too", ocispec.MediaTypeImageManifest, manifest(`,"fsLayers":[]`), `"fsLayers"`, true},
		{"foreign key in another case", ocispec.MediaTypeImageManifest, manifest(`,"MANIFESTS":[]`), `"manifests"`, true},
		{"key twice", ocispec.MediaTypeImageManifest, manifest(`,"layers":[]`), "twice", true},
		{"key twice by case", ocispec.MediaTypeImageManifest, manifest(`,"Layers":[]`), "twice", true},
		{"key twice in a descriptor", ocispec.MediaTypeImageManifest, strings.Replace(manifest(""), `"size":10`, `"size":10,"Size":11`, 1), "twice", true},
		{"another type inside", ocispec.MediaTypeImageManifest, manifest(`,"mediaType":"` + ocispec.MediaTypeImageIndex + `"`), "calls itself", true},
		{"something behind", ocispec.MediaTypeImageManifest, manifest("") + `{}`, "follows", true},
		{"promised as index", ocispec.MediaTypeImageIndex, manifest(""), "is none", false},
		{"no object", ocispec.MediaTypeImageManifest, `[]`, "no JSON object", false},
		{"no config", ocispec.MediaTypeImageManifest, `{"schemaVersion":2}`, "no config", false},
		{"negative size", ocispec.MediaTypeImageManifest, strings.Replace(manifest(""), `"size":10`, `"size":-1`, 1), "size -1", false},
		{"digest as path", ocispec.MediaTypeImageManifest, strings.Replace(manifest(""), sha1, "sha256:../../../../etc/passwd", 1), "digest", false},
		{"unknown algorithm", ocispec.MediaTypeImageManifest, strings.Replace(manifest(""), sha1, "md5:d41d8cd98f00b204e9800998ecf8427e", 1), "digest", false},
		{"deep", ocispec.MediaTypeImageManifest, manifest(`,"x":` + strings.Repeat("[", 100) + strings.Repeat("]", 100)), "deeper", false},
		{"too large", ocispec.MediaTypeImageManifest, manifest(`,"x":"` + strings.Repeat("x", MaxDocument) + `"`), "larger", false},
		{"too many layers", ocispec.MediaTypeImageManifest, strings.Replace(manifest(""), `"layers":[`, `"layers":[`+strings.Repeat(desc("x", sha1)+",", MaxChildren), 1), "more than", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseManifest(tt.mt, []byte(tt.doc))
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errdefs.IsInvalidArgument(err) {
				t.Errorf("err = %v, want an invalid argument with %q", err, tt.want)
			}
			if errors.Is(err, ErrAmbiguous) != tt.ambiguous {
				t.Errorf("err = %v, ambiguous %v wanted", err, tt.ambiguous)
			}
		})
	}
}

func TestParseIndexRefusesLayers(t *testing.T) {
	doc := `{"manifests":[` + desc(ocispec.MediaTypeImageManifest, sha1) + `]`
	if idx, err := ParseIndex(ocispec.MediaTypeImageIndex, []byte(doc+`}`)); err != nil || len(idx.Manifests) != 1 {
		t.Fatalf("%v, %v", idx, err)
	}
	for _, key := range []string{"config", "layers", "fsLayers"} {
		if _, err := ParseIndex(ocispec.MediaTypeImageIndex, []byte(doc+`,"`+key+`":[]}`)); !errors.Is(err, ErrAmbiguous) {
			t.Errorf("%s: %v", key, err)
		}
	}
}

func TestParseImageWantsValidDiffIDs(t *testing.T) {
	if _, err := ParseImage([]byte(`{"rootfs":{"type":"layers","diff_ids":["` + sha1 + `"]},"config":{"Labels":{"a":"1","A":"2"}},"container_config":{}}`)); err != nil {
		t.Error(err)
	}
	if _, err := ParseImage([]byte(`{"rootfs":{"type":"layers","diff_ids":["sha256:..","` + sha1 + `"]}}`)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("err = %v", err)
	}
}

// The refs under which the note's pull wrote its ingests.
func TestKey(t *testing.T) {
	for _, tt := range []struct{ mt, want string }{
		{MediaTypeDockerList, "index-" + sha1},
		{ocispec.MediaTypeImageManifest, "manifest-" + sha1},
		{MediaTypeDockerConfig, "config-" + sha1},
		{MediaTypeDockerLayer + ".gzip", "layer-" + sha1},
		{MediaTypeDockerForeign + ".gzip", "layer-" + sha1},
		{ocispec.MediaTypeImageLayerZstd, "layer-" + sha1},
		{"application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "layer-" + sha1},
		{mediaTypeAttestation, "attestation-" + sha1},
		{"text/plain", "unknown-" + sha1},
	} {
		if got := Key(Descriptor{MediaType: tt.mt, Digest: sha1}); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.mt, got, tt.want)
		}
	}
	named := Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: sha1, Annotations: map[string]string{ocispec.AnnotationRefName: "1.0"}}
	if got := Key(named); got != "manifest-1.0@"+sha1 {
		t.Error(got)
	}
}

func TestChainIDs(t *testing.T) {
	ids := []digest.Digest{sha1, sha2}
	chain := ChainIDs(ids)
	if chain[0] != sha1 || chain[1] != digest.FromString(sha1+" "+sha2) {
		t.Error(chain)
	}
	if ids[1] != sha2 {
		t.Error("the argument was changed")
	}
}

func TestChildLabels(t *testing.T) {
	got := ChildLabels([]Descriptor{
		{MediaType: ocispec.MediaTypeImageConfig, Digest: "sha256:c"},
		{MediaType: ocispec.MediaTypeImageLayer, Digest: "sha256:a"},
		{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: "sha256:b"},
		{MediaType: "text/plain", Digest: "sha256:x"},
		{MediaType: ocispec.MediaTypeImageManifest, Digest: "sha256:m"},
	})
	want := map[string]string{
		"containerd.io/gc.ref.content.config": "sha256:c",
		"containerd.io/gc.ref.content.l.0":    "sha256:a",
		"containerd.io/gc.ref.content.l.1":    "sha256:b",
		"containerd.io/gc.ref.content.0":      "sha256:x",
		"containerd.io/gc.ref.content.m.0":    "sha256:m",
	}
	if !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestSourceLabel(t *testing.T) {
	key, list, ok := SourceLabel("docker.io", "library/b", "library/a")
	if key != "containerd.io/distribution.source.docker.io" || list != "library/a,library/b" || !ok {
		t.Error(key, list, ok)
	}
	if _, list, ok := SourceLabel("docker.io", list, "library/a"); ok || list != "library/a,library/b" {
		t.Error("a repository is listed twice:", list)
	}
	if _, _, ok := SourceLabel("docker.io", strings.Repeat("x", 4090), "y"); ok {
		t.Error("a label outgrew its bound")
	}
	if key, _, _ := SourceLabel("127.0.0.1:5000", "", "a"); key != "containerd.io/distribution.source.127.0.0.1" {
		t.Error("a port is in the label:", key)
	}
}

func TestSelect(t *testing.T) {
	d := func(id string, p *Platform) Descriptor {
		return Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(id), Platform: p}
	}
	arm := &Platform{OS: "linux", Architecture: "arm64"}
	v7 := &Platform{OS: "linux", Architecture: "arm", Variant: "v7"}
	v6 := &Platform{OS: "linux", Architecture: "arm", Variant: "v6"}
	attest := &Platform{OS: "unknown", Architecture: "unknown"}
	for _, tt := range []struct {
		platform string
		have     []Descriptor
		want     digest.Digest
	}{
		{"linux/arm64", []Descriptor{d("x", attest), d("a", arm)}, "a"},
		{"linux/arm/v7", []Descriptor{d("6", v6), d("7", v7)}, "7"},
		{"linux/arm/v7", []Descriptor{d("bare", nil), d("6", v6)}, "6"},
		{"linux/amd64", []Descriptor{d("bare", nil), d("a", arm)}, "bare"},
		{"linux/amd64", []Descriptor{d("a", arm), d("x", attest)}, ""},
		{"linux/amd64", nil, ""},
	} {
		got, err := Select(Index{Manifests: tt.have}, platforms.Only(platforms.MustParse(tt.platform)))
		if got.Digest != tt.want || (tt.want == "") != errdefs.IsNotFound(err) {
			t.Errorf("%s of %v: %s, %v; want %s", tt.platform, tt.have, got.Digest, err, tt.want)
		}
	}
	_, err := Select(Index{Manifests: []Descriptor{d("a", arm)}}, platforms.Only(platforms.MustParse("linux/amd64")))
	if err == nil || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("the error doesn't list what there is: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(manifest("")))
	f.Add([]byte(`{"manifests":[` + desc(ocispec.MediaTypeImageManifest, sha1) + `]}`))
	f.Add([]byte(`{"rootfs":{"type":"layers","diff_ids":["` + sha1 + `"]}}`))
	f.Add([]byte(manifest(`,"Layers":[]`)))
	f.Fuzz(func(t *testing.T, doc []byte) {
		m, errM := ParseManifest(ocispec.MediaTypeImageManifest, doc)
		idx, errI := ParseIndex(ocispec.MediaTypeImageIndex, doc)
		if errM == nil && errI == nil && (len(m.Layers) > 0 || len(idx.Manifests) > 0) {
			t.Errorf("one document is read as two kinds: %s", doc)
		}
		if errM == nil {
			for _, d := range slices.Concat([]Descriptor{m.Config}, m.Layers) {
				if Check(d) != nil {
					t.Errorf("bad descriptor let through: %v", d)
				}
			}
		}
		ParseImage(doc)
	})
}
