package pull

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// plan is all that one pull brings, besides documents.
type plan struct {
	first  image.Image      // the one that names are made for; one without Config when nothing but All was asked for
	images []image.Image    // to unpack
	packed []oci.Descriptor // blobs that stay as they are
}

// Bounds of what one pull brings beside the images to unpack.
const (
	maxMetadata = 64 << 20 // bytes that it holds in memory of documents that no image of the plan needs
	maxBlobs    = 10_000   // as many as containerd follows
	maxNesting  = 8        // indexes that list indexes
)

// wanted is a platform that a request asks for.
type wanted struct {
	Platform
	match oci.Matcher
}

func (req Request) wanted() (list []wanted, err error) {
	asked := req.Platforms
	if len(asked) == 0 && !req.All {
		asked = []Platform{{Name: req.Platform}}
	}
	for _, p := range asked {
		m, err := oci.ParsePlatform(p.Name)
		if err != nil {
			return nil, err
		}
		p.Packed = p.Packed || req.NoUnpack
		list = append(list, wanted{p, m})
	}
	return list, nil
}

// plan reads the documents of all platforms wanted, and of the others as far
// as they are asked for.
func (r *run) plan(ctx context.Context, target oci.Descriptor) (pl plan, err error) {
	var missing error
	packed := rest{run: r, seen: make(map[digest.Digest]bool), left: maxMetadata}
	for _, w := range r.wanted {
		img, err := image.Load(ctx, r.docs, target, w.match)
		if _, ok := errors.AsType[*oci.NoPlatform](err); ok && (len(r.wanted) > 1 || r.req.All) {
			r.report(Event{Stage: StageMissing, Desc: target, Platform: w.Name})
			missing = err
			continue
		}
		if err != nil {
			return plan{}, err
		}
		if pl.first.Path == nil {
			pl.first = img
		}
		switch {
		case w.Packed:
			err = packed.blobsOf(img)
		case !pl.unpacks(img):
			pl.images = append(pl.images, img)
		}
		if err != nil {
			return plan{}, err
		}
	}
	if pl.first.Path == nil {
		if !r.req.All {
			return plan{}, missing
		}
		pl.first.Path = []oci.Descriptor{target}
	}
	if r.req.All || r.req.Metadata {
		r.docs.alone = !r.req.All
		err = packed.walk(ctx, target, 0)
	}
	pl.packed = packed.without(pl.images)
	return pl, err
}

// unpacks reports whether another platform has led to the same image.
func (pl *plan) unpacks(img image.Image) bool {
	return slices.ContainsFunc(pl.images, func(o image.Image) bool { return o.Manifest().Digest == img.Manifest().Digest })
}

// topChains names for each config the snapshot that it needs.
func (pl *plan) topChains() map[digest.Digest]digest.Digest {
	tops := make(map[digest.Digest]digest.Digest)
	for _, img := range pl.images {
		tops[img.Config.Digest] = img.TopChain()
	}
	return tops
}

// rest finds what is fetched beside the images to unpack.
type rest struct {
	*run
	seen  map[digest.Digest]bool
	blobs []oci.Descriptor
	left  int64 // bytes that further documents may have
}

func (t *rest) blobsOf(img image.Image) error {
	for _, l := range img.Layers {
		if err := t.blob(l.Desc); err != nil {
			return err
		}
	}
	return nil
}

func (t *rest) blob(desc oci.Descriptor) error {
	if t.seen[desc.Digest] {
		return nil
	}
	t.seen[desc.Digest] = true
	if t.blobs = append(t.blobs, desc); len(t.blobs) > maxBlobs {
		return fmt.Errorf("all platforms have more than %d blobs; pull the platforms you need: %w", maxBlobs, errdefs.ErrResourceExhausted)
	}
	return nil
}

// without leaves out the blobs that are fetched to be unpacked.
func (t *rest) without(images []image.Image) []oci.Descriptor {
	unpacked := make(map[digest.Digest]bool)
	for _, img := range images {
		for _, l := range img.Layers {
			unpacked[l.Desc.Digest] = true
		}
	}
	return slices.DeleteFunc(t.blobs, func(d oci.Descriptor) bool { return unpacked[d.Digest] })
}

func isDocument(mt string) bool { return oci.IsIndex(mt) || oci.IsManifest(mt) || oci.IsConfig(mt) }

// walk reads the documents from desc down, which the transactions then record
// like those of the images, and with All collects the blobs below them.
func (t *rest) walk(ctx context.Context, desc oci.Descriptor, depth int) error {
	if t.seen[desc.Digest] {
		return nil
	}
	t.seen[desc.Digest] = true
	if depth > maxNesting+2 { // a manifest and a config stand below the last index
		return fmt.Errorf("%s: indexes nest deeper than %d: %w", desc.Digest, maxNesting, errdefs.ErrInvalidArgument)
	}
	if _, read := t.docs.docs[desc.Digest.String()]; !read {
		t.left -= desc.Size
	}
	if t.left < 0 {
		return fmt.Errorf("the manifests and configs of all platforms have more than %d bytes; pull one platform without them: %w", maxMetadata, errdefs.ErrResourceExhausted)
	}
	doc, err := t.docs.ReadDocument(ctx, desc)
	if err != nil {
		return err
	}
	children, err := image.Children(desc.MediaType, doc)
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	for _, ch := range children {
		switch {
		case isDocument(ch.MediaType):
			err = t.walk(ctx, ch, depth+1)
		case t.req.All:
			err = t.blob(ch)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
