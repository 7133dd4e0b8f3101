package diff

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/undo"
)

// DiffOptions say what layer to make. The zero value works.
type DiffOptions struct {
	MediaType string            // OCI layer, plain, +gzip or +zstd; default: +gzip
	Ref       string            // the ingest to write to, which starts anew; default: one of its own
	Labels    map[string]string // for the blob; its DiffID is added
	Epoch     time.Time         // no time in the layer is later; zero: times stay as they are
}

// Diff makes a layer of what upper adds to lower, and of what it lacks, and
// keeps it as a blob in the namespace of sp. Both trees are mounted read-only,
// so upper may be in use. ErrNotImplemented for another media type. After an
// error nothing is left but, where opts name an ingest, that ingest.
func (d *Differ) Diff(ctx context.Context, sp meta.Space, lower, upper []mount.Mount, opts DiffOptions) (desc oci.Descriptor, err error) {
	if opts.MediaType == "" {
		opts.MediaType = ocispec.MediaTypeImageLayerGzip
	}
	compress, ok := compressors[opts.MediaType]
	if !ok {
		return oci.Descriptor{}, fmt.Errorf("unsupported diff media type %q: %w", opts.MediaType, errdefs.ErrNotImplemented)
	}
	err = d.opts.Temp.With(ctx, mount.ReadOnly(lower), func(below string) error {
		return d.opts.Temp.With(ctx, mount.ReadOnly(upper), func(above string) error {
			desc, err = keep(ctx, sp, opts, func(w io.Writer) (digest.Digest, error) {
				return pack(ctx, w, compress, below, above, opts)
			})
			return err
		})
	})
	if err != nil {
		return oci.Descriptor{}, fmt.Errorf("make layer: %w", err)
	}
	return desc, nil
}

// compressors are the media types that Diff can make. nil is no compression.
var compressors = map[string]func(io.Writer) (io.WriteCloser, error){
	ocispec.MediaTypeImageLayer: nil,
	ocispec.MediaTypeImageLayerGzip: func(w io.Writer) (io.WriteCloser, error) {
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	},
	ocispec.MediaTypeImageLayerZstd: func(w io.Writer) (io.WriteCloser, error) {
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1)) // the same bytes on every machine
	},
}

// pack writes the layer and returns its DiffID, or "" when it is not
// compressed: the blob's digest then says it.
func pack(ctx context.Context, w io.Writer, compress func(io.Writer) (io.WriteCloser, error), lower, upper string, opts DiffOptions) (digest.Digest, error) {
	var how layer.DiffOptions
	if !opts.Epoch.IsZero() {
		how.SourceDateEpoch = &opts.Epoch
	}
	if compress == nil {
		return "", layer.Diff(ctx, w, lower, upper, how)
	}
	packed, err := compress(w)
	if err != nil {
		return "", err
	}
	plain := digest.Canonical.Digester()
	err = layer.Diff(ctx, io.MultiWriter(packed, plain.Hash()), lower, upper, how)
	if err := errors.Join(err, packed.Close()); err != nil {
		return "", err
	}
	return plain.Digest(), nil
}

// keep makes a blob of what write writes.
func keep(ctx context.Context, sp meta.Space, opts DiffOptions, write func(io.Writer) (digest.Digest, error)) (desc oci.Descriptor, err error) {
	var u undo.Stack
	defer u.Unwind(&err)
	ref := opts.Ref
	if ref == "" {
		ref = "diff-" + rand.Text()
		u.Add("abort ingest "+ref, func(ctx context.Context) error { return abort(ctx, sp, ref) })
	}
	w, err := sp.OpenWriter(ctx, ref, meta.WriterOptions{})
	if err != nil {
		return oci.Descriptor{}, err
	}
	defer w.Close()
	u.Add("close ingest "+ref, func(context.Context) error { return w.Close() })
	if opts.Ref != "" {
		if err := w.Truncate(0); err != nil {
			return oci.Descriptor{}, err
		}
	}
	diffID, err := write(w)
	if err != nil {
		return oci.Descriptor{}, err
	}
	labels := maps.Clone(opts.Labels)
	if diffID != "" {
		if labels == nil {
			labels = make(map[string]string)
		}
		labels[oci.LabelUncompressed] = diffID.String()
	}
	dgst := w.Digest()
	if err := w.Commit(ctx, 0, dgst, labels); err != nil && !errdefs.IsAlreadyExists(err) {
		return oci.Descriptor{}, err
	}
	u.Keep()
	size, err := settle(ctx, sp, dgst, diffID)
	return oci.Descriptor{MediaType: opts.MediaType, Digest: dgst, Size: size}, err
}

// settle returns the size of the blob, and labels one that was there already
// with its DiffID if nobody has.
func settle(ctx context.Context, sp meta.Space, dgst, diffID digest.Digest) (int64, error) {
	b, err := sp.Blob(ctx, dgst)
	if err != nil || diffID == "" || b.Labels[oci.LabelUncompressed] != "" {
		return b.Size, err
	}
	b.Labels = map[string]string{oci.LabelUncompressed: diffID.String()}
	b, err = sp.UpdateBlob(ctx, b, "labels."+oci.LabelUncompressed)
	return b.Size, err
}

func abort(ctx context.Context, sp meta.Space, ref string) error {
	if err := sp.AbortIngest(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

func defaultTemp() string { return os.TempDir() + "/holdfast-mounts" }
