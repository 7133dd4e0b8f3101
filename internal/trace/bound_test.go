package trace

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// TestRecordIsBounded floods an operation with everything that a hostile
// registry can make grow: the record stays readable.
func TestRecordIsBounded(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir, Options{})
	op := r.Begin(NewID(), "pull", "default", strings.Repeat("r", 10_000))
	bad := errors.New(strings.Repeat("\x00\"<\xff", 1000))
	var shares []pull.Share
	for i := range 2 * maxLayers {
		d := digest.FromString(fmt.Sprint(i))
		shares = append(shares, pull.Share{ID: d, Parent: d, Desc: oci.Descriptor{Digest: d, Size: 1 << 60}})
	}
	op.shares(shares)
	begun := time.Now()
	for i := range 2 * maxSpans {
		s := shares[i%len(shares)]
		host := fmt.Sprint(i, bad)
		op.Exchange(registry.Exchange{Host: host, Object: s.ID.String(), Start: begun, Wait: time.Hour})
		op.Retry(host, s.ID.String(), time.Hour, bad)
		op.Down(host, bad)
		op.span(pull.Span{Layer: s.ID, Phase: pull.PhaseUnpack, Start: begun, End: begun.Add(time.Hour), Pass: &pull.Pass{Host: host, Fetched: 1 << 60, Kept: 1 << 60, Open: time.Hour}})
	}
	op.End("", bad)
	r.Close()
	r = open(t, dir, Options{})
	rec, err := r.Get(op.id)
	if err != nil {
		info, _ := os.Stat(r.file(op.id))
		t.Fatalf("%d bytes: %v", info.Size(), err)
	}
	spans := len(rec.Spans)
	for _, l := range rec.Layers {
		spans += len(l.Spans)
	}
	if spans != maxSpans || len(rec.Layers) != maxLayers || len(rec.Hosts) != maxHosts || rec.Dropped == 0 || strings.ContainsFunc(rec.Error, func(r rune) bool { return r == 0 || r == utf8.RuneError }) {
		t.Errorf("%d spans, %d layers, %d hosts, %d dropped", spans, len(rec.Layers), len(rec.Hosts), rec.Dropped)
	}
	if info, err := os.Stat(r.file(op.id)); err != nil || info.Size() > maxFile || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v", info, err)
	}
}

func TestRingIsBoundedInBytes(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir, Options{Bytes: 20_000})
	for i := range 20 {
		r.Begin(fmt.Sprintf("20260101-000000.%03d-aaaa", i), "pull", "default", "x").End("", errors.New(strings.Repeat("e", 3000)))
	}
	r.Close()
	var size int64
	files := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			info, e := e.Info()
			files, size, err = files+1, size+info.Size(), e
		}
		return err
	})
	if err != nil || size > 20_000 || files < 4 {
		t.Errorf("%d files of %d bytes, %v", files, size, err)
	}
}

// TestAFullDiskHurtsNobody: an operation whose record can't be written ends all the same.
func TestAFullDiskHurtsNobody(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "traces")
	r := open(t, dir, Options{})
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	op := r.Begin(NewID(), "pull", "default", "x")
	op.End("", nil)
	r.Close()
	if _, err := r.Get(op.id); !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
	op = r.Begin(NewID(), "pull", "default", "x")
	op.End("", nil) // after Close
	if _, err := r.Get(op.id); !errdefs.IsNotFound(err) {
		t.Errorf("after Close: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	rec := one(1, 2, 3)
	rec.ID = "20260101-000000.001-aaaa"
	data, err := encode(rec)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"id":"20260101-000000.001-aaaa","layers":[{"spans":[{"start":-9223372036854775808,"elapsed":9223372036854775807}]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := decode("20260101-000000.001-aaaa", data)
		if err != nil {
			return
		}
		again, err := encode(rec)
		if err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		if _, err := decode(rec.ID, again); err != nil {
			t.Fatal(err)
		}
	})
}
