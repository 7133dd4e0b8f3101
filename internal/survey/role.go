package survey

import (
	"cmp"
	"context"
	"fmt"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// roles says what a blob or a snapshot is in an image: in the first that has
// it. An uncompressed layer at the bottom has the name of its snapshot, so the keys are
// blob(...) and unpacked(...).
type roles map[string]string

func blob(dgst string) string      { return "blob " + dgst }
func unpacked(chain string) string { return "snapshot " + chain }

func (r roles) role(key, fallback string) string { return cmp.Or(r[key], fallback) }

func (r roles) play(key, role string) { r[key] = cmp.Or(r[key], role) }

// explain finds out what each blob and snapshot is for, and who holds it.
func (t *tree) explain(ctx context.Context) error {
	t.roles, t.holders = make(roles), make(holders)
	var seen map[digest.Digest]bool // in the namespace at hand: tags often share documents
	ns := ""
	for _, img := range t.dump.Images {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if seen == nil || img.Namespace != ns {
			seen, ns = make(map[digest.Digest]bool), img.Namespace
		}
		t.explainImage(ctx, documents{t.store.DB.Space(ns)}, img.Target, seen)
	}
	t.holders.read(t.dump, t.roles)
	return nil
}

// explainImage names the parts of one image that are here, of all platforms.
// What can't be read leaves the parts below it without a name; fsck is there
// to say so.
func (t *tree) explainImage(ctx context.Context, docs documents, desc oci.Descriptor, seen map[digest.Digest]bool) {
	if seen[desc.Digest] {
		return
	}
	seen[desc.Digest] = true
	suffix := ""
	if desc.Platform != nil {
		suffix = " for " + platforms.Format(*desc.Platform)
	}
	switch {
	case oci.IsManifest(desc.MediaType):
		t.play(blob(desc.Digest.String()), "manifest"+suffix)
		t.explainManifest(ctx, docs, desc)
	case oci.IsIndex(desc.MediaType):
		t.play(blob(desc.Digest.String()), "index"+suffix)
		doc, err := docs.ReadDocument(ctx, desc)
		if err != nil {
			return
		}
		children, err := image.Children(desc.MediaType, doc)
		if err != nil {
			return
		}
		for _, ch := range children {
			t.explainImage(ctx, docs, ch, seen)
		}
	default:
		t.play(blob(desc.Digest.String()), "document")
	}
}

func (t *tree) explainManifest(ctx context.Context, docs documents, desc oci.Descriptor) {
	img, err := image.Load(ctx, docs, desc, oci.Host()) // a manifest is taken whatever it is for
	if err != nil {
		return
	}
	t.play(blob(img.Config.Digest.String()), "config")
	for i, l := range img.Layers {
		name := fmt.Sprintf("layer %d of %d", i+1, len(img.Layers))
		t.play(blob(l.Desc.Digest.String()), name)
		t.play(unpacked(l.ChainID.String()), name+", unpacked")
	}
}

type documents struct{ sp meta.Space }

// ReadDocument implements image.Documents.
func (d documents) ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	return d.sp.ReadBlob(ctx, desc, oci.MaxDocument)
}
