package meta

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/filter"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// ingestLife is how long an ingest that no lease holds may rest before it is
// collected. It is counted from the last time that it was opened.
const ingestLife = 24 * time.Hour

// ingestFresh is how much of ingestLife may have passed before opening an
// ingest again is worth a transaction.
const ingestFresh = time.Hour

// Ingest reports how far an ingest is. ErrNotFound.
func (sp Space) Ingest(ctx context.Context, ref string) (st content.Status, err error) {
	var backend string
	err = sp.view(func(ns bucket) error {
		backend = ingestBucket(ns, ref).text(keyRef)
		return nil
	})
	if err != nil {
		return st, err
	}
	if backend == "" {
		return st, fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
	}
	st, err = sp.db.blobs.Status(backend)
	st.Ref = ref
	return st, err
}

// Ingests reports on the ingests that match any of the filters, in the order
// of their refs. Those that have no bytes of their own are left out.
func (sp Space) Ingests(ctx context.Context, filters ...string) (all []content.Status, err error) {
	match, err := filter.Parse(filters...)
	if err != nil {
		return nil, err
	}
	type ingest struct{ ref, backend string }
	read := func(ns bucket, after string) (batch []ingest, err error) {
		for ref, b := range ns.sub(keyContent, keyIngests).subsAfter(after) {
			if batch = append(batch, ingest{ref, b.text(keyRef)}); len(batch) == batchSize {
				break
			}
		}
		return batch, nil
	}
	for in, err := range inBatches(ctx, sp, read, func(in ingest) string { return in.ref }) {
		if err != nil {
			return nil, err
		}
		if !match.Match(fields{"ref": textField(in.ref)}) {
			continue
		}
		st, err := sp.db.blobs.Status(in.backend)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		st.Ref = in.ref
		all = append(all, st)
	}
	return all, nil
}

// AbortIngest forgets an ingest and removes its bytes, also under a Writer
// that is open: its methods fail with ErrAborted then. ErrNotFound;
// ErrUnavailable while it is just being opened.
func (sp Space) AbortIngest(ctx context.Context, ref string) error {
	var backend string
	err := sp.Update(ctx, func(tx *Tx) error {
		backend = ingestBucket(tx.ns(), ref).text(keyRef)
		if backend == "" {
			return fmt.Errorf("ingest %q: %w", ref, errdefs.ErrNotFound)
		}
		return tx.dropIngest(ref)
	})
	if err != nil {
		return err
	}
	_, err = sp.db.removeIngest(ctx, backend, true)
	return err
}

// AddIngest records that ref is being written, under the lease, before its
// first byte (inv 3); without a lease for 24 hours. A later OpenWriter of ref
// needs no transaction then. If the namespace has the blob expected ("" when
// unknown) already, that is leased instead and nothing else recorded:
// OpenWriter is going to say ErrAlreadyExists.
func (tx *Tx) AddIngest(ref string, expected digest.Digest) error {
	if expected != "" && blobBucket(tx.ns(), expected).exists() {
		return tx.LeaseBlob(expected)
	}
	_, err := tx.addIngest(ref)
	return err
}

// addIngest returns the ingest's bucket.
func (tx *Tx) addIngest(ref string) (b bucket, err error) {
	if err := checkRef(ref); err != nil {
		return b, err
	}
	if b, err = tx.v1.create(tx.sp.ns, keyContent, keyIngests, ref); err != nil {
		return b, err
	}
	if !b.has(keyRef) {
		seq := b.sequence() + 1
		if err := b.setSequence(seq); err != nil {
			return b, err
		}
		if err := b.putText(keyRef, backendKey(tx.sp.ns, seq, ref)); err != nil {
			return b, err
		}
	}
	held, err := tx.hold(keyIngests, ref)
	if err != nil || held {
		return b, err
	}
	return b, b.putTime(keyExpireAt, tx.now.Add(ingestLife))
}

// dropIngest forgets an ingest, if there is one, and its place in the lease.
func (tx *Tx) dropIngest(ref string) error {
	ingests := tx.ns().sub(keyContent, keyIngests)
	if ingests.sub(ref).exists() {
		tx.deletes(keyContent)
		if err := ingests.drop(ref); err != nil {
			return err
		}
	}
	return tx.release(keyIngests, ref)
}

// recordedIngest returns the backend ref of an ingest whose record is good as
// it is for opening: held by sp's lease, or not about to expire.
func (sp Space) recordedIngest(ref string) (backend string, err error) {
	err = sp.view(func(ns bucket) error {
		b := ingestBucket(ns, ref)
		if sp.lease != "" {
			if ns.sub(keyLeases, sp.lease, keyIngests).has(ref) {
				backend = b.text(keyRef)
			}
			return nil
		}
		expires, err := b.time(keyExpireAt)
		if err == nil && time.Until(expires) > ingestLife-ingestFresh {
			backend = b.text(keyRef)
		}
		return err
	})
	return backend, err
}

// removeIngest removes the bytes of an ingest unless it is recorded (again) or,
// if not even then, being written; removed is false then.
func (db *DB) removeIngest(ctx context.Context, backend string, evenThen bool) (removed bool, err error) {
	unlock, err := db.pins.locks.Lock(ctx, ingestPin(backend))
	if err != nil {
		return false, err
	}
	defer unlock()
	if !evenThen && db.pins.pinned(ingestPin(backend)) {
		return false, nil
	}
	recorded := false
	err = db.bolt.View(func(btx *bolt.Tx) error {
		ns, ref, ok := splitBackendKey(backend)
		recorded = ok && ingestBucket(root(btx, nil).sub(ns), ref).text(keyRef) == backend
		return nil
	})
	if err != nil || recorded {
		return false, err
	}
	if err := db.blobs.Abort(backend); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return false, fmt.Errorf("abort ingest %q: %w", backend, err)
	}
	return true, nil
}

// checkRef leaves room for the namespace and the sequence before the ref.
func checkRef(ref string) error {
	const most = min(content.MaxRef, bolt.MaxKeySize) - maxIdentifier - len("/18446744073709551615/")
	if ref == "" || len(ref) > most {
		return fmt.Errorf("an ingest's ref has 1 to %d bytes, not %d: %w", most, len(ref), errdefs.ErrInvalidArgument)
	}
	return nil
}

func ingestBucket(ns bucket, ref string) bucket { return ns.sub(keyContent, keyIngests, ref) }
