package pull

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// together runs n funcs at once and returns their errors.
func together(n int, f func(i int) error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	return errs
}

// slowly has the registry send a blob in many pieces, so that others come while it is on its way.
func (h *house) slowly(dgst fmt.Stringer, f registrytest.Fault) {
	f.Trickle, f.Piece = 2*time.Millisecond, 1000
	h.srv.Fault("GET /v2/app/blobs/"+dgst.String(), f)
}

// TestSameImageAtOnce: pulls of one image fetch and unpack each layer once.
func TestSameImageAtOnce(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			img := h.push("app", "1", simple(1, 50_000), simple(2, 50_000), simple(3, 50_000))
			h.slowly(img.Layers[0].Digest, registrytest.Fault{})
			for i, err := range together(8, func(int) error { return h.pull("app:1", Request{Snapshotter: driver}) }) {
				if err != nil {
					t.Errorf("pull %d: %v", i, err)
				}
			}
			h.whole("app:1", driver)
			for i, l := range img.Layers {
				if n := h.requests(l); n != 1 {
					t.Errorf("layer %d was asked for %d times", i, n)
				}
			}
		})
	}
}

// TestSharedBase: images with the same lower layers, pulled at once, fetch and unpack those once.
func TestSharedBase(t *testing.T) {
	h := newHouse(t, settings{})
	base := []registrytest.Layer{simple(1, 50_000), simple(2, 1000)}
	first := h.push("app", "0", append(base, simple(10, 1000))...)
	for i := 1; i < 5; i++ {
		h.push("app", fmt.Sprint(i), append(base, simple(uint64(10+i), 1000))...)
	}
	h.slowly(first.Layers[0].Digest, registrytest.Fault{})
	for i, err := range together(5, func(i int) error { return h.pull(fmt.Sprintf("app:%d", i), Request{}) }) {
		if err != nil {
			t.Errorf("pull %d: %v", i, err)
		}
	}
	h.settled()
	for i := range 5 {
		h.complete(testNamespace, fmt.Sprintf("app:%d", i), "overlayfs")
	}
	for i, l := range first.Layers[:2] {
		if n := h.requests(l); n != 1 {
			t.Errorf("shared layer %d was asked for %d times", i, n)
		}
	}
	if n := h.driverSnapshots("overlayfs"); n != 7 {
		t.Errorf("%d snapshots, want 2 shared and 5 others", n)
	}
}

func (h *house) driverSnapshots(driver string) (n int) {
	for _, err := range h.drivers[driver].Walk(h.t.Context()) {
		if err != nil {
			h.t.Fatal(err)
		}
		n++
	}
	return n
}

// TestTakeOver: the pull that fetches a layer is cancelled, and another, which wants it too, goes on with what has come.
func TestTakeOver(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			img := h.push("app", "1", simple(1, 200_000), simple(2, 1000))
			layer := img.Layers[0]
			h.slowly(layer.Digest, registrytest.Fault{})
			ctx, cancel := context.WithCancel(t.Context())
			leads := watchFor(offset(layer.Digest, 10_000))
			led := make(chan error, 1)
			go func() {
				_, err := h.puller.Pull(ctx, h.space(), h.ref("app:1"), Request{Snapshotter: driver, Progress: leads.hear})
				led <- err
			}()
			wait(t, leads.seen, "first bytes")
			joins := watchFor(offset(layer.Digest, 1))
			joined := make(chan error, 1)
			go func() { joined <- h.pull("app:1", Request{Snapshotter: driver, Progress: joins.hear}) }()
			wait(t, joins.seen, "bytes for the second pull")
			cancel()
			if err := <-led; !errors.Is(err, context.Canceled) {
				t.Errorf("the cancelled pull ended with %v", err)
			}
			if err := <-joined; err != nil {
				t.Errorf("the other: %v", err)
			}
			if n := h.srv.Bytes(layer.Digest.String()); n != layer.Size || h.requests(layer) != 1 {
				t.Errorf("%d bytes in %d requests for a layer of %d", n, h.requests(layer), layer.Size)
			}
			h.collect() // what was left of the pulls that failed
			h.whole("app:1", driver)
		})
	}
}

// TestAllCancelled: when nobody wants a layer any more its download ends, and the next pull resumes it.
func TestAllCancelled(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			img := h.push("app", "1", simple(1, 500_000))
			layer := img.Layers[0]
			h.srv.Fault("/blobs/"+layer.Digest.String(), registrytest.Fault{Stall: true, At: 300_000})
			ctx, cancel := context.WithCancelCause(t.Context())
			here := watchFor(offset(layer.Digest, 300_000))
			errs := make(chan error, 3)
			for range 3 {
				go func() {
					_, err := h.puller.Pull(ctx, h.space(), h.ref("app:1"), Request{Snapshotter: driver, Progress: here.hear})
					errs <- err
				}()
			}
			wait(t, here.seen, "bytes")
			cancel(errors.New("enough"))
			for range 3 {
				wantError(t, <-errs, "enough")
			}
			h.nothing()
			h.srv.Heal()
			h.srv.Forget()
			h.mustPull("app:1", Request{Snapshotter: driver})
			if n := h.srv.Bytes(layer.Digest.String()); n != layer.Size-300_000 {
				t.Errorf("%d bytes were sent, and %d were missing", n, layer.Size-300_000)
			}
			h.collect() // what was left of the pulls that failed
			h.whole("app:1", driver)
		})
	}
}

// TestLeaderFails: bytes that the first pull fetches are wrong; it fails, and the second, whose session has nothing
// against the registry, fetches them.
func TestLeaderFails(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			img := h.push("app", "1", simple(1, 100_000), simple(2, 1000))
			layer := img.Layers[0]
			h.slowly(layer.Digest, registrytest.Fault{})
			h.slowly(layer.Digest, registrytest.Fault{Corrupt: true, At: 99_000, Times: 1})
			leads := watchFor(offset(layer.Digest, 1))
			led := make(chan error, 1)
			go func() { led <- h.pull("app:1", Request{Snapshotter: driver, Progress: leads.hear}) }()
			wait(t, leads.seen, "first bytes")
			joined := h.pull("app:1", Request{Snapshotter: driver})
			wantError(t, <-led, layer.Digest.String(), h.srv.Host(), "damages")
			if joined != nil {
				t.Errorf("the pull that joined: %v", joined)
			}
			h.collect() // what was left of the pulls that failed
			h.whole("app:1", driver)
		})
	}
}

// TestNamespaces: two namespaces have nothing to do with one another, but for the bytes of a blob that one has.
func TestNamespaces(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", many(1, 4)...)
	names := []string{"one", "two"}
	for i, err := range together(2, func(i int) error {
		_, err := h.puller.Pull(t.Context(), h.db.Space(names[i]), h.ref("app:1"), Request{})
		return err
	}) {
		if err != nil {
			t.Errorf("namespace %s: %v", names[i], err)
		}
	}
	h.settled()
	for _, ns := range names {
		h.complete(ns, "app:1", "overlayfs")
	}
	h.srv.Forget()
	if _, err := h.puller.Pull(t.Context(), h.db.Space("three"), h.ref("app:1"), Request{}); err != nil {
		t.Fatal(err)
	}
	for _, l := range img.Layers {
		if n := h.requests(l); n != 0 {
			t.Errorf("a layer that another namespace has was asked for %d times", n)
		}
	}
	h.settled()
	h.complete("three", "app:1", "overlayfs")
}

// TestDriversAtOnce: one image into both drivers, and packed, at once.
func TestDriversAtOnce(t *testing.T) {
	h := newHouse(t, settings{})
	h.push("app", "1", many(1, 4)...)
	reqs := []Request{{Snapshotter: "overlayfs"}, {Snapshotter: "native"}, {NoUnpack: true}}
	for i, err := range together(9, func(i int) error { return h.pull("app:1", reqs[i%3]) }) {
		if err != nil {
			t.Errorf("pull %d: %v", i, err)
		}
	}
	for _, driver := range drivers {
		h.whole("app:1", driver)
	}
}

// TestCrossedLayers: images that have the same blobs in different orders don't wait for one another in a circle.
func TestCrossedLayers(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{downloads: 1})
			layers := many(1, 4)
			orders := [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {1, 0, 3, 2}, {2, 3, 0, 1}, {0, 0, 1, 1}, {1, 0, 1, 0}}
			for i, order := range orders {
				var stack []registrytest.Layer
				for _, at := range order {
					stack = append(stack, layers[at])
				}
				h.push("app", fmt.Sprint(i), stack...)
			}
			for i, err := range together(len(orders), func(i int) error {
				return h.pull(fmt.Sprintf("app:%d", i), Request{Snapshotter: driver})
			}) {
				if err != nil {
					t.Errorf("pull %d: %v", i, err)
				}
			}
			h.settled()
			for i := range orders {
				h.complete(testNamespace, fmt.Sprintf("app:%d", i), driver)
			}
		})
	}
}

// TestMany: twenty pulls of overlapping images into two namespaces and both drivers, some cancelled, beside collections.
func TestMany(t *testing.T) {
	h := newHouse(t, settings{downloads: 2})
	for i := range 5 {
		layers := many(1, i+1)
		h.push("app", fmt.Sprint(i), append(layers, simple(uint64(100+i), 30_000))...)
	}
	stop := make(chan struct{})
	var collector sync.WaitGroup
	collector.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				h.collect()
			}
		}
	})
	spaces := []string{testNamespace, "other"}
	for i, err := range together(20, func(i int) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		req := Request{Snapshotter: drivers[i/5%2]}
		if i%7 == 3 {
			req.Progress = func(e Event) {
				if e.Stage == StageFetching {
					cancel()
				}
			}
		}
		_, err := h.puller.Pull(ctx, h.db.Space(spaces[i/10]), h.ref(fmt.Sprintf("app:%d", i%5)), req)
		if i%7 == 3 && errors.Is(err, context.Canceled) {
			return nil
		}
		return err
	}) {
		if err != nil {
			t.Errorf("pull %d: %v", i, err)
		}
	}
	close(stop)
	collector.Wait()
	for i := range 5 {
		for _, driver := range drivers { // those that were cancelled, too
			for _, ns := range spaces {
				if _, err := h.puller.Pull(t.Context(), h.db.Space(ns), h.ref(fmt.Sprintf("app:%d", i)), Request{Snapshotter: driver}); err != nil {
					t.Error(err)
				}
				h.complete(ns, fmt.Sprintf("app:%d", i), driver)
			}
		}
	}
	h.collect() // what was left of the pulls that failed
	h.settled()
}

// TestExistingChain: layers that are snapshots already are neither fetched nor applied, even if their blobs are gone.
func TestExistingChain(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			base := many(1, 3)
			first := h.push("app", "1", base...)
			h.push("app", "2", append(base, simple(9, 1000))...)
			h.mustPull("app:1", Request{Snapshotter: driver})
			for _, l := range first.Layers {
				if err := h.space().DeleteBlob(t.Context(), l.Digest); err != nil {
					t.Fatal(err)
				}
			}
			h.collect()
			h.srv.Forget()
			seen := watchFor(func(Event) bool { return false })
			h.mustPull("app:2", Request{Snapshotter: driver, Progress: seen.hear})
			for i, l := range first.Layers {
				if n := h.requests(l); n != 0 {
					t.Errorf("layer %d was asked for %d times", i, n)
				}
				if got := seen.stages(l.Digest); len(got) != 1 || got[0] != StageExists {
					t.Errorf("layer %d went through %v", i, got)
				}
			}
			h.whole("app:2", driver)
		})
	}
}

// TestCollectedMeanwhile: a pull joins another's layer; that pull ends, its image is removed and collected, and the
// first, which still fetches another layer, sees that it must fetch again what it had joined.
func TestCollectedMeanwhile(t *testing.T) {
	h := newHouse(t, settings{})
	shared := simple(1, 100_000)
	small := h.push("app", "small", shared)
	large := h.push("app", "large", shared, simple(2, 50_000))
	h.slowly(shared.DiffID, registrytest.Fault{})
	h.slowly(small.Layers[0].Digest, registrytest.Fault{})
	stalled := registrytest.Fault{Trickle: 20 * time.Millisecond, Piece: 1000} // a second
	h.srv.Fault("GET /v2/app/blobs/"+large.Layers[1].Digest.String(), stalled)
	leads := watchFor(offset(small.Layers[0].Digest, 1))
	led := make(chan error, 1)
	go func() { led <- h.pull("app:small", Request{NoUnpack: true, Progress: leads.hear}) }()
	wait(t, leads.seen, "first bytes")
	joined := make(chan error, 1)
	joins := watchFor(offset(small.Layers[0].Digest, 1))
	go func() { joined <- h.pull("app:large", Request{NoUnpack: true, Progress: joins.hear}) }()
	wait(t, joins.seen, "bytes for the second pull")
	if err := <-led; err != nil {
		t.Fatal(err)
	}
	if err := h.space().DeleteImage(t.Context(), h.ref("app:small"), ""); err != nil {
		t.Fatal(err)
	}
	h.collect()
	if _, err := h.space().Blob(t.Context(), small.Layers[0].Digest); err == nil {
		t.Fatal("the shared layer is still here: this test tests nothing")
	}
	if err := <-joined; err != nil {
		t.Fatal(err)
	}
	if _, err := h.space().Blob(t.Context(), small.Layers[0].Digest); err != nil {
		t.Error(err)
	}
	h.whole("app:large", "")
}

// TestEarlyFailure: a layer that can't be had ends the pull at once, though one below it is still on its way.
func TestEarlyFailure(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", simple(1, 100_000), simple(2, 1000))
	h.srv.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Trickle: 50 * time.Millisecond, Piece: 1000})
	h.srv.Fault("/blobs/"+img.Layers[1].Digest.String(), registrytest.Fault{Status: 404})
	begin := time.Now()
	wantError(t, h.pull("app:1", Request{}), img.Layers[1].Digest.String())
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("the failure of one layer was told after %s", took)
	}
}
