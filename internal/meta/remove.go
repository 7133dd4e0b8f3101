package meta

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// driverTree is what a driver holds: the parent of each key.
type driverTree map[string]string

func walkDriver(ctx context.Context, driver snapshot.Driver) (driverTree, error) {
	tree := make(driverTree)
	for in, err := range driver.Walk(ctx) {
		if err != nil {
			return nil, fmt.Errorf("list snapshots: %w", err)
		}
		tree[in.Key] = in.Parent
	}
	return tree, nil
}

// leavesFirst lists the keys so that children come before their parents. A key
// whose parent is missing is as good as a root.
func (t driverTree) leavesFirst() []string {
	children := make(map[string][]string)
	var order []string
	for _, key := range slices.Sorted(maps.Keys(t)) {
		if _, there := t[t[key]]; there {
			children[t[key]] = append(children[t[key]], key)
		} else {
			order = append(order, key)
		}
	}
	for i := 0; i < len(order); i++ { // grows: parents before children
		order = append(order, children[order[i]]...)
	}
	slices.Reverse(order)
	return order
}

// names is which of a driver's keys records name, in any namespace, as of one
// transaction.
type names struct {
	driver string
	keys   map[string]bool
	txid   int
}

func (db *DB) namedSnapshots(driver string) (*names, error) {
	n := &names{driver: driver, txid: -1}
	return n, n.refresh(db)
}

// refresh reads the names again if anything was committed since.
func (n *names) refresh(db *DB) error {
	return db.bolt.View(func(btx *bolt.Tx) error {
		if n.txid == btx.ID() {
			return nil
		}
		n.keys, n.txid = make(map[string]bool), btx.ID()
		for _, ns := range root(btx, nil).subs() {
			for _, b := range ns.sub(keySnapshots, n.driver).subs() {
				n.keys[b.text(keyName)] = true
			}
		}
		return nil
	})
}

// removeSnapshot removes one key of a driver unless it is named, pinned or has
// children.
func (db *DB) removeSnapshot(ctx context.Context, name string, driver snapshot.Driver, key string, named *names) (gone bool, err error) {
	if named.keys[key] {
		return false, nil
	}
	unlock, err := db.pins.locks.Lock(ctx, snapshotPin(name, key))
	if err != nil {
		return false, err
	}
	defer unlock()
	if db.pins.pinned(snapshotPin(name, key)) {
		return false, nil
	}
	if err := named.refresh(db); err != nil || named.keys[key] {
		return false, err
	}
	if err := fault.Point("meta.remove.snapshot"); err != nil {
		return false, err
	}
	err = driver.Remove(ctx, key)
	switch {
	case err == nil, errdefs.IsNotFound(err):
		return true, nil
	case errdefs.IsFailedPrecondition(err):
		return false, nil // it got a child, or has one that is pinned or named
	}
	return false, fmt.Errorf("remove snapshot %s: %w", key, err)
}

// removeContent removes blobs and ingests that no record names. complete is
// false when some stayed that should go.
func (db *DB) removeContent(ctx context.Context, report func(string)) (bytes int64, complete bool, err error) {
	var errs firstError // one thing that can't be listed or removed doesn't keep the others
	var blobs []digest.Digest
	sizes := make(map[digest.Digest]int64)
	for info, err := range db.blobs.Blobs() {
		if !errs.note(err) {
			blobs = append(blobs, info.Digest)
			sizes[info.Digest] = info.Size
		}
	}
	var refs []string
	for ref, err := range db.blobs.Refs() {
		if !errs.note(err) {
			refs = append(refs, ref)
		}
	}
	blobs, refs, err = db.unnamedContent(blobs, refs)
	errs.note(err)
	complete = true
	for _, dgst := range blobs {
		gone, err := db.removeBlob(ctx, dgst)
		errs.note(err)
		if gone {
			bytes += sizes[dgst]
			report(fmt.Sprintf("blob %s: no record names it: removed", dgst))
		}
		complete = complete && gone
	}
	for _, ref := range refs {
		gone, err := db.removeIngest(ctx, ref, false)
		errs.note(err)
		if gone {
			report(fmt.Sprintf("ingest %s: no record names it: removed", ref))
		}
		complete = complete && gone
	}
	return bytes, complete, errs.err
}

// firstError keeps the first error of a loop that goes on.
type firstError struct{ err error }

// note reports whether err is one.
func (f *firstError) note(err error) bool {
	if f.err == nil {
		f.err = err
	}
	return err != nil
}

// unnamedContent leaves of blobs and ingests those that no record names.
func (db *DB) unnamedContent(blobs []digest.Digest, refs []string) (b []digest.Digest, r []string, err error) {
	err = db.bolt.View(func(btx *bolt.Tx) error {
		named := namedContent(root(btx, nil))
		for _, dgst := range blobs {
			if !named[string(dgst)] {
				b = append(b, dgst)
			}
		}
		for _, ref := range refs {
			if !named[ref] {
				r = append(r, ref)
			}
		}
		return nil
	})
	return b, r, err
}

// namedContent is the set of digests and backend refs that records of any
// namespace name. No string is both: a digest has a colon before any slash.
func namedContent(v1 bucket) map[string]bool {
	named := make(map[string]bool)
	for _, ns := range v1.subs() {
		for dgst := range ns.sub(keyContent, keyBlob).subs() {
			named[dgst] = true
		}
		for _, b := range ns.sub(keyContent, keyIngests).subs() {
			named[b.text(keyRef)] = true
			named[b.text(keyExpected)] = true // another namespace's blob, perhaps deleted there
		}
	}
	return named
}

// removeBlob removes a blob's file unless it is named or pinned.
func (db *DB) removeBlob(ctx context.Context, dgst digest.Digest) (gone bool, err error) {
	unlock, err := db.pins.locks.Lock(ctx, blobPin(dgst))
	if err != nil {
		return false, err
	}
	defer unlock()
	if db.pins.pinned(blobPin(dgst)) {
		return false, nil
	}
	named := false
	err = db.bolt.View(func(btx *bolt.Tx) error {
		named = blobNamed(root(btx, nil), dgst)
		return nil
	})
	if err != nil || named {
		return false, err
	}
	if err := fault.Point("meta.remove.blob"); err != nil {
		return false, err
	}
	if err := db.blobs.Remove(dgst); err != nil && !errdefs.IsNotFound(err) {
		return false, fmt.Errorf("remove blob %s: %w", dgst, err)
	}
	return true, nil
}

// blobNamed reports whether a record of any namespace names a blob.
func blobNamed(v1 bucket, dgst digest.Digest) bool {
	for _, ns := range v1.subs() {
		if blobBucket(ns, dgst).exists() {
			return true
		}
		for _, b := range ns.sub(keyContent, keyIngests).subs() {
			if b.text(keyExpected) == string(dgst) {
				return true
			}
		}
	}
	return false
}
