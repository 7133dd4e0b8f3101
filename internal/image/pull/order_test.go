package pull

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestOrder: the largest layer is asked for first, except where each must wait for the one below. Those that are the
// same blob again come last, as it is then here.
func TestOrder(t *testing.T) {
	sizes := []int{2000, 50_000, 300, 60_000, 9000}
	for driver, want := range map[string][]int{
		"overlayfs": {3, 1, 4, 0, 2},
		"native":    {0, 1, 2, 3, 4},
		"":          {3, 1, 4, 0, 2},
	} {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{downloads: 1})
			var layers []registrytest.Layer
			for i, size := range sizes {
				layers = append(layers, simple(uint64(i), size))
			}
			layers = append(layers, layers[1]) // a twin
			img := h.push("app", "1", layers...)
			h.mustPull("app:1", Request{Snapshotter: driver, NoUnpack: driver == ""})
			var got []int
			for _, r := range h.srv.Requests() {
				dgst := digest.Digest(path.Base(r.Path))
				if i := slices.IndexFunc(img.Layers, func(d ocispec.Descriptor) bool { return d.Digest == dgst }); i >= 0 {
					got = append(got, i)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("layers were asked for in the order %v, want %v", got, want)
			}
		})
	}
}

// TestSmallLayersCommitTogether: thirty tiny layers share the transactions of one, whatever else is slow about them.
func TestSmallLayersCommitTogether(t *testing.T) {
	h := newHouse(t, settings{})
	h.puller.patience = time.Hour
	h.push("app", "1", many(1, 30)...)
	h.metaCommits.Store(0)
	h.indexCommits.Store(0)
	h.mustPull("app:1", Request{})
	if m, i, s := h.metaCommits.Load(), h.indexCommits.Load(), h.syncs.Load(); m != 4 || i != 2 || s > 1 {
		t.Errorf("%d transactions of meta.db, %d of metadata.db, %d syncs; want 4, 2 and at most 1", m, i, s)
	}
	h.whole("app:1", "overlayfs")
}

// TestNobodyWaitsForCompany: patience is for layers that nobody waits for.
func TestNobodyWaitsForCompany(t *testing.T) {
	t.Run("another pull", func(t *testing.T) {
		h := newHouse(t, settings{})
		h.puller.patience = time.Hour
		shared := simple(1, 1000)
		img := h.push("slow", "1", shared, simple(2, 5000))
		h.push("quick", "1", shared)
		h.srv.Fault("/blobs/"+img.Layers[1].Digest.String(), registrytest.Fault{Trickle: 50 * time.Millisecond, Piece: 1})
		w := watchFor(func(e Event) bool { return e.Stage == StageCommit })
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := h.puller.Pull(ctx, h.space(), h.ref("slow:1"), Request{Progress: w.hear})
			ended <- err
		}()
		wait(t, w.seen, "layer that waits for company")
		h.mustPull("quick:1", Request{})
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the slow pull ends with %v", err)
		}
		h.complete(testNamespace, "quick:1", "overlayfs")
	})
	t.Run("pull is given up", func(t *testing.T) {
		h := newHouse(t, settings{})
		h.puller.patience = time.Hour
		img := h.push("app", "1", simple(1, 1000), simple(2, 5000))
		h.srv.Fault("/blobs/"+img.Layers[1].Digest.String(), registrytest.Fault{Trickle: 50 * time.Millisecond, Piece: 1})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		w := watchFor(func(e Event) bool {
			if e.Stage == StageCommit {
				cancel()
			}
			return false
		})
		if _, err := h.puller.Pull(ctx, h.space(), h.ref("app:1"), Request{Progress: w.hear}); !errors.Is(err, context.Canceled) {
			t.Errorf("it ends with %v", err)
		}
		h.srv.Heal()
		h.srv.Forget()
		h.mustPull("app:1", Request{})
		if n := h.requests(img.Layers[0]); n != 0 {
			t.Errorf("%d requests for the layer that had come", n)
		}
		h.whole("app:1", "overlayfs")
	})
	t.Run("daemon stops", func(t *testing.T) {
		h := newHouse(t, settings{})
		h.puller.patience = time.Hour
		img := h.push("app", "1", simple(1, 1000), simple(2, 5000))
		h.srv.Fault("/blobs/"+img.Layers[1].Digest.String(), registrytest.Fault{Trickle: 50 * time.Millisecond, Piece: 1})
		w := watchFor(func(e Event) bool { return e.Stage == StageCommit })
		ended := make(chan error, 1)
		go func() {
			_, err := h.puller.Pull(context.Background(), h.space(), h.ref("app:1"), Request{Progress: w.hear})
			ended <- err
		}()
		wait(t, w.seen, "layer that waits for company")
		h.reopen()
		if err := <-ended; err == nil || !strings.Contains(err.Error(), "stopping") {
			t.Errorf("the pull ends with %v", err)
		}
	})
	t.Run("twin", func(t *testing.T) {
		h := newHouse(t, settings{})
		h.puller.patience = time.Hour
		h.push("app", "1", simple(1, 1000), simple(2, 5000), simple(1, 1000))
		h.mustPull("app:1", Request{})
		h.whole("app:1", "overlayfs")
	})
}

// TestPatience: a layer waits for company, and not for ever.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &committer{run: &run{p: &Puller{patience: patience}}, news: make(chan struct{}, 1)}
		took := func(f func()) time.Duration {
			begun := time.Now()
			done := make(chan struct{})
			go func() { c.company(); close(done) }()
			if f != nil {
				time.Sleep(time.Second)
				f()
			}
			<-done
			return time.Since(begun)
		}
		if d := took(nil); d != 0 {
			t.Errorf("with nobody coming it takes %s", d)
		}
		c.expect(2)
		if d := took(nil); d != patience {
			t.Errorf("with two on their way for ever it takes %s, want %s", d, patience)
		}
		if d := took(c.look); d != patience {
			t.Errorf("a look that finds nothing new makes it %s, want %s", d, patience)
		}
		if d := took(c.came); d != patience {
			t.Errorf("when one of two comes it takes %s, want %s", d, patience)
		}
		if d := took(c.came); d != time.Second {
			t.Errorf("when the last one comes it takes %s, want 1 s", d)
		}
		c.expect(1)
		for i := range maxBatch {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			c.queue = append(c.queue, &ready{job: &job{key: layerKey{id: digest.FromString(fmt.Sprint(i)), packed: true}, ctx: ctx, cancel: cancel}})
		}
		if d := took(nil); d != 0 {
			t.Errorf("with %d in the queue it takes %s", maxBatch, d)
		}
		c.queue = c.queue[:2]
		if d := took(nil); d != patience {
			t.Errorf("with two in the queue it takes %s", d)
		}
		if d := took(func() { c.queue[1].job.wanted.Store(true); c.look() }); d != time.Second {
			t.Errorf("when somebody wants one of them it takes %s, want 1 s", d)
		}
	})
}
