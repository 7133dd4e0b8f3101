package meta

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// A collection is plain: it marks and sweeps in one write transaction, so
// writers wait. Records go first, in that transaction, and the bytes after it
// (inv 2), by which time writers go on (inv 5).
//
// Bytes are looked through only where something may have been left. dirt
// remembers where: a store is dirty from the moment that a record in it is
// deleted, or that bytes are abandoned, until a pass over it left nothing behind.

// Collected says what one collection did.
type Collected struct {
	Elapsed time.Duration // everything, the removal of bytes too
	Pause   time.Duration // while writers waited

	Blobs, Snapshots, Images, Leases, Ingests int // records removed

	Bytes int64 // of blob files removed
	Left  int   // stores in which something could not be removed yet; the next collection tries again
}

// Collect runs one collection and waits until the bytes are gone. Bytes that
// can't be removed are no error: they are logged, counted in Left and tried again.
func (db *DB) Collect(ctx context.Context) (c Collected, err error) {
	unlock, err := db.collecting.Lock(ctx, struct{}{})
	if err != nil {
		return c, err
	}
	defer unlock()
	start := time.Now()
	if err := db.sweep(ctx, &c); err != nil {
		return c, fmt.Errorf("collect: %w", err)
	}
	if err := fault.Point("meta.collect.swept"); err != nil {
		return c, err
	}
	removed := db.removeBytes(ctx, func(string) {})
	c.Bytes, c.Left = removed.bytes, removed.left
	c.Elapsed = time.Since(start)
	return c, context.Cause(ctx)
}

// sweep deletes the records that nothing needs, in one transaction.
func (db *DB) sweep(ctx context.Context, c *Collected) error {
	select {
	case db.writing <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-db.writing }()
	start := time.Now()
	defer func() { c.Pause = time.Since(start) }()
	btx, err := db.bolt.Begin(true)
	if err != nil {
		return err
	}
	defer btx.Rollback() // does nothing after a commit
	tx := db.begin(btx, Space{db: db})
	s := sweeper{tx: tx, live: mark(tx.v1, tx.now), c: c}
	for name, ns := range tx.v1.subs() {
		s.find(name, ns)
	}
	if err := s.delete(); err != nil || !tx.wrote {
		return err
	}
	if err := db.commitBolt(btx, 1); err != nil {
		return err
	}
	for _, f := range tx.committed {
		f()
	}
	return nil
}

// sweeper collects what to delete, since buckets must not change under a
// cursor, and then deletes it: referrers before what they refer to.
type sweeper struct {
	tx   *Tx
	live map[node]struct{}
	c    *Collected
	dead []node
}

func (s *sweeper) find(name string, ns bucket) {
	check := func(n node) {
		if _, live := s.live[n]; !live {
			s.dead = append(s.dead, n)
		}
	}
	for id := range ns.sub(keyLeases).subs() {
		check(node{kind: kindLease, ns: name, id: id})
	}
	for id := range ns.sub(keyImages).subs() {
		check(node{kind: kindImage, ns: name, id: id})
	}
	for driver, keys := range ns.sub(keySnapshots).subs() {
		for key := range keys.subs() {
			check(snapshotNode(name, driver, key))
		}
	}
	for ref := range ns.sub(keyContent, keyIngests).subs() {
		check(node{kind: kindIngest, ns: name, id: ref})
	}
	for dgst := range ns.sub(keyContent, keyBlob).subs() {
		check(node{kind: kindBlob, ns: name, id: dgst})
	}
}

func (s *sweeper) delete() error {
	for _, n := range s.dead {
		ns := s.tx.v1.sub(n.ns)
		var err error
		switch n.kind {
		case kindLease:
			s.c.Leases++
			err = ns.sub(keyLeases).drop(n.id)
		case kindImage:
			s.c.Images++
			err = ns.sub(keyImages).drop(n.id)
		case kindSnapshot:
			s.c.Snapshots++
			driver, key, _ := strings.Cut(n.id, "/")
			s.tx.deletes(keySnapshots + "/" + driver)
			all := ns.sub(keySnapshots, driver)
			err = removeSnapshot(all, record{key: key, parent: all.sub(key).text(keyParent)})
		case kindIngest:
			s.c.Ingests++
			s.tx.deletes(keyContent)
			err = ns.sub(keyContent, keyIngests).drop(n.id)
		case kindBlob:
			s.c.Blobs++
			s.tx.deletes(keyContent)
			err = ns.sub(keyContent, keyBlob).drop(n.id)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// dirt is the set of stores that may hold bytes which no record names:
// content, or snapshots/<driver>. The zero value is clean.
type dirt struct {
	mu     sync.Mutex
	stores map[string]bool
}

func (d *dirt) add(store string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stores == nil {
		d.stores = make(map[string]bool)
	}
	d.stores[store] = true
}

// wipe cleans a store and reports whether it was dirty. It comes before the
// pass: what is left from then on makes the store dirty again.
func (d *dirt) wipe(store string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.stores[store]
	delete(d.stores, store)
	return was
}

// deletes notes that the transaction deletes a record of a store.
func (tx *Tx) deletes(store string) {
	tx.deleted = true
	tx.onCommit(func() { tx.sp.db.dirt.add(store) })
}

// leftBehind notes that bytes in a store got no record.
func (db *DB) leftBehind(store string) {
	db.dirt.add(store)
	if db.opts.Changed != nil {
		db.opts.Changed(true)
	}
}

// removal is what a pass over the stores did.
type removal struct {
	bytes int64
	left  int // stores in which something stayed
}

// removeBytes removes, from every dirty store, what no record and no pin
// names, telling report about each thing.
func (db *DB) removeBytes(ctx context.Context, report func(string)) (done removal) {
	pass := func(store string, remove func() (complete bool, err error)) {
		if !db.dirt.wipe(store) {
			return
		}
		complete, err := remove()
		if err != nil {
			db.log.Warn("remove what no record names; the next collection tries again", "store", store, "error", err)
		}
		if err != nil || !complete {
			db.dirt.add(store)
			done.left++
		}
	}
	// Content comes first: on a full disk its files make the room that a driver's index needs to forget a key.
	pass(keyContent, func() (complete bool, err error) {
		done.bytes, complete, err = db.removeContent(ctx, report)
		return complete, err
	})
	for name, driver := range db.drivers {
		pass(keySnapshots+"/"+name, func() (bool, error) { return db.removeSnapshots(ctx, name, driver, report) })
	}
	return done
}

// removeSnapshots removes a driver's snapshots that no record names, children
// before parents, and the directories that they leave. complete is false when some stayed that should go.
func (db *DB) removeSnapshots(ctx context.Context, name string, driver snapshot.Driver, report func(string)) (complete bool, err error) {
	tree, err := walkDriver(ctx, driver)
	if err != nil {
		return false, err
	}
	named, err := db.namedSnapshots(name)
	if err != nil {
		return false, err
	}
	complete = true
	var errs firstError
	needed := make(map[string]bool) // named, or below what is: it goes when that goes
	for _, key := range tree.leavesFirst() {
		gone := false
		if !needed[key] {
			gone, err = db.removeSnapshot(ctx, name, driver, key, named)
			errs.note(err)
		}
		switch {
		case gone:
			report(fmt.Sprintf("snapshot %s of %s: no record names it: removed", key, name))
		case needed[key] || named.keys[key]:
			needed[tree[key]] = true
		default:
			complete = false
		}
	}
	errs.note(driver.Cleanup(ctx))
	return complete, errs.err
}
