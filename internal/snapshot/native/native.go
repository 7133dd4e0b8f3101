// Package native stores snapshots as plain copies.
//
// On disk it is containerd's native snapshotter. What is around these
// directories, and in which order they come and go, is told in package dirs:
//
//	<root>/snapshots/<id>   the whole tree, its root 0755 or as the parent's
//
// A view of a parent has no directory: it mounts the parent's, read-only.
package native

import (
	"context"
	"fmt"
	"iter"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/linux/tree"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/dirs"
	"github.com/holdfast-dev/holdfast/internal/snapshot/index"
)

// Options change what Open returns. The zero value works.
type Options struct {
	// OpenTimeout and Committed are those of index.Options.
	OpenTimeout time.Duration
	Committed   func()
}

// Driver is the native driver. It implements snapshot.Driver.
type Driver struct {
	store *dirs.Store
}

var _ snapshot.Driver = (*Driver)(nil)

// Open makes root if it is missing and opens the snapshots in it. Cleanup
// must run before anything else.
func Open(root string, opts Options) (*Driver, error) {
	layout := dirs.Layout{
		Holds:  holds,
		Make:   makeTree,
		Sync:   func(string) error { return nil }, // the root is all that there is, contents apart
		Finish: finish,
	}
	store, err := dirs.Open(root, layout, index.Options{OpenTimeout: opts.OpenTimeout, Committed: opts.Committed})
	if err != nil {
		return nil, fmt.Errorf("native snapshots: %w", err)
	}
	return &Driver{store}, nil
}

func holds(kind snapshot.Kind, parent string) bool {
	return kind != snapshot.KindView || parent == ""
}

// makeTree fills the directory of a new snapshot with a copy of its parent.
func makeTree(ctx context.Context, dir string, _ snapshot.New, parents []string) error {
	if err := os.Chmod(dir, 0o755); err != nil || len(parents) == 0 {
		return err
	}
	return tree.Copy(ctx, dir, parents[0])
}

// finish counts a tree. What was counted while a layer was written is all
// that there is only at the bottom: above, the copy of the parent is there too.
func finish(ctx context.Context, dir string, step snapshot.Commit, parents []string, _ bool) (snapshot.Usage, error) {
	if len(step.Links) > 0 {
		return snapshot.Usage{}, fmt.Errorf("hard links that wait for a parent, in a plain copy: %w", errdefs.ErrInvalidArgument)
	}
	if step.Usage != nil && len(parents) == 0 {
		return *step.Usage, nil
	}
	return measure(ctx, dir)
}

func measure(ctx context.Context, dir string) (snapshot.Usage, error) {
	u, err := tree.Measure(ctx, dir)
	return snapshot.Usage(u), err
}

// Traits says what the driver can do.
func (d *Driver) Traits() snapshot.Traits { return snapshot.Traits{Form: snapshot.FormPlain} }

// Create makes snapshots, all or none. Copying a parent takes as long as the
// parent is big.
func (d *Driver) Create(ctx context.Context, news ...snapshot.New) error {
	return d.store.Create(ctx, news...)
}

// CommitChain commits active snapshots, all or none.
func (d *Driver) CommitChain(ctx context.Context, steps ...snapshot.Commit) error {
	return d.store.CommitChain(ctx, steps...)
}

// Remove forgets a snapshot and removes its directory.
func (d *Driver) Remove(ctx context.Context, key string) error { return d.store.Remove(ctx, key) }

// Cleanup removes directories that no snapshot names.
func (d *Driver) Cleanup(ctx context.Context) error { return d.store.Cleanup(ctx) }

// Close releases the index.
func (d *Driver) Close() error { return d.store.Close() }

// Stat describes a snapshot.
func (d *Driver) Stat(_ context.Context, key string) (snapshot.Info, error) {
	r, err := d.store.Get(key)
	if err != nil {
		return snapshot.Info{}, err
	}
	return r.Info, nil
}

// Update changes labels.
func (d *Driver) Update(_ context.Context, key string, labels map[string]string, fields ...string) (snapshot.Info, error) {
	r, err := d.store.Update(key, labels, fields...)
	if err != nil {
		return snapshot.Info{}, err
	}
	return r.Info, nil
}

// Walk yields every snapshot in the order of keys.
func (d *Driver) Walk(ctx context.Context) iter.Seq2[snapshot.Info, error] {
	return func(yield func(snapshot.Info, error) bool) {
		for r, err := range d.store.Walk(ctx) {
			if !yield(r.Info, err) {
				return
			}
		}
	}
}

// Usage counts a snapshot's whole tree, since all of it is the snapshot's own.
func (d *Driver) Usage(ctx context.Context, key string) (snapshot.Usage, error) {
	r, err := d.store.Get(key)
	if err != nil || r.Kind != snapshot.KindActive {
		return r.Usage, err
	}
	return measure(ctx, d.store.Path(r.ID))
}

// Dir is the tree.
func (d *Driver) Dir(_ context.Context, key string) (string, error) {
	r, err := d.store.Get(key)
	if err != nil {
		return "", err
	}
	if r.Kind == snapshot.KindView {
		return "", fmt.Errorf("directory of snapshot %s: a view has none of its own: %w", key, errdefs.ErrFailedPrecondition)
	}
	return d.store.Path(r.ID), nil
}

// Parents is empty: a tree is whole in itself.
func (d *Driver) Parents(_ context.Context, key string) ([]string, error) {
	_, err := d.store.Get(key)
	return nil, err
}

// Mounts binds the tree, or for a view that of its parent.
func (d *Driver) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	r, err := d.store.Get(key)
	if err != nil {
		return nil, err
	}
	source, mode := d.store.Path(r.ID), "rw"
	switch r.Kind {
	case snapshot.KindCommitted:
		return nil, fmt.Errorf("mount snapshot %s: it is committed; make a view of it: %w", key, errdefs.ErrFailedPrecondition)
	case snapshot.KindView:
		mode = "ro"
		if r.Parent != "" {
			p, err := d.store.Get(r.Parent)
			if err != nil {
				return nil, fmt.Errorf("mount snapshot %s: parent: %w", key, err)
			}
			source = d.store.Path(p.ID)
		}
	}
	return []mount.Mount{{Type: "bind", Source: source, Options: []string{"rbind", mode}}}, nil
}
