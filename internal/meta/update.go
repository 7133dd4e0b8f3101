package meta

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/fault"
	bolt "go.etcd.io/bbolt"
)

// Write transactions are shared, because each costs two syncs of the disk.
//
// The simple version gives every caller its own: ten layers that finish
// together then wait for twenty syncs, one after the other. A timer that
// collects callers would make a lonely one wait for nobody. So there is no
// timer: callers queue; whoever gets the token `writing` takes everything that
// is in the queue, its own request among it, and commits once for all. Those
// who come while a commit is under way find the token taken, and are the next
// batch.
//
// A function that fails must not spoil its neighbours' transaction, nor leave
// half of what it did: bolt has no savepoints, so the transaction is rolled
// back and run again without it.

// maxShared bounds the functions of one transaction, and so the memory of its
// dirty pages and the work that one failure repeats.
const maxShared = 256

// Tx is a write transaction in one Space. Its methods record; they do nothing
// to content or drivers. It is good only until the function that got it returns.
type Tx struct {
	sp        Space
	v1        bucket
	now       time.Time
	wrote     bool
	deleted   bool // something may have become collectible
	after     error
	committed []func()
}

// ReturnAfterCommit makes Update return err although the transaction commits:
// what exists already is leased, and still reported as existing.
func (tx *Tx) ReturnAfterCommit(err error) { tx.after = err }

// onCommit calls f once the transaction is durable.
func (tx *Tx) onCommit(f func()) { tx.committed = append(tx.committed, f) }

// ns is the bucket of the transaction's namespace, perhaps absent.
func (tx *Tx) ns() bucket { return tx.v1.sub(tx.sp.ns) }

// request is one caller of Update.
type request struct {
	ctx  context.Context
	sp   Space
	fn   func(*Tx) error
	err  error         // valid once done is closed
	done chan struct{} // closed by whoever took the request from the queue
}

// queue holds the requests that nobody runs yet.
type queue struct {
	mu      sync.Mutex
	waiting []*request
}

func (q *queue) add(r *request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, r)
}

// remove reports whether r was still waiting, and so will never run.
func (q *queue) remove(r *request) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.waiting, r)
	if i < 0 {
		return false
	}
	q.waiting = slices.Delete(q.waiting, i, i+1)
	return true
}

// take removes up to maxShared requests, oldest first, and refuses those whose
// context has ended.
func (q *queue) take() []*request {
	q.mu.Lock()
	defer q.mu.Unlock()
	var batch []*request
	n := 0
	for _, r := range q.waiting {
		if len(batch) == maxShared {
			break
		}
		n++
		if r.ctx.Err() != nil {
			r.err = context.Cause(r.ctx)
			close(r.done)
			continue
		}
		batch = append(batch, r)
	}
	q.waiting = slices.Delete(q.waiting, 0, n)
	return batch
}

// Update runs fn in a write transaction that it may share with others who are
// ready at the same time, and returns after the commit is synced. fn may run
// more than once (a neighbour's failure rolls the shared transaction back), and
// must have no effect but on tx and on variables that each run sets anew; it
// must not wait for anything (inv 5), nor call other methods of the database.
// Once fn runs, the end of ctx no longer matters.
func (sp Space) Update(ctx context.Context, fn func(tx *Tx) error) error {
	if err := sp.check(); err != nil {
		return err
	}
	return sp.db.update(ctx, sp, fn)
}

func (db *DB) update(ctx context.Context, sp Space, fn func(*Tx) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	r := &request{ctx: ctx, sp: sp, fn: fn, done: make(chan struct{})}
	db.queue.add(r)
	for {
		select {
		case <-r.done:
			return r.err
		case <-ctx.Done():
			if db.queue.remove(r) {
				return context.Cause(ctx)
			}
			<-r.done
			return r.err
		case db.writing <- struct{}{}:
			db.commit(db.queue.take())
			<-db.writing
		}
	}
}

// commit runs a batch to its end; the caller holds db.writing.
func (db *DB) commit(batch []*request) {
	for len(batch) > 0 {
		failed := db.attempt(batch)
		if failed < 0 {
			break
		}
		close(batch[failed].done)
		batch = slices.Delete(batch, failed, failed+1)
	}
	for _, r := range batch {
		close(r.done)
	}
}

// attempt runs a batch in one bolt transaction and sets everyone's err. It
// returns the index of the request that failed after it had written, whose
// writes had to be rolled back with all others, or -1.
func (db *DB) attempt(batch []*request) (failed int) {
	btx, err := db.bolt.Begin(true)
	if err != nil {
		fail(batch, fmt.Errorf("begin a transaction in %s: %w", db.path, err))
		return -1
	}
	defer btx.Rollback() // does nothing after a commit
	ran := make([]*Tx, 0, len(batch))
	wrote := 0
	for i, r := range batch {
		tx := db.begin(btx, r.sp)
		if r.err = run(tx, r.fn); r.err != nil {
			if tx.wrote {
				return i
			}
			continue
		}
		r.err = tx.after
		ran = append(ran, tx)
		if tx.wrote {
			wrote++
		}
	}
	if wrote > 0 {
		if err := db.commitBolt(btx, wrote); err != nil {
			fail(batch, err)
			return -1
		}
	}
	for _, tx := range ran {
		for _, f := range tx.committed {
			f()
		}
		if tx.wrote && db.opts.Changed != nil {
			db.opts.Changed(tx.deleted)
		}
	}
	return -1
}

// begin makes the view that one Space has of a bolt transaction.
func (db *DB) begin(btx *bolt.Tx, sp Space) *Tx {
	tx := &Tx{sp: sp, now: time.Now().UTC()}
	tx.v1 = root(btx, &tx.wrote)
	return tx
}

// commitBolt is the only place that commits to the file once it is open.
func (db *DB) commitBolt(btx *bolt.Tx, callers int) error {
	if err := fault.Point("meta.commit.before"); err != nil {
		return err
	}
	if err := btx.Commit(); err != nil {
		return fmt.Errorf("commit to %s: %w", db.path, err)
	}
	if db.opts.Committed != nil {
		db.opts.Committed(callers)
	}
	return fault.Point("meta.commit.after")
}

// fail gives err to all of a batch that hasn't failed already.
func fail(batch []*request, err error) {
	for _, r := range batch {
		r.err = errors.Join(r.err, err)
	}
}

// run calls fn and turns a panic into an error: the transaction is not only
// the panicking caller's.
func run(tx *Tx, fn func(*Tx) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic in a transaction: %v: %w\n%s", p, errdefs.ErrInternal, debug.Stack())
		}
	}()
	return fn(tx)
}
