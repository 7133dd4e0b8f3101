package meta

import (
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/filter"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/opencontainers/go-digest"
)

// Blob is a namespace's record of a blob. Its bytes may be shared with other
// namespaces; labels and times are its own.
type Blob struct {
	Digest           digest.Digest
	Size             int64
	Labels           map[string]string
	Created, Updated time.Time
}

// batchSize is how many records an iterator reads in one read transaction.
const batchSize = 100

// Blob reads one blob's record. ErrNotFound.
func (sp Space) Blob(ctx context.Context, dgst digest.Digest) (blob Blob, err error) {
	err = sp.view(func(ns bucket) error {
		blob, err = readBlob(dgst, blobBucket(ns, dgst))
		return err
	})
	return blob, err
}

// Blobs yields the blobs that match any of the filters, in the order of their
// digests. It reads batches and holds no transaction while it yields, so what
// is written meanwhile may or may not be seen.
func (sp Space) Blobs(ctx context.Context, filters ...string) iter.Seq2[Blob, error] {
	return func(yield func(Blob, error) bool) {
		match, err := filter.Parse(filters...)
		if err != nil {
			yield(Blob{}, err)
			return
		}
		read := func(ns bucket, after string) (batch []Blob, err error) {
			for key, b := range ns.sub(keyContent, keyBlob).subsAfter(after) {
				dgst, err := digest.Parse(key)
				if err != nil {
					continue // not ours to judge
				}
				blob, err := readBlob(dgst, b)
				if err != nil {
					return nil, err
				}
				if batch = append(batch, blob); len(batch) == batchSize {
					break
				}
			}
			return batch, nil
		}
		for blob, err := range inBatches(ctx, sp, read, func(b Blob) string { return string(b.Digest) }) {
			if (err != nil || match.Match(blob.fields())) && !yield(blob, err) {
				return
			}
		}
	}
}

// inBatches yields what read finds after a key, batchSize at most, until it
// finds fewer.
func inBatches[T any](ctx context.Context, sp Space, read func(ns bucket, after string) ([]T, error), key func(T) string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		after := ""
		for {
			var batch []T
			err := context.Cause(ctx)
			if err == nil {
				err = sp.view(func(ns bucket) (err error) {
					batch, err = read(ns, after)
					return err
				})
			}
			if err != nil {
				yield(none, err)
				return
			}
			for _, item := range batch {
				if !yield(item, nil) {
					return
				}
			}
			if len(batch) < batchSize {
				return
			}
			after = key(batch[len(batch)-1])
		}
	}
}

// UpdateBlob sets the labels that fields name (`labels`, `labels.<key>`), or
// all when there are no fields. ErrNotFound, ErrInvalidArgument.
func (sp Space) UpdateBlob(ctx context.Context, blob Blob, fields ...string) (updated Blob, err error) {
	err = sp.Update(ctx, func(tx *Tx) error {
		b := blobBucket(tx.ns(), blob.Digest)
		updated, err = readBlob(blob.Digest, b)
		if err != nil {
			return err
		}
		updated.Labels, err = updateLabels(updated.Labels, blob.Labels, fields)
		if err != nil {
			return fmt.Errorf("blob %s: %w", blob.Digest, err)
		}
		updated.Updated = tx.now
		tx.deleted = true // a reference may be gone
		return updated.write(b)
	})
	return updated, err
}

// DeleteBlob forgets the blob in this namespace. The file goes with the next
// collection, if no other namespace has it. ErrNotFound.
func (sp Space) DeleteBlob(ctx context.Context, dgst digest.Digest) error {
	return sp.Update(ctx, func(tx *Tx) error {
		if !blobBucket(tx.ns(), dgst).exists() {
			return fmt.Errorf("blob %s: %w", dgst, errdefs.ErrNotFound)
		}
		if err := tx.release(keyContent, string(dgst)); err != nil {
			return err
		}
		tx.deletes(keyContent)
		return tx.ns().sub(keyContent, keyBlob).drop(string(dgst))
	})
}

// Reader opens a blob that the namespace has. ErrNotFound.
func (sp Space) Reader(ctx context.Context, dgst digest.Digest) (*content.Reader, error) {
	if _, err := sp.Blob(ctx, dgst); err != nil {
		return nil, err
	}
	return sp.db.blobs.Reader(dgst)
}

// ReadBlob reads a whole blob that the namespace has and checks its digest.
// ErrNotFound; ErrOutOfRange when it has more than max bytes; ErrFailedPrecondition
// when it hasn't the size that desc gives (unless that is 0); ErrDataLoss when the bytes aren't what the
// digest promises.
func (sp Space) ReadBlob(ctx context.Context, desc oci.Descriptor, max int64) ([]byte, error) {
	r, err := sp.Reader(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	switch size := r.Size(); {
	case size > max:
		return nil, fmt.Errorf("blob %s has %d bytes, more than %d: %w", desc.Digest, size, max, errdefs.ErrOutOfRange)
	case desc.Size > 0 && size != desc.Size:
		return nil, fmt.Errorf("blob %s has %d bytes and not %d: %w", desc.Digest, size, desc.Size, errdefs.ErrFailedPrecondition)
	}
	p := make([]byte, r.Size())
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, r.Size()), p); err != nil {
		return nil, fmt.Errorf("read blob %s: %w", desc.Digest, err)
	}
	if got := desc.Digest.Algorithm().FromBytes(p); got != desc.Digest {
		return nil, fmt.Errorf("blob %s holds other bytes, of digest %s: remove it and pull again: %w", desc.Digest, got, errdefs.ErrDataLoss)
	}
	return p, nil
}

// Blob describes a blob of the namespace, as the transaction sees it.
// ErrNotFound.
func (tx *Tx) Blob(dgst digest.Digest) (Blob, error) {
	return readBlob(dgst, blobBucket(tx.ns(), dgst))
}

// SetBlobLabels merges labels into those of a blob; a value of "" deletes.
// ErrNotFound, ErrInvalidArgument.
func (tx *Tx) SetBlobLabels(dgst digest.Digest, labels map[string]string) error {
	b := blobBucket(tx.ns(), dgst)
	blob, err := readBlob(dgst, b)
	if err != nil {
		return err
	}
	return blob.relabel(b, labels, tx.now)
}

// relabel merges labels and writes the record if that changed any.
func (blob Blob) relabel(b bucket, labels map[string]string, now time.Time) error {
	if err := checkLabels(labels); err != nil {
		return fmt.Errorf("blob %s: %w", blob.Digest, err)
	}
	merged := maps.Clone(blob.Labels)
	if merged == nil {
		merged = make(map[string]string, len(labels))
	}
	maps.Copy(merged, labels)
	merged = withoutEmpty(merged)
	if maps.Equal(merged, withoutEmpty(blob.Labels)) {
		return nil
	}
	blob.Labels, blob.Updated = merged, now
	return blob.write(b)
}

// LeaseBlob puts a blob that the namespace has under the lease. ErrNotFound
// when it has not, or when the lease doesn't exist.
func (tx *Tx) LeaseBlob(dgst digest.Digest) error {
	if !blobBucket(tx.ns(), dgst).exists() {
		return fmt.Errorf("blob %s: %w", dgst, errdefs.ErrNotFound)
	}
	_, err := tx.hold(keyContent, string(dgst))
	return err
}

// Sealed is a blob that has its place on disk and no record yet.
type Sealed struct {
	Ref    string
	Digest digest.Digest
	Size   int64 // bytes
}

// RecordBlob makes a sealed blob a record under the lease, and drops the
// record of its ingest. A blob that the namespace has already keeps its labels
// and gets the new ones. ErrInvalidArgument.
func (tx *Tx) RecordBlob(s Sealed, labels map[string]string) error {
	existed, err := tx.recordBlob(s, labels)
	if err != nil || !existed {
		return err
	}
	return tx.SetBlobLabels(s.Digest, labels)
}

// recordBlob is RecordBlob that leaves an existing record as it is.
func (tx *Tx) recordBlob(s Sealed, labels map[string]string) (existed bool, err error) {
	if err := checkLabels(labels); err != nil {
		return false, fmt.Errorf("blob %s: %w", s.Digest, err)
	}
	if err := tx.dropIngest(s.Ref); err != nil {
		return false, err
	}
	if _, err := tx.hold(keyContent, string(s.Digest)); err != nil {
		return false, err
	}
	if blobBucket(tx.ns(), s.Digest).exists() {
		return true, nil
	}
	b, err := tx.v1.create(tx.sp.ns, keyContent, keyBlob, string(s.Digest))
	if err != nil {
		return false, err
	}
	blob := Blob{Digest: s.Digest, Size: s.Size, Labels: labels, Created: tx.now, Updated: tx.now}
	return false, blob.write(b)
}

func (blob Blob) write(b bucket) error {
	if err := b.putTimes(blob.Created, blob.Updated); err != nil {
		return err
	}
	if err := b.putTexts(keyLabels, blob.Labels); err != nil {
		return err
	}
	return b.putNumber(keySize, blob.Size)
}

// fields is what filters see of a blob.
func (blob Blob) fields() fields {
	return fields{"digest": textField(string(blob.Digest)), "labels": mapField(blob.Labels)}
}

func blobBucket(ns bucket, dgst digest.Digest) bucket {
	return ns.sub(keyContent, keyBlob, string(dgst))
}

func readBlob(dgst digest.Digest, b bucket) (blob Blob, err error) {
	if !b.exists() {
		return blob, fmt.Errorf("blob %s: %w", dgst, errdefs.ErrNotFound)
	}
	blob = Blob{Digest: dgst, Size: b.number(keySize), Labels: b.texts(keyLabels)}
	if blob.Created, blob.Updated, err = b.times(); err != nil {
		return blob, fmt.Errorf("blob %s: %w", dgst, err)
	}
	return blob, nil
}
