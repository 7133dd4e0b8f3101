// Package image keeps the kubelet's view of images.
//
// To containerd's clients an image is a name for a root document. To the
// kubelet it is what runs: its id is the digest of its config, and all names
// that lead to the same config are names of one image. There is no second
// store that remembers this. The view is computed from the records of the
// namespace k8s.io whenever it is asked for, so that what `ctr -n k8s.io`
// pulls, imports, tags or removes shows at once. What is kept in memory are
// facts that can't change: what the documents of a digest say (facts.go), and how
// large a committed snapshot is (disk.go).
package image

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Namespace is where the kubelet's images are, as containerd has it.
const Namespace = "k8s.io"

// Labels of image records, in containerd's words.
const (
	labelManaged = "io.cri-containerd.image" // "managed": a pull for the kubelet made the record
	labelPinned  = "io.cri-containerd.pinned"
	managed      = "managed"
	pinned       = "pinned"
)

// Options of a View. The zero value works.
type Options struct {
	Snapshotter string            // for images whose runtime handler names none; default "overlayfs"
	Handlers    map[string]string // snapshotters by runtime handler
	Pinned      []string          // references of images that the kubelet must not remove
	Downloads   int               // layers of one pull that are fetched at once; default: the Puller's

	// ProgressTimeout ends a pull to which no byte has come for so long.
	// Default: it isn't watched, and the registry's own time-outs hold.
	ProgressTimeout time.Duration

	// Collect runs a collection that begins after the call, and waits for it.
	// Default: the DB's own.
	Collect func(ctx context.Context) (meta.Collected, error)

	Disks Disks
	Log   *slog.Logger // default: discard
}

// Puller makes remote images local: pull.Puller.
type Puller interface {
	Pull(ctx context.Context, sp meta.Space, reference string, req pull.Request) (meta.Image, error)
}

// View is the kubelet's view. It may be used by many at once and needs no
// closing.
type View struct {
	db     *meta.DB
	sp     meta.Space
	puller Puller
	opts   Options
	pins   map[string]bool // references, as they were given and normalised
	facts  factsCache
	sizes  sizeCache
}

// New makes a View of what db keeps.
func New(db *meta.DB, puller Puller, opts Options) *View {
	opts.Snapshotter = cmp.Or(opts.Snapshotter, "overlayfs")
	if opts.Collect == nil {
		opts.Collect = db.Collect
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	v := &View{db: db, sp: db.Space(Namespace), puller: puller, opts: opts, pins: map[string]bool{}}
	for _, name := range opts.Pinned {
		v.pins[name], v.pins[normal(name)] = true, true
	}
	return v
}

// Image is one image of the machine.
type Image struct {
	ID      digest.Digest // of its config; "" if the documents can't be read
	Names   []string      // of all its records, in their order
	Size    int64         // bytes of indexes, manifest, config and compressed layers
	ChainID digest.Digest // the name of its top snapshot; "" for an image without layers
	Pinned  bool          // the kubelet's own clean-up must leave it

	// UID, or else Username, is who the image's processes run as unless the
	// pod says otherwise. nil and "" when the config names nobody.
	UID      *int64
	Username string

	targets []oci.Descriptor // of the records, each once
	needs   []digest.Digest  // blobs, layers first, without which it can neither be unpacked nor started
}

// List returns the images that are whole, in the order of their ids: a record
// whose layers are gone, or that is for another platform, is no image that the kubelet
// could run, so it had better pull it.
func (v *View) List(ctx context.Context) ([]Image, error) {
	all, err := v.all(ctx)
	if err != nil {
		return nil, err
	}
	list := make([]Image, 0, len(all))
	for _, img := range all {
		switch whole, err := v.isWhole(ctx, img); {
		case err != nil:
			return nil, err
		case whole:
			list = append(list, img)
		}
	}
	return list, nil
}

// Find returns the image that name stands for: an id, the beginning of one, or a
// reference as people write it. ErrNotFound, also for one that isn't whole;
// ErrInvalidArgument for an empty name or one that several ids begin with.
func (v *View) Find(ctx context.Context, name string) (Image, error) {
	all, err := v.all(ctx)
	if err != nil {
		return Image{}, err
	}
	img, err := find(all, name)
	if err != nil {
		return Image{}, err
	}
	whole, err := v.isWhole(ctx, img)
	if err == nil && !whole {
		err = fmt.Errorf("image %q is incomplete: pull it again: %w", name, errdefs.ErrNotFound)
	}
	return img, err
}

// Spec reads the config document of an image that List or Find returned.
func (v *View) Spec(ctx context.Context, img Image) (oci.Image, error) {
	found, err := image.Load(ctx, documents{v.sp}, img.targets[0], oci.Host())
	return found.Spec, err
}

// all groups the records by what they lead to. Those that lead to nothing
// readable are there too, by target and without an ID: they can be removed.
func (v *View) all(ctx context.Context) ([]Image, error) {
	records, err := v.sp.Images(ctx)
	if err != nil {
		return nil, err
	}
	known, err := v.facts.of(ctx, documents{v.sp}, records, v.opts.Log)
	if err != nil {
		return nil, err
	}
	groups := map[digest.Digest]*Image{}
	for _, rec := range records {
		f, readable := known[rec.Target.Digest]
		key := rec.Target.Digest
		if readable {
			key = f.id
		}
		img := groups[key]
		if img == nil {
			img = f.image()
			groups[key] = img
		}
		img.Names = append(img.Names, rec.Name)
		img.Pinned = img.Pinned || rec.Labels[labelPinned] == pinned || v.pins[rec.Name]
		if !slices.ContainsFunc(img.targets, func(d oci.Descriptor) bool { return d.Digest == rec.Target.Digest }) {
			img.targets = append(img.targets, rec.Target)
		}
	}
	list := make([]Image, 0, len(groups))
	for _, img := range groups {
		list = append(list, *img)
	}
	slices.SortFunc(list, func(a, b Image) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Names[0], b.Names[0]))
	})
	return list, nil
}

// isWhole says whether an image can be run: its root file system is unpacked,
// or all that it is unpacked from is here.
func (v *View) isWhole(ctx context.Context, img Image) (bool, error) {
	if img.ID == "" {
		return false, nil
	}
	if _, err := v.sp.Blob(ctx, img.ID); err != nil {
		return false, unlessGone(err)
	}
	if img.ChainID == "" {
		return true, nil
	}
	for _, name := range v.snapshotters() {
		snaps, err := v.sp.Snapshots(name)
		if err != nil {
			continue // it isn't offered: what it has is of no use
		}
		in, err := snaps.Stat(ctx, img.ChainID.String())
		if err == nil && in.Kind == snapshot.KindCommitted {
			return true, nil
		}
		if unlessGone(err) != nil {
			return false, err
		}
	}
	for _, dgst := range img.needs {
		if _, err := v.sp.Blob(ctx, dgst); err != nil {
			return false, unlessGone(err)
		}
	}
	return true, nil
}

func unlessGone(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// snapshotters are those that the kubelet's images lie in, the default first.
func (v *View) snapshotters() []string {
	names := []string{v.opts.Snapshotter}
	for _, name := range v.opts.Handlers {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names[1:])
	return names
}

// maxUsername bounds a user's name, in bytes: one image must not make the list
// of all too long to be sent.
const maxUsername = 256

// user reads the User of an image's config, `name|uid[:group|gid]`. A longer
// name is cut: nobody is called so, and no name at all would mean root.
func user(config string) (uid *int64, name string) {
	name, _, _ = strings.Cut(config, ":")
	if n, err := strconv.ParseInt(name, 10, 64); err == nil {
		return &n, ""
	}
	return nil, strings.ToValidUTF8(name[:min(len(name), maxUsername)], "")
}

// documents are those of the store.
type documents struct{ sp meta.Space }

// ReadDocument implements image.Documents.
func (d documents) ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	return d.sp.ReadBlob(ctx, desc, oci.MaxDocument)
}

// normal is the form of a reference that images are named by; what is no
// reference stays as it is.
func normal(name string) string {
	if r, err := ref.Normalize(name); err == nil {
		return r.String()
	}
	return name
}
