package index

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

var (
	bucketVersion   = []byte("v1")
	bucketSnapshots = []byte("snapshots")
	bucketParents   = []byte("parents")
	bucketLabels    = []byte("labels")

	keyID      = []byte("id")
	keyKind    = []byte("kind")
	keyParent  = []byte("parent")
	keyCreated = []byte("createdat")
	keyUpdated = []byte("updatedat")
	keyInodes  = []byte("inodes")
	keySize    = []byte("size")
)

// maxName bounds a key or name, in bytes: what bolt takes.
const maxName = bolt.MaxKeySize

// buckets are the two of version 1; nil where nothing was ever written.
type buckets struct{ snapshots, parents *bolt.Bucket }

func read(tx *bolt.Tx) buckets {
	v1 := tx.Bucket(bucketVersion)
	if v1 == nil {
		return buckets{}
	}
	return buckets{v1.Bucket(bucketSnapshots), v1.Bucket(bucketParents)}
}

func createBuckets(tx *bolt.Tx) (b buckets, err error) {
	v1, err := tx.CreateBucketIfNotExists(bucketVersion)
	if err != nil {
		return b, err
	}
	if b.snapshots, err = v1.CreateBucketIfNotExists(bucketSnapshots); err != nil {
		return b, err
	}
	b.parents, err = v1.CreateBucketIfNotExists(bucketParents)
	return b, err
}

// bucket finds a snapshot's bucket, or nil.
func (b buckets) bucket(key string) *bolt.Bucket {
	if b.snapshots == nil || key == "" {
		return nil
	}
	return b.snapshots.Bucket([]byte(key))
}

// get reads a snapshot.
func (b buckets) get(key string) (Record, error) {
	bkt := b.bucket(key)
	if bkt == nil {
		return Record{}, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	r, err := decode(key, bkt)
	if err != nil {
		return r, fmt.Errorf("snapshot %s: %w", key, err)
	}
	return r, nil
}

func decode(key string, bkt *bolt.Bucket) (Record, error) {
	r := Record{Info: snapshot.Info{Key: key, Parent: string(bkt.Get(keyParent))}}
	r.ID, _ = binary.Uvarint(bkt.Get(keyID))
	kind := bkt.Get(keyKind)
	if r.ID == 0 || len(kind) != 1 {
		return r, fmt.Errorf("record has no id or no kind: %w", errdefs.ErrDataLoss)
	}
	r.Kind = snapshot.Kind(kind[0])
	if err := errors.Join(getTime(bkt, keyCreated, &r.Created), getTime(bkt, keyUpdated, &r.Updated)); err != nil {
		return r, err
	}
	r.Usage.Inodes, _ = binary.Varint(bkt.Get(keyInodes))
	r.Usage.Size, _ = binary.Varint(bkt.Get(keySize))
	labels := bkt.Bucket(bucketLabels)
	if labels == nil {
		return r, nil
	}
	r.Labels = make(map[string]string)
	return r, labels.ForEach(func(k, v []byte) error {
		r.Labels[string(k)] = string(v)
		return nil
	})
}

func getTime(bkt *bolt.Bucket, key []byte, t *time.Time) error {
	v := bkt.Get(key)
	if v == nil {
		return nil
	}
	if err := t.UnmarshalBinary(v); err != nil {
		return fmt.Errorf("%s: %w: %w", key, err, errdefs.ErrDataLoss)
	}
	return nil
}

// put writes a snapshot that is not there yet.
func (b buckets) put(r Record) error {
	if r.Key == "" || len(r.Key) > maxName {
		return fmt.Errorf("snapshot key of %d bytes: %w", len(r.Key), errdefs.ErrInvalidArgument)
	}
	bkt, err := b.snapshots.CreateBucket([]byte(r.Key))
	if errors.Is(err, bolterrors.ErrBucketExists) {
		return fmt.Errorf("snapshot %s: %w", r.Key, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", r.Key, err)
	}
	values := [][2][]byte{
		{keyID, binary.AppendUvarint(nil, r.ID)},
		{keyKind, {byte(r.Kind)}},
	}
	if r.Parent != "" {
		values = append(values, [2][]byte{keyParent, []byte(r.Parent)})
	}
	if r.Kind == snapshot.KindCommitted {
		values = append(values,
			[2][]byte{keyInodes, binary.AppendVarint(nil, r.Usage.Inodes)},
			[2][]byte{keySize, binary.AppendVarint(nil, r.Usage.Size)})
	}
	for _, v := range values {
		if err := bkt.Put(v[0], v[1]); err != nil {
			return err
		}
	}
	if err := putTimes(bkt, r.Created, r.Updated); err != nil {
		return err
	}
	return putLabels(bkt, r.Labels)
}

func putTimes(bkt *bolt.Bucket, created, updated time.Time) error {
	c, err := created.UTC().MarshalBinary()
	if err != nil {
		return err
	}
	u, err := updated.UTC().MarshalBinary()
	if err != nil {
		return err
	}
	return errors.Join(bkt.Put(keyCreated, c), bkt.Put(keyUpdated, u))
}

// putLabels replaces all labels.
func putLabels(bkt *bolt.Bucket, labels map[string]string) error {
	if bkt.Bucket(bucketLabels) != nil {
		if err := bkt.DeleteBucket(bucketLabels); err != nil {
			return err
		}
	}
	var to *bolt.Bucket
	for k, v := range labels {
		if v == "" {
			continue
		}
		if to == nil {
			var err error
			if to, err = bkt.CreateBucket(bucketLabels); err != nil {
				return err
			}
		}
		if err := to.Put([]byte(k), []byte(v)); err != nil {
			return fmt.Errorf("label %q: %w: %w", k, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// parentPrefix begins the keys of the links to the children of a snapshot.
// Uvarints are prefix-free, so that no other id's links begin so.
func parentPrefix(parent uint64) []byte {
	return append(binary.AppendUvarint(nil, parent), 0)
}

func parentKey(parent, child uint64) []byte {
	return binary.AppendUvarint(parentPrefix(parent), child)
}

// chain follows the parents of r upwards from the nearest. A record that names a
// parent which is not there is ErrNotFound.
func (b buckets) chain(r Record) ([]Record, error) {
	var out []Record
	for name := r.Parent; name != ""; {
		if len(out) == maxDepth {
			return nil, fmt.Errorf("snapshot %s has more than %d parents: %w", r.Key, maxDepth, errdefs.ErrDataLoss)
		}
		p, err := b.get(name)
		if err != nil {
			return nil, fmt.Errorf("parent of %s: %w", r.Key, err)
		}
		out = append(out, p)
		name = p.Parent
	}
	return out, nil
}

// maxDepth bounds a chain of parents: far more than any kernel mounts, so
// that a damaged file with a loop in it ends in an error.
const maxDepth = 10_000
