package pull

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

var (
	sealDurably = content.CommitOptions{}
	sealSynced  = content.CommitOptions{Synced: true}
)

// patience bounds how long a layer that is ready waits for others of its pull.
// It is what a power cut costs at most of what came over a slow network, and
// long enough for most pulls to commit once.
const patience = 5 * time.Second

// maxBatch is how many layers wait for another one at most: each keeps a file
// open.
const maxBatch = 64

// committer makes finished layers durable and then records them (inv 1). A
// layer comes after its parent.
//
// The simple version commits each layer as soon as it is ready. A sync of the
// file system then pays for all that the other layers have half written, and
// holds them up while it does; of thirty small layers each costs a sync and
// two transactions. So a layer that is ready waits for those of its pull that
// are in the works, as long as nobody waits for it (job.urgent) and within
// patience; whoever comes while a batch is on its way is in the next one. The
// bytes of a layer that waits are in its ingest already: when the daemon is
// killed meanwhile, they need not come again.
type committer struct {
	run *run

	mu    sync.Mutex
	queue []*ready
	busy  bool

	coming atomic.Int64  // layers on their way into the queue
	news   chan struct{} // holds a token when what company looks at may have changed

	failed map[*job]error // used by whoever drains
}

// ready is a layer whose bytes are all written and verified.
type ready struct {
	job    *job
	writer *meta.Writer // nil when the blob needs no record
	active string       // key of the active snapshot; "" when it stays packed
	result layer.Result
	synced bool // every file and directory was synced by itself

	sealed  *meta.Sealed // the blob, once its bytes have their place
	release func()       // its pin

	taken func() // tells that the commit in front is through
	done  chan struct{}
	err   error
}

// below is the error of a layer that can't be had because the one below it
// can't.
type below struct {
	parent *job
	err    error
}

func (b *below) Error() string { return "the layer below: " + b.err.Error() }
func (b *below) Unwrap() error { return b.err }

// expect announces layers that will come, or fail.
func (c *committer) expect(layers int) { c.coming.Add(int64(layers)) }

// came says that one has come, or won't.
func (c *committer) came() {
	c.coming.Add(-1)
	c.look()
}

// look has whoever waits for company look again.
func (c *committer) look() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// company waits until no more layers are coming, or one in the queue must not
// wait any longer.
func (c *committer) company() {
	t := time.NewTimer(c.run.p.patience)
	defer t.Stop()
	for c.coming.Load() > 0 && !c.pressed() {
		select {
		case <-c.news:
		case <-t.C:
			return
		}
	}
}

// pressed reports whether the queue can't wait.
func (c *committer) pressed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.queue) >= maxBatch || slices.ContainsFunc(c.queue, func(rd *ready) bool { return rd.job.urgent() })
}

// commit returns when rd is recorded, or couldn't be.
func (c *committer) commit(rd *ready) error {
	stop := context.AfterFunc(rd.job.ctx, c.look)
	defer stop()
	rd.done = make(chan struct{})
	end := rd.job.begin(PhaseBatch)
	rd.taken = func() { end(nil) }
	c.mu.Lock()
	c.queue = append(c.queue, rd)
	lead := !c.busy
	c.busy = true
	c.mu.Unlock()
	rd.job.enqueued()
	if lead {
		c.run.p.jobs.Go(c.drain) // not here: rd is done before the others are
	}
	<-rd.done
	return rd.err
}

func (c *committer) drain() {
	for {
		c.mu.Lock()
		some := len(c.queue) > 0
		c.mu.Unlock()
		if some {
			c.company()
		}
		c.mu.Lock()
		batch := c.queue
		c.queue = nil
		c.busy = len(batch) > 0
		c.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		for _, rd := range batch {
			rd.taken()
		}
		// A batch that has begun is finished even if the pulls that wait for it are gone: it is short, and half of it is worth nothing.
		c.settle(context.Background(), batch)
	}
}

// settle lands a batch. When the driver refuses it, its layers are tried one
// by one: the good ones get in and the bad one is known.
func (c *committer) settle(ctx context.Context, batch []*ready) {
	batch = slices.DeleteFunc(batch, func(rd *ready) bool {
		err := c.failed[rd.job.parent]
		if err != nil {
			c.finish(rd, &below{rd.job.parent, err})
		}
		return err != nil
	})
	refused, err := c.land(ctx, batch)
	for _, rd := range batch {
		if refused && len(batch) > 1 {
			c.settle(ctx, []*ready{rd})
		} else {
			c.finish(rd, err)
		}
	}
}

func (c *committer) finish(rd *ready, err error) {
	if err != nil {
		if c.failed == nil {
			c.failed = make(map[*job]error)
		}
		c.failed[rd.job] = err
	}
	if rd.release != nil {
		rd.release()
	}
	rd.err = err
	close(rd.done)
}

// land is T3. The order is what keeps the store whole: bytes, then
// metadata.db, then meta.db. refused says that the driver did not take the
// layers, and nothing has happened.
func (c *committer) land(ctx context.Context, batch []*ready) (refused bool, err error) {
	if len(batch) == 0 {
		return false, nil
	}
	how := sealDurably
	for _, rd := range batch {
		if !rd.synced {
			how = sealSynced
		}
	}
	if how.Synced {
		end := c.begin(batch, PhaseSync)
		err := c.run.sync(ctx)
		end()
		if err != nil {
			return false, err
		}
	}
	if err := fault.Point("pull.land.synced"); err != nil {
		return false, err
	}
	if err := c.seal(ctx, batch, how); err != nil {
		return false, err
	}
	var steps []snapshot.Commit
	for _, rd := range batch {
		if rd.active != "" {
			steps = append(steps, rd.step())
		}
	}
	if err := fault.Point("pull.land.sealed"); err != nil {
		return false, err
	}
	end := c.begin(batch, PhaseSnapshot)
	snaps, release, err := c.run.snaps.CommitChain(ctx, steps...)
	end()
	if err != nil {
		return true, err
	}
	defer release()
	if err := fault.Point("pull.land.committed"); err != nil {
		return false, err
	}
	defer c.begin(batch, PhaseMeta)()
	return false, c.run.sp.Update(ctx, func(tx *meta.Tx) error {
		for _, rd := range batch {
			if err := rd.record(tx); err != nil {
				return err
			}
		}
		for _, s := range snaps {
			if err := tx.RecordSnapshot(s); err != nil {
				return err
			}
		}
		return nil
	})
}

// seal moves the blobs of a batch to their places.
func (c *committer) seal(ctx context.Context, batch []*ready, how content.CommitOptions) error {
	defer c.begin(batch, PhaseSeal)()
	for _, rd := range batch {
		if err := rd.seal(ctx, how); err != nil {
			return err
		}
	}
	return nil
}

// seal moves the blob to its place, once.
func (rd *ready) seal(ctx context.Context, how content.CommitOptions) error {
	if rd.writer == nil || rd.sealed != nil {
		return nil
	}
	s, release, err := rd.writer.Seal(ctx, rd.job.layer.Desc.Size, rd.job.layer.Desc.Digest, how)
	if err != nil {
		return err
	}
	rd.sealed, rd.release = &s, release
	return nil
}

func (rd *ready) record(tx *meta.Tx) error {
	desc := rd.job.layer.Desc
	if rd.sealed != nil {
		if err := tx.RecordBlob(*rd.sealed, nil); err != nil {
			return err
		}
	}
	labels := rd.job.by.sourceLabel(tx, desc)
	if rd.active != "" {
		labels[oci.LabelUncompressed] = rd.job.layer.DiffID.String()
	}
	return tx.SetBlobLabels(desc.Digest, labels)
}

func (rd *ready) step() snapshot.Commit {
	u := rd.result.Usage
	s := snapshot.Commit{
		Key:     rd.active,
		Name:    rd.job.layer.ChainID.String(),
		Labels:  rd.job.labels(),
		Usage:   &u,
		Implied: rd.result.Implied,
		Links:   rd.result.Links,
	}
	if rd.job.by.snaps.Traits().Rebase {
		s.Parent = rd.job.parentChain()
	}
	return s
}

// sync makes everything that this pull has written durable.
func (r *run) sync(ctx context.Context) error {
	errs := make(chan error, len(r.syncs))
	for _, f := range r.syncs {
		go func() { errs <- f(ctx) }()
	}
	var first error
	for range r.syncs {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}
