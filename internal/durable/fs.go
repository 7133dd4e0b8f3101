package durable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/fault"
)

// FS syncs one file system as a whole, for all who are ready at once.
//
// The simple version is a syncfs(2) for every caller. With many callers each
// then waits for the bytes of all others, again and again. So at most one
// syncfs is in flight, and everyone who comes meanwhile joins the next: not
// the running one, which may have passed over their bytes already.
//
// The second difficulty is failure. The kernel reports a failed write-back
// once per descriptor, to the next sync on it, and then forgets: the pages
// count as clean. Who wrote them need not be the one who hears of it. So an
// FS holds one descriptor from its start on, a failed sync is an error for
// everyone who joined it, and it stays an error for everyone who began to
// write before it (see Mark).
type FS struct {
	dir    *os.File
	syncfs func() error // of dir

	mu       sync.Mutex
	next     *round // the sync that callers join; nil when nobody waits for one
	running  bool   // whether run is under way
	closed   bool
	failures uint64 // failed syncs so far
	last     error  // the latest failure
	worker   sync.WaitGroup
}

// round is one syncfs and those who wait for it.
type round struct {
	done     chan struct{} // closed when err and failures are set
	err      error
	failures uint64 // failed syncs of the FS up to and with this one
	last     error
}

// Mark is a moment in the life of an FS. It is taken before the first byte
// that a later sync is to answer for. The zero Mark is the moment of OpenFS.
type Mark struct{ failures uint64 }

// OpenFS holds the file system on which dir lies. It must be called before
// the first byte is written that Sync is to answer for, and be closed.
func OpenFS(dir string) (*FS, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open file system: %w", err)
	}
	f := &FS{dir: d}
	f.syncfs = func() error {
		for {
			err := unix.Syncfs(int(d.Fd()))
			if !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	}
	return f, nil
}

// Mark is the present moment, for SyncSince.
func (f *FS) Mark() Mark {
	f.mu.Lock()
	defer f.mu.Unlock()
	return Mark{f.failures}
}

// Sync returns nil once everything that was written to the file system
// before the call is durable, names and attributes included. Once a sync has
// failed, every later Sync fails as well, since bytes written before it may
// be lost; callers who know when they began use SyncSince.
//
// A context that ends returns its cause; the sync goes on without the caller.
func (f *FS) Sync(ctx context.Context) error { return f.SyncSince(ctx, Mark{}) }

// SyncSince is Sync for a caller whose first byte was written after since:
// syncs that failed before that moment do not matter.
func (f *FS) SyncSince(ctx context.Context, since Mark) error {
	r, err := f.join()
	if err != nil {
		return fmt.Errorf("sync file system of %s: %w", f.dir.Name(), err)
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	switch {
	case r.err != nil:
		return fmt.Errorf("sync file system of %s: %w", f.dir.Name(), r.err)
	case r.failures > since.failures:
		return fmt.Errorf("sync file system of %s: an earlier sync failed and bytes may be lost: %w", f.dir.Name(), r.last)
	}
	return nil
}

// join enters the caller into the next round and sees to it that it comes.
func (f *FS) join() (*round, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, fs.ErrClosed
	}
	if f.next == nil {
		f.next = &round{done: make(chan struct{})}
	}
	if !f.running {
		f.running = true
		f.worker.Go(f.run)
	}
	return f.next, nil
}

// run syncs round after round until nobody waits for another.
func (f *FS) run() {
	for {
		f.mu.Lock()
		r := f.next
		f.next = nil
		f.running = r != nil
		f.mu.Unlock()
		if r == nil {
			return
		}
		if r.err = fault.Point("durable.fs.syncing"); r.err == nil {
			r.err = f.syncfs()
		}
		f.mu.Lock()
		if r.err != nil {
			f.failures++
			f.last = r.err
		}
		r.failures, r.last = f.failures, f.last
		f.mu.Unlock()
		close(r.done)
	}
}

// Close waits for syncs under way and those who joined them, and lets the
// file system go.
func (f *FS) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.worker.Wait()
	return f.dir.Close()
}
