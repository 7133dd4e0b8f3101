package fsck

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// images looks whether each listed image is whole. Of an index only those
// manifests count that are here: an image is pulled for one platform. At least
// one must be.
func (p *pass) images(ctx context.Context) {
	w := whole{pass: p, blobs: map[string]bool{}, snaps: map[string]bool{}}
	for _, b := range p.dump.Blobs {
		w.blobs[b.Namespace+"/"+b.Digest.String()] = true
	}
	for _, s := range p.dump.Snapshots {
		w.snaps[s.Namespace+"/"+s.Key] = true
	}
	for _, img := range p.dump.Images {
		w.ns = img.Namespace
		if err := w.check(ctx, img.Target, 0); err != nil {
			p.found(ImageIncomplete, img.Namespace, img.Name, err.Error(), "pull it again, or remove it with `holdfast rmi`")
		}
	}
}

// whole checks images of one namespace at a time.
type whole struct {
	*pass
	ns    string
	blobs map[string]bool // `ns/digest`
	snaps map[string]bool // `ns/key`, of any driver
}

const maxNesting = 8

func (w *whole) has(dgst digest.Digest) bool { return w.blobs[w.ns+"/"+dgst.String()] }

func (w *whole) check(ctx context.Context, desc oci.Descriptor, depth int) error {
	if !w.has(desc.Digest) {
		return fmt.Errorf("%s is not here", desc.Digest)
	}
	if depth == maxNesting || !oci.IsIndex(desc.MediaType) && !oci.IsManifest(desc.MediaType) {
		return nil
	}
	doc, err := w.ReadDocument(ctx, desc)
	if err != nil {
		return err
	}
	children, err := image.Children(desc.MediaType, doc)
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	if oci.IsManifest(desc.MediaType) {
		return w.manifest(ctx, desc, children)
	}
	here := 0
	for _, ch := range children {
		if !w.has(ch.Digest) {
			continue
		}
		here++
		if err := w.check(ctx, ch, depth+1); err != nil {
			return err
		}
	}
	if here == 0 {
		return fmt.Errorf("%s lists %d manifests and none is here", desc.Digest, len(children))
	}
	return nil
}

// manifest asks for the config and, of every layer, the blob or the snapshot.
// An image whose config is absent was pulled without that platform's content
// (clients of containerd fetch all manifests) and has nothing to miss.
func (w *whole) manifest(ctx context.Context, desc oci.Descriptor, children []oci.Descriptor) error {
	config, layers := children[0], children[1:]
	if !w.has(config.Digest) {
		return fmt.Errorf("config %s of %s is not here", config.Digest, desc.Digest)
	}
	if !oci.IsConfig(config.MediaType) {
		return nil
	}
	doc, err := w.ReadDocument(ctx, config)
	if err != nil {
		return err
	}
	img, err := oci.ParseImage(doc)
	if err != nil {
		return fmt.Errorf("config %s: %w", config.Digest, err)
	}
	chain := oci.ChainIDs(img.RootFS.DiffIDs)
	here, gone := 0, ""
	for i, l := range layers {
		if w.has(l.Digest) || i < len(chain) && w.snaps[w.ns+"/"+chain[i].String()] {
			here++
		} else {
			gone = l.Digest.String()
		}
	}
	if gone != "" && here > 0 {
		return fmt.Errorf("layer %s of %s is not here, neither packed nor unpacked", gone, desc.Digest)
	}
	return nil
}

// ReadDocument implements image.Documents.
func (w *whole) ReadDocument(_ context.Context, desc oci.Descriptor) ([]byte, error) {
	if desc.Size > oci.MaxDocument {
		return nil, fmt.Errorf("document %s has %d bytes: %w", desc.Digest, desc.Size, errdefs.ErrInvalidArgument)
	}
	r, err := w.store.Content.Reader(desc.Digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	doc := make([]byte, r.Size())
	if r.Size() > oci.MaxDocument {
		return nil, fmt.Errorf("document %s has %d bytes: %w", desc.Digest, r.Size(), errdefs.ErrInvalidArgument)
	}
	if _, err := r.ReadAt(doc, 0); err != nil && int64(len(doc)) != r.Size() {
		return nil, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	if desc.Digest.Algorithm().FromBytes(doc) != desc.Digest {
		return nil, fmt.Errorf("the bytes of %s are not what its name says", desc.Digest)
	}
	return doc, nil
}
