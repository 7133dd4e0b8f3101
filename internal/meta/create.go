package meta

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/undo"
	bolt "go.etcd.io/bbolt"
)

// Created is a snapshot that the driver has and meta.db doesn't yet. Keys are
// the namespace's; Replaces is the active key that it was committed from.
type Created struct {
	Driver, Key, Parent, Backend, Replaces string
	Labels                                 map[string]string
	Kind                                   snapshot.Kind

	backendParent string // what the driver knows as its parent
	replaced      string // the backend key of Replaces
}

// Prepare makes an active snapshot and says how to mount it. ErrAlreadyExists
// when key exists or, with the label containerd.io/snapshot.ref, when the
// snapshot of that name exists or the driver supplies it: what exists is then
// leased. ErrNotFound for a parent that doesn't exist.
func (s Snapshots) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	return s.create(ctx, snapshot.New{Key: key, Parent: parent, Labels: labels, Kind: snapshot.KindActive})
}

// View makes a read-only snapshot of parent; otherwise it is as Prepare.
func (s Snapshots) View(ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error) {
	return s.create(ctx, snapshot.New{Key: key, Parent: parent, Labels: labels, Kind: snapshot.KindView})
}

func (s Snapshots) create(ctx context.Context, n snapshot.New) (m []mount.Mount, err error) {
	if err := s.leaseExisting(ctx, n); err != nil {
		return nil, err
	}
	created, release, err := s.Create(ctx, n)
	if errdefs.IsAlreadyExists(err) {
		if target := n.Labels[labelSnapshotRef]; target != "" {
			return nil, s.link(ctx, target, n)
		}
		// The key is new; to the caller this must not look as if it were not.
		return nil, fmt.Errorf("snapshotter %s: %v: %w", s.name, err, errdefs.ErrUnknown)
	}
	if err != nil {
		return nil, err
	}
	defer release()
	var u undo.Stack
	defer u.Unwind(&err)
	u.Add("remove snapshot", func(ctx context.Context) error { return s.driver.Remove(ctx, created[0].Backend) })
	if m, err = s.driver.Mounts(ctx, created[0].Backend); err != nil {
		return nil, err
	}
	return m, s.sp.Update(ctx, func(tx *Tx) error { return tx.recordOrLease(created[0]) })
}

// leaseExisting fails with ErrAlreadyExists when there is nothing to create.
func (s Snapshots) leaseExisting(ctx context.Context, n snapshot.New) error {
	var found string
	look := func(ns bucket) error {
		found = ""
		for _, key := range []string{n.Labels[labelSnapshotRef], n.Key} {
			if s.bucket(ns, key).exists() {
				found = key
				break
			}
		}
		return nil
	}
	if err := s.sp.view(look); err != nil || found == "" {
		return err
	}
	exists := fmt.Errorf("snapshot %q: %w", found, errdefs.ErrAlreadyExists)
	if s.sp.lease == "" {
		return exists
	}
	return s.sp.Update(ctx, func(tx *Tx) error {
		look(tx.ns())
		if found == "" {
			return nil // gone in between
		}
		tx.ReturnAfterCommit(exists)
		return tx.LeaseSnapshot(s.name, found)
	})
}

// link records, under the name target, a committed snapshot that the driver
// supplied instead of creating n: the driver marks it with the ref label. It
// returns ErrAlreadyExists when all is well, since that is what the caller of
// Prepare asked for; ErrNotFound when there is no such snapshot and
// ErrInvalidArgument when it has another parent than n in the namespace.
func (s Snapshots) link(ctx context.Context, target string, n snapshot.New) error {
	backendParent, err := s.backendParent(n.Parent)
	if err != nil {
		return err
	}
	for in, err := range s.driver.Walk(ctx) {
		if err != nil {
			return fmt.Errorf("look for snapshot %q: %w", target, err)
		}
		if in.Kind != snapshot.KindCommitted || in.Labels[labelSnapshotRef] != target || in.Parent != backendParent {
			continue
		}
		unpin, err := s.sp.db.pins.pinExisting(ctx, snapshotPin(s.name, in.Key), func() error {
			_, err := s.driver.Stat(ctx, in.Key)
			return err
		})
		if err != nil {
			return err
		}
		defer unpin()
		labels := in.Labels
		for k, v := range n.Labels {
			labels[k] = v
		}
		c := Created{
			Driver: s.name, Key: target, Parent: n.Parent, Backend: in.Key, Labels: labels,
			Kind: in.Kind, backendParent: backendParent,
		}
		return s.sp.Update(ctx, func(tx *Tx) error {
			tx.ReturnAfterCommit(fmt.Errorf("snapshot %q is there: %w", target, errdefs.ErrAlreadyExists))
			return tx.recordOrLease(c)
		})
	}
	return fmt.Errorf("snapshot %q is in no snapshotter: %w", target, errdefs.ErrNotFound)
}

func (s Snapshots) backendParent(parent string) (string, error) {
	if parent == "" {
		return "", nil
	}
	r, err := s.read(parent)
	if err != nil {
		return "", fmt.Errorf("parent: %w", err)
	}
	return r.backend, nil
}

// Create does the driver's part for new snapshots and pins them until release
// is called; the records are the caller's, by tx.RecordSnapshot. What hasn't a
// record when release is called is removed by the next collection. Without
// keys reserved for all it makes a transaction for that.
func (s Snapshots) Create(ctx context.Context, news ...snapshot.New) (created []Created, release func(), err error) {
	for _, n := range news {
		if n.Key == "" {
			return nil, nil, fmt.Errorf("snapshot key is required: %w", errdefs.ErrInvalidArgument)
		}
		if err := checkLabels(n.Labels); err != nil {
			return nil, nil, fmt.Errorf("snapshot %q: %w", n.Key, err)
		}
	}
	seqs, err := s.reserve(ctx, len(news))
	if err != nil {
		return nil, nil, err
	}
	theirs := make([]snapshot.New, len(news))
	for i, n := range news {
		parent, err := s.backendParent(n.Parent)
		if err != nil {
			return nil, nil, fmt.Errorf("snapshot %q: %w", n.Key, err)
		}
		c := Created{
			Driver: s.name, Key: n.Key, Parent: n.Parent, Backend: backendKey(s.sp.ns, seqs[i], n.Key),
			Labels: n.Labels, Kind: n.Kind, backendParent: parent,
		}
		created = append(created, c)
		theirs[i] = snapshot.New{Key: c.Backend, Parent: parent, Kind: n.Kind, Labels: inherited(n.Labels)}
	}
	release = s.pinCreated(created)
	if err := s.driver.Create(ctx, theirs...); err != nil {
		release()
		return nil, nil, fmt.Errorf("create snapshots: %w", err)
	}
	if err := fault.Point("meta.snapshot.created"); err != nil {
		release()
		return nil, nil, err
	}
	return created, release, nil
}

// reserve takes n sequence numbers, reserving more when they have run out.
func (s Snapshots) reserve(ctx context.Context, n int) ([]uint64, error) {
	p := pool{s.sp.ns, s.name}
	for n > 0 {
		if seqs := s.sp.db.sequences.take(p, n); seqs != nil {
			return seqs, nil
		}
		if err := s.sp.Update(ctx, func(tx *Tx) error { return tx.ReserveKeys(s.name, n) }); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// pinCreated pins backend keys that no record names yet. Its release sees to
// it that those which got no record are removed.
func (s Snapshots) pinCreated(created []Created) (release func()) {
	names := make([]string, len(created))
	for i, c := range created {
		names[i] = snapshotPin(s.name, c.Backend)
	}
	unpin := s.sp.db.pins.pin(names...)
	return func() {
		unpin()
		abandoned := false
		s.sp.db.bolt.View(func(btx *bolt.Tx) error {
			ns := root(btx, nil).sub(s.sp.ns)
			for _, c := range created {
				abandoned = abandoned || s.bucket(ns, c.Key).text(keyName) != c.Backend
			}
			return nil
		})
		if abandoned {
			s.sp.db.leftBehind(keySnapshots + "/" + s.name)
		}
	}
}

// Commit makes the active key a committed snapshot of that name. A parent may
// be given to one that has none, if the driver can rebase. What others have
// written to it must be synced (inv 1). ErrAlreadyExists when name exists: it is leased. ErrNotFound,
// ErrInvalidArgument.
func (s Snapshots) Commit(ctx context.Context, name, key, parent string, labels map[string]string) error {
	for {
		if err := s.leaseExisting(ctx, snapshot.New{Key: name}); err != nil {
			return err
		}
		created, release, err := s.CommitChain(ctx, snapshot.Commit{Key: key, Name: name, Parent: parent, Labels: labels})
		if errdefs.IsAlreadyExists(err) {
			continue // since that look; it may even be gone again
		}
		if err != nil {
			return err
		}
		defer release()
		// The active snapshot is no more: a caller that goes away now must not leave its record behind.
		return s.sp.Update(context.WithoutCancel(ctx), func(tx *Tx) error { return tx.recordOrLease(created[0]) })
	}
}

// CommitChain does the driver's part for a chain of active snapshots, bottom
// first, and pins the results until release is called; the records are the
// caller's. Parent is given only to those that have none, and may be the Name of an
// earlier step. Errors as for Commit; when a name exists nothing is done.
func (s Snapshots) CommitChain(ctx context.Context, steps ...snapshot.Commit) (created []Created, release func(), err error) {
	seqs, err := s.reserve(ctx, len(steps))
	if err != nil {
		return nil, nil, err
	}
	theirs := make([]snapshot.Commit, len(steps))
	err = s.sp.view(func(ns bucket) error {
		backends := make(map[string]string, len(steps)) // of earlier steps' names
		for i, step := range steps {
			c, their, err := s.commitStep(ns, step, seqs[i], backends)
			if err != nil {
				return err
			}
			created, theirs[i] = append(created, c), their
			backends[c.Key] = c.Backend
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	release = s.pinCreated(created)
	if err := s.driver.CommitChain(ctx, theirs...); err != nil {
		release()
		if errdefs.IsAlreadyExists(err) { // a new key, which no name of the caller's is
			return nil, nil, fmt.Errorf("snapshotter %s: %v: %w", s.name, err, errdefs.ErrUnknown)
		}
		return nil, nil, fmt.Errorf("commit snapshots: %w", err)
	}
	if err := fault.Point("meta.snapshot.committed"); err != nil {
		release()
		return nil, nil, err
	}
	return created, release, nil
}

// commitStep translates one step of a chain into the driver's keys.
func (s Snapshots) commitStep(ns bucket, step snapshot.Commit, seq uint64, earlier map[string]string) (c Created, their snapshot.Commit, err error) {
	if step.Name == "" {
		return c, their, fmt.Errorf("snapshot name is required: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkLabels(step.Labels); err != nil {
		return c, their, fmt.Errorf("snapshot %q: %w", step.Name, err)
	}
	if s.bucket(ns, step.Name).exists() || earlier[step.Name] != "" {
		return c, their, fmt.Errorf("snapshot %q: %w", step.Name, errdefs.ErrAlreadyExists)
	}
	active, err := readSnapshot(step.Key, s.bucket(ns, step.Key))
	if err != nil {
		return c, their, err
	}
	c = Created{
		Driver: s.name, Key: step.Name, Parent: active.parent, Backend: backendKey(s.sp.ns, seq, step.Name),
		Replaces: step.Key, replaced: active.backend, Labels: step.Labels, Kind: snapshot.KindCommitted,
	}
	their = step
	their.Key, their.Name, their.Parent, their.Labels = active.backend, c.Backend, "", inherited(step.Labels)
	rebase := c.Parent == "" && step.Parent != ""
	if rebase {
		c.Parent = step.Parent
	}
	if c.Parent != "" && earlier[c.Parent] != "" {
		c.backendParent = earlier[c.Parent]
	} else if c.Parent != "" {
		parent, err := readSnapshot(c.Parent, s.bucket(ns, c.Parent))
		if err != nil {
			return c, their, fmt.Errorf("parent of snapshot %q: %w", step.Name, err)
		}
		c.backendParent = parent.backend
	}
	if rebase {
		their.Parent = c.backendParent
	}
	return c, their, nil
}

// RecordSnapshot makes what Create or CommitChain made a record, under the
// lease, in place of the active key that it was committed from. Parents come before children. When the key has got
// a record in the meantime, ErrAlreadyExists: the transaction may go on, the
// existing one is leased, and the active key's record gone. ErrNotFound and ErrAborted when the parent went or
// was replaced in the meantime.
func (tx *Tx) RecordSnapshot(c Created) error {
	all, err := tx.v1.create(tx.sp.ns, keySnapshots, c.Driver)
	if err != nil {
		return err
	}
	if err := tx.retire(all, c); err != nil {
		return err
	}
	if _, err := tx.hold(keySnapshots, c.Driver, c.Key); err != nil {
		return err
	}
	if all.sub(c.Key).exists() {
		tx.deletes(keySnapshots + "/" + c.Driver)
		return fmt.Errorf("snapshot %q: %w", c.Key, errdefs.ErrAlreadyExists)
	}
	if c.Parent != "" {
		parent := all.sub(c.Parent)
		switch {
		case !parent.exists():
			return fmt.Errorf("parent %q of snapshot %q: %w", c.Parent, c.Key, errdefs.ErrNotFound)
		case parent.text(keyName) != c.backendParent:
			return fmt.Errorf("parent %q of snapshot %q has been replaced: try again: %w", c.Parent, c.Key, errdefs.ErrAborted)
		}
		children, err := parent.create(keyChildren)
		if err != nil {
			return err
		}
		if err := children.put(c.Key, nil); err != nil {
			return err
		}
	}
	return tx.writeSnapshot(all, c)
}

func (tx *Tx) writeSnapshot(all bucket, c Created) error {
	b, err := all.create(c.Key)
	if err != nil {
		return err
	}
	if err := b.putText(keyName, c.Backend); err != nil {
		return err
	}
	if c.Parent != "" {
		if err := b.putText(keyParent, c.Parent); err != nil {
			return err
		}
	}
	if err := b.putTimes(tx.now, tx.now); err != nil {
		return err
	}
	return b.putTexts(keyLabels, c.Labels)
}

// retire forgets the active snapshot that c was committed from.
func (tx *Tx) retire(all bucket, c Created) error {
	active := all.sub(c.Replaces)
	if !active.exists() || active.text(keyName) != c.replaced {
		return nil // removed in the meantime
	}
	r, err := readSnapshot(c.Replaces, active)
	if err != nil {
		return err
	}
	if err := tx.release(keySnapshots, c.Driver, c.Replaces); err != nil {
		return err
	}
	return removeSnapshot(all, r)
}

// recordOrLease is RecordSnapshot for callers that want ErrAlreadyExists after
// the commit: the existing snapshot is leased even so.
func (tx *Tx) recordOrLease(c Created) error {
	err := tx.RecordSnapshot(c)
	if errors.Is(err, errdefs.ErrAlreadyExists) {
		tx.ReturnAfterCommit(err)
		return nil
	}
	return err
}

// LeaseSnapshot puts a snapshot under the lease. ErrNotFound when the
// namespace doesn't have it, or when the lease doesn't exist.
func (tx *Tx) LeaseSnapshot(driver, key string) error {
	if !tx.ns().sub(keySnapshots, driver, key).exists() {
		return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrNotFound)
	}
	_, err := tx.hold(keySnapshots, driver, key)
	return err
}
