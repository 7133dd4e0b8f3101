package diff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// Apply unpacks the layer desc, which the namespace of sp must have, into the
// tree that mounts describe: an active snapshot's. It returns the descriptor
// of the uncompressed archive, whose digest is the layer's DiffID; comparing
// that with the image's config is the caller's part.
//
// When Apply returns nil, what it wrote is durable: the snapshot may be
// committed (inv 1). After an error the tree holds some part of the layer and
// is good only to be removed. Kinds of error: ErrNotFound (no such blob),
// ErrNotImplemented (no way to read that media type), ErrFailedPrecondition
// (desc and blob differ in size, or the layer can't go into these mounts),
// ErrDataLoss (the blob on disk is not what its digest says).
func (d *Differ) Apply(ctx context.Context, sp meta.Space, desc oci.Descriptor, mounts []mount.Mount) (oci.Descriptor, error) {
	if !readable(desc.MediaType) {
		return oci.Descriptor{}, fmt.Errorf("apply %s: no stream processor for media type %q: %w", desc.Digest, desc.MediaType, errdefs.ErrNotImplemented)
	}
	blob, err := sp.Reader(ctx, desc.Digest)
	if err != nil {
		return oci.Descriptor{}, fmt.Errorf("apply %s: %w", desc.Digest, err)
	}
	defer blob.Close()
	if desc.Size > 0 && desc.Size != blob.Size() {
		return oci.Descriptor{}, fmt.Errorf("apply %s: the blob has %d bytes, its descriptor says %d: %w", desc.Digest, blob.Size(), desc.Size, errdefs.ErrFailedPrecondition)
	}
	var res layer.Result
	err = d.into(ctx, mounts, func(dir string, to tree) error {
		return synced(ctx, dir, to, func() error {
			res, err = d.unpack(ctx, blob, desc, to)
			return err
		})
	})
	if err != nil {
		return oci.Descriptor{}, fmt.Errorf("apply %s: %w", desc.Digest, err)
	}
	return oci.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: res.DiffID, Size: res.Size}, nil
}

// readable reports whether layers of this media type can be read without a
// stream processor: archives that are plain or compressed, and nothing else
// on top, such as encrypted.
func readable(mediaType string) bool {
	_, packing, _ := strings.Cut(mediaType, "+")
	return oci.IsLayer(mediaType) && slices.Contains([]string{"", "gzip", "zstd"}, packing)
}

// unpack reads the whole blob, and compares its digest on the way: what has
// rotted on disk since it was committed does not become a snapshot. // inv 8
func (d *Differ) unpack(ctx context.Context, blob *content.Reader, desc oci.Descriptor, to layer.Emitter) (layer.Result, error) {
	verifier := desc.Digest.Verifier()
	src := io.TeeReader(io.NewSectionReader(blob, 0, blob.Size()), verifier)
	res, err := layer.Apply(ctx, src, desc.MediaType, to, d.opts.Limits)
	if err != nil && ctx.Err() != nil {
		return res, err
	}
	if _, e := io.Copy(io.Discard, src); e != nil {
		return res, errors.Join(err, e)
	}
	if !verifier.Verified() {
		err = fmt.Errorf("the blob is damaged on disk; remove the image and pull it again: %w", errors.Join(errdefs.ErrDataLoss, err))
	}
	if err != nil {
		return res, err
	}
	for _, l := range res.Links {
		if l.Target != "" {
			return res, fmt.Errorf("%q is a hard link into a lower layer, and these mounts name none: prepare the snapshot with its parent: %w", l.Name, errdefs.ErrFailedPrecondition)
		}
	}
	return res, nil
}

// tree is what a layer is emitted into.
type tree interface {
	layer.Emitter
	Sync() (done bool, err error) // what was emitted, if it is little
}

// into finds out where the tree that mounts describe really lies and calls f
// with that directory and an emitter into it.
//
// Mounting the tree and writing into the mount would do, and is what happens
// in the end. But most snapshots need no mount: a bind mount is its source,
// and the changes of an overlay are its upper directory, if deletions are
// written in overlay's own form. That costs no mount, and it is the only way
// for an overlay that has an upper directory and no lower one. Such mounts
// come from clients that unpack the layers of an image side by side and name
// the parent when they commit. What needs the parent is beyond them: a hard
// link into a lower layer is refused, and directories that the layer implies
// and doesn't describe get owner root and mode 0755, as in containerd.
func (d *Differ) into(ctx context.Context, mounts []mount.Mount, f func(dir string, to tree) error) error {
	if len(mounts) == 1 {
		if o, ok := overlayOf(mounts[0]); ok {
			to, err := layer.NewOverlay(o.upper, o.lower, layer.OverlayOptions{UserXattr: o.userXattr})
			if err != nil {
				return err
			}
			return f(o.upper, to)
		}
		if isPlainBind(mounts[0]) {
			return intoDirectory(mounts[0].Source, f)
		}
	}
	return d.opts.Temp.With(ctx, mounts, func(dir string) error { return intoDirectory(dir, f) })
}

func intoDirectory(dir string, f func(dir string, to tree) error) error {
	to, err := layer.NewDirectory(dir)
	if err != nil {
		return err
	}
	return f(dir, to)
}

// synced calls write, which emits to the tree in dir, and makes what it wrote
// durable. The file system is held from before the first byte, so that no
// failed write-back is missed.
func synced(ctx context.Context, dir string, to tree, write func() error) (err error) {
	fs, err := durable.OpenFS(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, fs.Close()) }()
	if err := write(); err != nil {
		return err
	}
	if done, err := to.Sync(); done || err != nil {
		return err
	}
	return fs.Sync(ctx)
}

// isPlainBind reports whether m shows the directory m.Source and changes
// nothing about it.
func isPlainBind(m mount.Mount) bool {
	return m.Type == "bind" && m.Target == "" && !slices.ContainsFunc(m.Options, func(o string) bool {
		return o != "bind" && o != "rbind" && o != "rw"
	})
}

// overlay is what an overlay mount is made of.
type overlay struct {
	upper     string
	lower     []string // nearest first; none when they are named at commit
	userXattr bool     // marks are in the user.* namespace
}

// overlayOf takes the mount of an active overlay snapshot to pieces. ok is
// false for any other, and for options whose paths are quoted or escaped:
// reading those is the kernel's business.
func overlayOf(m mount.Mount) (o overlay, ok bool) {
	if m.Type != "overlay" || m.Target != "" {
		return o, false
	}
	for _, opt := range m.Options {
		if strings.ContainsAny(opt, `\,"`) {
			return o, false
		}
		switch key, value, _ := strings.Cut(opt, "="); key {
		case "upperdir":
			o.upper = value
		case "lowerdir":
			o.lower = strings.Split(value, ":")
		case "userxattr":
			o.userXattr = true
		case "ro", "lowerdir+", "datadir+":
			return o, false
		}
	}
	return o, o.upper != ""
}
