package meta

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// bucket is a bolt bucket that may be absent: reading an absent one finds
// nothing. Whatever changes the file goes through it, so that wrote is true
// exactly when there is something to commit; putting what is there already is
// no change.
type bucket struct {
	b     *bolt.Bucket
	wrote *bool // nil in a read transaction
}

// root is the bucket v1 of a transaction.
func root(btx *bolt.Tx, wrote *bool) bucket {
	return bucket{btx.Bucket([]byte(keyV1)), wrote}
}

func (b bucket) exists() bool { return b.b != nil }

// sub descends along path; the result is absent when a step is.
func (b bucket) sub(path ...string) bucket {
	for _, name := range path {
		if b.b == nil {
			break
		}
		b.b = b.b.Bucket([]byte(name))
	}
	return b
}

// create descends along path and makes what is missing.
func (b bucket) create(path ...string) (bucket, error) {
	for _, name := range path {
		next := b.sub(name)
		if !next.exists() {
			if len(name) > bolt.MaxKeySize { // which bolt checks for keys only
				return bucket{}, refused(name, bolterrors.ErrKeyTooLarge)
			}
			made, err := b.b.CreateBucket([]byte(name))
			if err != nil {
				return bucket{}, refused(name, err)
			}
			*b.wrote = true
			next.b = made
		}
		b = next
	}
	return b, nil
}

func (b bucket) get(key string) []byte {
	if b.b == nil {
		return nil
	}
	return b.b.Get([]byte(key))
}

func (b bucket) has(key string) bool { return b.get(key) != nil }

func (b bucket) text(key string) string { return string(b.get(key)) }

func (b bucket) number(key string) int64 {
	n, _ := binary.Varint(b.get(key))
	return n
}

// time reads a T; an absent one is the zero time.
func (b bucket) time(key string) (t time.Time, err error) {
	if v := b.get(key); v != nil {
		if err := t.UnmarshalBinary(v); err != nil {
			return t, fmt.Errorf("read %s: %w", key, err)
		}
	}
	return t, nil
}

func (b bucket) times() (created, updated time.Time, err error) {
	if created, err = b.time(keyCreatedAt); err != nil {
		return created, updated, err
	}
	updated, err = b.time(keyUpdatedAt)
	return created, updated, err
}

// texts reads a bucket of strings; nil when it is absent.
func (b bucket) texts(name string) map[string]string {
	s := b.sub(name)
	if !s.exists() {
		return nil
	}
	m := make(map[string]string)
	for k, v := range s.values() {
		m[k] = string(v)
	}
	return m
}

func (b bucket) put(key string, value []byte) error {
	if old := b.get(key); old != nil && bytes.Equal(old, value) {
		return nil
	}
	if err := b.b.Put([]byte(key), value); err != nil {
		return refused(key, err)
	}
	*b.wrote = true
	return nil
}

func (b bucket) putText(key, value string) error { return b.put(key, []byte(value)) }

func (b bucket) putNumber(key string, n int64) error {
	return b.put(key, binary.AppendVarint(nil, n))
}

func (b bucket) putTime(key string, t time.Time) error {
	v, err := t.UTC().MarshalBinary()
	if err != nil {
		return fmt.Errorf("encode %s: %w", key, err)
	}
	return b.put(key, v)
}

func (b bucket) putTimes(created, updated time.Time) error {
	if err := b.putTime(keyCreatedAt, created); err != nil {
		return err
	}
	return b.putTime(keyUpdatedAt, updated)
}

// putTexts makes the bucket name hold m and nothing else. Empty values are
// not stored.
func (b bucket) putTexts(name string, m map[string]string) error {
	m = withoutEmpty(m)
	if maps.Equal(m, b.texts(name)) {
		return nil
	}
	if err := b.drop(name); err != nil || len(m) == 0 {
		return err
	}
	s, err := b.create(name)
	if err != nil {
		return err
	}
	for k, v := range m {
		if err := s.putText(k, v); err != nil {
			return err
		}
	}
	return nil
}

// delete removes a key, if it is there.
func (b bucket) delete(key string) error {
	if !b.has(key) {
		return nil
	}
	*b.wrote = true
	return b.b.Delete([]byte(key))
}

// drop removes a sub-bucket and all in it, if it is there.
func (b bucket) drop(name string) error {
	if !b.sub(name).exists() {
		return nil
	}
	*b.wrote = true
	return b.b.DeleteBucket([]byte(name))
}

func (b bucket) sequence() uint64 {
	if b.b == nil {
		return 0
	}
	return b.b.Sequence()
}

func (b bucket) setSequence(n uint64) error {
	*b.wrote = true
	return b.b.SetSequence(n)
}

func (b bucket) empty() bool {
	if b.b == nil {
		return true
	}
	k, _ := b.b.Cursor().First()
	return k == nil
}

// values yields the keys that aren't buckets. The bucket must not be changed
// meanwhile, and the values are gone with the transaction.
func (b bucket) values() iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		if b.b == nil {
			return
		}
		c := b.b.Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			if v != nil && !yield(string(k), v) {
				return
			}
		}
	}
}

// subs yields the sub-buckets. The bucket must not be changed meanwhile.
func (b bucket) subs() iter.Seq2[string, bucket] { return b.subsAfter("") }

// subsAfter yields the sub-buckets whose names are greater than after.
func (b bucket) subsAfter(after string) iter.Seq2[string, bucket] {
	return func(yield func(string, bucket) bool) {
		if b.b == nil {
			return
		}
		c := b.b.Cursor()
		k, v := c.Seek([]byte(after))
		if after != "" && string(k) == after {
			k, v = c.Next()
		}
		for ; k != nil; k, v = c.Next() {
			if v == nil && !yield(string(k), bucket{b.b.Bucket(k), b.wrote}) {
				return
			}
		}
	}
}

// withoutEmpty is m without its empty values; nil when nothing is left.
func withoutEmpty(m map[string]string) map[string]string {
	var full map[string]string
	for k, v := range m {
		if v == "" {
			continue
		}
		if full == nil {
			full = make(map[string]string, len(m))
		}
		full[k] = v
	}
	return full
}

// refused gives bolt's refusal of a name or value the kind that it has.
func refused(name string, err error) error {
	for _, bad := range []error{
		bolterrors.ErrBucketNameRequired, bolterrors.ErrKeyRequired, bolterrors.ErrKeyTooLarge,
		bolterrors.ErrValueTooLarge, bolterrors.ErrIncompatibleValue,
	} {
		if errors.Is(err, bad) {
			return fmt.Errorf("name %.64q: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
	}
	return fmt.Errorf("write %.64q: %w", name, err)
}
