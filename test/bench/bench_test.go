package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestLayersAndRegistry: the same files make the same layer, which unpacks to
// what its record says, and the registry serves it whole and in ranges.
func TestLayersAndRegistry(t *testing.T) {
	tree := t.TempDir()
	for name, size := range map[string]int{"a": 10, "b/c": 5000, "b/d": 0} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(tree, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, name), bytes.Repeat([]byte("x"), size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(tree, "a"), filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	lib := &library{dir: t.TempDir()}
	if err := os.Mkdir(filepath.Join(lib.dir, "blobs"), 0o755); err != nil {
		t.Fatal(err)
	}
	var made [2]layer
	for i := range made {
		entries, err := walk(tree, "opt")
		if err != nil {
			t.Fatal(err)
		}
		if made[i], err = lib.writeLayer(t.Context(), append(entries, patternEntry("noise", 1<<20, 100, 1000, 7))); err != nil {
			t.Fatal(err)
		}
	}
	if made[0].Desc.Digest != made[1].Desc.Digest {
		t.Error("the same files made two layers")
	}
	if made[0].Files != 5 || made[0].Bytes != 5010+1<<20 {
		t.Errorf("%d files and %d bytes are recorded, want 5 and %d", made[0].Files, made[0].Bytes, 5010+1<<20)
	}
	packed, err := os.ReadFile(lib.blob(made[0].Desc.Digest))
	if err != nil {
		t.Fatal(err)
	}
	unpacked, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	if dgst, err := digest.FromReader(unpacked); err != nil || dgst != made[0].DiffID {
		t.Errorf("the layer unpacks to %s (%v), want %s", dgst, err, made[0].DiffID)
	}

	img := &image{Name: "bench/x", Layers: made[:1]}
	lib.Images = []*image{img}
	if err := lib.writeManifest(img); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(lib)
	defer server.Close()
	for _, row := range []struct {
		path, byteRange string
		status          int
		length          int64
	}{
		{"/v2/", "", 200, 0},
		{"/v2/bench/x/manifests/latest", "", 200, img.Target.Size},
		{"/v2/bench/y/manifests/latest", "", 404, -1},
		{"/v2/bench/x/blobs/" + made[0].Desc.Digest.String(), "", 200, made[0].Desc.Size},
		{"/v2/bench/x/blobs/" + made[0].Desc.Digest.String(), "bytes=100-", 206, made[0].Desc.Size - 100},
		{"/v2/bench/x/blobs/sha256:..", "", 404, -1},
	} {
		req, err := http.NewRequest(http.MethodGet, server.URL+row.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if row.byteRange != "" {
			req.Header.Set("Range", row.byteRange)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != row.status || row.length >= 0 && n != row.length {
			t.Errorf("GET %s %s: status %d, %d bytes (%v), want %d, %d", row.path, row.byteRange, resp.StatusCode, n, err, row.status, row.length)
		}
	}
}

// TestPattern: noise and zeros alternate, and reads of any size see the same bytes.
func TestPattern(t *testing.T) {
	read := func(step int) []byte {
		body, err := patternEntry("x", 5000, 64, 1024, 3).open()
		if err != nil {
			t.Fatal(err)
		}
		var all []byte
		buf := make([]byte, step)
		for {
			n, err := body.Read(buf)
			if all = append(all, buf[:n]...); err != nil {
				return all
			}
		}
	}
	whole := read(8192)
	if len(whole) != 5000 {
		t.Fatalf("%d bytes, want 5000", len(whole))
	}
	if !bytes.Equal(whole, read(7)) {
		t.Error("small reads see other bytes")
	}
	if bytes.Equal(whole[:64], make([]byte, 64)) || !bytes.Equal(whole[64:1024], make([]byte, 960)) {
		t.Error("want 64 bytes of noise and 960 zeros")
	}
	if bytes.Equal(whole[:64], whole[1024:1088]) {
		t.Error("the noise repeats itself, and would compress")
	}
}

// TestVerdicts: medians are taken figure by figure, and a verdict needs the figures of both daemons.
func TestVerdicts(t *testing.T) {
	r := new(report)
	for _, s := range []sample{
		{Daemon: "ours", Wall: 1, Anon: 30}, {Daemon: "ours", Wall: 3, Anon: 10}, {Daemon: "ours", Wall: 2, Anon: 20},
		{Daemon: "default", Wall: 10, Anon: 10, Peak: 1}, {Daemon: "default", Wall: 20, Anon: 10, Peak: 1},
	} {
		s.Scenario, s.Root = "b", tmpfs
		r.Samples = append(r.Samples, s)
	}
	ours, _ := r.median("b", tmpfs, "ours")
	theirs, _ := r.median("b", tmpfs, "default")
	if ours.Wall != 2 || ours.Anon != 20 || theirs.Wall != 15 {
		t.Errorf("medians are %+v and %+v", ours, theirs)
	}
	r.judge()
	var met []bool
	for _, v := range r.Verdicts {
		met = append(met, v.Met)
	}
	// Wall is 2 of 15 and met, anonymous memory twice theirs and missed, peak none of 1 and met.
	if !slices.Equal(met, []bool{true, false, true}) {
		t.Errorf("verdicts are %+v", r.Verdicts)
	}
}
