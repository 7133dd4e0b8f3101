package meta

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Namespace is a namespace's record.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// shareable is the label of a namespace whose blobs others may have without
// sending them, under the isolated policy too.
const shareable = "containerd.io/namespace.shareable"

// Namespaces lists the namespaces in the order of their names.
func (db *DB) Namespaces(ctx context.Context) (all []Namespace, err error) {
	err = db.bolt.View(func(btx *bolt.Tx) error {
		for name, b := range root(btx, nil).subs() {
			all = append(all, Namespace{Name: name, Labels: b.texts(keyLabels)})
		}
		return nil
	})
	return all, err
}

// Namespace reads one namespace. One that doesn't exist has no labels, and is
// no error: it comes to be with its first record.
func (db *DB) Namespace(ctx context.Context, name string) (Namespace, error) {
	ns := Namespace{Name: name}
	err := db.bolt.View(func(btx *bolt.Tx) error {
		ns.Labels = root(btx, nil).sub(name).texts(keyLabels)
		return nil
	})
	return ns, err
}

// CreateNamespace records a namespace. ErrAlreadyExists, ErrInvalidArgument.
func (db *DB) CreateNamespace(ctx context.Context, ns Namespace) error {
	if err := checkLabels(ns.Labels); err != nil {
		return err
	}
	return db.Space(ns.Name).Update(ctx, func(tx *Tx) error {
		if tx.ns().exists() {
			return fmt.Errorf("namespace %q: %w", ns.Name, errdefs.ErrAlreadyExists)
		}
		b, err := tx.v1.create(ns.Name)
		if err != nil {
			return err
		}
		return b.putTexts(keyLabels, ns.Labels)
	})
}

// UpdateNamespace sets labels: those that fields name as `labels.<key>` ("" deletes),
// or all of them when there are no fields. A field `labels` is
// ErrInvalidArgument, as in containerd. A namespace that doesn't exist is made.
func (db *DB) UpdateNamespace(ctx context.Context, ns Namespace, fields ...string) (updated Namespace, err error) {
	for _, path := range fields {
		if !strings.HasPrefix(path, "labels.") {
			return updated, fmt.Errorf("field %q of a namespace can't be updated: %w", path, errdefs.ErrInvalidArgument)
		}
	}
	err = db.Space(ns.Name).Update(ctx, func(tx *Tx) error {
		labels, err := updateLabels(tx.ns().texts(keyLabels), ns.Labels, fields)
		if err != nil {
			return err
		}
		b, err := tx.v1.create(ns.Name)
		if err != nil {
			return err
		}
		updated = Namespace{Name: ns.Name, Labels: labels}
		return b.putTexts(keyLabels, labels)
	})
	return updated, err
}

// DeleteNamespace forgets a namespace and its leases, ingests and sandboxes.
// ErrFailedPrecondition while it has images, blobs, containers or snapshots;
// ErrNotFound.
func (db *DB) DeleteNamespace(ctx context.Context, name string) error {
	return db.Space(name).Update(ctx, func(tx *Tx) error {
		ns := tx.ns()
		if !ns.exists() {
			return fmt.Errorf("namespace %q: %w", name, errdefs.ErrNotFound)
		}
		if left := remains(ns); len(left) > 0 {
			return fmt.Errorf("namespace %q must be empty, but still has %s: %w", name, strings.Join(left, ", "), errdefs.ErrFailedPrecondition)
		}
		tx.deletes(keyContent)
		tx.onCommit(func() { db.sequences.forget(name) })
		return tx.v1.drop(name)
	})
}

// remains names the kinds of record that keep a namespace from being deleted.
func remains(ns bucket) (kinds []string) {
	for _, kind := range []struct {
		word string
		b    bucket
	}{
		{"images", ns.sub(keyImages)},
		{"blobs", ns.sub(keyContent, keyBlob)},
		{"containers", ns.sub(keyContainers)},
	} {
		if !kind.b.empty() {
			kinds = append(kinds, kind.word)
		}
	}
	for driver, b := range ns.sub(keySnapshots).subs() {
		if !b.empty() {
			kinds = append(kinds, fmt.Sprintf("snapshots on %q", driver))
		}
	}
	return kinds
}
