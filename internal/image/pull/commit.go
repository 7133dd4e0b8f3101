package pull

import (
	"context"
	"slices"
	"sync"

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

// committer makes finished layers durable and then records them (inv 1), as
// many at once as are ready: whoever comes while a batch is on its way is in
// the next one. A layer comes after its parent.
type committer struct {
	run *run

	mu    sync.Mutex
	queue []*ready
	busy  bool

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

// commit returns when rd is recorded, or couldn't be.
func (c *committer) commit(rd *ready) error {
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
		c.drain()
	}
	<-rd.done
	return rd.err
}

func (c *committer) drain() {
	for {
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
