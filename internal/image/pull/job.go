package pull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// layerKey is what makes two layers the same work.
type layerKey struct {
	namespace, driver string
	id                digest.Digest // the ChainID; of a packed one, which no driver sees, the blob's
	packed            bool
}

// job brings one layer of a chain from its registry to a committed snapshot.
// It runs with the means of the pull that started it, and for as long as any
// pull wants it:
//
//	claimed -> fetching -> queued (committer) -> done
//	   \___________\__________\______________/  on an error, or when all have left
type job struct {
	by     *run // the pull that started it
	key    layerKey
	layer  image.Layer
	parent *job // nil for the bottom layer
	before *job // gets a download slot before this one does, or nil
	active string

	account *account // of the room that it takes; nil when nobody watches

	ctx    context.Context
	cancel context.CancelCauseFunc

	queuedOnce sync.Once
	begun      chan struct{} // closed when it has a download slot, or needs none for now
	queued     chan struct{} // closed when in the committer's queue, or done
	expected   bool          // by the committer
	held       bool          // the parent, by a lease of this pull
	wanted     atomic.Bool   // somebody can't go on before it is done
	done       chan struct{} // closed when err and fetched are set
	err        error
	fetched    bool // it wasn't here before

	mu     sync.Mutex
	claims []*claim
	over   bool // finished, or on its way out: nobody may join
}

var errAllLeft = errors.New("every pull that wanted the layer has ended")

// join adds r to the job of key, making it if there is none. It returns the
// job instead when that can't be joined any more.
func (p *Puller) join(r *run, key layerKey, l image.Layer, parent *job) (c *claim, leaving *job) {
	p.mu.Lock()
	defer p.mu.Unlock()
	j := p.layers[key]
	led := j == nil
	if led {
		j = &job{by: r, key: key, layer: l, parent: parent,
			begun: make(chan struct{}), queued: make(chan struct{}), done: make(chan struct{})}
		j.ctx, j.cancel = context.WithCancelCause(context.Background())
		if p.closed {
			j.cancel(errStopping)
		}
		p.layers[key] = j
		p.live[r.sp.Lease()]++
	}
	c = &claim{job: j, led: led, report: r.report, trace: r.req.Trace}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.over {
		return nil, j
	}
	j.claims = append(j.claims, c)
	if !led {
		j.by.ready.look()
	}
	return c, nil
}

// leave ends a pull's share. The last one to leave ends the job, if it is
// under way.
func (j *job) leave(c *claim) (last bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.claims = slices.DeleteFunc(j.claims, func(o *claim) bool { return o == c })
	if len(j.claims) == 0 && !j.over {
		j.over = true
		j.cancel(errAllLeft)
		return true
	}
	return false
}

func (j *job) report(e Event) {
	j.mu.Lock()
	claims := slices.Clone(j.claims)
	j.mu.Unlock()
	e.Packed = j.key.packed
	for _, c := range claims {
		c.report(e)
	}
}

func (j *job) enqueued() {
	j.queuedOnce.Do(func() {
		close(j.queued)
		if j.expected {
			j.by.ready.came()
		}
	})
}

// hurry says that somebody can't go on before the job is done.
func (j *job) hurry() {
	j.wanted.Store(true)
	j.by.ready.look()
}

// urgent reports whether the job, once it is ready, is to be committed without
// waiting for others: somebody can't go on without it, or nobody waits for it
// any more and those who have left wait for its end.
func (j *job) urgent() bool {
	if j.wanted.Load() || j.ctx.Err() != nil || !j.key.packed && !j.by.snaps.Traits().Rebase {
		return true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.ContainsFunc(j.claims, func(c *claim) bool { return !c.led })
}

// finish settles the job: all who wait for it go on. Only the first call
// counts.
func (j *job) finish(err error) {
	p := j.by.p
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-j.done:
		return
	default:
	}
	j.mu.Lock()
	j.over = true
	j.mu.Unlock()
	j.err = err
	delete(p.layers, j.key)
	p.letGo(j.by.sp.Lease())
	j.account.close()
	close(j.done)
	j.enqueued()
	j.cancel(nil)
}

// run does the work and settles the job.
func (j *job) run() {
	err := j.work(j.ctx)
	j.fetched = err == nil
	if err != nil {
		j.dropActive()
		err = fmt.Errorf("layer %s: %w", j.layer.Desc.Digest, err)
	} else {
		j.report(Event{Stage: StageComplete, Desc: j.layer.Desc, Offset: j.layer.Desc.Size})
	}
	j.finish(err)
}

// dropActive removes the snapshot of a layer that failed: unlike an ingest it
// can't be resumed.
func (j *job) dropActive() {
	if j.active == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := j.by.snaps.Remove(ctx, j.active); err != nil && !errdefs.IsNotFound(err) {
		j.by.p.opts.Log.Warn("active snapshot of a failed layer stays until its lease ends", "key", j.active, "error", err)
	}
	j.active = ""
}

// work is the life of one layer. Bytes that don't match their digest are
// thrown away, snapshot and all, and fetched again from elsewhere.
func (j *job) work(ctx context.Context) error {
	end := j.begin(PhaseQueue)
	free, err := j.takeSlot(ctx)
	end(nil)
	if err != nil {
		return err
	}
	defer free()
	rd, err := j.landTrue(ctx, free)
	if err != nil {
		return err
	}
	return j.commit(ctx, rd)
}

// maxLies bounds how often the bytes of a layer may come wrong: once from what
// an earlier pull has kept, and then from a few hosts.
const maxLies = 4

// landTrue is land until the bytes are right: whoever has sent wrong ones is
// not asked again.
func (j *job) landTrue(ctx context.Context, free func()) (*ready, error) {
	rd, err := j.land(ctx, free)
	told := err
	for range maxLies {
		l, isLie := errors.AsType[*lied](err)
		if !isLie {
			break
		}
		for _, host := range l.hosts {
			j.by.repo.Distrust(host)
		}
		if err = j.renew(ctx); err == nil {
			rd, err = j.land(ctx, free)
		}
		if err != nil {
			told = again(told, err)
		}
	}
	if err != nil {
		return nil, told
	}
	return rd, nil
}

// takeSlot waits for one of the pull's download slots, which layers get in
// the order of run.order. A layer that has the same blob as one below it waits
// for that first, and then needs no download.
//
// Nobody waits in a circle, whatever the order: who has a slot waits for no
// other layer before giving it up, and who waits for a twin, which lies below
// it in the chain, has no slot and keeps nobody in line behind it from getting
// one.
func (j *job) takeSlot(ctx context.Context) (free func(), err error) {
	begin := sync.OnceFunc(func() { close(j.begun) })
	defer begin()
	if j.before != nil {
		select {
		case <-j.before.begun:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if twin := j.twin(); twin != nil {
		begin()
		twin.hurry()
		select {
		case <-twin.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	select {
	case j.by.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return sync.OnceFunc(func() { <-j.by.slots }), nil
}

// twin is the nearest layer below that has the same blob.
func (j *job) twin() *job {
	for p := j.parent; p != nil; p = p.parent {
		if p.layer.Desc.Digest == j.layer.Desc.Digest {
			return p
		}
	}
	return nil
}

// renew replaces the active snapshot, into which unverified bytes have gone.
func (j *job) renew(ctx context.Context) error {
	if j.active == "" {
		return nil
	}
	j.dropActive()
	if !j.by.snaps.Traits().Rebase {
		return nil
	}
	return j.createActive(ctx, "")
}

// createActive makes and records the snapshot of this one layer.
func (j *job) createActive(ctx context.Context, parent string) error {
	key := j.newKey()
	made, release, err := j.by.snaps.Create(ctx, snapshot.New{Key: key, Parent: parent, Kind: snapshot.KindActive, Labels: j.labels()})
	if err != nil {
		return err
	}
	defer release()
	err = j.by.sp.Update(ctx, func(tx *meta.Tx) error { return tx.RecordSnapshot(made[0]) })
	if err == nil {
		j.active = key
	}
	return err
}

// land brings the bytes to disk, verified: blob and tree in one pass where the
// driver allows it, else the blob first and, when the parent is there, the
// tree from it. free gives up the download slot.
func (j *job) land(ctx context.Context, free func()) (*ready, error) {
	src, err := j.openSource(ctx)
	if err != nil {
		return nil, err
	}
	rd := &ready{job: j, writer: src.writer}
	if j.key.packed || !j.by.snaps.Traits().Rebase {
		end := j.begin(PhaseFetch)
		err := src.drain(ctx)
		end(src.pass(layer.Result{}))
		if err != nil {
			return nil, errors.Join(err, src.close())
		}
		free()
		if j.key.packed {
			j.account.land()
			return rd, nil
		}
		if err := j.waitParent(ctx, true); err != nil {
			return nil, errors.Join(err, src.close())
		}
		if j.active == "" {
			if err := j.createActive(ctx, j.parentChain()); err != nil {
				return nil, errors.Join(err, src.close())
			}
		}
		if err := src.rewind(); err != nil {
			return nil, errors.Join(err, src.close())
		}
	}
	j.report(Event{Stage: StageFetching, Desc: j.layer.Desc, Offset: src.offset, Kept: src.here})
	if err := j.unpack(ctx, src, rd); err != nil {
		return nil, errors.Join(err, src.close())
	}
	src.release()
	free()
	j.account.land()
	return rd, nil
}

// unpack emits the layer into its active snapshot while its bytes go by.
func (j *job) unpack(ctx context.Context, src *source, rd *ready) error {
	emit, err := j.emitter(ctx)
	if err != nil {
		return err
	}
	src.unpacking = true
	end := j.begin(PhaseUnpack)
	res, err := j.apply(ctx, src, emit)
	end(src.pass(res))
	if err != nil {
		return err
	}
	end = j.begin(PhaseFlush)
	rd.synced, err = emit.Sync()
	end(nil)
	rd.active, rd.result = j.active, res
	return err
}

// emitter writes files, and may sync what it has written.
type emitter interface {
	layer.Emitter
	Sync() (bool, error)
}

// emitter opens the active snapshot for writing.
func (j *job) emitter(ctx context.Context) (emitter, error) {
	dir, _, err := j.by.snaps.Dir(ctx, j.active)
	if err != nil {
		return nil, err
	}
	if j.by.snaps.Traits().Form == snapshot.FormOverlay {
		return layer.NewOverlay(dir, nil, layer.OverlayOptions{UserXattr: j.by.p.opts.UserXattr})
	}
	return layer.NewDirectory(dir)
}

// apply reads the blob to its end, and verifies it and the archive in it.
func (j *job) apply(ctx context.Context, src *source, emit layer.Emitter) (layer.Result, error) {
	res, applyErr := layer.Apply(ctx, src, j.layer.Desc.MediaType, emit, j.by.p.opts.Limits)
	if ctx.Err() != nil {
		src.stop(context.Cause(ctx))
		return res, context.Cause(ctx)
	}
	if err := src.failure(); err != nil {
		return res, err
	}
	// Whether the archive is bad or its bytes were changed on the way shows only at the end of the blob.
	begun := time.Now()
	err := src.drain(ctx)
	took := time.Since(begun)
	res.Times.Source += took
	res.Times.Hungry += took
	if err != nil {
		return res, err
	}
	if applyErr != nil {
		return res, applyErr
	}
	if res.DiffID != j.layer.DiffID {
		return res, fmt.Errorf("the archive's uncompressed digest is %s and the image config promises %s; the image is broken, its author must rebuild it: %w", res.DiffID, j.layer.DiffID, errdefs.ErrFailedPrecondition)
	}
	return res, nil
}

// commit queues the layer behind its parent.
func (j *job) commit(ctx context.Context, rd *ready) error {
	if err := j.waitParent(ctx, false); err != nil {
		if rd.writer != nil {
			rd.writer.Close()
		}
		return err
	}
	j.report(Event{Stage: StageCommit, Desc: j.layer.Desc, Offset: j.layer.Desc.Size})
	err := j.by.ready.commit(rd)
	if err != nil && rd.writer != nil {
		rd.writer.Close()
	}
	return err
}

// waitParent waits until the layer below is committed or, when a batch may
// hold both, at least queued in the same committer.
func (j *job) waitParent(ctx context.Context, committed bool) error {
	p := j.parent
	if p == nil {
		return nil
	}
	end := j.begin(PhaseParent)
	defer end(nil)
	wait := p.queued
	if committed || p.by != j.by {
		wait = p.done
	}
	select {
	case <-wait:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-p.done:
		if p.err != nil {
			return &below{p, p.err}
		}
	default:
	}
	return j.holdParent(ctx)
}

// holdParent leases a parent that another pull has made: the image that holds
// it may be removed, and the parent collected, before this layer holds it.
func (j *job) holdParent(ctx context.Context) error {
	if j.parent.by == j.by || j.held {
		return nil
	}
	err := j.by.sp.Update(ctx, func(tx *meta.Tx) error {
		return tx.LeaseSnapshot(j.by.snaps.Driver(), j.parentChain())
	})
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("the layer below: %w", errCollected)
	}
	j.held = err == nil
	return err
}
