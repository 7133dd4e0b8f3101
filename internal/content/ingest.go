package content

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/fault"
)

// Status describes an ingest.
type Status struct {
	Ref                  string
	Offset               int64         // bytes so far
	Total                int64         // bytes expected; 0 if not known
	Expected             digest.Digest // always "" here; meta knows it
	StartedAt, UpdatedAt time.Time
}

// hold keeps a ref for one Writer.
type hold struct {
	since time.Time
	w     *Writer // nil while it is being opened
}

// lock takes ref, if no more than most refs are held then. If ref is held it
// returns ErrUnavailable, and the Writer that has it unless that is only being
// opened.
func (s *Store) lock(ref string, most int) (holder *Writer, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch h := s.held[ref]; {
	case s.closed:
		return nil, fmt.Errorf("content store: %w", fs.ErrClosed)
	case h != nil:
		return h.w, fmt.Errorf("ref %s locked for %s (since %s): %w",
			clip(ref), time.Since(h.since), h.since.Format(time.RFC3339Nano), errdefs.ErrUnavailable)
	case len(s.held) >= most:
		return nil, fmt.Errorf("%d ingests are being written, which is the most; try again later: %w",
			len(s.held), errdefs.ErrUnavailable)
	}
	s.held[ref] = &hold{since: time.Now()}
	return nil, nil
}

func (s *Store) unlock(ref string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.held, ref)
}

// Status describes the ingest of ref, or returns ErrNotFound, also for what
// is left of one that can't be resumed.
func (s *Store) Status(ref string) (Status, error) {
	st, err := s.ingest(ref).status()
	if beyondResume(err) {
		return Status{}, fmt.Errorf("ingest %s: %w", clip(ref), errdefs.ErrNotFound)
	}
	if err != nil {
		return Status{}, fmt.Errorf("ingest %s: %w", clip(ref), err)
	}
	return st, nil
}

// beyondResume reports whether err, from reading an ingest, means that there
// is nothing to go on with. Other errors (no descriptor free, no permission)
// may pass, and the bytes are worth waiting for.
func beyondResume(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errDamaged) ||
		errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EUCLEAN) || errors.Is(err, syscall.EBADMSG)
}

// Statuses yields every ingest that can be resumed, or is being written. An
// error is about one ingest, and doesn't end the iteration.
func (s *Store) Statuses() iter.Seq2[Status, error] {
	return func(yield func(Status, error) bool) {
		for in, err := range s.ingests() {
			if err != nil {
				if !yield(Status{}, err) {
					return
				}
				continue
			}
			st, err := in.status()
			if beyondResume(err) {
				continue // being made or removed at this moment, or a stray
			}
			if err != nil {
				err = fmt.Errorf("list ingests: %w", err)
			}
			if !yield(st, err) {
				return
			}
		}
	}
}

// Refs yields the refs of all ingests, also of those that only Abort is good
// for.
func (s *Store) Refs() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for in, err := range s.ingests() {
			var ref string
			if err == nil {
				ref, err = in.readRef()
			}
			if beyondResume(err) {
				continue
			}
			if err != nil {
				err = fmt.Errorf("list ingests: %w", err)
			}
			if !yield(ref, err) {
				return
			}
		}
	}
}

// ingests yields the directories that ingests may have, by name.
func (s *Store) ingests() iter.Seq2[ingest, error] {
	return func(yield func(ingest, error) bool) {
		dir := filepath.Join(s.dir, ingestDir)
		entries, err := os.ReadDir(dir)
		if err != nil {
			yield("", fmt.Errorf("list ingests: %w", err))
			return
		}
		for _, e := range entries {
			if e.IsDir() && isIngestName(e.Name()) && !yield(ingest(filepath.Join(dir, e.Name())), nil) {
				return
			}
		}
	}
}

// strayIngests yields what stands in ingest/ and no Writer holds or could
// resume.
func (s *Store) strayIngests() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		dir := filepath.Join(s.dir, ingestDir)
		entries, err := os.ReadDir(dir)
		if err != nil {
			yield(dir, fmt.Errorf("list ingests: %w", err))
			return
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			stray := !e.IsDir() || !isIngestName(e.Name())
			if !stray {
				_, err := ingest(path).status()
				stray = beyondResume(err) && !s.holds(e.Name())
			}
			if stray && !yield(path, nil) {
				return
			}
		}
	}
}

// holds reports whether the ingest in the directory name is being written.
func (s *Store) holds(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ref := range s.held {
		if ingestName(ref) == name {
			return true
		}
	}
	return false
}

// sweepIngests removes, before anybody writes, what a crash has left of
// ingests that were just being made, committed or aborted.
func (s *Store) sweepIngests() error {
	for in, err := range s.ingests() {
		if err != nil {
			return err
		}
		_, err := in.readRef()
		if err == nil {
			_, err = os.Lstat(in.path(dataFile))
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errDamaged) {
			in.remove() // or it shows among the Strays
		}
	}
	return nil
}

// TakeBack makes the blob dgst the ingest of ref again, with all its bytes,
// for who has found that nothing names the blob and that ref was to become it:
// it died between the commit and the record. The bytes count as unverified from now
// on. ErrNotFound if there is no such blob, ErrAlreadyExists if the ingest has
// bytes of its own.
func (s *Store) TakeBack(dgst digest.Digest, ref string) error {
	info, err := s.Info(dgst)
	if err != nil {
		return fmt.Errorf("take back blob: %w", err)
	}
	if _, err := s.lock(ref, math.MaxInt); err != nil {
		return fmt.Errorf("take back blob %s: %w", dgst, err)
	}
	defer s.unlock(ref)
	in := s.ingest(ref)
	if err := in.takeBack(s.blobPath(dgst), ref, info); err != nil {
		return fmt.Errorf("take back blob %s: %w", dgst, err)
	}
	return nil
}

// takeBack describes the ingest before it gets its bytes: a crash on the way
// leaves the blob in its place.
func (in ingest) takeBack(blob, ref string, info Info) error {
	if _, err := os.Lstat(in.path(dataFile)); err == nil {
		return fmt.Errorf("ingest %s has bytes: %w", clip(ref), errdefs.ErrAlreadyExists)
	}
	if err := os.Mkdir(string(in), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	err := errors.Join(
		os.WriteFile(in.path(refFile), []byte(ref), 0o666),
		in.writeTime(startedFile, info.Created),
		in.writeTime(updatedFile, info.Created),
		in.writeTotal(info.Size),
	)
	if err != nil {
		return err
	}
	if err := fault.Point("content.takeback.described"); err != nil {
		return err
	}
	return os.Rename(blob, in.path(dataFile))
}

// Abort removes the ingest of ref, or returns ErrNotFound. If it is being
// written, its Writer is closed first, and fails with ErrAborted from then on;
// if it is being opened, which may mean minutes of hashing, ErrUnavailable.
func (s *Store) Abort(ref string) error {
	for {
		holder, err := s.lock(ref, math.MaxInt)
		if err == nil {
			defer s.unlock(ref)
			return s.ingest(ref).abort(ref)
		}
		if holder == nil {
			return fmt.Errorf("abort ingest: %w", err)
		}
		if done, err := holder.abort(); done {
			return err
		}
	}
}

// abort removes the ingest, whose ref the caller holds.
func (in ingest) abort(ref string) error {
	if _, err := os.Lstat(string(in)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("ingest %s: %w", clip(ref), errdefs.ErrNotFound)
	}
	if err := in.remove(); err != nil {
		return fmt.Errorf("abort ingest %s: %w", clip(ref), err)
	}
	return nil
}

// remove deletes the files of an ingest in their order, and the directory.
// A crash on the way leaves a directory without ref, which Open clears.
func (in ingest) remove() error {
	known := []string{
		refFile, startedFile, updatedFile, totalFile, dataFile,
		startedFile + tmpSuffix, updatedFile + tmpSuffix,
	}
	for i, file := range known {
		if err := os.Remove(in.path(file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if i == 0 {
			if err := fault.Point("content.ingest.removing"); err != nil {
				return err
			}
		}
	}
	err := os.Remove(string(in))
	if !errors.Is(err, syscall.ENOTEMPTY) {
		return err
	}
	rest, err := os.ReadDir(string(in))
	if err != nil {
		return err
	}
	for _, e := range rest { // not ours, but in our way
		if err := os.Remove(in.path(e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(string(in))
}
