package meta

import (
	"context"
	"time"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Dump is every record of the file, as of one transaction, in the order of
// namespaces and names.
type Dump struct {
	Namespaces []Namespace
	Images     []DumpImage
	Blobs      []DumpBlob
	Ingests    []DumpIngest
	Snapshots  []DumpSnapshot
	Leases     []DumpLease
	Containers []DumpContainer
	Sandboxes  []DumpSandbox
}

// DumpImage is an image of a namespace.
type DumpImage struct {
	Namespace string
	Image
}

// DumpBlob is a blob of a namespace.
type DumpBlob struct {
	Namespace string
	Blob
}

// DumpIngest is an ingest of a namespace.
type DumpIngest struct {
	Namespace, Ref, Backend string
	Expected                digest.Digest // of a blob that the store has; "" for one that is being written
	ExpireAt                time.Time     // zero when only a lease holds it
}

// DumpSnapshot is a snapshot of a namespace; Backend is the driver's key.
type DumpSnapshot struct {
	Namespace, Driver, Key, Backend, Parent string
	Labels                                  map[string]string
	Children                                []string
	Created, Updated                        time.Time
}

// DumpLease is a lease of a namespace with what it holds.
type DumpLease struct {
	Namespace string
	Lease
	Resources []Resource
}

// DumpContainer is what of a container's record holds other records.
type DumpContainer struct {
	Namespace, ID, Image, Driver, SnapshotKey string
	Labels                                    map[string]string
}

// DumpSandbox is what of a sandbox's record holds other records.
type DumpSandbox struct {
	Namespace, ID string
	Labels        map[string]string
}

// Dump reads every record into memory, which the file's size bounds.
func (db *DB) Dump(ctx context.Context) (d Dump, err error) {
	err = db.bolt.View(func(btx *bolt.Tx) error {
		for name, ns := range root(btx, nil).subs() {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			d.Namespaces = append(d.Namespaces, Namespace{Name: name, Labels: ns.texts(keyLabels)})
			if err := d.named(name, ns); err != nil {
				return err
			}
			if err := d.snapshots(name, ns); err != nil {
				return err
			}
			d.containers(name, ns)
		}
		return nil
	})
	return d, err
}

// named adds images, blobs, ingests and leases.
func (d *Dump) named(name string, ns bucket) error {
	for key, b := range ns.sub(keyImages).subs() {
		img, err := readImage(key, b)
		if err != nil {
			return err
		}
		d.Images = append(d.Images, DumpImage{name, img})
	}
	for dgst, b := range ns.sub(keyContent, keyBlob).subs() {
		blob, err := readBlob(digest.Digest(dgst), b)
		if err != nil {
			return err
		}
		d.Blobs = append(d.Blobs, DumpBlob{name, blob})
	}
	for ref, b := range ns.sub(keyContent, keyIngests).subs() {
		expires, err := b.time(keyExpireAt)
		if err != nil {
			return err
		}
		d.Ingests = append(d.Ingests, DumpIngest{
			Namespace: name, Ref: ref, Backend: b.text(keyRef),
			Expected: digest.Digest(b.text(keyExpected)), ExpireAt: expires,
		})
	}
	for id, b := range ns.sub(keyLeases).subs() {
		l, err := readLease(id, b)
		if err != nil {
			return err
		}
		d.Leases = append(d.Leases, DumpLease{name, l, resources(b)})
	}
	return nil
}

func (d *Dump) snapshots(name string, ns bucket) error {
	for driver, all := range ns.sub(keySnapshots).subs() {
		for key, b := range all.subs() {
			r, err := readSnapshot(key, b)
			if err != nil {
				return err
			}
			s := DumpSnapshot{
				Namespace: name, Driver: driver, Key: key, Backend: r.backend, Parent: r.parent,
				Labels: r.labels, Created: r.created, Updated: r.updated,
			}
			for child := range b.sub(keyChildren).values() {
				s.Children = append(s.Children, child)
			}
			d.Snapshots = append(d.Snapshots, s)
		}
	}
	return nil
}

func (d *Dump) containers(name string, ns bucket) {
	for id, b := range ns.sub(keyContainers).subs() {
		d.Containers = append(d.Containers, DumpContainer{
			Namespace: name, ID: id, Image: b.text(keyImage), Driver: b.text(keySnapshotter),
			SnapshotKey: b.text(keySnapshotKey), Labels: b.texts(keyLabels),
		})
	}
	for id, b := range ns.sub(keySandboxes).subs() {
		d.Sandboxes = append(d.Sandboxes, DumpSandbox{name, id, b.texts(keyLabels)})
	}
}
