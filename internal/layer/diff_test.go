package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

func diffOf(t *testing.T, lower, upper string, opts DiffOptions) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := Diff(t.Context(), &buf, lower, upper, opts); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}

// A diff between two trees, applied to the first, gives the second.
func TestDiffRoundTrip(t *testing.T) {
	layertest.InMemory(t)
	var images []layertest.Image
	for _, img := range layertest.Awkward() {
		if img.Name != "hundred-layers" && img.Name != "names" { // tar can't hold names that aren't UTF-8 in PAX
			images = append(images, img)
		}
	}
	for seed := range uint64(25) {
		images = append(images, layertest.Random(seed))
	}
	for _, img := range images {
		t.Run(img.Name, func(t *testing.T) {
			upper := asDirectory(t, img)
			lower := asDirectory(t, layertest.Image{Layers: img.Layers[:len(img.Layers)-1]})
			work := t.TempDir()
			copyTree(t, lower, work)
			archive := diffOf(t, lower, upper, DiffOptions{})
			if _, err := applyTo(t, work, archive, "", Limits{}); err != nil {
				t.Fatal(err)
			}
			diffs, err := layertest.Compare(upper, work, layertest.CompareOptions{
				// Times are cut to seconds, as containerd's differ cuts them.
				IgnoreTimes: func(string, bool) bool { return true },
				IgnoreRoot:  true,
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range diffs {
				t.Errorf("applied diff: %s", d)
			}
			if again := diffOf(t, lower, upper, DiffOptions{}); !bytes.Equal(archive, again) {
				t.Error("the second diff is another archive")
			}
		})
	}
}

func TestDiffEntries(t *testing.T) {
	lower, upper := t.TempDir(), t.TempDir()
	if _, err := applyTo(t, lower, layertest.Archive(layertest.Dir("d", 0o750), layertest.File("d/gone", "g"), layertest.File("d/same", "s"), layertest.File("x", "x"), layertest.Link("y", "x")), "", Limits{}); err != nil {
		t.Fatal(err)
	}
	copyTree(t, lower, upper)
	late := time.Unix(2_000_000_000, 5)
	if err := errors.Join(
		os.Remove(filepath.Join(upper, "d/gone")),
		os.WriteFile(filepath.Join(upper, "new"), []byte("n"), 0o600),
		os.Chtimes(filepath.Join(upper, "new"), late, late),
		os.Link(filepath.Join(upper, "x"), filepath.Join(upper, "z")),
		unix.Mknod(filepath.Join(upper, "sock"), unix.S_IFSOCK|0o600, 0),
	); err != nil {
		t.Fatal(err)
	}
	epoch := time.Unix(1_700_000_000, 0)
	r := tar.NewReader(bytes.NewReader(diffOf(t, lower, upper, DiffOptions{SourceDateEpoch: &epoch})))
	var got []string
	for {
		hdr, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		line := string(hdr.Typeflag) + " " + hdr.Name
		if hdr.Linkname != "" {
			line += " -> " + hdr.Linkname
		}
		got = append(got, line)
		if hdr.ModTime.After(epoch) || hdr.ModTime.Nanosecond() != 0 {
			t.Errorf("%s: time %v", hdr.Name, hdr.ModTime)
		}
		if strings.Contains(hdr.Name, ".wh.") && hdr.ModTime.Unix() != 0 {
			t.Errorf("whiteout %s has time %v", hdr.Name, hdr.ModTime)
		}
	}
	want := "5 d/, 0 d/.wh.gone, 0 new, 0 z, 1 x -> z, 1 y -> z"
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("entries:\n%s, want\n%s", s, want)
	}
}
