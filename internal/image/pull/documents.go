package pull

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// documents fetches an image's documents into memory, since the plan is made
// from all of them before the second transaction, and writes them to the store
// once their ingests are recorded. The bound on memory is oci.MaxDocument for
// each of the few that lie between a name and its layers.
type documents struct {
	sp     meta.Space
	repo   *registry.Repository
	docs   map[string][]byte // by digest
	report func(Event)
	alone  bool // what is read now is read for itself: the layers that it names don't come

	read    []oci.Descriptor // in order
	missing []oci.Descriptor // those of them that the namespace hasn't, as T2 saw it
	writers []*meta.Writer
	sealing []oci.Descriptor

	sealed   []meta.Sealed
	releases []func() // of what is sealed
}

// ReadDocument implements image.Documents: from the store if it is there,
// else from the registry.
func (d *documents) ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	if doc, ok := d.docs[desc.Digest.String()]; ok {
		return doc, nil
	}
	stage := StageKnown
	doc, err := d.sp.ReadBlob(ctx, desc, oci.MaxDocument)
	if errdefs.IsNotFound(err) {
		stage = StageRead
		d.report(Event{Stage: StageReading, Desc: desc})
		if doc = d.kept(ctx, desc); doc == nil {
			doc, err = d.fetch(ctx, desc)
		} else {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	d.docs[desc.Digest.String()] = doc
	d.read = append(d.read, desc)
	children, _ := image.Children(desc.MediaType, doc) // whoever wants them says what is wrong with them
	if d.alone {
		children = slices.DeleteFunc(children, func(ch oci.Descriptor) bool { return !isDocument(ch.MediaType) })
	}
	d.report(Event{Stage: stage, Desc: desc, Offset: desc.Size, Children: children})
	return doc, nil
}

// kept returns a document that an earlier, interrupted pull has left whole in
// its ingest, or nil.
func (d *documents) kept(ctx context.Context, desc oci.Descriptor) []byte {
	st, err := d.sp.Ingest(ctx, oci.Key(desc))
	if err != nil || st.Offset != desc.Size || desc.Size > oci.MaxDocument {
		return nil
	}
	w, err := d.sp.OpenWriter(ctx, oci.Key(desc), meta.WriterOptions{Total: desc.Size, Expected: desc.Digest})
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
	doc, err := d.fetchOnce(ctx, desc)
	told := err
	for range maxLies {
		l, isLie := errors.AsType[*lied](err)
		if !isLie {
			break
		}
		for _, host := range l.hosts {
			d.repo.Distrust(host)
		}
		if doc, err = d.fetchOnce(ctx, desc); err != nil {
			told = again(told, err)
		}
	}
	if err != nil {
		return nil, told
	}
	return doc, nil
}

// fetchOnce reads a document from the first host that answers; the error is a
// *lied if that sent other bytes.
func (d *documents) fetchOnce(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	body, err := d.repo.Fetch(ctx, desc, 0)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	doc, err := io.ReadAll(io.LimitReader(body, oci.MaxDocument+1))
	if err != nil {
		return nil, err
	}
	if got := desc.Digest.Algorithm().FromBytes(doc); got != desc.Digest || int64(len(doc)) != desc.Size {
		return nil, &lied{[]string{body.Host()}, lie(body.Host(), desc.Digest, got)}
	}
	return doc, nil
}

// again is the error of a blob that came wrong, and then failed for another
// reason or wasn't right either.
func again(first, err error) error { return fmt.Errorf("%w (asked again: %w)", first, err) }

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

// seal moves the written documents to their place, ready to be recorded. They
// are pinned until close.
func (d *documents) seal(ctx context.Context) error {
	for len(d.writers) > 0 {
		desc := d.sealing[len(d.sealed)]
		s, release, err := d.writers[0].Seal(ctx, desc.Size, desc.Digest, sealDurably)
		d.writers = d.writers[1:]
		if err != nil {
			return fmt.Errorf("document %s: %w", desc.Digest, err)
		}
		d.sealed, d.releases = append(d.sealed, s), append(d.releases, release)
	}
	return nil
}

// close lets go of the ingests that were not sealed, and of what was.
func (d *documents) close() {
	for _, w := range d.writers {
		w.Close()
	}
	for _, release := range d.releases {
		release()
	}
	d.writers, d.releases = nil, nil
}
