package content

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/keylock"
)

// Options of a Store. The zero value works.
type Options struct {
	// MaxWriters bounds the Writers that are open at once, each of which
	// holds a file descriptor (inv 10). Default 4096.
	MaxWriters int
}

// Store is a directory of blobs and of ingests. Its methods may be called at
// the same time. One process at a time may have a directory open.
type Store struct {
	dir, trash string
	opts       Options

	placing keylock.Locks[digest.Digest] // from the look at a blob's place to the rename

	mu     sync.Mutex
	held   map[string]*hold          // refs that a Writer has, or is about to have
	synced map[digest.Algorithm]bool // whose directory is known to be durable
	closed bool
}

// Info describes a committed blob.
type Info struct {
	Digest           digest.Digest
	Size             int64     // in bytes
	Created, Updated time.Time // modification and access time of the file
}

// Open makes dir if needed, and opens the store in it. trash is a directory
// (made if needed, 0700) to which removed blobs go before they are unlinked;
// it should lie on the same file system.
//
// Nobody writes yet, so Open also clears what a crash has left: files in
// trash, and ingests that nothing can resume since they lack their ref or
// their data. What can't be cleared is no reason not to serve, and shows
// among the Strays.
func Open(dir, trash string, opts Options) (*Store, error) {
	if opts.MaxWriters == 0 {
		opts.MaxWriters = 4096
	}
	s := &Store{
		dir: dir, trash: trash, opts: opts,
		held:   make(map[string]*hold),
		synced: make(map[digest.Algorithm]bool),
	}
	for _, d := range []string{dir, filepath.Join(dir, blobsDir), filepath.Join(dir, ingestDir)} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("open content store: %w", err)
		}
	}
	if err := os.MkdirAll(trash, 0o700); err != nil {
		return nil, fmt.Errorf("open content store: %w", err)
	}
	if err := os.Chmod(trash, 0o700); err != nil {
		return nil, fmt.Errorf("open content store: %w", err)
	}
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := durable.SyncDir(d); err != nil {
			return nil, fmt.Errorf("open content store: %w", err)
		}
	}
	if err := s.emptyTrash(); err != nil {
		return nil, fmt.Errorf("open content store: %w", err)
	}
	if err := s.sweepIngests(); err != nil {
		return nil, fmt.Errorf("open content store: %w", err)
	}
	return s, nil
}

// emptyTrash removes what lies in trash: blobs whose unlink a crash came before.
func (s *Store) emptyTrash() error {
	entries, err := os.ReadDir(s.trash)
	if err != nil {
		return err
	}
	for _, e := range entries {
		os.RemoveAll(filepath.Join(s.trash, e.Name())) // or at the next Open
	}
	return nil
}

// Close closes every open Writer, whose ingests stay for a resume, and makes
// new ones fail. Blobs stay readable.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	var open []*Writer
	for _, h := range s.held {
		if h.w != nil {
			open = append(open, h.w)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, w := range open {
		errs = append(errs, w.Close())
	}
	return errors.Join(errs...)
}

// Info describes the blob dgst, or returns ErrNotFound.
func (s *Store) Info(dgst digest.Digest) (Info, error) {
	if err := checkDigest(dgst); err != nil {
		return Info{}, err
	}
	fi, err := os.Lstat(s.blobPath(dgst))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
		return Info{}, fmt.Errorf("content %s: %w", dgst, errdefs.ErrNotFound)
	}
	if err != nil {
		return Info{}, fmt.Errorf("content %s: %w", dgst, err)
	}
	return info(dgst, fi), nil
}

func info(dgst digest.Digest, fi fs.FileInfo) Info {
	i := Info{Digest: dgst, Size: fi.Size(), Created: fi.ModTime(), Updated: fi.ModTime()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		i.Updated = time.Unix(st.Atim.Unix())
	}
	return i
}

// Reader opens the blob dgst, or returns ErrNotFound.
func (s *Store) Reader(dgst digest.Digest) (*Reader, error) {
	if err := checkDigest(dgst); err != nil {
		return nil, err
	}
	r, err := openReader(s.blobPath(dgst))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("content %s: %w", dgst, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("content %s: %w", dgst, err)
	}
	return r, nil
}

// Remove takes the blob dgst away, or returns ErrNotFound. It goes by rename,
// so the name is free at once however large the file is; open Readers keep
// what they have. After a power cut the blob may be there again, which does no
// harm: its record went first (inv 2).
func (s *Store) Remove(dgst digest.Digest) error {
	if _, err := s.Info(dgst); err != nil {
		return err
	}
	path := s.blobPath(dgst)
	gone := filepath.Join(s.trash, dgst.Algorithm().String()+"-"+dgst.Encoded())
	err := os.Rename(path, gone)
	if errors.Is(err, syscall.EXDEV) {
		gone, err = path, nil // the trash lies elsewhere: slower, but right
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("content %s: %w", dgst, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("remove blob %s: %w", dgst, err)
	}
	if err := fault.Point("content.remove.trashed"); err != nil {
		return err
	}
	if err := os.Remove(gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove blob %s: %w", dgst, err)
	}
	return nil
}

// SyncBlob makes a blob that is in place durable, bytes and name. It is for
// callers about to record a blob that somebody else has put there, perhaps
// with CommitOptions.Unsynced and not yet synced (inv 1).
func (s *Store) SyncBlob(dgst digest.Digest) error {
	if err := checkDigest(dgst); err != nil {
		return err
	}
	f, err := os.Open(s.blobPath(dgst))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("content %s: %w", dgst, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("sync blob %s: %w", dgst, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync blob %s: %w", dgst, err)
	}
	if err := s.syncName(dgst.Algorithm()); err != nil {
		return fmt.Errorf("sync blob %s: %w", dgst, err)
	}
	return nil
}

// syncName makes the names in an algorithm's directory durable, and, once in
// a process's life, the name of the directory itself.
func (s *Store) syncName(alg digest.Algorithm) error {
	blobs := filepath.Join(s.dir, blobsDir)
	if err := durable.SyncDir(filepath.Join(blobs, alg.String())); err != nil {
		return err
	}
	s.mu.Lock()
	known := s.synced[alg]
	s.mu.Unlock()
	if known {
		return nil
	}
	if err := durable.SyncDir(blobs); err != nil {
		return err
	}
	s.mu.Lock()
	s.synced[alg] = true
	s.mu.Unlock()
	return nil
}

// exists reports whether a whole blob stands in its place. A file of another
// size is damage, and no reason to refuse verified bytes.
func (s *Store) exists(dgst digest.Digest, size int64) (bool, error) {
	fi, err := os.Lstat(s.blobPath(dgst))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return fi.Mode().IsRegular() && fi.Size() == size, nil
}

// place moves a verified file to the place of its digest. If a blob is there
// it stays (inv 4), and place returns ErrAlreadyExists.
func (s *Store) place(ctx context.Context, file string, dgst digest.Digest, size int64) error {
	unlock, err := s.placing.Lock(ctx, dgst)
	if err != nil {
		return err
	}
	defer unlock()
	switch there, err := s.exists(dgst, size); {
	case err != nil:
		return err
	case there:
		return fmt.Errorf("content %s: %w", dgst, errdefs.ErrAlreadyExists)
	}
	target := s.blobPath(dgst)
	if err := os.Mkdir(filepath.Dir(target), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Rename(file, target)
}

// Blobs yields every blob, in the order of the digests. Names that no blob
// can have are left out; see Strays. An error ends what it is about, not the
// iteration.
func (s *Store) Blobs() iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		s.walkBlobs(func(path string, i Info, err error) bool {
			if err == nil && i.Digest == "" {
				return true
			}
			return yield(i, err)
		})
	}
}

// walkBlobs visits every name below blobs/. A name that is no blob's comes
// with an empty Info.
func (s *Store) walkBlobs(visit func(path string, i Info, err error) bool) {
	blobs := filepath.Join(s.dir, blobsDir)
	algs, err := os.ReadDir(blobs)
	if err != nil {
		visit(blobs, Info{}, fmt.Errorf("list blobs: %w", err))
		return
	}
	for _, a := range algs {
		alg, dir := digest.Algorithm(a.Name()), filepath.Join(blobs, a.Name())
		if !a.IsDir() || hashes[alg] == nil {
			if !visit(dir, Info{}, nil) {
				return
			}
			continue
		}
		names, err := os.ReadDir(dir)
		if err != nil && !visit(dir, Info{}, fmt.Errorf("list blobs: %w", err)) {
			return
		}
		for _, n := range names {
			path := filepath.Join(dir, n.Name())
			if alg.Validate(n.Name()) != nil || !n.Type().IsRegular() {
				if !visit(path, Info{}, nil) {
					return
				}
				continue
			}
			fi, err := n.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed meanwhile
			}
			if err != nil {
				if !visit(path, Info{}, fmt.Errorf("list blobs: %w", err)) {
					return
				}
				continue
			}
			if !visit(path, info(digest.NewDigestFromEncoded(alg, n.Name()), fi), nil) {
				return
			}
		}
	}
}

// Strays yields the paths of what is neither a blob nor an ingest that
// somebody could resume. They do no harm, and are nobody's to remove.
func (s *Store) Strays() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		more := true
		s.walkBlobs(func(path string, i Info, err error) bool {
			if err != nil || i.Digest == "" {
				more = yield(path, err)
			}
			return more
		})
		if !more {
			return
		}
		for path, err := range s.strayIngests() {
			if !yield(path, err) {
				return
			}
		}
	}
}
