package pull

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// maxMetadata bounds what one pull holds in memory for the platforms that it
// doesn't pull, in bytes.
const maxMetadata = 64 << 20

// metadata reads the manifests and configs of the other platforms, which the
// transactions then record like those of this one.
func (r *run) metadata(ctx context.Context, plan image.Image) error {
	left := int64(maxMetadata)
	for _, idx := range plan.Path[:len(plan.Path)-1] {
		if err := r.children(ctx, idx, &left); err != nil {
			return err
		}
	}
	return nil
}

// children reads the documents below desc that haven't been read yet.
func (r *run) children(ctx context.Context, desc oci.Descriptor, left *int64) error {
	doc, err := r.docs.ReadDocument(ctx, desc)
	if err != nil {
		return err
	}
	all, err := image.Children(desc.MediaType, doc)
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	for _, ch := range all {
		if !oci.IsManifest(ch.MediaType) && !oci.IsConfig(ch.MediaType) {
			continue
		}
		if _, read := r.docs.docs[ch.Digest.String()]; read {
			continue
		}
		if *left -= ch.Size; *left < 0 {
			return fmt.Errorf("the manifests and configs of all platforms have more than %d bytes; pull one platform without them: %w", maxMetadata, errdefs.ErrResourceExhausted)
		}
		if err := r.children(ctx, ch, left); err != nil {
			return err
		}
	}
	return nil
}
