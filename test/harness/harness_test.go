package harness

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestMain(m *testing.M) { os.Exit(Run(m)) }

// get fetches a blob from byte from on; it returns the status and what came before the connection ended.
func get(ctx context.Context, r *Registry, dgst digest.Digest, byteRange string) (int, []byte) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Host+"/v2/x/blobs/"+dgst.String(), nil)
	if err != nil {
		return 0, nil
	}
	req.Header.Set("Range", byteRange)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, body
}

// TestRegistryCountsAndHolds: ranges are served, every byte is counted, and a hold lets out what it says.
func TestRegistryCountsAndHolds(t *testing.T) {
	reg := NewRegistry(t)
	img := NewImage(t, Random(1, 1)...)
	reg.Push(img, "x")
	layer := img.Layers[0]

	status, body := get(t.Context(), reg, layer.Digest, "bytes=1000-")
	if want := img.Blobs[layer.Digest][1000:]; status != http.StatusPartialContent || !slices.Equal(body, want) {
		t.Errorf("a range from 1000 on: status %d, %d bytes, want %d", status, len(body), len(want))
	}
	if n := reg.Served()[layer.Digest]; n != layer.Size-1000 {
		t.Errorf("%d bytes counted, want %d", n, layer.Size-1000)
	}

	reached := reg.Hold(100_000)
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan int)
	go func() {
		_, body := get(ctx, reg, layer.Digest, "bytes=0-")
		got <- len(body)
	}()
	<-reached
	cancel()
	if n := <-got; n > 100_000+chunk {
		t.Errorf("a hold after 100000 bytes let out %d", n)
	}
	if n := reg.Served()[layer.Digest]; n < 100_000 || n > 100_000+chunk {
		t.Errorf("%d bytes counted, want about 100000", n)
	}
}

// TestImageIsDeterministic: a seed gives the same digests, so that layers can be shared; another seed gives others.
func TestImageIsDeterministic(t *testing.T) {
	a, b, c := NewImage(t, Random(1, 3)...), NewImage(t, Random(1, 3)...), NewImage(t, Random(2, 3)...)
	if a.Target.Digest != b.Target.Digest || a.ChainID != b.ChainID {
		t.Error("one seed, two images")
	}
	if a.Target.Digest == c.Target.Digest {
		t.Error("two seeds, one image")
	}
}

// TestTreeModel: deletions of a layer hide what lies below it and not what it brings itself.
func TestTreeModel(t *testing.T) {
	img := NewImage(t,
		Layer{Dir("a"), File("a/gone", []byte("1")), File("a/kept", []byte("2")), Dir("b"), File("b/old", nil), Dir("c"), File("c/x", nil)},
		Layer{Dir("a"), Whiteout("a/gone"), Link("a/hard", "a/kept"), Dir("b"), File("b/new", nil), Opaque("b"), Whiteout("c"), Symlink("c", "a")})
	var names []string
	for name := range img.Tree {
		names = append(names, name)
	}
	slices.Sort(names)
	if want := []string{"a", "a/hard", "a/kept", "b", "b/new", "c"}; !slices.Equal(names, want) {
		t.Errorf("tree is %v, want %v", names, want)
	}
}

// TestDifferences: a tree read from disk equals itself, and every kind of difference is seen.
func TestDifferences(t *testing.T) {
	dir := t.TempDir()
	write := func(name, body string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("same", "1")
	write("changed", "1")
	write("missing", "1")
	want, err := ReadTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	if lines := want.Differences(want); len(lines) > 0 {
		t.Errorf("a tree differs from itself: %q", lines)
	}
	write("changed", "")
	write("extra", "1")
	if err := os.Remove(filepath.Join(dir, "missing")); err != nil {
		t.Fatal(err)
	}
	got, err := ReadTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	if lines := want.Differences(got); len(lines) != 3 {
		t.Errorf("differences %q, want those of changed, extra and missing", lines)
	}
}
