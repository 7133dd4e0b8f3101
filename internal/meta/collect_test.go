package meta

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/opencontainers/go-digest"
)

// TestSurvivingParentForgetsChild: containerd's collector doesn't tell it.
func TestSurvivingParentForgetsChild(t *testing.T) {
	h := newHouse(t, Options{})
	s := mem(t, h.Space("ns"))
	prepare(t, s, "a", "", nil)
	ok(t, s.Commit(t.Context(), "base", "a", "", map[string]string{labelRoot: "x"}))
	prepare(t, s, "child", "base", nil)
	if c := h.collect(); c.Snapshots != 1 {
		t.Errorf("%+v", c)
	}
	if d := must[Dump](t)(h.Dump(t.Context())); len(d.Snapshots) != 1 || len(d.Snapshots[0].Children) != 0 {
		t.Errorf("%+v", d.Snapshots)
	}
	ok(t, s.Remove(t.Context(), "base"))
}

// TestDriverFailureIsTriedAgain without another deletion.
func TestDriverFailureIsTriedAgain(t *testing.T) {
	h := newHouse(t, Options{})
	s := mem(t, h.Space("ns"))
	chain(t, s, "base", "top")
	h.drivers["mem"].breakRemove(errBroken)
	if c := h.collect(); c.Left != 1 || c.Snapshots != 2 {
		t.Errorf("%+v", c)
	}
	if c := h.collect(); c.Left != 1 || c.Snapshots != 0 {
		t.Errorf("%+v", c)
	}
	h.drivers["mem"].breakRemove(nil)
	if c := h.collect(); c.Left != 0 {
		t.Errorf("%+v", c)
	}
	equalStrings(t, h.drivers["mem"].keys())
	cleanups := h.drivers["mem"].cleanups
	h.collect()
	if h.drivers["mem"].cleanups != cleanups {
		t.Error("looked at a driver that nothing happened to")
	}
}

// TestMissingDriver: records of a driver that isn't there any more are
// collected like others, and don't fail.
func TestMissingDriver(t *testing.T) {
	h := newHouse(t, Options{})
	h.drivers["second"] = newMemory()
	h.reopen(nil)
	for _, name := range []string{"mem", "second"} {
		chain(t, must[Snapshots](t)(h.Space("ns").Snapshots(name)), "base", "top")
	}
	second := h.drivers["second"]
	h.reopen(func() { delete(h.drivers, "second") })
	if d := must[Dump](t)(h.Dump(t.Context())); len(d.Snapshots) != 4 || len(h.Recovered()) != 0 {
		t.Errorf("%+v %v", d.Snapshots, h.Recovered())
	}
	if c := h.collect(); c.Snapshots != 4 || c.Left != 0 {
		t.Errorf("%+v", c)
	}
	h.reopen(func() { h.drivers["second"] = second }) // it is back, with what is nobody's now
	equalStrings(t, second.keys())
}

// TestCollectStopsWaiting for writers when its context ends.
func TestCollectStopsWaiting(t *testing.T) {
	h := newHouse(t, Options{})
	free := h.busy()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	done := make(chan error)
	go func() {
		_, err := h.Collect(ctx)
		done <- err
	}()
	cancel(why)
	if err := <-done; !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	free()
	h.collect()
}

// TestPinsAgainstCollector: many make, share, drop and collect the same blobs
// and snapshots at once. Whatever was recorded must have its bytes, at the
// moment that it is recorded and ever after; when all is done nothing is left.
func TestPinsAgainstCollector(t *testing.T) {
	h := newHouse(t, Options{})
	const rounds = 60
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				h.leftBehind(keyContent)
				h.leftBehind(keySnapshots + "/mem")
				if _, err := h.Collect(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var writers sync.WaitGroup
	for i := range 4 {
		sp := h.Space(fmt.Sprint("ns", i%2))
		writers.Go(func() {
			for round := range rounds {
				if err := h.churn(t.Context(), sp.Leased(fmt.Sprint("l", i)), i, round%3); err != nil {
					t.Errorf("writer %d: %v", i, err)
					return
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	wg.Wait()
	if c := h.collect(); c.Left != 0 {
		t.Errorf("%+v", c)
	}
	equalStrings(t, h.files())
	equalStrings(t, h.drivers["mem"].keys())
	equalStrings(t, refs(t, h))
}

// churn records a blob and a snapshot under a new lease, looks whether they
// are whole, and lets them go.
func (h *house) churn(ctx context.Context, sp Space, writer, which int) error {
	if _, err := sp.CreateLease(ctx, Lease{ID: sp.Lease()}); err != nil {
		return err
	}
	text := fmt.Sprint("text ", which)
	dgst := digest.FromString(text)
	w, err := sp.OpenWriter(ctx, fmt.Sprintf("ref %d %d", writer, which), WriterOptions{Expected: dgst})
	if err == nil {
		if st, _ := w.Status(); st.Offset == 0 {
			_, err = w.Write([]byte(text))
		}
		if err == nil {
			err = w.Commit(ctx, int64(len(text)), dgst, nil)
		}
		w.Close()
	}
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("write: %w", err)
	}
	r, err := sp.Reader(ctx, dgst)
	if err != nil {
		return fmt.Errorf("a recorded and leased blob: %w", err)
	}
	r.Close()
	s, err := sp.Snapshots("mem")
	if err != nil {
		return err
	}
	active, name := fmt.Sprintf("active %d %d", writer, which), fmt.Sprint("name ", which)
	if _, err := s.Prepare(ctx, active, "", nil); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	err = s.Commit(ctx, name, active, "", nil)
	if errdefs.IsAlreadyExists(err) {
		// Another has committed it. The active one may have gone into a commit
		// of ours that came second.
		if err = s.Remove(ctx, active); errdefs.IsNotFound(err) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	if _, err := s.Stat(ctx, name); err != nil {
		return fmt.Errorf("a recorded and leased snapshot: %w", err)
	}
	return sp.DeleteLease(ctx, sp.Lease())
}

// TestRemovalAndPin: whoever relies on a blob holds it from its look to its
// record; who comes during the removal waits, and doesn't find it.
func TestRemovalAndPin(t *testing.T) {
	h := newHouse(t, Options{})
	dgst := write(t, h.Space("ns"), "blob", nil)
	ok(t, h.Space("ns").DeleteBlob(t.Context(), dgst))
	there := func() error { return errOf(h.blobs.Info(dgst)) }
	unpin := must[func()](t)(h.pins.pinExisting(t.Context(), blobPin(dgst), there))
	if c := h.collect(); c.Left != 1 {
		t.Errorf("%+v", c)
	}
	ok(t, there())
	unpin()
	unlock := must[func()](t)(h.pins.locks.Lock(t.Context(), blobPin(dgst)))
	done := make(chan error)
	go func() {
		_, err := h.pins.pinExisting(t.Context(), blobPin(dgst), there)
		done <- err
	}()
	ok(t, h.blobs.Remove(dgst))
	unlock()
	is(t, errdefs.IsNotFound, <-done)
}

// TestCollectorSeesNewNames: a snapshot that is recorded between the
// collector's list and its removal stays.
func TestCollectorSeesNewNames(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	named, err := h.namedSnapshots("mem")
	ok(t, err)
	prepare(t, mem(t, sp), "key", "", nil)
	gone, err := h.removeSnapshot(t.Context(), "mem", h.drivers["mem"], "ns/1/key", named)
	if gone || err != nil {
		t.Errorf("removed: %v, %v", gone, err)
	}
	must[snapshot.Info](t)(mem(t, sp).Stat(t.Context(), "key"))
	in := must[content.Status](t)(func() (content.Status, error) {
		open(t, sp, "ref", WriterOptions{}).Close()
		if removed, err := h.removeIngest(t.Context(), "ns/1/ref", true); removed || err != nil {
			t.Errorf("removed: %v, %v", removed, err)
		}
		return sp.Ingest(t.Context(), "ref")
	}())
	if in.Ref != "ref" {
		t.Errorf("%+v", in)
	}
}

// TestUnnamedParentOfNamed: it can't go before its child, and isn't tried
// again and again until then.
func TestUnnamedParentOfNamed(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	chain(t, mem(t, sp), "base", "top")
	h.reopen(func() { rawDelete(t, h.path(), "v1", "ns", "snapshots", "mem", "base") })
	h.leftBehind(keySnapshots + "/mem")
	if c := h.collect(); c.Left != 0 {
		t.Errorf("%+v", c)
	}
	equalStrings(t, h.drivers["mem"].keys(), "ns/2/base", "ns/4/top")
	ok(t, mem(t, h.Space("ns")).Remove(t.Context(), "top"))
	h.collect()
	equalStrings(t, h.drivers["mem"].keys())
}
