// Package meta keeps every named record in one bolt file, knows which record needs which, and collects what none needs.
package meta

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/keylock"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Options of a database. The zero value works.
type Options struct {
	// Isolated makes a namespace send every byte of a blob that only others
	// have (content_sharing_policy = "isolated"). Default: it may have it.
	Isolated bool
	// OpenTimeout bounds the wait for another process to give the file up. 0 waits for ever.
	OpenTimeout time.Duration
	// NoSync leaves syncing to the kernel: a power cut may then cost the file.
	NoSync bool
	// Committed, if set, is called after each bolt commit with the number of
	// callers that shared it.
	Committed func(callers int)
	// Changed, if set, is called after each change; deleted says that
	// something may have become collectible. It must not block.
	Changed func(deleted bool)
	// Log hears what nobody is left to be told. Default: nobody.
	Log *slog.Logger
}

// DB is an open meta.db with the stores that hold what it names. Its methods,
// and those of what it hands out, may be called from several goroutines unless they say otherwise.
type DB struct {
	bolt    *bolt.DB
	path    string
	blobs   *content.Store
	drivers map[string]snapshot.Driver
	opts    Options
	log     *slog.Logger

	writing chan struct{} // holds a token while somebody has bolt's write transaction
	queue   queue

	pins       pins
	sequences  sequences
	dirt       dirt
	collecting keylock.Locks[struct{}]

	recovered []string
}

// lockPatience is how long Open waits for the file before it says so.
const lockPatience = 10 * time.Second

// Open opens or makes the file at path and migrates it. Then, before it
// returns, it makes records and bytes agree (inv 2): see recover. It doesn't
// close blobs and drivers. ErrUnavailable when another process keeps the file
// longer than OpenTimeout; ErrFailedPrecondition when there is no meta.db but the stores
// aren't empty.
func Open(ctx context.Context, path string, blobs *content.Store, drivers map[string]snapshot.Driver, opts Options) (*DB, error) {
	db := &DB{
		path: path, blobs: blobs, drivers: drivers, opts: opts, log: opts.Log,
		writing: make(chan struct{}, 1),
	}
	if db.log == nil {
		db.log = slog.New(slog.DiscardHandler)
	}
	info, err := os.Stat(path)
	absent := errors.Is(err, os.ErrNotExist)
	if absent || err == nil && info.Size() == 0 {
		if err := db.checkFresh(ctx); err != nil { // before anything is written
			return nil, err
		}
	}
	if absent {
		if err := db.create(ctx); err != nil {
			return nil, fmt.Errorf("create %s: %w", path, err)
		}
	}
	if err := db.openBolt(ctx, path); err != nil {
		return nil, err
	}
	if err := db.prepare(ctx); err != nil {
		return nil, errors.Join(err, db.bolt.Close())
	}
	return db, nil
}

// prepare makes an open file ready for use.
func (db *DB) prepare(ctx context.Context) error {
	fresh := false
	err := db.bolt.View(func(btx *bolt.Tx) error {
		fresh = !root(btx, nil).exists()
		return nil
	})
	if err != nil {
		return err
	}
	if fresh {
		if err := db.checkFresh(ctx); err != nil {
			return err
		}
	}
	if err := db.migrate(); err != nil {
		return fmt.Errorf("migrate %s: %w", db.path, err)
	}
	return db.recover(ctx)
}

// create makes the file under another name first: bolt's beginnings aren't
// atomic, and one that a power cut left half done can't be opened. The name is
// made durable, since stores without their meta.db are refused.
func (db *DB) create(ctx context.Context) error {
	next := db.path + ".new"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := db.openBolt(ctx, next); err != nil {
		return err
	}
	if err := errors.Join(db.migrate(), db.bolt.Close()); err != nil {
		return err
	}
	if err := fault.Point("meta.create.written"); err != nil {
		return err
	}
	// Unlike a rename, a link doesn't replace what somebody else has made.
	if err := os.Link(next, db.path); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.Remove(next); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(db.path))
}

// openBolt waits for the file's lock in short steps, since bolt knows no
// context.
func (db *DB) openBolt(ctx context.Context, path string) error {
	const step = time.Second
	start := time.Now()
	said := false
	for {
		wait := step
		if db.opts.OpenTimeout > 0 {
			wait = max(min(step, db.opts.OpenTimeout-time.Since(start)), time.Millisecond)
		}
		b, err := bolt.Open(path, 0o644, &bolt.Options{
			Timeout:        wait,
			NoFreelistSync: true,
			NoStatistics:   true,
			NoSync:         db.opts.NoSync,
			NoGrowSync:     db.opts.NoSync,
		})
		if err == nil {
			db.bolt = b
			return nil
		}
		switch waited := time.Since(start); {
		case !errors.Is(err, bolterrors.ErrTimeout):
			return fmt.Errorf("open %s: %w", path, err)
		case ctx.Err() != nil:
			return fmt.Errorf("wait for %s: %w", path, context.Cause(ctx))
		case db.opts.OpenTimeout > 0 && waited >= db.opts.OpenTimeout:
			return fmt.Errorf("%s is in use by another process, for more than %s: stop it first: %w", path, db.opts.OpenTimeout, errdefs.ErrUnavailable)
		case waited >= lockPatience && !said:
			said = true
			db.log.Warn("waiting for another process to give up the database", "path", path)
		}
	}
}

// Close waits for transactions and closes the file. Whoever calls a method
// after that gets an error.
func (db *DB) Close() error {
	db.writing <- struct{}{}
	defer func() { <-db.writing }()
	if err := db.bolt.Close(); err != nil {
		return fmt.Errorf("close %s: %w", db.path, err)
	}
	return nil
}

// Recovered has one line for each thing that Open dropped, removed or took back.
func (db *DB) Recovered() []string { return slices.Clone(db.recovered) }
