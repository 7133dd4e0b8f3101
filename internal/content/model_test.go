package content

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// model is what a store must look like, in a few maps.
type model struct {
	blobs   map[digest.Digest]string
	ingests map[string]string
	open    map[string]*Writer
}

// TestRandomOperations runs random operations on a store and on the model,
// and compares all that can be seen after each.
func TestRandomOperations(t *testing.T) {
	refs := []string{"a", "b", "c"}
	words := []string{"", "x", "yy", "zzz"}
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		pick := func(of []string) string { return of[rnd.IntN(len(of))] }
		dir := t.TempDir()
		s := open(t, dir)
		m := model{map[digest.Digest]string{}, map[string]string{}, map[string]*Writer{}}
		for step := range 300 {
			ref, word := pick(refs), pick(words)
			w := m.open[ref]
			switch op := rnd.IntN(8); {
			case op == 0: // open
				got, err := s.Writer(t.Context(), ref, WriterOptions{})
				if w != nil {
					if !errdefs.IsUnavailable(err) {
						t.Fatalf("seed %d step %d: second writer: %v", seed, step, err)
					}
				} else if err != nil {
					t.Fatalf("seed %d step %d: %v", seed, step, err)
				} else {
					m.open[ref] = got
					m.ingests[ref] += ""
				}
			case op <= 2 && w != nil: // write
				write(t, w, word)
				m.ingests[ref] += word
			case op == 3 && w != nil: // truncate
				if err := w.Truncate(0); err != nil {
					t.Fatal(err)
				}
				m.ingests[ref] = ""
			case op == 4 && w != nil: // commit, sometimes of the wrong bytes
				data := m.ingests[ref]
				want := digest.FromString(data + word)
				err := w.Commit(t.Context(), int64(len(data+word)), want, CommitOptions{Unsynced: true})
				_, exists := m.blobs[want]
				switch {
				case word != "" && !errdefs.IsFailedPrecondition(err),
					word == "" && exists && !errdefs.IsAlreadyExists(err),
					word == "" && !exists && err != nil:
					t.Fatalf("seed %d step %d: commit: %v", seed, step, err)
				case word == "":
					m.blobs[want] = data
					delete(m.ingests, ref)
				}
				delete(m.open, ref)
			case op == 5: // abort, also under a writer
				err := s.Abort(ref)
				if _, ok := m.ingests[ref]; ok != (err == nil) || err != nil && !errdefs.IsNotFound(err) {
					t.Fatalf("seed %d step %d: abort: %v", seed, step, err)
				}
				delete(m.ingests, ref)
				delete(m.open, ref)
			case op == 6 && len(m.blobs) > 0: // remove
				dgst := slices.Sorted(maps.Keys(m.blobs))[0]
				if err := s.Remove(dgst); err != nil {
					t.Fatal(err)
				}
				delete(m.blobs, dgst)
			case op == 7 && rnd.IntN(4) == 0: // restart
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s = open(t, dir)
				clear(m.open)
			}
			m.compare(t, s)
			if t.Failed() {
				t.Fatalf("seed %d step %d", seed, step)
			}
		}
	}
}

func (m model) compare(t *testing.T, s *Store) {
	t.Helper()
	blobs := map[digest.Digest]string{}
	for i, err := range s.Blobs() {
		if err != nil {
			t.Fatal(err)
		}
		blobs[i.Digest] = string(read(t, s, i.Digest))
	}
	if !maps.Equal(blobs, m.blobs) {
		t.Errorf("blobs %q, want %q", blobs, m.blobs)
	}
	offsets, want := map[string]int64{}, map[string]int64{}
	for st, err := range s.Statuses() {
		if err != nil {
			t.Fatal(err)
		}
		offsets[st.Ref] = st.Offset
	}
	for ref, data := range m.ingests {
		want[ref] = int64(len(data))
	}
	if !maps.Equal(offsets, want) {
		t.Errorf("ingests %v, want %v", offsets, want)
	}
	for ref, w := range m.open {
		if w.Digest() != digest.FromString(m.ingests[ref]) {
			t.Errorf("ingest %s: digest %s", ref, w.Digest())
		}
	}
	for path, err := range s.Strays() {
		t.Errorf("stray %s, %v", path, err)
	}
}
