// Package gc decides when to collect.
package gc

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/meta"
)

// Options say when to collect; the names are those of containerd's plugin
// io.containerd.gc.v1.scheduler. The zero value has containerd's defaults.
type Options struct {
	// PauseThreshold is the part of the time, at most 0.5, that writers may spend waiting for
	// collections. Default 0.02. Negative: no part, but at most one collection in a second.
	PauseThreshold float64
	// DeletionThreshold is after how many deletions a collection doesn't wait
	// for its interval. Default: never.
	DeletionThreshold int
	// MutationThreshold is after how many changes of any kind a collection is
	// worth it without a deletion. Default 100. Negative: never.
	MutationThreshold int
	// ScheduleDelay is between what asks for a collection and the collection. Default 0.
	ScheduleDelay time.Duration
	// StartupDelay is between Run and the first collection. Default 100 ms.
	// Negative: there is none until something asks for it.
	StartupDelay time.Duration
	// Collected, if set, is told about each collection.
	Collected func(meta.Collected, error)
	// Log hears of collections that failed. Default: nobody.
	Log *slog.Logger
}

const (
	// leastPause is what a collection counts for at least, so that short ones
	// don't follow one upon the other.
	leastPause = 5 * time.Millisecond
	// retryLeast and retryMost bound the wait before another try at what a collection
	// could not remove; it doubles.
	retryLeast = time.Second
	retryMost  = time.Minute
)

// GC collects when enough has happened, and not so often that writers wait
// more than they may. What has happened is told by Changed, Trigger and
// ScheduleAndWait, at any time; collections happen in Run.
type GC struct {
	opts Options
	wake chan struct{} // holds a token when Run should look again

	mu        sync.Mutex
	asked     time.Time // since when somebody wants a collection now; zero when nobody does
	mutations int
	deletions int
	waiters   []chan outcome // of the next collection
	ended     bool
}

type outcome struct {
	collected meta.Collected
	err       error
}

// New makes a GC, which does nothing until Run. It comes before meta.Open,
// whose Options take its Changed.
func New(opts Options) *GC {
	if opts.PauseThreshold == 0 {
		opts.PauseThreshold = 0.02
	}
	opts.PauseThreshold = min(opts.PauseThreshold, 0.5)
	if opts.MutationThreshold == 0 {
		opts.MutationThreshold = 100
	}
	if opts.StartupDelay == 0 {
		opts.StartupDelay = 100 * time.Millisecond
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &GC{opts: opts, wake: make(chan struct{}, 1)}
}

// Changed says that a transaction has changed something; deleted, that
// something may have become collectible. It doesn't block.
func (g *GC) Changed(deleted bool) {
	g.mu.Lock()
	g.mutations++
	if deleted {
		g.deletions++
	}
	if n := g.opts.DeletionThreshold; n > 0 && g.deletions >= n {
		g.ask()
	}
	g.mu.Unlock()
	g.look()
}

// Trigger asks for a collection and doesn't wait for it.
func (g *GC) Trigger() {
	g.mu.Lock()
	g.ask()
	g.mu.Unlock()
	g.look()
}

// ScheduleAndWait asks for a collection and waits for it: one that begins
// after the call. ErrUnavailable when Run has ended.
func (g *GC) ScheduleAndWait(ctx context.Context) (meta.Collected, error) {
	w := make(chan outcome, 1)
	g.mu.Lock()
	if g.ended {
		g.mu.Unlock()
		return meta.Collected{}, errEnded
	}
	g.waiters = append(g.waiters, w)
	g.ask()
	g.mu.Unlock()
	g.look()
	select {
	case o := <-w:
		return o.collected, o.err
	case <-ctx.Done():
		return meta.Collected{}, context.Cause(ctx)
	}
}

var errEnded = fmt.Errorf("collection has ended: %w", errdefs.ErrUnavailable)

// ask is called with the lock held.
func (g *GC) ask() {
	if g.asked.IsZero() {
		g.asked = time.Now()
	}
}

func (g *GC) look() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// pace is what Run knows of the past.
type pace struct {
	first    time.Time     // when the first collection is due; zero when it has been or there is none
	last     time.Time     // when the last one ended; zero before it
	interval time.Duration // from the last to the next
	retry    time.Duration // the last wait for what could not be removed; 0 when all could
	pauses   time.Duration
	count    int
}

// Run collects, by calling collect, until ctx ends. It is called once.
func (g *GC) Run(ctx context.Context, collect func(context.Context) (meta.Collected, error)) {
	defer g.end()
	p := pace{interval: time.Second}
	if g.opts.StartupDelay > 0 {
		p.first = time.Now().Add(g.opts.StartupDelay)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.wake:
		case <-timer.C:
		}
		due := g.due(p)
		switch {
		case due.IsZero():
			timer.Stop()
		case time.Until(due) > 0:
			timer.Reset(time.Until(due))
		default:
			g.collect(ctx, &p, collect)
			g.look()
		}
	}
}

// due is when the next collection is to begin; zero when nothing calls for one.
func (g *GC) due(p pace) (at time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	earlier := func(t time.Time) {
		if at.IsZero() || t.Before(at) {
			at = t
		}
	}
	if !p.first.IsZero() {
		earlier(p.first)
	}
	if !g.asked.IsZero() {
		earlier(g.asked.Add(g.opts.ScheduleDelay))
	}
	if n := g.opts.MutationThreshold; g.deletions > 0 || n > 0 && g.mutations >= n {
		if p.last.IsZero() {
			// Something is to be done and nothing was yet: the first collection, if there is to be one, does it.
			if p.first.IsZero() {
				earlier(time.Now())
			}
		} else {
			earlier(p.last.Add(p.interval))
		}
	}
	if p.retry > 0 {
		earlier(p.last.Add(p.retry))
	}
	return at
}

// collect runs one collection and tells its waiters. Whoever asks while it
// runs is for the next.
func (g *GC) collect(ctx context.Context, p *pace, collect func(context.Context) (meta.Collected, error)) {
	g.mu.Lock()
	waiters, mutations, deletions := g.waiters, g.mutations, g.deletions
	g.waiters, g.asked, g.mutations, g.deletions = nil, time.Time{}, 0, 0
	g.mu.Unlock()
	collected, err := collect(ctx)
	p.ended(collected, err, g.opts.PauseThreshold)
	if err != nil {
		err = fmt.Errorf("garbage collection: %w", err)
		if ctx.Err() == nil { // one that a shutdown cuts short has not failed
			g.opts.Log.Error("garbage collection failed; it is tried again", "error", err, "after", p.retry)
		}
		g.mu.Lock()
		g.mutations += mutations
		g.deletions += deletions
		g.mu.Unlock()
	}
	if g.opts.Collected != nil {
		g.opts.Collected(collected, err)
	}
	for _, w := range waiters {
		w <- outcome{collected, err}
	}
}

// ended notes how a collection went.
func (p *pace) ended(c meta.Collected, err error, threshold float64) {
	p.first, p.last = time.Time{}, time.Now()
	if err != nil {
		p.retry = min(p.interval+retryLeast, retryMost)
		p.interval = max(p.interval, p.retry) // deletions that wait don't come sooner
		return
	}
	p.pauses += c.Pause
	p.count++
	p.interval = time.Second
	if threshold > 0 {
		average := max(p.pauses/time.Duration(p.count), leastPause)
		p.interval = time.Duration(float64(average)/threshold) - average
	}
	if c.Left == 0 {
		p.retry = 0
	} else {
		p.retry = min(max(2*p.retry, retryLeast), retryMost)
	}
}

// end tells those who wait that there will be nothing.
func (g *GC) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
	for _, w := range g.waiters {
		w <- outcome{err: errEnded}
	}
	g.waiters = nil
}
