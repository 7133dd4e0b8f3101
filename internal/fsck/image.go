package fsck

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// images looks whether each listed image is whole. An image is pulled for one
// platform, and clients of containerd fetch the manifests and configs of all,
// so of an index one manifest must be whole, and no other may have some of
// its own layers and lack others. A layer is there packed or unpacked.
func (p *pass) images(ctx context.Context) error {
	w := whole{pass: p, blobs: map[string]bool{}, snaps: map[string]bool{}}
	for _, b := range p.dump.Blobs {
		w.blobs[b.Namespace+"/"+b.Digest.String()] = true
	}
	for _, s := range p.dump.Snapshots {
		w.snaps[s.Namespace+"/"+s.Key] = true
	}
	seen := make(map[string]error) // `ns/target`: tags often share one
	for _, img := range p.dump.Images {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		target := img.Namespace + "/" + img.Target.MediaType + "/" + img.Target.Digest.String()
		err, ok := seen[target]
		if !ok {
			w.ns = img.Namespace
			err = w.check(ctx, img.Target)
			seen[target] = err
		}
		if err != nil {
			p.found(imagePromise(img), Finding{ImageIncomplete, img.Namespace, img.Name, err.Error(), "pull it again, or remove it with `holdfast rmi`"})
		}
	}
	return nil
}

// whole checks images of one namespace at a time.
type whole struct {
	*pass
	ns        string
	blobs     map[string]bool // `ns/digest`
	snaps     map[string]bool // `ns/key`, of any driver
	manifests []manifest      // of the image at hand
	visited   map[digest.Digest]bool
}

// manifest is what is here of one manifest.
type manifest struct {
	here    []digest.Digest // of its layers
	missing error           // nil when all is here
}

func (w *whole) has(dgst digest.Digest) bool { return w.blobs[w.ns+"/"+dgst.String()] }

func (w *whole) check(ctx context.Context, target oci.Descriptor) error {
	w.manifests, w.visited = nil, make(map[digest.Digest]bool)
	if !w.has(target.Digest) {
		return fmt.Errorf("%s is not here", target.Digest)
	}
	if !oci.IsIndex(target.MediaType) && !oci.IsManifest(target.MediaType) {
		return nil // something that only its author can read
	}
	if err := w.collect(ctx, target, 0); err != nil {
		return err
	}
	complete := false
	shared := make(map[digest.Digest]bool) // layers that are here for a manifest that is whole
	for _, m := range w.manifests {
		if m.missing != nil {
			continue
		}
		complete = true
		for _, d := range m.here {
			shared[d] = true
		}
	}
	err := fmt.Errorf("none of the manifests that %s lists is here", target.Digest)
	for i := len(w.manifests) - 1; i >= 0; i-- { // the first is told of
		m := w.manifests[i]
		own := slices.ContainsFunc(m.here, func(d digest.Digest) bool { return !shared[d] })
		if m.missing != nil && own {
			return m.missing
		}
		err = m.missing
	}
	if complete {
		return nil
	}
	return err
}

// maxNesting bounds indexes that list indexes.
const maxNesting = 8

// collect finds the manifests of an image that are here. Each document is
// read once, however often it is listed.
func (w *whole) collect(ctx context.Context, desc oci.Descriptor, depth int) error {
	if !oci.IsIndex(desc.MediaType) && !oci.IsManifest(desc.MediaType) || w.visited[desc.Digest] {
		return nil
	}
	if depth > maxNesting {
		return fmt.Errorf("indexes nest deeper than %d", maxNesting)
	}
	w.visited[desc.Digest] = true
	doc, err := w.ReadDocument(ctx, desc)
	if err != nil {
		return err
	}
	children, err := image.Children(desc.MediaType, doc)
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	if oci.IsManifest(desc.MediaType) {
		return w.manifest(ctx, desc, children[0], children[1:])
	}
	for _, ch := range children {
		if w.has(ch.Digest) {
			if err := w.collect(ctx, ch, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// manifest notes what of a manifest is here. The config tells under which
// names the layers are unpacked.
func (w *whole) manifest(ctx context.Context, desc, config oci.Descriptor, layers []oci.Descriptor) error {
	var m manifest
	var chain []digest.Digest
	if !w.has(config.Digest) {
		m.missing = fmt.Errorf("config %s of %s is not here", config.Digest, desc.Digest)
	} else if oci.IsConfig(config.MediaType) {
		doc, err := w.ReadDocument(ctx, config)
		if err != nil {
			return err
		}
		img, err := oci.ParseImage(doc)
		if err != nil {
			return fmt.Errorf("config %s: %w", config.Digest, err)
		}
		chain = oci.ChainIDs(img.RootFS.DiffIDs)
	}
	for i, l := range layers {
		if w.has(l.Digest) || i < len(chain) && w.snaps[w.ns+"/"+chain[i].String()] {
			m.here = append(m.here, l.Digest)
		} else if m.missing == nil {
			m.missing = fmt.Errorf("layer %s of %s is not here, neither packed nor unpacked", l.Digest, desc.Digest)
		}
	}
	w.manifests = append(w.manifests, m)
	return nil
}

// ReadDocument implements image.Documents.
func (w *whole) ReadDocument(_ context.Context, desc oci.Descriptor) ([]byte, error) {
	r, err := w.store.Content.Reader(desc.Digest)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r.Size() > oci.MaxDocument {
		return nil, fmt.Errorf("document %s has %d bytes, more than %d: %w", desc.Digest, r.Size(), oci.MaxDocument, errdefs.ErrInvalidArgument)
	}
	doc := make([]byte, r.Size())
	if _, err := r.ReadAt(doc, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	if desc.Digest.Algorithm().FromBytes(doc) != desc.Digest {
		return nil, fmt.Errorf("the bytes of %s are not what its name says", desc.Digest)
	}
	return doc, nil
}
