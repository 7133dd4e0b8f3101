package dirs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/linux/tree"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/index"
)

// Create makes snapshots, all or none. The directories are made under
// temporary names, get their ids, and are synced; then one transaction
// records all.
func (s *Store) Create(ctx context.Context, news ...snapshot.New) (err error) {
	c := creation{store: s, began: s.disk.Mark()}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.undo(context.WithoutCancel(ctx)))
		}
		s.end(c.names)
	}()
	for _, n := range news {
		if err := c.prepare(ctx, n); err != nil {
			return fmt.Errorf("create snapshot %s: %w", n.Key, err)
		}
	}
	if err := fault.Point("snapshot.dirs.create.made"); err != nil {
		return err
	}
	if err := c.name(); err != nil {
		return fmt.Errorf("create snapshots: %w", err)
	}
	if err := fault.Point("snapshot.dirs.create.renamed"); err != nil {
		return err
	}
	if err := c.sync(ctx); err != nil {
		return fmt.Errorf("create snapshots: %w", err)
	}
	if err := fault.Point("snapshot.dirs.create.synced"); err != nil {
		return err
	}
	return s.index.Create(c.records...)
}

// creation is one Create under way.
type creation struct {
	store   *Store
	began   durable.Mark
	records []index.Creation
	paths   []string // where the directory of each record is now; "" if it has none
	names   []string // all names in snapshots that were used on the way
}

// prepare makes the directory of n under a temporary name. It looks at keys
// and parents only to fail early and cheaply: the transaction decides.
func (c *creation) prepare(ctx context.Context, n snapshot.New) error {
	if n.Kind != snapshot.KindActive && n.Kind != snapshot.KindView {
		return fmt.Errorf("a snapshot of kind %s can't be created: %w", n.Kind, errdefs.ErrInvalidArgument)
	}
	if _, err := c.store.index.Get(n.Key); err == nil {
		return errdefs.ErrAlreadyExists
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	var parents []string
	if n.Parent != "" {
		p, above, err := c.store.Chain(n.Parent)
		if err != nil {
			return fmt.Errorf("parent: %w", err)
		}
		if p.Kind != snapshot.KindCommitted {
			return fmt.Errorf("parent %s is not committed: %w", n.Parent, errdefs.ErrInvalidArgument)
		}
		parents = append([]string{c.store.Path(p.ID)}, above...)
	}
	c.records = append(c.records, index.Creation{New: n})
	c.paths = append(c.paths, "")
	if !c.store.layout.Holds(n.Kind, n.Parent) {
		return nil
	}
	name := newName()
	c.store.begin(name)
	c.names = append(c.names, name)
	dir := filepath.Join(c.store.snapshots, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	c.paths[len(c.paths)-1] = dir
	return c.store.layout.Make(ctx, dir, n, parents)
}

// name gives every record its id, and its directory the name that goes with it.
func (c *creation) name() error {
	first, err := c.store.index.Reserve(len(c.records))
	if err != nil {
		return err
	}
	for i := range c.records {
		id := first + uint64(i)
		for c.paths[i] != "" {
			// A directory of that name is left from an index that was lost
			// or is older than it. It stays; a number costs nothing.
			_, err := os.Lstat(c.store.Path(id))
			if errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err != nil {
				return err
			}
			if id, err = c.store.index.Reserve(1); err != nil {
				return err
			}
		}
		c.records[i].ID = id
		if c.paths[i] == "" {
			continue
		}
		to := c.store.Path(id)
		c.store.begin(filepath.Base(to))
		c.names = append(c.names, filepath.Base(to))
		if err := os.Rename(c.paths[i], to); err != nil {
			return err
		}
		c.paths[i] = to
	}
	return nil
}

// fewDirectories is up to how many new directories are synced one by one.
// Each costs the disk a flush, even if a journal has made it durable already;
// one syncfs costs one, and waits for other people's bytes instead.
const fewDirectories = 16

// sync makes the new names durable, and what is below them.
func (c *creation) sync(ctx context.Context) error {
	made := slices.DeleteFunc(slices.Clone(c.paths), func(dir string) bool { return dir == "" })
	if len(made) == 0 {
		return nil
	}
	if len(made) > fewDirectories {
		return c.store.disk.SyncSince(ctx, c.began)
	}
	// The directory that holds them comes first: with a journal it takes the
	// others along.
	if err := durable.SyncDir(c.store.snapshots); err != nil {
		return err
	}
	for _, dir := range made {
		if err := errors.Join(durable.SyncDir(dir), c.store.layout.Sync(dir)); err != nil {
			return err
		}
	}
	return nil
}

// undo removes the directories, unless the transaction has come through in
// spite of its error: when its last sync fails, it may.
func (c *creation) undo(ctx context.Context) error {
	var errs []error
	for i, dir := range c.paths {
		if dir == "" {
			continue
		}
		if r, err := c.store.index.Get(c.records[i].Key); err == nil && r.ID == c.records[i].ID {
			continue
		}
		errs = append(errs, tree.Remove(ctx, dir))
	}
	return errors.Join(errs...)
}
