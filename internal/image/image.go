// Package image walks an image: manifests, configs, layers, sizes.
package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/oci"
)

// Documents reads the small documents of images, whole: from a store or from
// a registry. What it returns has the descriptor's digest and size.
type Documents interface {
	ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error)
}

// maxNesting bounds indexes that list indexes.
const maxNesting = 8

// Layer is one layer of an image.
type Layer struct {
	Desc    oci.Descriptor
	DiffID  digest.Digest // of the uncompressed archive
	ChainID digest.Digest // of this layer and all below it: the name of its snapshot
}

// Image is one image for one platform, found from the descriptor that a name
// stands for.
type Image struct {
	Path   []oci.Descriptor // from the target down to the manifest: indexes, then the manifest
	Config oci.Descriptor
	Spec   oci.Image
	Layers []Layer // bottom first
}

// Target is what the image's name stands for.
func (img Image) Target() oci.Descriptor { return img.Path[0] }

// Manifest is the image's own manifest.
func (img Image) Manifest() oci.Descriptor { return img.Path[len(img.Path)-1] }

// TopChain is the name of the snapshot that is the image's root file system,
// or "" for an image without layers.
func (img Image) TopChain() digest.Digest {
	if len(img.Layers) == 0 {
		return ""
	}
	return img.Layers[len(img.Layers)-1].ChainID
}

// Size is the sum of the compressed layers, the config and the manifest, in
// bytes.
func (img Image) Size() int64 {
	n := img.Config.Size + img.Manifest().Size
	for _, l := range img.Layers {
		n += l.Desc.Size
	}
	return n
}

// Load finds the image that target holds for the platform that m likes best.
// Errors are errdefs.ErrNotFound when there is none or a document is missing,
// and errdefs.ErrInvalidArgument when a document is refused.
func Load(ctx context.Context, docs Documents, target oci.Descriptor, m oci.Matcher) (Image, error) {
	var img Image
	desc := target
	for oci.IsIndex(desc.MediaType) {
		if len(img.Path) == maxNesting {
			return Image{}, fmt.Errorf("%s: indexes nest deeper than %d: %w", target.Digest, maxNesting, errdefs.ErrInvalidArgument)
		}
		img.Path = append(img.Path, desc)
		doc, err := docs.ReadDocument(ctx, desc)
		if err != nil {
			return Image{}, err
		}
		idx, err := oci.ParseIndex(desc.MediaType, doc)
		if err != nil {
			return Image{}, fmt.Errorf("%s: %w", desc.Digest, err)
		}
		if desc, err = oci.Select(idx, m); err != nil {
			return Image{}, fmt.Errorf("%s: %w", img.Path[len(img.Path)-1].Digest, err)
		}
	}
	img.Path = append(img.Path, desc)
	if err := img.load(ctx, docs, desc); err != nil {
		return Image{}, fmt.Errorf("%s: %w", desc.Digest, err)
	}
	return img, nil
}

func (img *Image) load(ctx context.Context, docs Documents, desc oci.Descriptor) error {
	doc, err := docs.ReadDocument(ctx, desc)
	if err != nil {
		return err
	}
	m, err := oci.ParseManifest(desc.MediaType, doc)
	if err != nil {
		return err
	}
	img.Config = m.Config
	if doc, err = docs.ReadDocument(ctx, m.Config); err != nil {
		return err
	}
	if img.Spec, err = oci.ParseImage(doc); err != nil {
		return err
	}
	diffIDs := img.Spec.RootFS.DiffIDs
	if len(diffIDs) != len(m.Layers) {
		return fmt.Errorf("the manifest has %d layers and the config %d: %w", len(m.Layers), len(diffIDs), errdefs.ErrInvalidArgument)
	}
	chain := oci.ChainIDs(diffIDs)
	for i, l := range m.Layers {
		img.Layers = append(img.Layers, Layer{Desc: l, DiffID: diffIDs[i], ChainID: chain[i]})
	}
	return nil
}

// Children returns what a document of media type and content given refers to,
// in its order: manifests of an index; config, then layers of a manifest; and
// nothing for anything else.
func Children(mt string, doc []byte) ([]oci.Descriptor, error) {
	switch {
	case oci.IsIndex(mt):
		idx, err := oci.ParseIndex(mt, doc)
		return idx.Manifests, err
	case oci.IsManifest(mt):
		m, err := oci.ParseManifest(mt, doc)
		if err != nil {
			return nil, err
		}
		return append([]oci.Descriptor{m.Config}, m.Layers...), nil
	}
	return nil, nil
}
