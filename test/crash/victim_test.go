package crash

import (
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/test/harness"
)

var benchDir = flag.String("bench", "/tmp/holdfast-bench", "with -thorough, kill pulls of the benchmark's image b if its directory has it, and else of one made as large")

// Sizes of the image that is made here, in bytes of files per layer.
const (
	layerBytes = 6 << 20
	largeTimes = 32 // with -thorough; then the layers have about 500 MB together, compressed
)

// newVictim chooses the image to pull.
func newVictim(t *testing.T, seed uint64) *victim {
	t.Helper()
	v := &victim{diskSize: 512 << 20}
	times := 1
	if *thorough {
		v.diskSize, times = 8<<30, largeTimes
		v.img = benchImage(t)
	}
	if v.img == nil {
		v.img = harness.NewImage(t, goLayers(t, seed, times)...)
	}
	v.measure(t)
	return v
}

// goLayers makes five layers: four of files out of Go's own tree, chosen by seed,
// and one of a blob that doesn't compress.
func goLayers(t *testing.T, seed uint64, times int) []harness.Layer {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	root := strings.TrimSpace(string(out))
	var files []string
	for _, dir := range []string{"src", "pkg/tool"} {
		err = errors.Join(err, filepath.WalkDir(filepath.Join(root, dir), func(name string, entry fs.DirEntry, err error) error {
			if err == nil && entry.Type().IsRegular() {
				files = append(files, name)
			}
			return err
		}))
	}
	if err != nil || len(files) == 0 {
		t.Fatalf("no files in GOROOT %s: %v", root, err)
	}
	rnd := rand.New(rand.NewPCG(seed, 4))
	layers := make([]harness.Layer, 4)
	for i := range layers {
		dir := path.Join("layer", string(rune('a'+i)))
		layers[i] = harness.Layer{harness.Dir("layer"), harness.Dir(dir)}
		made := make(map[string]bool)
		for n, left := 0, times*layerBytes*(i+1)/2; left > 0; n++ {
			name := files[rnd.IntN(len(files))]
			body, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			rel, _ := filepath.Rel(root, name)
			sub := path.Join(dir, strings.ReplaceAll(path.Dir(rel), "/", "-"))
			if !made[sub] {
				made[sub] = true
				layers[i] = append(layers[i], harness.Dir(sub))
			}
			layers[i] = append(layers[i], harness.File(path.Join(sub, strconv.Itoa(n)), body))
			left -= len(body)
		}
	}
	noise := make([]byte, times*layerBytes/2)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	return append(layers, harness.Layer{harness.File("noise", noise)})
}

// benchImage returns the benchmark's image b, nil if it was not made yet. What its
// tree must be is left to the first pull.
func benchImage(t *testing.T) *harness.Image {
	t.Helper()
	body, err := os.ReadFile(filepath.Join(*benchDir, "images.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Images []struct {
			Scenario string
			Target   ocispec.Descriptor
			Layers   []struct {
				Desc   ocispec.Descriptor
				DiffID digest.Digest `json:"diff_id"`
			}
		}
	}
	if err := json.Unmarshal(body, &list); err != nil {
		t.Fatal(err)
	}
	for _, made := range list.Images {
		if made.Scenario != "b" {
			continue
		}
		img := &harness.Image{Target: made.Target, Blobs: make(map[digest.Digest][]byte)}
		read := func(desc ocispec.Descriptor) {
			if img.Blobs[desc.Digest], err = os.ReadFile(filepath.Join(*benchDir, "blobs", desc.Digest.Encoded())); err != nil {
				t.Fatal(err)
			}
		}
		read(made.Target)
		var manifest ocispec.Manifest
		if err := json.Unmarshal(img.Blobs[made.Target.Digest], &manifest); err != nil {
			t.Fatal(err)
		}
		read(manifest.Config)
		var diffIDs []digest.Digest
		for _, layer := range made.Layers {
			read(layer.Desc)
			img.Layers = append(img.Layers, layer.Desc)
			diffIDs = append(diffIDs, layer.DiffID)
		}
		img.ChainID = identity.ChainID(diffIDs)
		return img
	}
	return nil
}
