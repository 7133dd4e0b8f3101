package meta

import (
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// migrations turn a file of version i into one of version i+1. Each leaves
// what is no longer right for later ones to judge: none fails for a record
// that hangs in the air.
var migrations = [schemaVersion]func(btx *bolt.Tx, v1 bucket) error{
	linkChildren,
	moveIngests,
	func(*bolt.Tx, bucket) error { return nil }, // boltdb/bolt became bbolt: nothing in the file
	moveSandboxes,
}

// migrate brings a file to schemaVersion in one transaction. A file that is
// there already, or further, isn't written.
func (db *DB) migrate() error {
	btx, err := db.bolt.Begin(true)
	if err != nil {
		return err
	}
	defer btx.Rollback() // does nothing after a commit
	wrote := false
	v1 := root(btx, &wrote)
	version := v1.number(keyVersion)
	if version >= schemaVersion {
		return nil
	}
	if !v1.exists() { // a new file: there is nothing to migrate
		version = schemaVersion
		if v1.b, err = btx.CreateBucket([]byte(keyV1)); err != nil {
			return err
		}
	}
	for _, m := range migrations[max(0, version):] {
		if err := m(btx, v1); err != nil {
			return fmt.Errorf("from version %d to %d: %w", version, version+1, err)
		}
		version++
	}
	if err := v1.putNumber(keyVersion, schemaVersion); err != nil {
		return err
	}
	return db.commitBolt(btx, 1)
}

// linkChildren (0 to 1) records each snapshot in its parent's children.
func linkChildren(_ *bolt.Tx, v1 bucket) error {
	for _, ns := range v1.subs() {
		for _, all := range ns.sub(keySnapshots).subs() {
			parents := make(map[string]string)
			for key, b := range all.subs() {
				if parent := b.text(keyParent); all.sub(parent).exists() {
					parents[key] = parent
				}
			}
			for key, parent := range parents {
				children, err := all.create(parent, keyChildren)
				if err != nil {
					return err
				}
				if err := children.put(key, nil); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// moveIngests (1 to 2) turns the keys of content/ingest into buckets of
// content/ingests.
func moveIngests(_ *bolt.Tx, v1 bucket) error {
	for _, ns := range v1.subs() {
		content := ns.sub(keyContent)
		old := content.sub(keyIngestV1)
		if !old.exists() {
			continue
		}
		backends := make(map[string]string)
		for ref, backend := range old.values() {
			backends[ref] = string(backend)
		}
		if _, err := content.create(keyIngests); err != nil {
			return err
		}
		for ref, backend := range backends {
			b, err := content.create(keyIngests, ref)
			if err != nil {
				return err
			}
			if err := b.putText(keyRef, backend); err != nil {
				return err
			}
		}
		if err := content.drop(keyIngestV1); err != nil {
			return err
		}
	}
	return nil
}

// moveSandboxes (3 to 4) moves <ns>/sandboxes from beside v1 into it, and
// removes everything else beside v1.
func moveSandboxes(btx *bolt.Tx, v1 bucket) error {
	var beside []string
	err := btx.ForEach(func(name []byte, b *bolt.Bucket) error {
		if string(name) == keyV1 {
			return nil
		}
		beside = append(beside, string(name))
		old := bucket{b, v1.wrote}.sub(keySandboxes)
		if !old.exists() {
			return nil
		}
		to, err := v1.create(string(name), keySandboxes)
		if err != nil {
			return err
		}
		return copyBucket(to, old)
	})
	if err != nil {
		return err
	}
	for _, name := range beside {
		if err := btx.DeleteBucket([]byte(name)); err != nil {
			return err
		}
	}
	return nil
}

func copyBucket(to, from bucket) error {
	for k, v := range from.values() {
		if err := to.put(k, v); err != nil {
			return err
		}
	}
	for name, b := range from.subs() {
		sub, err := to.create(name)
		if err != nil {
			return err
		}
		if err := copyBucket(sub, b); err != nil {
			return err
		}
	}
	return nil
}
