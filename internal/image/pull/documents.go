package pull

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// documents fetches an image's documents into memory, since the plan is made
// from all of them before the second transaction, and writes them to the store
// once their ingests are recorded. The bound on memory is oci.MaxDocument for
// each of the few that lie between a name and its layers.
type documents struct {
	sp   meta.Space
	repo *registry.Repository
	docs map[string][]byte // by digest

	missing []oci.Descriptor // fetched, and not in the store yet; in order
	writers []*meta.Writer
	sealing []oci.Descriptor
}

// ReadDocument implements image.Documents: from the store if it is there,
// else from the registry.
func (d *documents) ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	if doc, ok := d.docs[desc.Digest.String()]; ok {
		return doc, nil
	}
	doc, err := d.sp.ReadBlob(ctx, desc, oci.MaxDocument)
	if errdefs.IsNotFound(err) {
		if doc = d.kept(ctx, desc); doc == nil {
			doc, err = d.fetch(ctx, desc)
		} else {
			err = nil
		}
		d.missing = append(d.missing, desc)
	}
	if err != nil {
		return nil, err
	}
	d.docs[desc.Digest.String()] = doc
	return doc, nil
}

// kept returns a document that an earlier, interrupted pull has left whole in
// its ingest, or nil.
func (d *documents) kept(ctx context.Context, desc oci.Descriptor) []byte {
	st, err := d.sp.Ingest(ctx, oci.Key(desc))
	if err != nil || st.Offset != desc.Size || desc.Size > oci.MaxDocument {
		return nil
	}
	w, err := openWriter(ctx, d.sp, desc)
	if err != nil {
		return nil
	}
	defer w.Close()
	data, err := w.Data()
	if err != nil {
		return nil
	}
	defer data.Close()
	doc := make([]byte, desc.Size)
	if _, err := data.ReadAt(doc, 0); err != nil && err != io.EOF || desc.Digest.Algorithm().FromBytes(doc) != desc.Digest {
		return nil
	}
	return doc
}

// fetch reads one document, from one host after the other as long as they
// serve other bytes than the descriptor promises (inv 8).
func (d *documents) fetch(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	if desc.Size > oci.MaxDocument {
		return nil, fmt.Errorf("document %s has %d bytes, more than %d: %w", desc.Digest, desc.Size, oci.MaxDocument, errdefs.ErrInvalidArgument)
	}
	if int64(len(desc.Data)) == desc.Size && desc.Size > 0 && desc.Digest.Algorithm().FromBytes(desc.Data) == desc.Digest {
		return desc.Data, nil
	}
	for try := 0; ; try++ {
		body, err := d.repo.Fetch(ctx, desc, 0)
		if err != nil {
			return nil, err
		}
		doc, err := io.ReadAll(io.LimitReader(body, oci.MaxDocument+1))
		host := body.Host()
		body.Close()
		if err != nil {
			return nil, err
		}
		if int64(len(doc)) == desc.Size && desc.Digest.Algorithm().FromBytes(doc) == desc.Digest {
			return doc, nil
		}
		if d.repo.Distrust(host); try == maxLies {
			return nil, lie(host, desc.Digest, desc.Digest.Algorithm().FromBytes(doc))
		}
	}
}

// maxLies is how many more times a descriptor is fetched after bytes that
// don't match it.
const maxLies = 1

func lie(host string, want, got digest.Digest) error {
	return fmt.Errorf("%s served bytes of digest %s for %s: the registry or a proxy in between damages or changes content: %w",
		host, got, want, errdefs.ErrDataLoss)
}

// write opens the ingests of the missing documents, in order, and fills them.
// Documents that have come into the store meanwhile are left out.
func (d *documents) write(ctx context.Context) error {
	for _, desc := range d.missing {
		if slices.ContainsFunc(d.sealing, func(s oci.Descriptor) bool { return s.Digest == desc.Digest }) {
			continue
		}
		w, err := openWriter(ctx, d.sp, desc)
		if errdefs.IsAlreadyExists(err) {
			continue
		}
		if err != nil {
			return err
		}
		d.writers, d.sealing = append(d.writers, w), append(d.sealing, desc)
		st, err := w.Status()
		if err != nil {
			return err
		}
		if st.Offset == desc.Size && w.Digest() == desc.Digest {
			continue // from an earlier pull, or another namespace has it
		}
		if err := w.Truncate(0); err != nil {
			return err
		}
		if _, err := io.Copy(w, bytes.NewReader(d.docs[desc.Digest.String()])); err != nil {
			return fmt.Errorf("write document %s: %w", desc.Digest, err)
		}
	}
	return nil
}

// seal moves the written documents to their place, ready to be recorded.
// release must be called in any case.
func (d *documents) seal(ctx context.Context) (sealed []meta.Sealed, release func(), err error) {
	var releases []func()
	release = func() {
		for _, f := range releases {
			f()
		}
	}
	for i, w := range d.writers {
		s, f, err := w.Seal(ctx, d.sealing[i].Size, d.sealing[i].Digest, sealDurably)
		if err != nil {
			return nil, release, fmt.Errorf("document %s: %w", d.sealing[i].Digest, err)
		}
		sealed, releases = append(sealed, s), append(releases, f)
	}
	d.writers = nil
	return sealed, release, nil
}

// close lets go of the ingests that were not sealed.
func (d *documents) close() {
	for _, w := range d.writers {
		w.Close()
	}
	d.writers = nil
}
