package meta

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// WriterOptions say what is known of a blob before it is written.
type WriterOptions struct {
	Total    int64         // bytes; 0 when unknown
	Expected digest.Digest // "" when unknown
}

// Writer writes one ingest of a namespace. It isn't for use by several
// goroutines at once. It must be closed, also after Seal and Commit.
//
// A Writer is shared while it stands for a blob that the store has already, for
// another namespace: it looks completely written, and Commit only makes a
// record. Writing to it copies the blob into an ingest of its own first.
type Writer struct {
	sp           Space
	ref, backend string
	total        int64
	expected     digest.Digest

	data    *content.Writer // nil while shared
	blob    content.Info    // when shared
	started time.Time
	unpin   func() // of the ingest
}

// OpenWriter opens or resumes an ingest, recording it first if nobody has
// (COMPATIBILITY §2.4). ErrAlreadyExists if the namespace has Expected, which
// is then leased; ErrUnavailable while another Writer of ref is open.
func (sp Space) OpenWriter(ctx context.Context, ref string, opts WriterOptions) (*Writer, error) {
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	if opts.Expected != "" {
		if err := opts.Expected.Validate(); err != nil {
			return nil, fmt.Errorf("ingest %q: expected digest %q: %w: %w", ref, opts.Expected, err, errdefs.ErrInvalidArgument)
		}
	}
	w := &Writer{sp: sp, ref: ref, total: opts.Total, expected: opts.Expected, started: time.Now()}
	shared, release, err := w.findShared(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := w.record(ctx, shared); err != nil {
		return nil, err
	}
	if shared {
		w.unpin = func() {}
		return w, nil
	}
	if err := w.open(ctx); err != nil {
		return nil, err
	}
	return w, nil
}

// findShared looks for the expected blob in the store, outside of the
// namespace; if it is there and may be shared it is pinned until release.
func (w *Writer) findShared(ctx context.Context) (shared bool, release func(), err error) {
	release = func() {}
	if w.expected == "" {
		return false, release, nil
	}
	var has, allowed, recorded bool
	err = w.sp.db.bolt.View(func(btx *bolt.Tx) error {
		v1 := root(btx, nil)
		has = blobBucket(v1.sub(w.sp.ns), w.expected).exists()
		allowed = !w.sp.db.opts.Isolated || isShareable(v1, w.expected)
		recorded = isRecorded(v1, w.expected)
		return nil
	})
	if err != nil || has || !allowed {
		return false, release, err
	}
	unpin, err := w.sp.db.pins.pinExisting(ctx, blobPin(w.expected), func() (err error) {
		w.blob, err = w.sp.db.blobs.Info(w.expected)
		return err
	})
	if errdefs.IsNotFound(err) {
		return false, release, nil
	}
	if err != nil {
		return false, release, err
	}
	if w.total != 0 && w.total != w.blob.Size {
		unpin()
		return false, release, nil // the caller's mistake, found when it commits
	}
	if !recorded {
		// Somebody is about to record it, and may not have synced it yet; our
		// own record must not be the first to promise it (inv 1).
		if err := w.sp.db.blobs.SyncBlob(w.expected); err != nil {
			unpin()
			return false, release, err
		}
	}
	return true, unpin, nil
}

// isRecorded reports whether any namespace has the blob.
func isRecorded(v1 bucket, dgst digest.Digest) bool {
	for _, ns := range v1.subs() {
		if blobBucket(ns, dgst).exists() {
			return true
		}
	}
	return false
}

// isShareable reports whether a namespace that has the blob lets others have it.
func isShareable(v1 bucket, dgst digest.Digest) bool {
	for _, ns := range v1.subs() {
		if ns.sub(keyLabels).text(shareable) == "true" && blobBucket(ns, dgst).exists() {
			return true
		}
	}
	return false
}

// record makes sure that the ingest is recorded and the namespace hasn't the
// blob; without a transaction when AddIngest came before.
func (w *Writer) record(ctx context.Context, shared bool) error {
	if !shared {
		backend, err := w.sp.recordedIngest(w.ref)
		if err != nil {
			return err
		}
		if _, err = w.sp.Blob(ctx, w.expected); backend != "" && errdefs.IsNotFound(err) {
			w.backend = backend
			return nil
		}
	}
	return w.sp.Update(ctx, func(tx *Tx) error {
		if w.expected != "" && blobBucket(tx.ns(), w.expected).exists() {
			tx.ReturnAfterCommit(fmt.Errorf("blob %s: %w", w.expected, errdefs.ErrAlreadyExists))
			return tx.LeaseBlob(w.expected)
		}
		b, err := tx.addIngest(w.ref)
		if err != nil {
			return err
		}
		w.backend = b.text(keyRef)
		if !shared {
			return b.delete(keyExpected)
		}
		return b.putText(keyExpected, string(w.expected))
	})
}

// open opens the ingest's own bytes. It waits until a removal of an earlier
// ingest of the same ref is over; hashing again what is there happens outside of
// the lock, under the pin.
func (w *Writer) open(ctx context.Context) error {
	unpin, err := w.sp.db.pins.pinExisting(ctx, ingestPin(w.backend), func() error { return nil })
	if err != nil {
		return err
	}
	w.data, err = w.sp.db.blobs.Writer(ctx, w.backend, content.WriterOptions{Total: w.total, Expected: w.expected})
	if err != nil {
		unpin()
		return err
	}
	w.unpin = unpin
	return nil
}

// Write appends to the ingest.
func (w *Writer) Write(p []byte) (int, error) {
	if w.data == nil {
		if len(p) == 0 {
			return 0, nil
		}
		if err := w.unshare(w.blob.Size); err != nil {
			return 0, err
		}
	}
	return w.data.Write(p)
}

// unshare gives a shared Writer an ingest of its own, that begins with the
// first size bytes of the blob.
func (w *Writer) unshare(size int64) error {
	// The blob is local and the ingest's lock ours in all but a race, so
	// there is nothing to wait for that deserves a context.
	if err := w.open(context.Background()); err != nil {
		return err
	}
	if err := w.data.Truncate(0); err != nil || size == 0 {
		return err
	}
	r, err := w.sp.db.blobs.Reader(w.blob.Digest)
	if err != nil {
		return err
	}
	defer r.Close()
	if _, err := io.Copy(w.data, io.NewSectionReader(r, 0, size)); err != nil {
		return fmt.Errorf("copy blob %s: %w", w.blob.Digest, err)
	}
	return nil
}

// Status reports how far the ingest is; a shared one is complete.
func (w *Writer) Status() (st content.Status, err error) {
	if w.data != nil {
		st, err = w.data.Status()
		st.Expected = w.expected
	} else {
		st = content.Status{
			Offset: w.blob.Size, Total: w.blob.Size, Expected: w.blob.Digest,
			StartedAt: w.started, UpdatedAt: w.started,
		}
	}
	st.Ref = w.ref
	return st, err
}

// Digest is the digest of what is written so far.
func (w *Writer) Digest() digest.Digest {
	if w.data == nil {
		return w.blob.Digest
	}
	return w.data.Digest()
}

// Truncate discards what is written; size must be 0.
func (w *Writer) Truncate(size int64) error {
	if w.data == nil {
		if size != 0 {
			return fmt.Errorf("truncate ingest %q to %d: only 0 is possible: %w", w.ref, size, errdefs.ErrInvalidArgument)
		}
		return w.unshare(0)
	}
	return w.data.Truncate(size)
}

// Data reads back what is written so far.
func (w *Writer) Data() (*content.Reader, error) {
	if w.data == nil {
		return w.sp.db.blobs.Reader(w.blob.Digest)
	}
	return w.data.Data()
}

// Close ends the writing and keeps the ingest, to be resumed or collected.
func (w *Writer) Close() error {
	var err error
	if w.data != nil {
		err = w.data.Close()
	}
	w.unpin()
	return err
}

// Commit makes the ingest a blob of the namespace, synced, with labels. size
// 0 and expected "" are not checked. ErrFailedPrecondition when they don't
// match; the ingest stays. ErrAlreadyExists when the namespace got the blob in
// the meantime: it is leased and the ingest gone.
func (w *Writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	if err := checkLabels(labels); err != nil {
		return errors.Join(err, w.Close())
	}
	s, release, err := w.Seal(ctx, size, expected, content.CommitOptions{})
	if err != nil {
		return err
	}
	defer release()
	return w.sp.Update(ctx, func(tx *Tx) error {
		existed, err := tx.recordBlob(s, labels)
		if existed {
			tx.ReturnAfterCommit(fmt.Errorf("blob %s: %w", s.Digest, errdefs.ErrAlreadyExists))
		}
		return err
	})
}

// Seal moves the bytes to their place (opts are content's: what the caller
// has synced or is going to) and pins them against removal until release is
// called. The record is the caller's: tx.RecordBlob, in the same Update as
// others, when the bytes are synced (inv 1). A blob that is there already is
// as good. The Writer is finished after Seal, also when it fails; the ingest
// stays then. Errors as for Commit.
func (w *Writer) Seal(ctx context.Context, size int64, expected digest.Digest, opts content.CommitOptions) (s Sealed, release func(), err error) {
	if w.data == nil {
		return w.sealShared(ctx, size, expected)
	}
	defer w.Close()
	st, err := w.data.Status()
	if err != nil {
		return s, nil, err
	}
	if size != 0 && size != st.Offset {
		return s, nil, fmt.Errorf("ingest %q has %d bytes and not %d: %w", w.ref, st.Offset, size, errdefs.ErrFailedPrecondition)
	}
	release, err = w.pinBlobs(ctx, w.data.Digest(), expected)
	if err != nil {
		return s, nil, err
	}
	if err := w.data.Commit(ctx, st.Offset, expected, opts); err != nil && !errdefs.IsAlreadyExists(err) {
		release()
		return s, nil, err
	}
	// The expected digest may be of another algorithm than ours.
	return Sealed{Ref: w.ref, Digest: cmp.Or(expected, w.data.Digest()), Size: st.Offset}, release, nil
}

func (w *Writer) sealShared(ctx context.Context, size int64, expected digest.Digest) (s Sealed, release func(), err error) {
	if size != 0 && size != w.blob.Size {
		return s, nil, fmt.Errorf("ingest %q has %d bytes and not %d: %w", w.ref, w.blob.Size, size, errdefs.ErrFailedPrecondition)
	}
	if expected != "" && expected != w.blob.Digest {
		return s, nil, fmt.Errorf("ingest %q has digest %s and not %s: %w", w.ref, w.blob.Digest, expected, errdefs.ErrFailedPrecondition)
	}
	unpin, err := w.sp.db.pins.pinExisting(ctx, blobPin(w.blob.Digest), func() error {
		_, err := w.sp.db.blobs.Info(w.blob.Digest)
		return err
	})
	if err != nil {
		return s, nil, err
	}
	s = Sealed{Ref: w.ref, Digest: w.blob.Digest, Size: w.blob.Size}
	return s, w.sp.db.releaseBlobs(w.sp.ns, unpin, s.Digest), nil
}

// pinBlobs pins the blob that the ingest is about to become, whether or not
// it is there already.
func (w *Writer) pinBlobs(ctx context.Context, written, expected digest.Digest) (release func(), err error) {
	db := w.sp.db
	unpin, err := db.pins.pinExisting(ctx, blobPin(written), func() error { return nil })
	if err != nil || expected == "" || expected == written {
		return db.releaseBlobs(w.sp.ns, unpin, written), err
	}
	unpinExpected, err := db.pins.pinExisting(ctx, blobPin(expected), func() error { return nil })
	if err != nil {
		unpin()
		return nil, err
	}
	return db.releaseBlobs(w.sp.ns, func() { unpin(); unpinExpected() }, written, expected), nil
}

// releaseBlobs unpins, and sees to it that blobs which got no record are
// removed with the next collection.
func (db *DB) releaseBlobs(ns string, unpin func(), blobs ...digest.Digest) func() {
	return func() {
		unpin()
		recorded := false
		db.bolt.View(func(btx *bolt.Tx) error {
			for _, dgst := range blobs {
				recorded = recorded || blobBucket(root(btx, nil).sub(ns), dgst).exists()
			}
			return nil
		})
		if !recorded {
			db.leftBehind(keyContent)
		}
	}
}
