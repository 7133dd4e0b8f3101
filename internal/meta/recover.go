package meta

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// recover makes records and bytes agree after a crash, whatever it cut in two:
//
//   - A blob's record whose file is missing or has another size promises what
//     isn't there (inv 1): the record is dropped, in every namespace, and the file with it.
//   - An image whose target was dropped so is dropped too, so that each
//     listed image can be read. Other blobs may be missing on purpose (layers
//     can be discarded once unpacked), and an image may have been recorded without content, so what
//     refers to a blob in any other way stays.
//   - A snapshot's record that its driver has no snapshot for is dropped, with all above it.
//     Records of drivers that aren't configured are left alone.
//   - An ingest's record whose bytes are missing stays until it expires:
//     its writer may come yet. But one that counts on a blob which is gone is dropped.
//   - A blob that no record names yet, and that a recorded ingest was to become, is made that ingest
//     again: what was fetched and verified isn't fetched twice.
//   - Bytes that no record names are removed (inv 2).
//
// A file with nothing to drop isn't written. Digests aren't checked here; that is fsck's.
func (db *DB) recover(ctx context.Context) error {
	lost, err := db.findLost(ctx)
	if err != nil {
		return fmt.Errorf("compare records with the stores: %w", err)
	}
	if err := db.dropLost(lost); err != nil {
		return fmt.Errorf("drop records whose bytes are gone: %w", err)
	}
	if err := db.takeBack(); err != nil {
		db.log.Warn("keep blobs that were about to be recorded", "error", err) // they can be fetched again
	}
	db.dirt.add(keyContent)
	for name := range db.drivers {
		db.dirt.add(keySnapshots + "/" + name)
	}
	db.removeBytes(ctx, func(line string) { db.recovered = append(db.recovered, line) })
	return context.Cause(ctx)
}

// checkFresh refuses to begin an empty database over stores that aren't:
// everything in them would be garbage to it.
func (db *DB) checkFresh(ctx context.Context) error {
	refuse := func(what, where string) error {
		return fmt.Errorf("%s has no records, but %s is in %s: put the lost meta.db back, or move the old %s away to begin an empty store: %w",
			db.path, what, where, where, errdefs.ErrFailedPrecondition)
	}
	for info, err := range db.blobs.Blobs() {
		if err != nil {
			return fmt.Errorf("list blobs: %w", err)
		}
		return refuse("blob "+string(info.Digest), "the content store")
	}
	for name, driver := range db.drivers {
		for in, err := range driver.Walk(ctx) {
			if err != nil {
				return fmt.Errorf("list snapshots of %s: %w", name, err)
			}
			return refuse("snapshot "+in.Key, "the "+name+" snapshotter")
		}
	}
	return nil
}

// digestInRef finds what an ingest is to become: clients put the digest into
// the ref, as in `layer-sha256:...` (oci.Key).
var digestInRef = regexp.MustCompile(`\bsha(256|384|512):[0-9a-f]+`)

// takeBack makes ingests again of blobs whose Writer came to Seal and not to RecordBlob.
func (db *DB) takeBack() error {
	var errs firstError
	var blobs []digest.Digest
	for info, err := range db.blobs.Blobs() {
		if !errs.note(err) {
			blobs = append(blobs, info.Digest)
		}
	}
	unnamed, _, err := db.unnamedContent(blobs, nil)
	if err != nil || len(unnamed) == 0 {
		return errors.Join(err, errs.err)
	}
	refs := make(map[digest.Digest][]string) // of the ingests, in the content store
	err = db.bolt.View(func(btx *bolt.Tx) error {
		for _, ns := range root(btx, nil).subs() {
			for ref, b := range ns.sub(keyContent, keyIngests).subs() {
				dgst := digest.Digest(digestInRef.FindString(ref))
				refs[dgst] = append(refs[dgst], b.text(keyRef))
			}
		}
		return nil
	})
	errs.note(err)
	for _, dgst := range unnamed {
		for _, ref := range refs[dgst] {
			err := db.blobs.TakeBack(dgst, ref)
			if errdefs.IsAlreadyExists(err) {
				continue // it was written twice
			}
			if !errs.note(err) {
				db.recovered = append(db.recovered, fmt.Sprintf("blob %s: was about to be recorded: an ingest again", dgst))
			}
			break
		}
	}
	return errs.err
}

// lost is what records promise and the stores don't have.
type lost struct {
	blobs     map[digest.Digest]string // why
	snapshots map[string]bool          // <driver>/<backend key>
}

// findLost compares the records, of one transaction, with what was listed before.
// Nobody else is writing yet.
func (db *DB) findLost(ctx context.Context) (l lost, err error) {
	sizes := make(map[string]int64)
	for info, err := range db.blobs.Blobs() {
		if err != nil {
			db.log.Warn("list blobs", "error", err) // lookAgain decides what is lost
			continue
		}
		sizes[string(info.Digest)] = info.Size
	}
	has := make(map[string]map[string]bool) // by driver
	for name, driver := range db.drivers {
		has[name] = make(map[string]bool)
		for in, err := range driver.Walk(ctx) {
			if err != nil {
				return l, fmt.Errorf("list snapshots of %s: %w", name, err)
			}
			has[name][in.Key] = true
		}
	}
	l = lost{blobs: make(map[digest.Digest]string), snapshots: make(map[string]bool)}
	err = db.bolt.View(func(btx *bolt.Tx) error {
		for _, ns := range root(btx, nil).subs() {
			for dgst, b := range ns.sub(keyContent, keyBlob).subs() {
				size, there := sizes[dgst]
				if want := b.number(keySize); !there {
					l.blobs[digest.Digest(dgst)] = "its file is gone"
				} else if size != want {
					l.blobs[digest.Digest(dgst)] = fmt.Sprintf("its file has %d bytes and not %d", size, want)
				}
			}
			for _, b := range ns.sub(keyContent, keyIngests).subs() {
				if dgst := b.text(keyExpected); dgst != "" {
					if _, there := sizes[dgst]; !there {
						l.blobs[digest.Digest(dgst)] = "its file is gone"
					}
				}
			}
			for driver, keys := range ns.sub(keySnapshots).subs() {
				for _, b := range keys.subs() {
					if backend := b.text(keyName); has[driver] != nil && !has[driver][backend] {
						l.snapshots[driver+"/"+backend] = true
					}
				}
			}
		}
		return nil
	})
	l.lookAgain(db)
	return l, err
}

// lookAgain takes back what merely couldn't be listed.
func (l lost) lookAgain(db *DB) {
	for dgst := range l.blobs {
		if _, err := db.blobs.Info(dgst); err != nil && !errdefs.IsNotFound(err) {
			db.log.Warn("a blob can't be looked at; its record stays", "digest", dgst, "error", err)
			delete(l.blobs, dgst)
		}
	}
}

// dropLost deletes the records that promise what is lost.
func (db *DB) dropLost(l lost) error {
	if len(l.blobs) == 0 && len(l.snapshots) == 0 {
		return nil
	}
	btx, err := db.bolt.Begin(true)
	if err != nil {
		return err
	}
	defer btx.Rollback() // does nothing after a commit
	tx := db.begin(btx, Space{db: db})
	var lines []string
	for name, ns := range tx.v1.subs() {
		dropped, err := l.drop(name, ns)
		if err != nil {
			return err
		}
		lines = append(lines, dropped...)
	}
	if err := db.commitBolt(btx, 1); err != nil {
		return err
	}
	db.recovered = append(db.recovered, lines...)
	return nil
}

// drop deletes what is lost from one namespace and says so.
func (l lost) drop(name string, ns bucket) (lines []string, err error) {
	for img, b := range collectSubs(ns.sub(keyImages)) {
		target := digest.Digest(b.sub(keyTarget).text(keyDigest))
		// The blob's record goes below; an image that never had one stays.
		if why := l.blobs[target]; why != "" && blobBucket(ns, target).exists() {
			lines = append(lines, fmt.Sprintf("image %s in %s: its target %s is lost (%s): dropped; pull it again", img, name, target, why))
			if err := ns.sub(keyImages).drop(img); err != nil {
				return nil, err
			}
		}
	}
	for ref, b := range collectSubs(ns.sub(keyContent, keyIngests)) {
		if why := l.blobs[digest.Digest(b.text(keyExpected))]; why != "" {
			lines = append(lines, fmt.Sprintf("ingest %s in %s: it counts on blob %s (%s): dropped", ref, name, b.text(keyExpected), why))
			if err := ns.sub(keyContent, keyIngests).drop(ref); err != nil {
				return nil, err
			}
		}
	}
	for dgst := range collectSubs(ns.sub(keyContent, keyBlob)) {
		if why := l.blobs[digest.Digest(dgst)]; why != "" {
			lines = append(lines, fmt.Sprintf("blob %s in %s: %s: dropped; pull what needs it again", dgst, name, why))
			if err := ns.sub(keyContent, keyBlob).drop(dgst); err != nil {
				return nil, err
			}
		}
	}
	for driver, all := range ns.sub(keySnapshots).subs() {
		dropped, err := l.dropSnapshots(name, driver, all)
		if err != nil {
			return nil, err
		}
		lines = append(lines, dropped...)
	}
	return lines, nil
}

// dropSnapshots deletes a driver's lost snapshots, and all that stand on them.
func (l lost) dropSnapshots(name, driver string, all bucket) (lines []string, err error) {
	records := collectSubs(all)
	children := make(map[string][]string)
	var todo []string
	for key, b := range records {
		children[b.text(keyParent)] = append(children[b.text(keyParent)], key)
		if l.snapshots[driver+"/"+b.text(keyName)] {
			todo = append(todo, key)
		}
	}
	slices.Sort(todo)
	for i := 0; i < len(todo); i++ { // grows by what is above
		todo = append(todo, children[todo[i]]...)
	}
	for _, key := range todo {
		b := all.sub(key)
		if !b.exists() {
			continue // dropped already
		}
		why := "its parent is"
		if l.snapshots[driver+"/"+b.text(keyName)] {
			why = "the snapshotter hasn't it"
		}
		lines = append(lines, fmt.Sprintf("snapshot %s of %s in %s: %s: dropped", key, driver, name, why))
		if err := removeSnapshot(all, record{key: key, parent: b.text(keyParent)}); err != nil {
			return nil, err
		}
	}
	return lines, nil
}

// collectSubs reads sub-buckets beforehand, for loops that delete them.
func collectSubs(b bucket) map[string]bucket {
	all := make(map[string]bucket)
	for name, sub := range b.subs() {
		all[name] = sub
	}
	return all
}
