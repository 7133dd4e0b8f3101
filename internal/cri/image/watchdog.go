package image

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
)

// maxTick is how often, at least, a watchdog looks.
const maxTick = 10 * time.Second

// watchdog ends a pull that asks for bytes and gets none. The registry has
// time-outs of its own for each answer and asks again; this one counts the
// whole of it, for as long as any layer is being fetched. A pull that does
// something else is idle: it asks for documents, which are few and small, or waits
// for the disk.
//
//	idle --a layer begins--> waiting --bytes--> waiting, the clock begins anew
//	  ^------no layer left-----/   \--nothing for too long--> ended
type watchdog struct {
	timeout time.Duration
	cancel  context.CancelCauseFunc
	ended   sync.WaitGroup

	mu       sync.Mutex
	fetching map[digest.Digest]int64 // layers, and how many of their bytes have come
	moved    time.Time               // when bytes came last, or the first layer began
}

// newWatchdog watches a pull that runs in the context returned. It must be
// stopped. A timeout of 0 watches nothing.
func newWatchdog(ctx context.Context, timeout time.Duration) (context.Context, *watchdog) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watchdog{timeout: timeout, cancel: cancel, fetching: map[digest.Digest]int64{}}
	if timeout > 0 {
		w.ended.Go(func() { w.run(ctx) })
	}
	return ctx, w
}

func (w *watchdog) stop() {
	w.cancel(nil)
	w.ended.Wait()
}

// hear takes the pull's events. It is called from several goroutines.
func (w *watchdog) hear(e pull.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.Stage != pull.StageFetching {
		delete(w.fetching, e.Desc.Digest)
		return
	}
	offset, known := w.fetching[e.Desc.Digest]
	if len(w.fetching) == 0 || known && e.Offset != offset {
		w.moved = time.Now()
	}
	w.fetching[e.Desc.Digest] = e.Offset
}

// isStuck says whether too long nothing has come of what is being fetched.
func (w *watchdog) isStuck() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.fetching) > 0 && time.Since(w.moved) >= w.timeout
}

func (w *watchdog) run(ctx context.Context) {
	tick := time.NewTicker(max(min(maxTick, w.timeout/2), 1))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if w.isStuck() {
				w.cancel(fmt.Errorf("no byte has come for %s (image_pull_progress_timeout); what was fetched is kept for the next pull: %w", w.timeout, errdefs.ErrUnavailable))
				return
			}
		}
	}
}
