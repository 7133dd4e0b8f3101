package meta

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/filter"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Snapshots is one driver's snapshots in one Space. Keys, names and parents
// are the namespace's; the driver knows them by backend keys.
type Snapshots struct {
	sp     Space
	name   string
	driver snapshot.Driver
}

// Labels that drivers see; all others stay in meta.db.
const (
	labelSnapshotRef     = "containerd.io/snapshot.ref" // the name that the snapshot is going to have
	labelSnapshotInherit = "containerd.io/snapshot/"
)

// Snapshots returns the snapshots of a driver. ErrInvalidArgument when there
// is no such driver.
func (sp Space) Snapshots(driver string) (Snapshots, error) {
	d := sp.db.drivers[driver]
	if d == nil {
		return Snapshots{}, fmt.Errorf("snapshotter %q is not there: %w", driver, errdefs.ErrInvalidArgument)
	}
	return Snapshots{sp: sp, name: driver, driver: d}, nil
}

// Driver is the driver's name.
func (s Snapshots) Driver() string { return s.name }

// Traits says what the driver can do.
func (s Snapshots) Traits() snapshot.Traits { return s.driver.Traits() }

// record is what meta.db holds of a snapshot.
type record struct {
	key, backend, parent string
	labels               map[string]string
	created, updated     time.Time
}

func (s Snapshots) bucket(ns bucket, key string) bucket { return ns.sub(keySnapshots, s.name, key) }

func readSnapshot(key string, b bucket) (r record, err error) {
	if !b.exists() {
		return r, fmt.Errorf("snapshot %q: %w", key, errdefs.ErrNotFound)
	}
	r = record{key: key, backend: b.text(keyName), parent: b.text(keyParent), labels: b.texts(keyLabels)}
	if r.created, r.updated, err = b.times(); err != nil {
		return r, fmt.Errorf("snapshot %q: %w", key, err)
	}
	return r, nil
}

func (s Snapshots) read(key string) (r record, err error) {
	err = s.sp.view(func(ns bucket) error {
		r, err = readSnapshot(key, s.bucket(ns, key))
		return err
	})
	return r, err
}

// info lays the record over what the driver says.
func (r record) info(in snapshot.Info) snapshot.Info {
	in.Key, in.Parent, in.Created, in.Updated = r.key, r.parent, r.created, r.updated
	labels := maps.Clone(in.Labels)
	if labels == nil {
		labels = make(map[string]string, len(r.labels))
	}
	maps.Copy(labels, r.labels)
	in.Labels = labels
	return in
}

// Stat describes a snapshot. ErrNotFound.
func (s Snapshots) Stat(ctx context.Context, key string) (snapshot.Info, error) {
	r, err := s.read(key)
	if err != nil {
		return snapshot.Info{}, err
	}
	in, err := s.driver.Stat(ctx, r.backend)
	if err != nil {
		return snapshot.Info{}, fmt.Errorf("snapshot %q: %w", key, err)
	}
	return r.info(in), nil
}

// Walk yields the snapshots that match any of the filters, in the order of
// their keys. It reads batches and holds no transaction while it yields. What
// the driver doesn't have is left out.
func (s Snapshots) Walk(ctx context.Context, filters ...string) iter.Seq2[snapshot.Info, error] {
	return func(yield func(snapshot.Info, error) bool) {
		match, err := filter.Parse(filters...)
		if err != nil {
			yield(snapshot.Info{}, err)
			return
		}
		read := func(ns bucket, after string) (batch []record, err error) {
			for key, b := range ns.sub(keySnapshots, s.name).subsAfter(after) {
				r, err := readSnapshot(key, b)
				if err != nil {
					return nil, err
				}
				if batch = append(batch, r); len(batch) == batchSize {
					break
				}
			}
			return batch, nil
		}
		for r, err := range inBatches(ctx, s.sp, read, func(r record) string { return r.key }) {
			var in snapshot.Info
			if err == nil {
				in, err = s.driver.Stat(ctx, r.backend)
				if errdefs.IsNotFound(err) {
					continue
				}
				in = r.info(in)
			}
			if (err != nil || match.Match(snapshotFields(in))) && !yield(in, err) {
				return
			}
		}
	}
}

// snapshotFields is what filters see of a snapshot.
func snapshotFields(in snapshot.Info) fields {
	kinds := map[snapshot.Kind]string{
		snapshot.KindView: "view", snapshot.KindActive: "active", snapshot.KindCommitted: "committed",
	}
	return fields{
		"kind":   textField(kinds[in.Kind]),
		"name":   textField(in.Key),
		"parent": func([]string) (string, bool) { return in.Parent, true }, // `parent==""` finds the roots
		"labels": mapField(in.Labels),
	}
}

// Update sets the labels that fields name (`labels`, `labels.<key>`), or all
// when there are no fields; the driver gets its share after the record.
// ErrNotFound, ErrInvalidArgument.
func (s Snapshots) Update(ctx context.Context, key string, labels map[string]string, fields ...string) (snapshot.Info, error) {
	var r record
	err := s.sp.Update(ctx, func(tx *Tx) (err error) {
		b := s.bucket(tx.ns(), key)
		if r, err = readSnapshot(key, b); err != nil {
			return err
		}
		if r.labels, err = updateLabels(r.labels, labels, fields); err != nil {
			return fmt.Errorf("snapshot %q: %w", key, err)
		}
		r.updated = tx.now
		tx.deleted = true // a reference may be gone
		if err := b.putTimes(r.created, r.updated); err != nil {
			return err
		}
		return b.putTexts(keyLabels, r.labels)
	})
	if err != nil {
		return snapshot.Info{}, err
	}
	theirs := inheritedFields(fields)
	var in snapshot.Info
	if len(fields) > 0 && len(theirs) == 0 {
		in, err = s.driver.Stat(ctx, r.backend)
	} else {
		in, err = s.driver.Update(ctx, r.backend, inherited(r.labels), theirs...)
	}
	if err != nil {
		return snapshot.Info{}, fmt.Errorf("snapshot %q: %w", key, err)
	}
	return r.info(in), nil
}

// inherited is what the driver sees of labels.
func inherited(labels map[string]string) map[string]string {
	theirs := make(map[string]string)
	for k, v := range labels {
		if isInherited(k) {
			theirs[k] = v
		}
	}
	return theirs
}

func isInherited(label string) bool {
	return label == labelSnapshotRef || strings.HasPrefix(label, labelSnapshotInherit)
}

// inheritedFields is what of a field mask concerns the driver.
func inheritedFields(fields []string) (theirs []string) {
	for _, path := range fields {
		if label, one := strings.CutPrefix(path, "labels."); !one || isInherited(label) {
			theirs = append(theirs, path)
		}
	}
	return theirs
}

// Usage counts what a snapshot adds to its parent. ErrNotFound.
func (s Snapshots) Usage(ctx context.Context, key string) (snapshot.Usage, error) {
	r, err := s.read(key)
	if err != nil {
		return snapshot.Usage{}, err
	}
	return s.driver.Usage(ctx, r.backend)
}

// Mounts says how to mount an active snapshot or a view. ErrNotFound.
func (s Snapshots) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	r, err := s.read(key)
	if err != nil {
		return nil, err
	}
	return s.driver.Mounts(ctx, r.backend)
}

// Dir is the directory that a layer is unpacked into, in the driver's
// Traits().Form, and the directories below it, nearest first. ErrNotFound.
func (s Snapshots) Dir(ctx context.Context, key string) (dir string, parents []string, err error) {
	r, err := s.read(key)
	if err != nil {
		return "", nil, err
	}
	if dir, err = s.driver.Dir(ctx, r.backend); err != nil {
		return "", nil, err
	}
	parents, err = s.driver.Parents(ctx, r.backend)
	return dir, parents, err
}

// Remove forgets a snapshot; the driver's part goes with the next collection.
// ErrNotFound; ErrFailedPrecondition while it has children.
func (s Snapshots) Remove(ctx context.Context, key string) error {
	return s.sp.Update(ctx, func(tx *Tx) error {
		all := tx.ns().sub(keySnapshots, s.name)
		r, err := readSnapshot(key, all.sub(key))
		if err != nil {
			return err
		}
		if child := firstChild(all, key); child != "" {
			return fmt.Errorf("snapshot %q has a child, %q: %w", key, child, errdefs.ErrFailedPrecondition)
		}
		if err := tx.release(keySnapshots, s.name, key); err != nil {
			return err
		}
		tx.deletes(keySnapshots + "/" + s.name)
		return removeSnapshot(all, r)
	})
}

// firstChild names a child of key, or "". A link whose child is gone doesn't
// count: containerd's collector leaves such links.
func firstChild(all bucket, key string) string {
	for child := range all.sub(key, keyChildren).values() {
		if all.sub(child).text(keyParent) == key {
			return child
		}
	}
	return ""
}

// removeSnapshot deletes a record and its parent's link to it.
func removeSnapshot(all bucket, r record) error {
	if err := all.sub(r.parent, keyChildren).delete(r.key); err != nil {
		return err
	}
	return all.drop(r.key)
}

// Cleanup removes directories that the driver has no snapshot for.
func (s Snapshots) Cleanup(ctx context.Context) error {
	if err := s.sp.check(); err != nil {
		return err
	}
	return s.driver.Cleanup(ctx)
}
