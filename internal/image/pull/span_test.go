package pull

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// chronicle remembers what a pull's hooks are told.
type chronicle struct {
	mu     sync.Mutex
	shares []Share
	open   map[Phase]int
	spans  []Span // that have ended
}

func (w *chronicle) hooks() Hooks {
	w.open = map[Phase]int{}
	return Hooks{
		Layers: func(list []Share) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.shares = list
		},
		Span: func(s Span) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if s.End.IsZero() {
				w.open[s.Phase]++
				return
			}
			w.open[s.Phase]--
			w.spans = append(w.spans, s)
		},
	}
}

// of lists the phases of a layer in the order in which they began.
func (w *chronicle) of(layer digest.Digest) (phases []Phase) {
	spans := slices.Clone(w.spans)
	slices.SortStableFunc(spans, func(a, b Span) int { return a.Start.Compare(b.Start) })
	for _, s := range spans {
		if s.Layer == layer {
			phases = append(phases, s.Phase)
		}
	}
	return phases
}

// TestSpans: every phase is told of, in order, and one ends before the next begins.
func TestSpans(t *testing.T) {
	for driver, want := range map[string][]Phase{
		"overlayfs": {PhaseQueue, PhaseUnpack, PhaseFlush, PhaseParent, PhaseBatch, PhaseSeal, PhaseSnapshot, PhaseMeta},
		"native":    {PhaseQueue, PhaseFetch, PhaseParent, PhaseUnpack, PhaseFlush, PhaseParent, PhaseBatch, PhaseSeal, PhaseSnapshot, PhaseMeta},
	} {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			img := h.push("app", "1", simple(1, 50_000), simple(2, 3000))
			var w chronicle
			h.mustPull("app:1", Request{Snapshotter: driver, Trace: w.hooks()})
			own := []Phase{PhaseResolve, PhaseBegin, PhaseDocuments, PhaseClaim, PhaseLayers, PhaseRecord}
			if got := w.of(""); !slices.Equal(got, own) {
				t.Errorf("the pull's phases are %v, want %v", got, own)
			}
			if len(w.shares) != 2 || w.shares[0].Parent != "" || w.shares[1].Parent != w.shares[0].ID || w.shares[1].Desc.Digest != img.Layers[1].Digest {
				t.Fatalf("shares %+v", w.shares)
			}
			if got := w.of(w.shares[1].ID); !slices.Equal(got, want) {
				t.Errorf("the upper layer's phases are %v, want %v", got, want)
			}
			for p, n := range w.open {
				if n != 0 {
					t.Errorf("phase %s began %d times more than it ended", p, n)
				}
			}
			ended := map[digest.Digest]time.Time{}
			for _, s := range w.spans {
				if s.Layer != "" && (s.Start.Before(ended[s.Layer]) || s.End.Before(s.Start)) {
					t.Errorf("phase %s of %s begins before the last has ended", s.Phase, s.Layer)
				}
				ended[s.Layer] = s.End
			}
			var fetched, unpacked int64
			for _, s := range w.spans {
				if s.Pass != nil {
					fetched += s.Pass.Fetched
					unpacked += s.Pass.Unpacked
				}
			}
			if fetched != img.Layers[0].Size+img.Layers[1].Size || unpacked < 53_000 {
				t.Errorf("%d bytes fetched, %d unpacked", fetched, unpacked)
			}

			var again chronicle
			h.mustPull("app:1", Request{Snapshotter: driver, Trace: again.hooks()})
			if len(again.shares) != 2 || !again.shares[0].Present || !again.shares[1].Present || len(again.of(again.shares[0].ID)) != 0 {
				t.Errorf("what is here: %+v, %v", again.shares, again.spans)
			}
		})
	}
}

// TestSpansOfOthers: a pull that joins hears how the layer goes on.
func TestSpansOfOthers(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", simple(1, 50_000))
	h.slowly(img.Layers[0].Digest, registrytest.Fault{})
	chronicles := make([]chronicle, 2)
	for i, err := range together(2, func(i int) error { return h.pull("app:1", Request{Trace: chronicles[i].hooks()}) }) {
		if err != nil {
			t.Errorf("pull %d: %v", i, err)
		}
	}
	joined := 0
	for i := range chronicles {
		w := &chronicles[i]
		if len(w.shares) != 1 {
			t.Fatalf("shares %+v", w.shares)
		}
		if w.shares[0].Joined {
			joined++
		}
		if !slices.Contains(w.of(w.shares[0].ID), PhaseUnpack) {
			t.Errorf("pull %d hears of %v", i, w.of(w.shares[0].ID))
		}
	}
	if joined != 1 {
		t.Errorf("%d of 2 pulls have joined", joined)
	}
}

// TestSpansOfFailures: the phase in which a pull fails ends, too.
func TestSpansOfFailures(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", simple(1, 50_000), simple(2, 3000))
	h.srv.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Status: 404})
	var w chronicle
	if h.pull("app:1", Request{Trace: w.hooks()}) == nil {
		t.Fatal("the pull of an absent layer succeeds")
	}
	if got := w.of(w.shares[0].ID); !slices.Equal(got, []Phase{PhaseQueue, PhaseUnpack}) {
		t.Errorf("the failed layer's phases are %v", got)
	}
	for p, n := range w.open {
		if n != 0 {
			t.Errorf("phase %s began %d times more than it ended", p, n)
		}
	}
}
