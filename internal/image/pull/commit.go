package pull

import (
	"context"
	"fmt"
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
}

// ready is a layer whose bytes are all written and verified.
type ready struct {
	job    *job
	writer *meta.Writer // nil when the blob needs no record
	active string       // key of the active snapshot; "" when it stays packed
	result layer.Result
	synced bool // every file and directory was synced by itself

	done chan struct{}
	err  error
}

// commit returns when rd is recorded, or couldn't be.
func (c *committer) commit(rd *ready) error {
	rd.done = make(chan struct{})
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
		// A batch that has begun is finished even if the pulls that wait for it are gone: it is short, and half of it is worth nothing.
		err := c.land(context.Background(), batch)
		for _, rd := range batch {
			rd.err = err
			close(rd.done)
		}
	}
}

// land is T3. The order is what keeps the store whole: bytes, then
// metadata.db, then meta.db.
func (c *committer) land(ctx context.Context, batch []*ready) error {
	how := sealDurably
	for _, rd := range batch {
		if !rd.synced {
			how = sealSynced
		}
	}
	if how.Synced {
		if err := c.run.sync(ctx); err != nil {
			return err
		}
	}
	if err := fault.Point("pull.land.synced"); err != nil {
		return err
	}
	var sealed = make(map[*ready]meta.Sealed)
	var steps []snapshot.Commit
	for _, rd := range batch {
		if rd.writer != nil {
			s, release, err := rd.writer.Seal(ctx, rd.job.layer.Desc.Size, rd.job.layer.Desc.Digest, how)
			if err != nil {
				return err
			}
			defer release()
			sealed[rd] = s
		}
		if rd.active != "" {
			steps = append(steps, rd.step())
		}
	}
	if err := fault.Point("pull.land.sealed"); err != nil {
		return err
	}
	snaps, release, err := c.run.snaps.CommitChain(ctx, steps...)
	if err != nil {
		return fmt.Errorf("commit layers: %w", err)
	}
	defer release()
	if err := fault.Point("pull.land.committed"); err != nil {
		return err
	}
	return c.run.sp.Update(ctx, func(tx *meta.Tx) error {
		for _, rd := range batch {
			if err := rd.record(tx, sealed); err != nil {
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

func (rd *ready) record(tx *meta.Tx, sealed map[*ready]meta.Sealed) error {
	desc := rd.job.layer.Desc
	if s, ok := sealed[rd]; ok {
		if err := tx.RecordBlob(s, nil); err != nil {
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
