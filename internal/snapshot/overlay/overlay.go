// Package overlay stores snapshots as overlay directories, mounted by the kernel or by fuse-overlayfs.
//
// On disk it is containerd's overlayfs snapshotter. What is around these
// directories, and in which order they come and go, is told in package dirs:
//
//	<root>/snapshots/<id>   0700
//	├── fs                  0755, owned as the parent's: the upper directory, and the whole layer
//	└── work                0711, for the kernel; views have none, and it stays when a snapshot is committed
package overlay

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/linux/tree"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/dirs"
	"github.com/holdfast-dev/holdfast/internal/snapshot/index"
)

// LabelUpperdir is the label that Options.UpperdirLabel adds to what Stat,
// Update and Walk return: the path of the snapshot's upper directory.
const LabelUpperdir = "containerd.io/snapshot/overlay.upperdir"

// Options change what Open returns. The zero value is containerd's default.
type Options struct {
	// MountOptions are added to every overlay mount, and not to binds.
	MountOptions []string
	// UpperdirLabel adds LabelUpperdir.
	UpperdirLabel bool
	// SlowChown allows that files are copied to change their owners where the
	// kernel can't map ids: it clears Traits.OnlyRemapIDs.
	SlowChown bool
	// OpenTimeout and Committed are those of index.Options.
	OpenTimeout time.Duration
	Committed   func()
}

// Driver is the overlay driver. It implements snapshot.Driver.
type Driver struct {
	store         *dirs.Store
	traits        snapshot.Traits
	options       []string // of every overlay
	upperdirLabel bool
}

var _ snapshot.Driver = (*Driver)(nil)

// Open makes root if it is missing and opens the snapshots in it. A file
// system whose directories don't tell the types of their entries is
// ErrNotImplemented: the kernel mounts no overlay on it. Cleanup must run
// before anything else.
func Open(root string, opts Options) (*Driver, error) {
	d := &Driver{
		upperdirLabel: opts.UpperdirLabel,
		options:       mountOptions(root, opts.MountOptions),
		traits: snapshot.Traits{
			// A deletion is a device, which a user namespace can't make.
			Rebase:       !inUserNamespace(),
			RemapIDs:     mapsIDs(),
			OnlyRemapIDs: !opts.SlowChown,
			Form:         snapshot.FormOverlay,
		},
	}
	layout := dirs.Layout{
		Holds:  func(snapshot.Kind, string) bool { return true },
		Make:   makeDirectories,
		Sync:   func(dir string) error { return durable.SyncDir(upper(dir)) },
		Finish: finish,
		Rebase: d.traits.Rebase,
	}
	var err error
	d.store, err = dirs.Open(root, layout, index.Options{OpenTimeout: opts.OpenTimeout, Committed: opts.Committed})
	if err != nil {
		return nil, fmt.Errorf("overlay snapshots: %w", err)
	}
	typed, err := tellsTypes(root)
	if err == nil && !typed {
		err = fmt.Errorf("the file system has no d_type; make xfs with ftype=1, or use the native snapshotter: %w", errdefs.ErrNotImplemented)
	}
	if err != nil {
		return nil, fmt.Errorf("overlay snapshots in %s: %w", root, errors.Join(err, d.store.Close()))
	}
	return d, nil
}

func upper(dir string) string { return filepath.Join(dir, "fs") }
func work(dir string) string  { return filepath.Join(dir, "work") }

func uppers(dirs []string) []string {
	out := make([]string, len(dirs))
	for i, dir := range dirs {
		out[i] = upper(dir)
	}
	return out
}

// makeDirectories fills the directory of a new snapshot.
func makeDirectories(_ context.Context, dir string, n snapshot.New, parents []string) error {
	if err := makeDirectory(upper(dir), 0o755); err != nil {
		return err
	}
	if n.Kind == snapshot.KindActive {
		if err := makeDirectory(work(dir), 0o711); err != nil {
			return err
		}
	}
	_, byUID := n.Labels[snapshot.LabelUIDMapping]
	_, byGID := n.Labels[snapshot.LabelGIDMapping]
	if byUID || byGID {
		uid, err := hostRoot(n.Labels[snapshot.LabelUIDMapping])
		if err != nil {
			return fmt.Errorf("label %s: %w", snapshot.LabelUIDMapping, err)
		}
		gid, err := hostRoot(n.Labels[snapshot.LabelGIDMapping])
		if err != nil {
			return fmt.Errorf("label %s: %w", snapshot.LabelGIDMapping, err)
		}
		return os.Lchown(upper(dir), uid, gid)
	}
	if len(parents) == 0 {
		return nil
	}
	_, err := inheritOwner(upper(dir), upper(parents[0]))
	return err
}

// makeDirectory makes a directory whose mode the umask doesn't change.
func makeDirectory(dir string, mode os.FileMode) error {
	if err := os.Mkdir(dir, mode); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}

// inheritOwner gives dir the owner that parent has, if it has another.
func inheritOwner(dir, parent string) (changed bool, err error) {
	uid, gid, err := owner(parent)
	if err != nil {
		return false, err
	}
	if u, g, err := owner(dir); err != nil || u == uid && g == gid {
		return false, err
	}
	return true, os.Lchown(dir, uid, gid)
}

func owner(dir string) (uid, gid int, err error) {
	fi, err := os.Lstat(dir)
	if err != nil {
		return 0, 0, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("stat %s: no owner", dir)
	}
	return int(st.Uid), int(st.Gid), nil
}

// finish makes a layer what it would have been, had its parents been there
// while it was written, and counts it. Nothing changes in dir afterwards (inv 4).
func finish(ctx context.Context, dir string, step snapshot.Commit, parents []string, rebased bool) (snapshot.Usage, error) {
	var more snapshot.Usage
	if rebased {
		changed, err := inheritOwner(upper(dir), upper(parents[0]))
		if err == nil && changed {
			err = durable.SyncDir(upper(dir))
		}
		if err != nil {
			return snapshot.Usage{}, err
		}
	}
	if len(step.Implied)+len(step.Links) > 0 {
		var err error
		if more, err = layer.Complete(upper(dir), uppers(parents), step.Implied, step.Links); err != nil {
			return snapshot.Usage{}, err
		}
	}
	if step.Usage == nil {
		return measure(ctx, dir)
	}
	return snapshot.Usage{Inodes: step.Usage.Inodes + more.Inodes, Size: step.Usage.Size + more.Size}, nil
}

func measure(ctx context.Context, dir string) (snapshot.Usage, error) {
	u, err := tree.Measure(ctx, upper(dir))
	return snapshot.Usage(u), err
}

// Traits says what the driver can do here.
func (d *Driver) Traits() snapshot.Traits { return d.traits }

// Create makes snapshots, all or none.
func (d *Driver) Create(ctx context.Context, news ...snapshot.New) error {
	return d.store.Create(ctx, news...)
}

// CommitChain commits active snapshots, all or none, giving them the parents
// that they are to have.
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
	return d.info(r), nil
}

// Update changes labels.
func (d *Driver) Update(_ context.Context, key string, labels map[string]string, fields ...string) (snapshot.Info, error) {
	r, err := d.store.Update(key, labels, fields...)
	if err != nil {
		return snapshot.Info{}, err
	}
	return d.info(r), nil
}

// Walk yields every snapshot in the order of keys.
func (d *Driver) Walk(ctx context.Context) iter.Seq2[snapshot.Info, error] {
	return func(yield func(snapshot.Info, error) bool) {
		for r, err := range d.store.Walk(ctx) {
			if !yield(d.info(r), err) {
				return
			}
		}
	}
}

func (d *Driver) info(r index.Record) snapshot.Info {
	if d.upperdirLabel && r.ID != 0 {
		r.Labels = maps.Clone(r.Labels)
		if r.Labels == nil {
			r.Labels = make(map[string]string)
		}
		r.Labels[LabelUpperdir] = upper(d.store.Path(r.ID))
	}
	return r.Info
}

// Usage counts what a snapshot's own layer takes on disk.
func (d *Driver) Usage(ctx context.Context, key string) (snapshot.Usage, error) {
	r, err := d.store.Get(key)
	if err != nil || r.Kind != snapshot.KindActive {
		return r.Usage, err
	}
	return measure(ctx, d.store.Path(r.ID))
}

// Dir is the upper directory.
func (d *Driver) Dir(_ context.Context, key string) (string, error) {
	r, err := d.store.Get(key)
	if err != nil {
		return "", err
	}
	if r.Kind == snapshot.KindView {
		return "", fmt.Errorf("directory of snapshot %s: a view has none of its own: %w", key, errdefs.ErrFailedPrecondition)
	}
	return upper(d.store.Path(r.ID)), nil
}

// Parents lists the upper directories below, nearest first.
func (d *Driver) Parents(_ context.Context, key string) ([]string, error) {
	_, parents, err := d.store.Chain(key)
	return uppers(parents), err
}

// Mounts says how to mount a snapshot: by a bind where there is one directory
// only, else by an overlay.
func (d *Driver) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	r, parents, err := d.store.Chain(key)
	if err != nil {
		return nil, err
	}
	if r.Kind == snapshot.KindCommitted {
		return nil, fmt.Errorf("mount snapshot %s: it is committed; make a view of it: %w", key, errdefs.ErrFailedPrecondition)
	}
	lower, own := uppers(parents), d.store.Path(r.ID)
	options := d.mapping(r.Labels)
	switch {
	case len(lower) == 0 && r.Kind == snapshot.KindActive:
		return bind(upper(own), append(options, "rw")), nil
	case len(lower) == 0:
		return bind(upper(own), append(options, "ro")), nil
	case len(lower) == 1 && r.Kind == snapshot.KindView:
		return bind(lower[0], append(options, "ro")), nil
	}
	if r.Kind == snapshot.KindActive {
		options = append(options, "workdir="+mount.Escape(work(own)), "upperdir="+mount.Escape(upper(own)))
	}
	for i, dir := range lower {
		lower[i] = mount.Escape(dir)
	}
	options = append(options, "lowerdir="+strings.Join(lower, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, d.options...)}}, nil
}

func bind(dir string, options []string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: append(options, "rbind")}}
}

func (d *Driver) mapping(labels map[string]string) []string {
	var out []string
	if !d.traits.RemapIDs {
		return out
	}
	if m, ok := labels[snapshot.LabelUIDMapping]; ok {
		out = append(out, "uidmap="+m)
	}
	if m, ok := labels[snapshot.LabelGIDMapping]; ok {
		out = append(out, "gidmap="+m)
	}
	return out
}

// mountOptions completes the configured options of overlays.
func mountOptions(root string, configured []string) []string {
	out := slices.Clone(configured)
	if inUserNamespace() && !names(out, "userxattr") && !onTmpfs(root) {
		out = append(out, "userxattr")
	}
	// An index would refuse layers that another image's mount uses as well.
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil && !names(out, "index") {
		out = append(out, "index=off")
	}
	return out
}

func names(options []string, key string) bool {
	return slices.ContainsFunc(options, func(o string) bool {
		k, _, _ := strings.Cut(o, "=")
		return k == key
	})
}
