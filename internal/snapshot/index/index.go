// Package index records the keys, parents and kinds of a driver's snapshots.
//
// It is containerd's file, so that either daemon can go on where the other
// stopped. Numbers are varints of encoding/binary, times are
// time.MarshalBinary in UTC, and a label that would be empty is not there:
//
//	metadata.db                             bbolt, 0600, made at the first write
//	└── v1
//	    ├── snapshots                       its sequence number: the last id given
//	    │   └── <key or name>
//	    │       ├── id         uvarint      in decimal, the name of the directory
//	    │       ├── kind       byte         1 view, 2 active, 3 committed
//	    │       ├── parent     string       name; missing at the bottom
//	    │       ├── createdat  time
//	    │       ├── updatedat  time
//	    │       ├── inodes     varint       committed only
//	    │       ├── size       varint       committed only; bytes
//	    │       └── labels
//	    │           └── <key>  string
//	    └── parents
//	        └── <uvarint parent id> 0x00 <uvarint child id>   → key or name of the child
package index

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Options change what New returns. The zero value works.
type Options struct {
	// OpenTimeout is how long to wait for another process to let go of the
	// file. 0 = 10 s.
	OpenTimeout time.Duration
	// Committed, if set, is called after each transaction that was written.
	Committed func()
}

// Index is one metadata.db. Its methods may be called at once from several
// goroutines.
type Index struct {
	path string
	opts Options

	mu       sync.Mutex
	db       *bolt.DB // nil until the file is needed
	closed   bool
	reserved uint64 // the last id given out by Reserve
}

// Record is what the index knows of one snapshot.
type Record struct {
	snapshot.Info
	ID    uint64         // its directory's name, in decimal; never used again
	Usage snapshot.Usage // zero unless committed
}

// New returns the index in the file at path. It touches nothing: the file is
// opened when it is first needed, and made by the first write.
func New(path string, opts Options) *Index {
	if opts.OpenTimeout == 0 {
		opts.OpenTimeout = 10 * time.Second
	}
	return &Index{path: path, opts: opts}
}

// Close waits for transactions under way and releases the file.
func (x *Index) Close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.closed = true
	if x.db == nil {
		return nil
	}
	db := x.db
	x.db = nil
	return db.Close()
}

// open returns the database, or nil if the file is missing and create is false.
func (x *Index) open(create bool) (*bolt.DB, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return nil, fmt.Errorf("%s is closed: %w", x.path, errdefs.ErrUnavailable)
	}
	if x.db != nil {
		return x.db, nil
	}
	if _, err := os.Stat(x.path); errors.Is(err, os.ErrNotExist) {
		if !create {
			return nil, nil
		}
		if err := x.create(); err != nil {
			return nil, fmt.Errorf("create %s: %w", x.path, err)
		}
	}
	db, err := bolt.Open(x.path, 0o600, x.bolt())
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("open %s: another process holds it; stop that daemon first: %w", x.path, errdefs.ErrUnavailable)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", x.path, err)
	}
	x.db = db
	return db, nil
}

// create makes the file under another name first: bolt refuses a file that a
// power cut left half written.
func (x *Index) create() error {
	tmp := x.path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	db, err := bolt.Open(tmp, 0o600, x.bolt()) // which syncs it
	if err != nil {
		return err
	}
	if err := db.Close(); err != nil {
		return err
	}
	if err := fault.Point("snapshot.index.create.written"); err != nil {
		return err
	}
	if err := os.Rename(tmp, x.path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(x.path))
}

func (x *Index) bolt() *bolt.Options {
	opts := *bolt.DefaultOptions
	opts.Timeout = x.opts.OpenTimeout
	opts.NoStatistics = true
	return &opts
}

// view runs f in a read transaction. Nothing is sent, awaited or walked in it
// (inv 5). A missing file reads as an empty one.
func (x *Index) view(f func(b buckets) error) error {
	db, err := x.open(false)
	if err != nil {
		return err
	}
	if db == nil {
		return f(buckets{})
	}
	return closedOr(x.path, db.View(func(tx *bolt.Tx) error {
		return f(read(tx))
	}))
}

// update runs f in a write transaction, commits and syncs it. f touches
// nothing but the file (inv 5).
func (x *Index) update(f func(b buckets) error) error {
	db, err := x.open(true)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		b, err := createBuckets(tx)
		if err != nil {
			return err
		}
		if err := f(b); err != nil {
			return err
		}
		return fault.Point("snapshot.index.committing")
	})
	if err != nil {
		return closedOr(x.path, err)
	}
	if x.opts.Committed != nil {
		x.opts.Committed()
	}
	return fault.Point("snapshot.index.committed")
}

func closedOr(path string, err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return fmt.Errorf("%s is closed: %w", path, errdefs.ErrUnavailable)
	}
	return err
}

// Exists says whether the file is there, and so whether a directory that it
// does not name is garbage. Without the file nobody knows.
func (x *Index) Exists() (bool, error) {
	db, err := x.open(false)
	return db != nil, err
}

// Reserve gives out n ids, the first of which it returns, so that directories
// can have their names before the transaction that records them. No id is
// given out twice while the Index is open. Those that are not recorded may be
// given out again after the next Open; by then Cleanup has removed their directories.
func (x *Index) Reserve(n int) (uint64, error) {
	// The file comes before any directory: a directory without it is a
	// directory whose index was lost, and that may be worth rescuing.
	if _, err := x.open(true); err != nil {
		return 0, err
	}
	var last uint64
	if err := x.view(func(b buckets) error {
		if b.snapshots != nil {
			last = b.snapshots.Sequence()
		}
		return nil
	}); err != nil {
		return 0, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	first := max(last, x.reserved) + 1
	x.reserved = first + uint64(n) - 1
	return first, nil
}
