package meta

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// busy is a commit that is under way until free is called.
func (h *house) busy() (free func()) {
	h.writing <- struct{}{}
	return func() { <-h.writing }
}

// queued returns when n requests wait.
func (h *house) queued(n int) {
	for got := -1; got != n; runtime.Gosched() {
		h.queue.mu.Lock()
		got = len(h.queue.waiting)
		h.queue.mu.Unlock()
	}
}

func label(name string) func(*Tx) error {
	return func(tx *Tx) error {
		_, err := tx.CreateLease(Lease{ID: name})
		return err
	}
}

// TestUpdatesShareCommits: whoever comes while a commit is under way is in the next.
func TestUpdatesShareCommits(t *testing.T) {
	h := newHouse(t, Options{})
	free := h.busy()
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if err := h.Space("ns").Update(t.Context(), label(fmt.Sprint("l", i))); err != nil {
				t.Error(err)
			}
		})
	}
	h.queued(50)
	before := h.commits.Load()
	free()
	wg.Wait()
	if n := h.commits.Load() - before; n != 1 {
		t.Errorf("50 callers took %d commits", n)
	}
	if n := len(must[[]Lease](t)(h.Space("ns").Leases(t.Context()))); n != 50 {
		t.Errorf("%d leases", n)
	}
}

// TestSharedTransactionIsBounded: more than maxShared take a second one.
func TestSharedTransactionIsBounded(t *testing.T) {
	h := newHouse(t, Options{})
	free := h.busy()
	var wg sync.WaitGroup
	for i := range maxShared + 1 {
		wg.Go(func() {
			if err := h.Space("ns").Update(t.Context(), label(fmt.Sprint("l", i))); err != nil {
				t.Error(err)
			}
		})
	}
	h.queued(maxShared + 1)
	before := h.commits.Load()
	free()
	wg.Wait()
	if n := h.commits.Load() - before; n != 2 {
		t.Errorf("took %d commits", n)
	}
}

// TestFailureStaysAlone: a function that fails or panics after it has written
// takes nothing of its neighbours along, and leaves nothing.
func TestFailureStaysAlone(t *testing.T) {
	h := newHouse(t, Options{})
	boom := errors.New("boom")
	free := h.busy()
	runs := make([]int, 6)
	errs := make([]error, 6)
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			errs[i] = h.Space("ns").Update(t.Context(), func(tx *Tx) error {
				runs[i]++
				if err := label(fmt.Sprint("l", i))(tx); err != nil {
					return err
				}
				switch i {
				case 2:
					return boom
				case 4:
					panic("at four")
				}
				return nil
			})
		})
		h.queued(i + 1) // so that they run in this order
	}
	before := h.commits.Load()
	free()
	wg.Wait()
	for i, err := range errs {
		switch i {
		case 2:
			if !errors.Is(err, boom) {
				t.Errorf("2: %v", err)
			}
		case 4:
			if !errdefs.IsInternal(err) || !strings.Contains(err.Error(), "at four") {
				t.Errorf("4: %v", err)
			}
		default:
			ok(t, err)
		}
	}
	if runs[0] != 3 || runs[5] != 1 {
		t.Errorf("runs %v", runs)
	}
	var ids []string
	for _, l := range must[[]Lease](t)(h.Space("ns").Leases(t.Context())) {
		ids = append(ids, l.ID)
	}
	equalStrings(t, ids, "l0", "l1", "l3", "l5")
	if n := h.commits.Load() - before; n != 1 {
		t.Errorf("took %d commits", n)
	}
}

// TestFailureWithoutWritesCostsNothing: nobody is run again for it.
func TestFailureWithoutWritesCostsNothing(t *testing.T) {
	h := newHouse(t, Options{})
	free := h.busy()
	var wg sync.WaitGroup
	runs := 0
	wg.Go(func() {
		ok(t, h.Space("ns").Update(t.Context(), func(tx *Tx) error { runs++; return label("a")(tx) }))
	})
	h.queued(1)
	wg.Go(func() { is(t, errdefs.IsNotFound, h.Space("ns").DeleteLease(t.Context(), "nobody")) })
	h.queued(2)
	free()
	wg.Wait()
	if runs != 1 {
		t.Errorf("ran %d times", runs)
	}
}

// TestQueuedCallerGivesUp: it is taken out, and a later one isn't held up.
func TestQueuedCallerGivesUp(t *testing.T) {
	h := newHouse(t, Options{})
	free := h.busy()
	why := errors.New("no more patience")
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := make(chan error)
	go func() { gone <- h.Space("ns").Update(ctx, label("gone")) }()
	h.queued(1)
	cancel(why)
	if err := <-gone; !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	free()
	ok(t, h.Space("ns").Update(t.Context(), label("stays")))
	if err := h.Space("ns").Update(ctx, label("late")); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	if all := must[[]Lease](t)(h.Space("ns").Leases(t.Context())); len(all) != 1 || all[0].ID != "stays" {
		t.Errorf("leases %v", all)
	}
}

// TestNoChangeNoCommit: putting what is there already commits nothing.
func TestNoChangeNoCommit(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	must[Lease](t)(sp.CreateLease(t.Context(), Lease{ID: "l"}))
	dgst := write(t, sp, "blob", map[string]string{"a": "b"})
	again := func(tx *Tx) error {
		if err := tx.SetBlobLabels(dgst, map[string]string{"a": "b", "none": ""}); err != nil {
			return err
		}
		return tx.LeaseBlob(dgst)
	}
	ok(t, sp.Leased("l").Update(t.Context(), again))
	before := h.commits.Load()
	ok(t, sp.Leased("l").Update(t.Context(), again))
	if n := h.commits.Load() - before; n != 0 {
		t.Errorf("%d commits", n)
	}
}

func TestReturnAfterCommit(t *testing.T) {
	h := newHouse(t, Options{})
	err := h.Space("ns").Update(t.Context(), func(tx *Tx) error {
		tx.ReturnAfterCommit(errdefs.ErrAlreadyExists)
		return label("l")(tx)
	})
	is(t, errdefs.IsAlreadyExists, err)
	if all := must[[]Lease](t)(h.Space("ns").Leases(t.Context())); len(all) != 1 {
		t.Errorf("leases %v", all)
	}
}

// TestClosed: an error, and nobody hangs.
func TestClosed(t *testing.T) {
	h := newHouse(t, Options{})
	db := h.DB
	h.close()
	if err := db.Space("ns").Update(t.Context(), label("l")); err == nil {
		t.Error("wrote to a closed database")
	}
	if _, err := db.Space("ns").Images(t.Context()); err == nil {
		t.Error("read a closed database")
	}
}

// TestOpenWaits: for as long as it is told, or for the context.
func TestOpenWaits(t *testing.T) {
	h := &house{t: t, dir: t.TempDir(), opts: Options{OpenTimeout: 60 * time.Millisecond}}
	other, err := bolt.Open(h.path(), 0o644, nil)
	ok(t, err)
	defer other.Close()
	is(t, errdefs.IsUnavailable, h.tryOpen())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, h.path(), h.openContent(), nil, Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}
