// Package pull makes a remote image local: resolve, fetch, unpack, record.
//
// One pull makes few transactions, each of which may be shared with other
// pulls (for an image of one layer four in meta.db and two in metadata.db):
//
//	T1  the lease, and the ingest of the root document        start
//	T2  the other ingests, and the active snapshots           claim
//	T3  blobs and committed snapshots, as they are synced     committer
//	T4  documents, image name, end of the lease               record
//
// Layers are jobs that belong to nobody: pulls that need the same layer at the
// same time join one job, and it ends early only when all of them have left.
package pull

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// Lease times and labels.
const (
	leaseFor    = 24 * time.Hour
	labelExpire = "containerd.io/gc.expire"
	labelRef    = "io.holdfast/pull.ref" // on a pull's lease: what it pulls
)

// maxClaims bounds how often a pull takes over from others that failed.
const maxClaims = 3

// Options of a Puller. The zero value works.
type Options struct {
	Snapshotter string            // driver for pulls that name none; default "overlayfs"
	Downloads   int               // layers of one pull that are fetched at once; default 3
	Limits      layer.Limits      // bounds on each layer's archive
	Content     string            // directory that blobs lie in; if it is given, a pull that doesn't fit on its disk is refused, or stopped before the disk is full
	Snapshots   map[string]string // the same of each driver, by its name
	UserXattr   bool              // overlay marks in the user.* namespace: the daemon runs in a user namespace
	Log         *slog.Logger      // default: discard
}

// Request says how one image is to be pulled. The zero value works.
type Request struct {
	Snapshotter string // default: the Puller's
	Platform    string // `os/arch[/variant]`; default: this machine's
	Labels      map[string]string
	KeepLabels  bool // labels that an image record has already stay, where Labels doesn't set them anew
	Downloads   int  // default: the Puller's
	NoUnpack    bool // fetch all layers and leave them packed
	Session     registry.Session
	Progress    func(Event) // called from several goroutines; must not block
	ID          string      // names this pull to who watches it, and means nothing here
	Trace       Hooks

	// Names lists the image records to make, all for the same target and in
	// one transaction. Default: the reference. The first is the one that Pull
	// returns.
	Names func(image.Image) []string
	// Metadata also fetches the manifests and configs of the platforms that
	// an index lists and that are not pulled.
	Metadata bool

	// Platforms, if there are any, take the place of Platform: the images for
	// all of them are pulled under the one name. A platform that there is no
	// image for is passed over (StageMissing) as long as there is another.
	Platforms []Platform
	// All also fetches everything else that the target lists, of whatever
	// platform and type, and leaves it packed.
	All bool
}

// Platform is one of several that are pulled together.
type Platform struct {
	Name   string // `os/arch[/variant]`
	Packed bool   // fetch its layers and leave them packed
}

// Disk makes what was written to one file system durable. Begin is called
// before the first write; the returned func syncs and reports every
// write-back error since.
type Disk interface {
	Begin() (sync func(context.Context) error)
}

// Remote opens the repository that an image reference names, and returns the
// host and path by which blobs remember where they came from.
type Remote func(reference string, s registry.Session) (repo *registry.Repository, host, path string, err error)

// Puller makes remote images local.
type Puller struct {
	db     *meta.DB
	remote Remote
	disks  []Disk
	opts   Options

	rooms    *rooms
	patience time.Duration // see the constant; tests have another

	jobs   sync.WaitGroup
	mu     sync.Mutex
	layers map[layerKey]*job
	live   map[string]int // leases in use: by a pull, and by each job that it started
	closed bool
}

// New makes a Puller. disks are the file systems that content and snapshots
// lie on.
func New(db *meta.DB, remote Remote, disks []Disk, opts Options) *Puller {
	if opts.Snapshotter == "" {
		opts.Snapshotter = "overlayfs"
	}
	if opts.Downloads <= 0 {
		opts.Downloads = 3
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	room := &rooms{measure: durable.RoomOf, content: opts.Content, snapshots: opts.Snapshots, warn: opts.Log.Warn, disks: make(map[uint64]*filesystem)}
	return &Puller{db: db, rooms: room, remote: remote, disks: disks, opts: opts, patience: patience,
		layers: make(map[layerKey]*job), live: make(map[string]int)}
}

var errStopping = fmt.Errorf("the daemon is stopping; pull again when it is back, and what was fetched is kept: %w", errdefs.ErrUnavailable)

// Close ends the layers that are still being fetched and waits for them. The
// pulls that wait for them fail.
func (p *Puller) Close() error {
	p.mu.Lock()
	p.closed = true
	for _, j := range p.layers {
		j.cancel(errStopping)
	}
	p.mu.Unlock()
	p.jobs.Wait()
	return nil
}

// Pull makes the image that reference names local in the namespace of sp:
// afterwards its documents and layers, its snapshots and its name are durable.
// A failed or killed pull keeps what it has fetched under a lease that expires
// after a day, and the next pull of the image resumes from it; only a full disk
// gives everything back at once. Errors are errdefs kinds.
func (p *Puller) Pull(ctx context.Context, sp meta.Space, reference string, req Request) (img meta.Image, err error) {
	r, err := p.newRun(sp, reference, req)
	if err != nil {
		return meta.Image{}, fmt.Errorf("pull %s: %w", reference, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("pull %s: %w", reference, err)
		}
	}()
	r.report(Event{Stage: StageResolving})
	end := r.begin(PhaseResolve)
	target, err := r.repo.Resolve(ctx)
	end()
	if err != nil {
		return meta.Image{}, err
	}
	r.report(Event{Stage: StageResolved, Desc: target})
	end = r.begin(PhaseBegin)
	err = r.start(ctx, target)
	end()
	if err != nil {
		return meta.Image{}, err
	}
	defer r.end(&err)
	end = r.begin(PhaseDocuments)
	plan, err := r.plan(ctx, target)
	end()
	if err != nil {
		return meta.Image{}, err
	}
	for n := 1; ; n++ {
		if err := r.layers(ctx, plan); err != nil {
			return meta.Image{}, err
		}
		img, err := r.record(ctx, plan)
		if !errors.Is(err, errCollected) || n == maxClaims {
			return img, err
		}
	}
}

// run is the state of one pull.
type run struct {
	p         *Puller
	sp        meta.Space // leased
	snaps     meta.Snapshots
	reference string
	req       Request
	wanted    []wanted
	repo      *registry.Repository
	host      string // these two name the source in labels
	path      string
	docs      *documents
	slots     chan struct{}
	syncs     []func(context.Context) error
	ready     committer
	claimed   bool          // T2 is through: there may be bytes worth keeping
	rooms     []*share      // of the room that it takes, one for each claim
	foreign   []image.Layer // what other pulls have fetched for this one, under leases of theirs
}

func (p *Puller) newRun(sp meta.Space, reference string, req Request) (*run, error) {
	if req.Snapshotter == "" {
		req.Snapshotter = p.opts.Snapshotter
	}
	if req.Downloads <= 0 {
		req.Downloads = p.opts.Downloads
	}
	r := &run{p: p, reference: reference, req: req, slots: make(chan struct{}, req.Downloads)}
	var err error
	if r.wanted, err = req.wanted(); err != nil {
		return nil, err
	}
	if r.repo, r.host, r.path, err = p.remote(reference, req.Session); err != nil {
		return nil, err
	}
	r.sp = sp.Leased(fmt.Sprintf("pull-%d-%s", time.Now().UnixNano(), rand.Text()[:8]))
	if r.snaps, err = r.sp.Snapshots(req.Snapshotter); err != nil {
		return nil, err
	}
	r.docs = &documents{sp: r.sp, repo: r.repo, docs: map[string][]byte{}, report: r.report}
	r.ready.run, r.ready.news = r, make(chan struct{}, 1)
	for _, d := range p.disks {
		r.syncs = append(r.syncs, d.Begin())
	}
	return r, nil
}

// keysAhead is how many keys of snapshots the first transaction sees to, so
// that T2 needs none before it: two for each layer.
const keysAhead = 64

// start is T1: from here on the root document may lie on disk (inv 3).
func (r *run) start(ctx context.Context, target oci.Descriptor) (err error) {
	if err := oci.Check(target); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if target.Size > oci.MaxDocument {
		return fmt.Errorf("%s has %d bytes, more than a document may have: %w", target.Digest, target.Size, errdefs.ErrInvalidArgument)
	}
	r.p.mu.Lock()
	closed := r.p.closed
	r.p.live[r.sp.Lease()]++
	r.p.mu.Unlock()
	defer func() {
		if err != nil {
			r.letGo()
		}
	}()
	if closed {
		return errStopping
	}
	return r.sp.Update(ctx, func(tx *meta.Tx) error {
		_, err := tx.CreateLease(meta.Lease{ID: r.sp.Lease(), Labels: map[string]string{
			labelExpire: time.Now().Add(leaseFor).UTC().Format(time.RFC3339),
			labelRef:    r.reference,
		}})
		if err != nil {
			return err
		}
		if !r.req.NoUnpack {
			if err := tx.ReserveKeys(r.snaps.Driver(), keysAhead); err != nil {
				return err
			}
		}
		_, err = r.holdBlob(tx, target)
		return err
	})
}

// holdBlob leases a blob that the namespace has, or records the ingest of one
// that it hasn't.
func (r *run) holdBlob(tx *meta.Tx, desc oci.Descriptor) (here bool, err error) {
	err = tx.LeaseBlob(desc.Digest)
	if errdefs.IsNotFound(err) {
		return false, tx.AddIngest(oci.Key(desc), desc.Digest)
	}
	return err == nil, err
}

// end settles what a failed pull leaves. Its lease stays, so that what was
// fetched can be resumed, unless nothing was or the disk is full.
func (r *run) end(err *error) {
	defer func() {
		for _, s := range r.rooms {
			s.release()
		}
	}()
	r.docs.close()
	inUse := r.letGo()
	full := *err != nil && isFull(*err)
	if *err == nil || inUse || r.claimed && !full {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if e := r.sp.DeleteLease(ctx, r.sp.Lease()); e != nil && !errdefs.IsNotFound(e) {
		*err = errors.Join(*err, e)
		return
	}
	if full {
		if _, e := r.p.db.Collect(ctx); e != nil {
			*err = errors.Join(*err, e)
		}
		if _, refused := errors.AsType[*noRoom](*err); refused {
			return // it says what to do
		}
		*err = fmt.Errorf("no space left on the disk that keeps the images; free some (`holdfast rmi IMAGE`) and pull again: %w", *err)
	}
}

// letGo ends this pull's own use of its lease.
func (r *run) letGo() (inUse bool) {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	return r.p.letGo(r.sp.Lease())
}

// letGo ends one use of a lease and reports whether others go on. p.mu is held.
func (p *Puller) letGo(lease string) (inUse bool) {
	p.live[lease]--
	if p.live[lease] <= 0 {
		delete(p.live, lease)
		return false
	}
	return true
}

// layers makes every layer of the plan a snapshot, by its own jobs and those
// of others. When another pull's job fails, or ends because that pull did,
// or what it has made is gone again, this one takes the layer over.
func (r *run) layers(ctx context.Context, plan plan) error {
	for n := 1; ; n++ {
		end := r.begin(PhaseClaim)
		claims, err := r.claim(ctx, plan)
		end()
		if errors.Is(err, errCollected) && n < maxClaims {
			continue
		}
		if err != nil {
			return err
		}
		end = r.begin(PhaseLayers)
		foreign, err := r.wait(ctx, claims)
		end()
		if err == nil {
			r.foreign = fetchedByOthers(claims)
		}
		again := foreign || errors.Is(err, errCollected)
		if err == nil || !again || n == maxClaims || ctx.Err() != nil {
			return err
		}
	}
}

// wait returns when all jobs are done or one has failed, and has left them
// all; those that nobody else wants have then stopped. foreign says that a job
// led by another pull failed.
func (r *run) wait(ctx context.Context, claims []*claim) (foreign bool, err error) {
	defer func() {
		for _, c := range claims {
			if last := c.job.leave(c); last {
				defer func() { <-c.job.done }()
			}
		}
	}()
	settled := make(chan *claim, len(claims))
	for _, c := range claims {
		go func() { <-c.job.done; settled <- c }()
	}
	for range claims {
		select {
		case c := <-settled:
			if c.job.err != nil {
				c = culprit(claims, c)
				return !c.led, c.job.err
			}
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
	return false, nil
}

// culprit is the layer for whose sake that of c has failed: itself, or one
// below it.
func culprit(claims []*claim, c *claim) *claim {
	for {
		b, ok := errors.AsType[*below](c.job.err)
		i := slices.IndexFunc(claims, func(o *claim) bool { return ok && o.job == b.parent })
		if i < 0 {
			return c
		}
		c = claims[i]
		<-c.job.done
	}
}

// fetchedByOthers lists the layers that no lease of this pull holds.
func fetchedByOthers(claims []*claim) (layers []image.Layer) {
	for _, c := range claims {
		if !c.led && c.job.fetched {
			layers = append(layers, c.job.layer)
		}
	}
	return layers
}

// errCollected says that a layer, which was there or which another pull had
// fetched, was removed with the last image that held it before this pull could
// hold it too.
var errCollected = errors.New("removed in the meantime")

// record is T4: the documents, whose bytes are synced one by one, the image's
// name, and the end of this pull's lease and of those that earlier, failed
// pulls of the same image have left.
func (r *run) record(ctx context.Context, plan plan) (meta.Image, error) {
	defer r.begin(PhaseRecord)()
	if err := r.docs.seal(ctx); err != nil {
		return meta.Image{}, err
	}
	stale, err := r.staleLeases(ctx)
	if err != nil {
		return meta.Image{}, err
	}
	var img meta.Image
	err = r.sp.Update(ctx, func(tx *meta.Tx) error {
		if err := r.checkForeign(tx); err != nil {
			return err
		}
		for _, s := range r.docs.sealed {
			if err := tx.RecordBlob(s, nil); err != nil {
				return err
			}
		}
		if err := r.labelDocuments(tx, plan); err != nil {
			return err
		}
		for i, name := range r.names(plan) {
			labels, err := r.labels(tx, name)
			if err != nil {
				return err
			}
			made, err := tx.PutImage(meta.Image{Name: name, Target: plan.first.Target(), Labels: labels})
			if err != nil {
				return err
			}
			if i == 0 {
				img = made
			}
		}
		for _, id := range append(stale, r.sp.Lease()) {
			if err := tx.DeleteLease(id); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
		return nil
	})
	if err == nil {
		r.report(Event{Stage: StageDone, Desc: plan.first.Target()})
	}
	return img, err
}

// labels are those of the image record to make.
func (r *run) labels(tx *meta.Tx, name string) (map[string]string, error) {
	if !r.req.KeepLabels {
		return r.req.Labels, nil
	}
	labels := map[string]string{}
	old, err := tx.Image(name)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	maps.Copy(labels, old.Labels)
	maps.Copy(labels, r.req.Labels)
	return labels, nil
}

func (r *run) names(plan plan) []string {
	if r.req.Names == nil {
		return []string{r.reference}
	}
	return r.req.Names(plan.first)
}

// checkForeign makes sure that all is still there that no lease of this pull
// has held: from this transaction on the image holds it.
func (r *run) checkForeign(tx *meta.Tx) error {
	for _, l := range r.foreign {
		_, err := tx.Blob(l.Desc.Digest)
		if err == nil && l.ChainID != "" {
			err = tx.LeaseSnapshot(r.snaps.Driver(), l.ChainID.String())
		}
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("layer %s: %w", l.Desc.Digest, errCollected)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// labelDocuments ties the image's documents to what they need, and to where
// they came from.
func (r *run) labelDocuments(tx *meta.Tx, plan plan) error {
	tops := plan.topChains()
	for _, desc := range r.docs.read {
		labels := r.sourceLabel(tx, desc)
		children, err := image.Children(desc.MediaType, r.docs.docs[desc.Digest.String()])
		if err != nil {
			return err
		}
		for k, v := range oci.ChildLabels(children) {
			labels[k] = v
		}
		if top := tops[desc.Digest]; top != "" {
			if err := tx.LeaseSnapshot(r.snaps.Driver(), top.String()); err != nil {
				return err
			}
			labels[oci.LabelSnapshot+r.snaps.Driver()] = top.String()
		}
		if err := tx.SetBlobLabels(desc.Digest, labels); err != nil {
			return err
		}
	}
	return nil
}

// sourceLabel adds this pull's repository to those that a blob is known to
// come from.
func (r *run) sourceLabel(tx *meta.Tx, desc oci.Descriptor) map[string]string {
	labels := map[string]string{}
	old := ""
	if b, err := tx.Blob(desc.Digest); err == nil {
		old = b.Labels[oci.SourceKey(r.host)]
	}
	if key, list, ok := oci.SourceLabel(r.host, old, r.path); ok {
		labels[key] = list
	}
	return labels
}

// staleLeases finds the leases of earlier pulls of this image that didn't end
// well: what they hold is now held by the image.
func (r *run) staleLeases(ctx context.Context) ([]string, error) {
	all, err := r.sp.Leases(ctx)
	if err != nil {
		return nil, err
	}
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	var ids []string
	for _, l := range all {
		if l.Labels[labelRef] == r.reference && r.p.live[l.ID] == 0 {
			ids = append(ids, l.ID)
		}
	}
	return ids, nil
}
