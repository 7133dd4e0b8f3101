package e2e

import (
	"encoding/json"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/test/harness"
)

// noted is what a published trace of containerd shows of one ingest, by inotify's create, modify and delete; DIR is the
// ingest's directory. The trace's own ingest of the index begins late, since its watch came late.
var noted = []string{
	"CREATE DIR/",
	"CREATE ref", "MODIFY ref",
	"CREATE startedat.tmp", "MODIFY startedat.tmp",
	"CREATE updatedat.tmp", "MODIFY updatedat.tmp",
	"CREATE total", "MODIFY total",
	"CREATE data", "MODIFY data",
	"DELETE ref", "DELETE startedat", "DELETE updatedat", "DELETE total",
	"DELETE DIR/",
}

// tmpfs mounts one of its own for a store.
func tmpfs(t *testing.T) string {
	t.Helper()
	dir := harness.TempDir(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// indexed puts an image of one layer and an index of it into the registry.
func indexed(t *testing.T, reg *harness.Registry, name string) (ref string, img *harness.Image, index digest.Digest) {
	t.Helper()
	img = harness.NewImage(t, harness.Random(1, 1)...)
	reg.Push(img, name+"-manifest")
	target := img.Target
	target.Platform = &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	doc, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{target},
	})
	if err != nil {
		t.Fatal(err)
	}
	index = digest.FromBytes(doc)
	img.Blobs[index] = doc
	whole := *img
	whole.Target = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: index, Size: int64(len(doc))}
	return reg.Push(&whole, name), img, index
}

// TestIngestOrder watches a pull in the kubelet's namespace as the trace did: the names of the ingests, their order, and
// the order of what happens in each.
func TestIngestOrder(t *testing.T) {
	harness.NeedRoot(t)
	mount := tmpfs(t)
	reg := harness.NewRegistry(t)
	ref, img, index := indexed(t, reg, "app")
	d := harness.Start(t, harness.Options{Root: filepath.Join(mount, "root")})
	config := manifestOf(t, img).Config.Digest

	watch := watchMount(t, mount)
	reached := reg.Hold(int64(len(img.Blobs[index])+len(img.Blobs[img.Target.Digest])+len(img.Blobs[config])) + 100_000)
	pulled := make(chan error, 1)
	go func() {
		_, err := d.Ctl("-n", "k8s.io", "pull", "--plain-http", ref)
		pulled <- err
	}()
	select {
	case <-reached:
	case err := <-pulled:
		t.Fatalf("the pull ended before the layer was half here: %v", err)
	}
	before := watch.all() // so that the kernel joins no event of the end to one of the beginning
	reg.Release()
	if err := <-pulled; err != nil {
		t.Fatal(err)
	}
	all := watch.all()

	kinds := []string{"index-" + index.String(), "manifest-" + img.Target.Digest.String(), "config-" + config.String(), "layer-" + img.Layers[0].Digest.String()}
	var names []string
	for _, kind := range kinds {
		names = append(names, digest.FromString("k8s.io/1/"+kind).Encoded())
	}
	var made []string
	for _, h := range all {
		if h.dir == inRoot(harness.IngestDir) && h.what == "CREATE" {
			made = append(made, strings.TrimSuffix(h.name, "/"))
		}
	}
	if !slices.Equal(made, names) {
		t.Errorf("ingests were made in the order\n%q, want\n%q", made, names)
	}
	for i, name := range names {
		if got := ingestStory(all, name); !slices.Equal(got, noted) {
			t.Errorf("ingest of %s:\n%s\nwant\n%s", kinds[i], strings.Join(got, "\n"), strings.Join(noted, "\n"))
		}
	}
	checkMetaBetween(t, before, all)
	whole(t, d)
}

func inRoot(dir string) string { return filepath.Join("root", dir) }

// ingestStory is what the trace would show of an ingest: renames are left out, and a repeated change is one.
func ingestStory(all []happening, name string) (story []string) {
	for _, h := range all {
		line := ""
		switch {
		case h.what == "MOVED":
			continue
		case h.dir == inRoot(harness.IngestDir) && h.name == name+"/":
			line = h.what + " DIR/"
		case h.dir == filepath.Join(inRoot(harness.IngestDir), name):
			line = h.what + " " + h.name
		default:
			continue
		}
		if len(story) == 0 || story[len(story)-1] != line {
			story = append(story, line)
		}
	}
	return story
}

// checkMetaBetween: meta.db is written before the first ingest is made and after the last is gone.
func checkMetaBetween(t *testing.T, before, all []happening) {
	t.Helper()
	isMeta := func(h happening) bool { return h.what == "MODIFY" && h.name == "meta.db" }
	isIngest := func(h happening) bool { return strings.HasPrefix(h.dir, inRoot(harness.IngestDir)) }
	if m, i := slices.IndexFunc(all, isMeta), slices.IndexFunc(all, isIngest); m < 0 || m > i {
		t.Errorf("meta.db is first written as happening %d, and the first ingest made as %d", m, i)
	}
	if after := all[len(before):]; !slices.ContainsFunc(after, isMeta) {
		t.Error("meta.db isn't written after the ingests are")
	}
}

func manifestOf(t *testing.T, img *harness.Image) (m ocispec.Manifest) {
	t.Helper()
	if err := json.Unmarshal(img.Blobs[img.Target.Digest], &m); err != nil {
		t.Fatal(err)
	}
	return m
}
