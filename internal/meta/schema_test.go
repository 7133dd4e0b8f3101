package meta

import (
	"encoding/binary"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/opencontainers/go-digest"
)

// readDrawing turns the drawing of schema.go into paths and encodings.
func readDrawing(t *testing.T) map[string]string {
	t.Helper()
	src, err := os.ReadFile("schema.go")
	ok(t, err)
	line := regexp.MustCompile(`^//\t( *)(\S+)(?: +(\S+))?`)
	paths := make(map[string]string)
	var at []string
	for l := range strings.Lines(string(src)) {
		m := line.FindStringSubmatch(l)
		if m == nil {
			continue
		}
		depth := len(m[1]) / 4
		at = append(at[:depth], m[2])
		if slices.Contains([]string{"T", "V", "S", "A", "-"}, m[3]) {
			paths[strings.Join(at, "|")] = m[3]
		}
	}
	if len(paths) < 30 {
		t.Fatalf("read %d keys from the drawing", len(paths))
	}
	return paths
}

// TestSchemaDrawing holds the drawing against a file that has every kind of
// record in it.
func TestSchemaDrawing(t *testing.T) {
	h := newHouse(t, Options{})
	h.reopen(func() {
		raw(t, h.path(), map[string][]byte{
			"v1|ns0|containers|box|image":       []byte("name0"),
			"v1|ns0|containers|box|snapshotter": []byte("mem"),
			"v1|ns0|containers|box|snapshotKey": []byte("key0"),
			"v1|ns0|containers|box|labels|l0":   []byte("x"),
			"v1|ns0|sandboxes|box|labels|l0":    []byte("x"),
		})
	})
	labels := map[string]string{"l0": "x", labelExpire: "2999-01-02T15:04:05Z"}
	ok(t, h.CreateNamespace(t.Context(), Namespace{Name: "other"}))
	other := write(t, h.Space("other"), "shared", nil)
	must[Namespace](t)(h.UpdateNamespace(t.Context(), Namespace{Name: "ns0", Labels: labels}))
	sp := h.Space("ns0")
	must[Lease](t)(sp.CreateLease(t.Context(), Lease{ID: "lease0", Labels: labels}))
	leased := sp.Leased("lease0")
	dgst := write(t, leased, "blob", labels)
	img := image("name0", dgst, labels)
	img.Target.Annotations = map[string]string{"l0": "x"}
	must[Image](t)(leased.CreateImage(t.Context(), img))
	ok(t, leased.Update(t.Context(), func(tx *Tx) error { return tx.AddIngest("held", "") }))
	w := must[*Writer](t)(sp.OpenWriter(t.Context(), "unheld", WriterOptions{Expected: other}))
	ok(t, w.Close())
	mem := must[Snapshots](t)(leased.Snapshots("mem"))
	_, err := mem.Prepare(t.Context(), "key0", "", nil)
	ok(t, err)
	ok(t, mem.Commit(t.Context(), "base", "key0", "", labels))
	_, err = mem.Prepare(t.Context(), "key0", "base", nil)
	ok(t, err)

	drawn := readDrawing(t)
	seen := make(map[string]bool)
	names := map[string]string{
		"ns0": "<ns>", "other": "<ns>", "l0": "<key>", labelExpire: "<key>", "name0": "<name>", "lease0": "<id>", "box": "<id>",
		"mem": "<driver>", "key0": "<key>", "base": "<key>", "held": "<ref>", "unheld": "<ref>",
		string(dgst): "<digest>", string(other): "<digest>",
	}
	for path, v := range dumpFile(t, h.bolt) {
		steps := strings.Split(path, "|")
		for i, s := range steps {
			if n, ok := names[s]; ok {
				steps[i] = n
			}
		}
		at := strings.Join(steps, "|")
		enc, ok := drawn[at]
		if !ok {
			t.Errorf("not in the drawing: %s", path)
			continue
		}
		seen[at] = true
		var tm time.Time
		switch enc {
		case "T":
			if err := tm.UnmarshalBinary(v); err != nil || len(v) != 15 {
				t.Errorf("%s isn't a time in UTC: %x", path, v)
			}
		case "V":
			if _, n := binary.Varint(v); n != len(v) {
				t.Errorf("%s isn't a varint: %x", path, v)
			}
		case "-":
			if len(v) != 0 {
				t.Errorf("%s isn't empty: %x", path, v)
			}
		}
	}
	for _, at := range slices.Sorted(maps.Keys(drawn)) {
		if !seen[at] {
			t.Errorf("drawn, and not in the file: %s", at)
		}
	}
	if v := dumpFile(t, h.bolt)["v1|version"]; string(v) != "\x08" {
		t.Errorf("version is %x", v)
	}
}

// TestRefs are the names that a pull in namespace k8s.io gives its ingests.
func TestBackendRef(t *testing.T) {
	h := newHouse(t, Options{})
	dgst := digest.Digest("sha256:dabf91b69c191a1a0a1628fd6bdd029c0c4018041c7f052870bb13c5a222ae76")
	w := must[*Writer](t)(h.Space("k8s.io").OpenWriter(t.Context(), "manifest-"+string(dgst), WriterOptions{Expected: dgst}))
	ok(t, w.Close())
	for ref, err := range h.blobs.Refs() {
		ok(t, err)
		if want := "k8s.io/1/manifest-" + string(dgst); ref != want {
			t.Errorf("backend ref %s, want %s", ref, want)
		}
	}
}

func TestTargetKeepsFourFields(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	img := image("a", digest.FromString("x"), nil)
	img.Target.URLs = []string{"http://nowhere"}
	img.Target.Annotations = map[string]string{"k": "v", "empty": ""}
	img.Target.Platform = &oci.Platform{OS: "plan9"}
	must[Image](t)(sp.CreateImage(t.Context(), img))
	got := must[Image](t)(sp.Image(t.Context(), "a"))
	if got.Target.URLs != nil || got.Target.Platform != nil || !maps.Equal(got.Target.Annotations, map[string]string{"k": "v"}) {
		t.Errorf("%+v", got.Target)
	}
	if got.Target.Digest != img.Target.Digest || got.Target.Size != 1 || got.Target.MediaType != "application/x" {
		t.Errorf("%+v", got.Target)
	}
}
