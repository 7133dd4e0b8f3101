package content

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/undo"
)

// openFlags keep a stray link or FIFO among our files from leading astray.
const openFlags = syscall.O_NOFOLLOW | syscall.O_NONBLOCK

// WriterOptions of one ingest.
type WriterOptions struct {
	Total    int64         // the size to come, in bytes; 0 if not known
	Expected digest.Digest // chooses the algorithm, no more: whether it exists already is the caller's question
}

// CommitOptions say who syncs what. By default Commit does all: when it
// returns, the blob survives a power cut.
type CommitOptions struct {
	// Synced: the caller has synced the file system since the last Write
	// (durable.FS). Commit leaves the data as it is, and syncs the names.
	Synced bool
	// Unsynced: the caller syncs the file system (durable.FS) after Commit has
	// returned, or returned ErrAlreadyExists, and before it records the blob;
	// Commit syncs nothing. Until then a power cut may leave the blob's name
	// with other bytes. No record names it then, so that meta removes it when
	// it opens (inv 1, inv 2). It takes precedence over Synced.
	Unsynced bool
}

// Writer writes one ingest at its end. It holds the ref until Close or Commit.
// Its methods may be called at the same time, but for the order of Writes.
type Writer struct {
	s   *Store
	in  ingest
	ref string

	mu               sync.Mutex
	f                *os.File // nil when closed
	ended            error    // why, when closed
	alg              digest.Algorithm
	hash             hash.Hash // of the first offset bytes
	offset, total    int64
	started, updated time.Time
}

var _ io.WriteCloser = (*Writer)(nil)

// Writer opens the ingest of ref, new or where it was left. What is there
// already is read once more for its digest, unless ctx ends meanwhile; what
// can't be read back is discarded. ErrUnavailable, "ref ... locked for ...",
// while another Writer has it.
func (s *Store) Writer(ctx context.Context, ref string, opts WriterOptions) (*Writer, error) {
	alg := digest.SHA256
	switch {
	case ref == "" || len(ref) > MaxRef:
		return nil, fmt.Errorf("an ingest's ref has 1 to %d bytes, not %d: %w", MaxRef, len(ref), errdefs.ErrInvalidArgument)
	case opts.Total < 0:
		return nil, fmt.Errorf("ingest %s: negative total %d: %w", clip(ref), opts.Total, errdefs.ErrInvalidArgument)
	case opts.Expected != "":
		if err := checkDigest(opts.Expected); err != nil {
			return nil, fmt.Errorf("ingest %s: %w", clip(ref), err)
		}
		alg = opts.Expected.Algorithm()
	}
	if _, err := s.lock(ref, s.opts.MaxWriters); err != nil {
		return nil, err
	}
	w := &Writer{s: s, in: s.ingest(ref), ref: ref, alg: alg, hash: hashes[alg](), total: opts.Total}
	if err := w.open(ctx); err != nil {
		s.unlock(ref)
		return nil, fmt.Errorf("open ingest %s: %w", clip(ref), s.explain(err))
	}
	s.mu.Lock()
	closed := s.closed
	s.held[ref].w = w
	s.mu.Unlock()
	if closed {
		return nil, errors.Join(fmt.Errorf("content store: %w", fs.ErrClosed), w.Close())
	}
	return w, nil
}

// explain tells who runs out of space what to do.
func (s *Store) explain(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w; make room on the file system of %s and try again: %w", err, s.dir, errdefs.ErrResourceExhausted)
	}
	return err
}

// open makes the ingest's directory, or takes up what is in it.
func (w *Writer) open(ctx context.Context) (err error) {
	err = os.Mkdir(string(w.in), 0o755)
	if errors.Is(err, fs.ErrExist) {
		err = w.resume(ctx)
		if !beyondResume(err) {
			return err
		}
		return w.create()
	}
	if err != nil {
		return err
	}
	var u undo.Stack
	defer u.Unwind(&err)
	u.Add("remove ingest", func(context.Context) error { return w.in.remove() })
	if err := fault.Point("content.ingest.made"); err != nil {
		return err
	}
	return w.create()
}

// resume goes on where the ingest ends, having hashed it up to there.
func (w *Writer) resume(ctx context.Context) error {
	st, err := w.in.status()
	if err != nil {
		return err
	}
	if w.total > 0 && st.Total > 0 && w.total != st.Total {
		return fmt.Errorf("ingest was begun for %d bytes, not %d: %w", st.Total, w.total, errDamaged)
	}
	total := max(w.total, st.Total)
	if total > 0 && st.Offset > total {
		return fmt.Errorf("ingest has %d bytes of %d: %w", st.Offset, total, errDamaged)
	}
	f, err := w.openData()
	if err != nil {
		return err
	}
	n, err := hashAll(ctx, w.hash, f)
	if err == nil && st.Total != total {
		err = w.in.writeTotal(total)
	}
	if err != nil {
		f.Close()
		return err
	}
	w.f, w.offset, w.total = f, n, total
	w.started, w.updated = st.StartedAt, st.UpdatedAt
	return nil
}

// create describes a new ingest, or one that can't be read back. Whatever is
// left of its data goes first: nothing may join old bytes to a new ref.
func (w *Writer) create() error {
	err := os.Truncate(w.in.path(dataFile), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w.hash.Reset()
	w.started = time.Now()
	w.updated = w.started
	if err := os.WriteFile(w.in.path(refFile), []byte(w.ref), 0o666); err != nil {
		return err
	}
	if err := w.in.writeTime(startedFile, w.started); err != nil {
		return err
	}
	if err := w.in.writeTime(updatedFile, w.updated); err != nil {
		return err
	}
	if w.total > 0 {
		err = w.in.writeTotal(w.total)
	} else if err = os.Remove(w.in.path(totalFile)); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return err
	}
	if err := fault.Point("content.ingest.described"); err != nil {
		return err
	}
	w.f, err = w.openData()
	return err
}

// openData opens the data for reading and writing, and makes it if needed. A
// commit that a crash cut short may have made it read-only.
func (w *Writer) openData() (*os.File, error) {
	path, flags := w.in.path(dataFile), os.O_RDWR|os.O_CREATE|openFlags
	f, err := os.OpenFile(path, flags, 0o666)
	if !errors.Is(err, fs.ErrPermission) {
		return f, err
	}
	if err := os.Chmod(path, 0o644); err != nil {
		return nil, err
	}
	return os.OpenFile(path, flags, 0o666)
}

// hashAll adds to h what r yields, in pieces between which ctx may end it.
func hashAll(ctx context.Context, h hash.Hash, r io.Reader) (n int64, err error) {
	buf := make([]byte, 256<<10)
	for {
		if ctx.Err() != nil {
			return n, context.Cause(ctx)
		}
		m, err := r.Read(buf)
		h.Write(buf[:m])
		n += int64(m)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// Write adds p to the end. On an error, such as a full disk
// (ErrResourceExhausted), the first n bytes are there and count.
func (w *Writer) Write(p []byte) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return 0, fmt.Errorf("write ingest %s: %w", clip(w.ref), w.ended)
	}
	n, err = w.f.WriteAt(p, w.offset)
	w.hash.Write(p[:n])
	w.offset += int64(n)
	w.updated = time.Now()
	if err != nil {
		return n, fmt.Errorf("write ingest %s: %w", clip(w.ref), w.s.explain(err))
	}
	return n, nil
}

// Ref is what the Writer was opened with.
func (w *Writer) Ref() string { return w.ref }

// Status describes the ingest as far as it is written.
func (w *Writer) Status() (Status, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Status{Ref: w.ref, Offset: w.offset, Total: w.total, StartedAt: w.started, UpdatedAt: w.updated}, nil
}

// Offset is the number of bytes so far.
func (w *Writer) Offset() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.offset
}

// Digest is the digest of the bytes so far.
func (w *Writer) Digest() digest.Digest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return digest.NewDigest(w.alg, w.hash)
}

// Truncate discards all bytes so far. Only 0 is a possible size:
// ErrInvalidArgument otherwise.
func (w *Writer) Truncate(size int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if size != 0 {
		return fmt.Errorf("truncate ingest %s to %d: only to 0: %w", clip(w.ref), size, errdefs.ErrInvalidArgument)
	}
	if w.f == nil {
		return fmt.Errorf("truncate ingest %s: %w", clip(w.ref), w.ended)
	}
	if err := w.f.Truncate(0); err != nil {
		return fmt.Errorf("truncate ingest %s: %w", clip(w.ref), err)
	}
	w.hash.Reset()
	w.offset = 0
	w.updated = time.Now()
	return nil
}

// Data opens what is written so far for reading. The bytes are unverified:
// they may go only where a mismatch at Commit can take them back (inv 8).
func (w *Writer) Data() (*Reader, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return nil, fmt.Errorf("read ingest %s: %w", clip(w.ref), w.ended)
	}
	r, err := openReader(w.in.path(dataFile))
	if err != nil {
		return nil, fmt.Errorf("read ingest %s: %w", clip(w.ref), err)
	}
	return r, nil
}

// end closes the Writer for good, with what its methods return from now on,
// and leaves the file to the caller. The caller has w.mu.
func (w *Writer) end(why error) *os.File {
	f := w.f
	w.f, w.ended = nil, why
	return f
}

var errClosed = fmt.Errorf("writer is closed: %w", errdefs.ErrFailedPrecondition)

// Close keeps the ingest for a resume. What a power cut leaves of it is not
// certain, so the bytes are handed to the disk but not waited for. Closing
// again, or after Commit, does nothing.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return nil
	}
	defer w.s.unlock(w.ref)
	f := w.end(errClosed)
	durable.StartWriteback(int(f.Fd()))
	if err := errors.Join(f.Close(), w.in.writeTime(updatedFile, w.updated)); err != nil {
		return fmt.Errorf("close ingest %s: %w", clip(w.ref), w.s.explain(err))
	}
	return nil
}

// abort removes the ingest under the Writer. It is not done if the Writer was
// closed already and no longer holds the ref.
func (w *Writer) abort() (done bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return false, nil
	}
	defer w.s.unlock(w.ref)
	w.end(fmt.Errorf("ingest was removed meanwhile: %w", errdefs.ErrAborted)).Close()
	return true, w.in.abort(w.ref)
}

// Commit verifies what is written and makes it a blob. A size of 0 or an
// empty digest is not compared; ErrFailedPrecondition if one differs, and
// then the ingest stays. ErrAlreadyExists if the blob is there: the ingest is
// dropped, and the blob is as durable as opts ask for. The Writer is closed
// whatever happens.
func (w *Writer) Commit(ctx context.Context, size int64, expected digest.Digest, opts CommitOptions) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return fmt.Errorf("commit ingest %s: %w", clip(w.ref), w.ended)
	}
	defer w.s.unlock(w.ref)
	f := w.end(errClosed)
	defer f.Close()
	dgst, err := w.verify(ctx, f, size, expected)
	if err != nil {
		return fmt.Errorf("commit ingest %s: %w", clip(w.ref), err)
	}
	if err := w.commit(ctx, f, dgst, opts); err != nil {
		return fmt.Errorf("commit blob %s: %w", dgst, w.s.explain(err))
	}
	return nil
}

// verify returns the digest of what is written, if it is what is wanted.
func (w *Writer) verify(ctx context.Context, f *os.File, size int64, expected digest.Digest) (digest.Digest, error) {
	if size < 0 {
		return "", fmt.Errorf("negative size %d: %w", size, errdefs.ErrInvalidArgument)
	}
	if size > 0 && size != w.offset {
		return "", fmt.Errorf("unexpected commit size %d, expected %d: %w", w.offset, size, errdefs.ErrFailedPrecondition)
	}
	if fi, err := f.Stat(); err != nil {
		return "", err
	} else if fi.Size() != w.offset {
		return "", fmt.Errorf("%d bytes were written but the file has %d: somebody else changed it: %w",
			w.offset, fi.Size(), errdefs.ErrFailedPrecondition)
	}
	h, alg := w.hash, w.alg
	if expected != "" {
		if err := checkDigest(expected); err != nil {
			return "", err
		}
		if alg = expected.Algorithm(); alg != w.alg {
			h = hashes[alg]()
			if _, err := hashAll(ctx, h, io.NewSectionReader(f, 0, w.offset)); err != nil {
				return "", err
			}
		}
	}
	dgst := digest.NewDigest(alg, h)
	if expected != "" && expected != dgst {
		return "", fmt.Errorf("unexpected commit digest %s, expected %s: %w", dgst, expected, errdefs.ErrFailedPrecondition)
	}
	return dgst, nil
}

// commit turns the verified ingest into the blob dgst. Bytes are synced before
// the rename, so that a name among the blobs means whole bytes; unless the
// caller has promised to sync both before anybody relies on them.
func (w *Writer) commit(ctx context.Context, f *os.File, dgst digest.Digest, opts CommitOptions) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	data, now := w.in.path(dataFile), time.Now()
	if err := os.Chtimes(data, now, now); err != nil {
		return err
	}
	if err := f.Chmod(fi.Mode().Perm() &^ 0o333); err != nil {
		return err
	}
	if !opts.Synced && !opts.Unsynced {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := fault.Point("content.commit.synced"); err != nil {
		return err
	}
	err = w.s.place(ctx, data, dgst, w.offset)
	if errdefs.IsAlreadyExists(err) {
		return w.yield(dgst, opts, err)
	}
	if err != nil {
		return errors.Join(err, f.Chmod(fi.Mode().Perm())) // the ingest stays, and stays writable
	}
	if err := fault.Point("content.commit.renamed"); err != nil {
		return err
	}
	if !opts.Unsynced {
		if err := w.s.syncName(dgst.Algorithm()); err != nil {
			return err
		}
	}
	w.in.remove() // or the next Open does: it has no data any more
	return fault.Point("content.commit.cleared")
}

// yield drops the ingest in favour of the blob that stands in its place, and
// returns exists. The blob may be another writer's who has yet to sync it.
func (w *Writer) yield(dgst digest.Digest, opts CommitOptions, exists error) error {
	if !opts.Unsynced {
		if err := w.s.SyncBlob(dgst); err != nil {
			return err
		}
	}
	if err := w.in.remove(); err != nil {
		return fmt.Errorf("drop ingest %s: %w", clip(w.ref), err)
	}
	return exists
}
