package trace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func open(t testing.TB, dir string, opts Options) *Recorder {
	t.Helper()
	r, err := Open(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func all(t *testing.T, r *Recorder) (ids []string) {
	t.Helper()
	for rec, err := range r.All(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, rec.ID)
	}
	return ids
}

func TestRingKeepsTheNewest(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir, Options{Records: 3})
	ids := []string{
		"20260101-000000.001-aaaa", "20260101-000000.002-aaaa", "20260101-000000.003-aaaa",
		"20260101-000000.004-aaaa", "20260101-000000.005-aaaa",
	}
	for _, id := range ids {
		r.Begin(id, "pull", "default", "r.example/app:1").End(digest.FromString("x"), errors.New("the disk is full"))
	}
	r.Close()
	if err := os.WriteFile(filepath.Join(dir, ids[4]+".json.tmp"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ids[3]+".json"), []byte("{damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	r = open(t, dir, Options{Records: 3})
	if got, want := all(t, r), []string{ids[4], ids[2]}; !slices.Equal(got, want) {
		t.Errorf("%q, want the newest that can be read: %q", got, want)
	}
	if _, err := os.Stat(filepath.Join(dir, ids[4]+".json.tmp")); !os.IsNotExist(err) {
		t.Error("what a crash has left stays")
	}
	rec, err := r.Get(ids[4])
	if err != nil || rec.Error != "the disk is full" || rec.Running {
		t.Errorf("%+v, %v", rec, err)
	}
	if _, err := r.Get(ids[0]); !errdefs.IsNotFound(err) {
		t.Errorf("the oldest: %v", err)
	}
	if _, err := r.Get("../../etc/passwd"); !errdefs.IsNotFound(err) {
		t.Errorf("a name that is no id: %v", err)
	}
}

func TestAnOperationUnderWayIsListed(t *testing.T) {
	r := open(t, t.TempDir(), Options{})
	op := r.Begin(NewID(), "pull", "default", "r.example/app:1")
	rec, err := r.Get(op.id)
	if err != nil || !rec.Running {
		t.Errorf("%+v, %v", rec, err)
	}
	op.End("", nil)
	op.End("", errors.New("twice"))
	if rec, err := r.Get(op.id); err != nil || rec.Running || rec.Error != "" {
		t.Errorf("%+v, %v", rec, err)
	}
}

func TestHostsAreBounded(t *testing.T) {
	op := open(t, t.TempDir(), Options{}).Begin(NewID(), "pull", "default", "r.example/app:1")
	long := strings.Repeat("long.", 100)
	for i := range 10 * maxHosts {
		op.Retry(long, "x", 0, nil)
		op.Down(fmt.Sprint(i), errors.New("it is gone"))
		op.Down(long, errors.New("it is gone"))
	}
	if n := len(op.snapshot().Hosts); n > maxHosts {
		t.Errorf("%d hosts, more than %d", n, maxHosts)
	}
}

// one is a record of one layer whose bytes took a second to go by.
func one(inflate, starved, emit time.Duration) Record {
	const s = time.Second
	return Record{Elapsed: s, Spans: []Span{{Stage: StageLayers, Elapsed: s}}, Layers: []Layer{{
		ID: "sha256:1", Digest: "sha256:1", Size: 1 << 20, Spans: []Span{
			{Stage: StageFetch, Elapsed: s, Busy: starved, Bytes: 1 << 20},
			{Stage: StageInflate, Elapsed: s, Busy: inflate, Starved: starved},
			{Stage: StageEmit, Elapsed: s, Busy: emit},
		},
	}}}
}

func TestVerdictNamesWhatBounds(t *testing.T) {
	const ms = time.Millisecond
	for want, rec := range map[Resource]Record{
		Network: one(50*ms, 930*ms, 60*ms),
		Inflate: one(930*ms, 30*ms, 300*ms),
		Files:   one(200*ms, 20*ms, 970*ms),
		Registry: {Elapsed: time.Second, Spans: []Span{
			{Stage: StageResolve, Elapsed: 900 * ms}, {Stage: StageAnswer, Elapsed: 880 * ms},
			{Stage: StageRecord, Start: 900 * ms, Elapsed: 100 * ms},
		}},
		Commit: {Elapsed: time.Second, Spans: []Span{
			{Stage: StageResolve, Elapsed: 100 * ms}, {Stage: StageRecord, Start: 100 * ms, Elapsed: 900 * ms},
		}},
	} {
		if v := judge(rec); v.Resource != want {
			t.Errorf("%s bounded it, and the verdict is %q: %+v", want, v.Text, v.Parts)
		}
	}
}
