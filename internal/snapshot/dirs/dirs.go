// Package dirs keeps a driver's snapshot directories in step with its index.
//
// The layout is containerd's for drivers that keep plain directories:
//
//	<root>                      0700
//	├── metadata.db             the index
//	└── snapshots               0700
//	    ├── <id>                a snapshot: the decimal id that the index has for its key
//	    ├── new-<random>        one that is being made
//	    └── rm-<id>             one that is being removed
//
// A directory has its final name, and is synced, before the transaction that
// records it (inv 1); a key is removed before its directory (inv 2). So what
// a crash leaves are directories that no key names.
package dirs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/keylock"
	"github.com/holdfast-dev/holdfast/internal/linux/tree"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/index"
)

const (
	newPrefix = "new-"
	oldPrefix = "rm-"
)

// Layout is what drivers do differently. Directories are given as
// `<root>/snapshots/<id>`, parents nearest first.
type Layout struct {
	// Holds says whether a snapshot has a directory of its own.
	Holds func(kind snapshot.Kind, parent string) bool
	// Make fills dir, which is new and empty. When it fails, dir is removed.
	Make func(ctx context.Context, dir string, n snapshot.New, parents []string) error
	// Sync makes durable what Make has put into dir, except for the contents
	// of files that it has copied. dir has another name by now.
	Sync func(dir string) error
	// Finish prepares dir for being committed, syncs what it changes in it,
	// and counts it. rebased says that the parents are new to it.
	Finish func(ctx context.Context, dir string, step snapshot.Commit, parents []string, rebased bool) (snapshot.Usage, error)
	// Rebase says whether an active snapshot may get its parent at commit.
	Rebase bool
}

// Store is one root directory of a driver. Its methods may be called at once
// from several goroutines.
type Store struct {
	snapshots string
	layout    Layout
	index     *index.Index
	disk      *durable.FS
	busy      keylock.Locks[string] // keys that are being committed or removed

	closing sync.Once
	closed  error

	mu     sync.Mutex
	making map[string]bool // names in snapshots that the index does not know yet
}

// Open makes the root if it is missing. The index is opened when it is needed.
func Open(root string, layout Layout, opts index.Options) (*Store, error) {
	snapshots := filepath.Join(root, "snapshots")
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	err := os.Mkdir(snapshots, 0o700)
	if err == nil {
		err = errors.Join(durable.SyncDir(root), durable.SyncDir(filepath.Dir(root)))
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	// Nobody else may look into images; old daemons left wider modes.
	if err := os.Chmod(snapshots, 0o700); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	disk, err := durable.OpenFS(snapshots)
	if err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	return &Store{
		snapshots: snapshots, layout: layout, disk: disk, making: make(map[string]bool),
		index: index.New(filepath.Join(root, "metadata.db"), opts),
	}, nil
}

// Close waits for what is under way and releases the index. A second call
// does nothing.
func (s *Store) Close() error {
	s.closing.Do(func() { s.closed = errors.Join(s.index.Close(), s.disk.Close()) })
	return s.closed
}

// Path is the directory of the snapshot with an id, whether it is there or not.
func (s *Store) Path(id uint64) string { return filepath.Join(s.snapshots, strconv.FormatUint(id, 10)) }

func (s *Store) paths(records []index.Record) []string {
	out := make([]string, len(records))
	for i, r := range records {
		out[i] = s.Path(r.ID)
	}
	return out
}

// Get reads a snapshot; ErrNotFound also if its directory is missing.
func (s *Store) Get(key string) (index.Record, error) {
	r, err := s.index.Get(key)
	if err == nil {
		err = s.present(r)
	}
	return r, err
}

// Chain reads a snapshot and the paths of its parents, nearest first;
// ErrNotFound if any of the directories is missing.
func (s *Store) Chain(key string) (index.Record, []string, error) {
	r, parents, err := s.index.Chain(key)
	if err != nil {
		return r, nil, err
	}
	for _, r := range append([]index.Record{r}, parents...) {
		if err := s.present(r); err != nil {
			return r, nil, err
		}
	}
	return r, s.paths(parents), nil
}

func (s *Store) present(r index.Record) error {
	if !s.layout.Holds(r.Kind, r.Parent) {
		return nil
	}
	if _, err := os.Lstat(s.Path(r.ID)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("snapshot %s: its directory %s is missing: %w", r.Key, s.Path(r.ID), errdefs.ErrNotFound)
	} else if err != nil {
		return fmt.Errorf("snapshot %s: %w", r.Key, err)
	}
	return nil
}

// Walk yields every snapshot in the order of keys, also those whose directory
// is missing.
func (s *Store) Walk(ctx context.Context) iter.Seq2[index.Record, error] {
	return func(yield func(index.Record, error) bool) {
		for r, err := range s.index.Walk() {
			if err == nil {
				err = context.Cause(ctx)
			}
			if !yield(r, err) || err != nil {
				return
			}
		}
	}
}

// Update changes labels.
func (s *Store) Update(key string, labels map[string]string, fields ...string) (index.Record, error) {
	return s.index.Update(key, labels, fields...)
}

// Remove forgets a snapshot, then removes its directory, as far as it goes:
// the rest is left for Cleanup.
func (s *Store) Remove(ctx context.Context, key string) error {
	unlock, err := s.busy.Lock(ctx, key)
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	defer unlock()
	r, err := s.index.Remove(key)
	if err != nil {
		return err
	}
	if err := fault.Point("snapshot.dirs.remove.unindexed"); err != nil {
		return err
	}
	if !s.layout.Holds(r.Kind, r.Parent) {
		return nil
	}
	old := filepath.Join(s.snapshots, oldPrefix+filepath.Base(s.Path(r.ID)))
	if err := os.Rename(s.Path(r.ID), old); err != nil {
		return nil // the key is gone, and with it the snapshot
	}
	if err := fault.Point("snapshot.dirs.remove.renamed"); err != nil {
		return err
	}
	_ = tree.Remove(ctx, old) // Cleanup tries again and tells
	return nil
}

// Cleanup removes the directories that no key names, and joins the errors.
// Names that no driver gives are left alone. If there is no index at all,
// snapshots are left alone too: it was lost, and they may be worth rescuing.
func (s *Store) Cleanup(ctx context.Context) error {
	garbage, err := s.garbage()
	if err != nil {
		return fmt.Errorf("clean up snapshots: %w", err)
	}
	var errs []error
	for _, name := range garbage {
		if err := context.Cause(ctx); err != nil {
			return errors.Join(append(errs, err)...)
		}
		errs = append(errs, tree.Remove(ctx, filepath.Join(s.snapshots, name)))
	}
	return errors.Join(errs...)
}

// garbage lists names in this order: what is on disk, what is being made,
// what the index knows. A directory on the first list is then either on one
// of the others, or nobody's: what is being made leaves the second list only
// after it has entered the third.
func (s *Store) garbage() ([]string, error) {
	names, err := readNames(s.snapshots)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	names = slices.DeleteFunc(names, func(n string) bool { return s.making[n] })
	s.mu.Unlock()
	indexed, err := s.index.Exists()
	if err != nil {
		return nil, err
	}
	ids, err := s.index.IDs()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(n string) bool {
		if strings.HasPrefix(n, newPrefix) || strings.HasPrefix(n, oldPrefix) {
			return false
		}
		id, err := strconv.ParseUint(n, 10, 64)
		if err != nil || strconv.FormatUint(id, 10) != n || !indexed {
			return true
		}
		_, ok := ids[id]
		return ok
	}), nil
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// begin marks a name as being made, so that Cleanup spares it.
func (s *Store) begin(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.making[name] = true
}

func (s *Store) end(names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range names {
		delete(s.making, n)
	}
}

func newName() string { return newPrefix + rand.Text() }
