package pull

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// claim is one pull's share in a job.
type claim struct {
	job    *job
	led    bool // this pull started it
	report func(Event)
	trace  Hooks
}

// claim joins the jobs of all layers, bottom first, and starts those that
// nobody runs: this is T2. On an error it has left them all.
func (r *run) claim(ctx context.Context, plan plan) (claims []*claim, err error) {
	claims, err = r.join(ctx, plan)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			abandon(claims, err)
		}
	}()
	led, present, err := r.missing(ctx, claims)
	if err != nil {
		return claims, err
	}
	if err := r.admit(ctx, led); err != nil {
		return claims, err
	}
	made, release, err := r.createActives(ctx, led)
	defer release()
	if err != nil {
		return claims, err
	}
	if err := r.recordClaim(ctx, led, present, made); err != nil {
		return claims, err
	}
	r.claimed = true
	r.shares(claims, present)
	for _, j := range present {
		j.report(Event{Stage: StageExists, Desc: j.layer.Desc, Offset: j.layer.Desc.Size})
		j.finish(nil)
	}
	if err := r.docs.write(ctx); err != nil {
		return claims, err
	}
	r.ready.expect(len(led))
	for _, j := range led {
		j.expected = true
		j.report(Event{Stage: StageWaiting, Desc: j.layer.Desc}) // from here, so that all hear of the layers in their order
	}
	var before *job
	for _, j := range r.order(led) {
		j.before, before = before, j
		r.p.jobs.Go(j.run)
	}
	return claims, nil
}

// order is that in which layers get download slots. The largest goes first: a
// large one that comes last is fetched, inflated and written alone, when all
// the others are through and the second core has nothing to do, while small
// ones fill any gap. Equals keep the order of the chain.
//
// A driver that wants the parent first has its layers in the order of the
// chain: it unpacks one at a time, from the bottom, and would otherwise wait
// with that until the small bottom layer has come behind all large ones. What
// stays packed comes after them, the largest first.
func (r *run) order(led []*job) []*job {
	inChain := func(j *job) bool { return !j.key.packed && !r.snaps.Traits().Rebase }
	order := slices.Clone(led)
	slices.SortStableFunc(order, func(a, b *job) int {
		switch chainA, chainB := inChain(a), inChain(b); {
		case chainA && chainB:
			return 0
		case chainA:
			return -1
		case chainB:
			return 1
		}
		return cmp.Compare(b.layer.Desc.Size, a.layer.Desc.Size)
	})
	return order
}

// join finds or makes the job of every layer, once for images that share it.
func (r *run) join(ctx context.Context, plan plan) (claims []*claim, err error) {
	seen := make(map[layerKey]*job)
	one := func(key layerKey, l image.Layer, parent *job) (*job, error) {
		if j := seen[key]; j != nil {
			return j, nil
		}
		c, err := r.joinLayer(ctx, key, l, parent)
		if err != nil {
			abandon(claims, err)
			return nil, err
		}
		claims, seen[key] = append(claims, c), c.job
		return c.job, nil
	}
	for _, img := range plan.images {
		var below *job
		for _, l := range img.Layers {
			if below, err = one(layerKey{r.sp.Namespace(), r.snaps.Driver(), l.ChainID, false}, l, below); err != nil {
				return nil, err
			}
		}
	}
	for _, desc := range plan.packed {
		if _, err = one(layerKey{r.sp.Namespace(), "", desc.Digest, true}, image.Layer{Desc: desc}, nil); err != nil {
			return nil, err
		}
	}
	return claims, nil
}

// joinLayer joins one job. A job whose pulls have all left is on its way out:
// it is waited for.
func (r *run) joinLayer(ctx context.Context, key layerKey, l image.Layer, parent *job) (*claim, error) {
	for {
		c, leaving := r.p.join(r, key, l, parent)
		if c != nil {
			return c, nil
		}
		select {
		case <-leaving.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// abandon ends the jobs that this pull has made and not started, and leaves
// the others; those that nobody else wants have then stopped.
func abandon(claims []*claim, err error) {
	for _, c := range claims {
		if c.led {
			c.job.dropActive()
			c.job.finish(err)
		}
		if last := c.job.leave(c); last {
			defer func() { <-c.job.done }()
		}
	}
}

// missing splits the jobs of this pull into those with work to do and those
// whose snapshot, or blob if it stays packed, is there already.
func (r *run) missing(ctx context.Context, claims []*claim) (todo, present []*job, err error) {
	for _, c := range claims {
		j := c.job
		if !c.led {
			continue
		}
		if j.key.packed {
			switch _, err := r.sp.Blob(ctx, j.key.id); {
			case err == nil:
				present = append(present, j)
			case errdefs.IsNotFound(err):
				todo = append(todo, j)
			default:
				return nil, nil, err
			}
			continue
		}
		info, err := r.snaps.Stat(ctx, j.layer.ChainID.String())
		switch {
		case err == nil && info.Kind == snapshot.KindCommitted:
			present = append(present, j)
		case err == nil:
			return nil, nil, fmt.Errorf("snapshot %s of %s is not a committed one; remove it and pull again: %w", j.layer.ChainID, r.snaps.Driver(), errdefs.ErrFailedPrecondition)
		case errdefs.IsNotFound(err):
			todo = append(todo, j)
		default:
			return nil, nil, err
		}
	}
	return todo, present, nil
}

// createActives makes the snapshots that the layers are unpacked into, if the
// driver gives parents at commit; with others all but the bottom layer have to
// wait for their parent.
func (r *run) createActives(ctx context.Context, led []*job) ([]meta.Created, func(), error) {
	var news []snapshot.New
	for _, j := range led {
		if j.key.packed || !r.snaps.Traits().Rebase && j.parent != nil {
			continue
		}
		j.active = j.newKey()
		news = append(news, snapshot.New{Key: j.active, Kind: snapshot.KindActive, Labels: j.labels()})
	}
	if len(news) == 0 {
		return nil, func() {}, nil
	}
	made, release, err := r.snaps.Create(ctx, news...)
	if release == nil {
		release = func() {}
	}
	return made, release, err
}

// recordClaim is the transaction: what exists is leased, and what is about to
// come has a record before its first byte (inv 3).
func (r *run) recordClaim(ctx context.Context, led, present []*job, made []meta.Created) error {
	return r.sp.Update(ctx, func(tx *meta.Tx) error {
		r.docs.missing = nil
		for _, desc := range r.docs.read {
			if held, err := r.holdBlob(tx, desc); err != nil {
				return err
			} else if !held {
				r.docs.missing = append(r.docs.missing, desc)
			}
		}
		for _, j := range present {
			err := j.holdPresent(tx)
			if errdefs.IsNotFound(err) {
				return fmt.Errorf("layer %s: %w", j.layer.Desc.Digest, errCollected)
			}
			if err != nil {
				return err
			}
		}
		for _, j := range led {
			if _, err := r.holdBlob(tx, j.layer.Desc); err != nil {
				return err
			}
		}
		for _, c := range made {
			if err := tx.RecordSnapshot(c); err != nil {
				return err
			}
		}
		return nil
	})
}

// holdPresent leases what the job finds done.
func (j *job) holdPresent(tx *meta.Tx) error {
	if !j.key.packed {
		return tx.LeaseSnapshot(j.by.snaps.Driver(), j.layer.ChainID.String())
	}
	if err := tx.LeaseBlob(j.key.id); err != nil {
		return err
	}
	return tx.SetBlobLabels(j.key.id, j.by.sourceLabel(tx, j.layer.Desc))
}

// newKey names an active snapshot as containerd's unpacker does, so that what
// a crash leaves is recognised for what it is.
func (j *job) newKey() string {
	return fmt.Sprintf("extract-%d-%s %s", time.Now().Nanosecond(), strings.ToLower(rand.Text()[:4]), j.layer.ChainID)
}

// labels of the layer's snapshot, active and committed: its annotations meant
// for snapshots, and what it is. A manifest is a stranger's: it can't ask for
// an id mapping.
func (j *job) labels() map[string]string {
	labels := map[string]string{}
	for k, v := range j.layer.Desc.Annotations {
		if strings.HasPrefix(k, "containerd.io/snapshot/") && len(k)+len(v) <= 4096 {
			labels[k] = v
		}
	}
	maps.DeleteFunc(labels, func(k, _ string) bool {
		return strings.HasSuffix(k, "/uidmapping") || strings.HasSuffix(k, "/gidmapping")
	})
	labels[oci.LabelSnapshotRef] = j.layer.ChainID.String()
	labels[oci.LabelDiffID] = j.layer.DiffID.String()
	if p := j.parentChain(); p != "" {
		labels[oci.LabelParentChain] = p
	}
	return labels
}

func (j *job) parentChain() string {
	if j.parent == nil {
		return ""
	}
	return j.parent.layer.ChainID.String()
}
