package image

import (
	"cmp"
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// Pull makes an image local and unpacks it into the snapshotter of the runtime
// handler ("" is the default one). name is normalised as docker does. The
// image gets three names in one transaction: the reference, the repository with
// the target's digest, and the id, which is returned. Labels that these names
// have already stay.
func (v *View) Pull(ctx context.Context, name string, a Auth, handler string) (digest.Digest, error) {
	r, err := ref.Normalize(name)
	if err != nil {
		return "", err
	}
	creds, err := a.credentials(ctx, r.Host)
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", r, err)
	}
	labels := map[string]string{labelManaged: managed}
	if v.pins[r.String()] {
		labels[labelPinned] = pinned
	}
	ctx, watch := newWatchdog(ctx, v.opts.ProgressTimeout)
	defer watch.stop()
	var id digest.Digest
	_, err = v.puller.Pull(ctx, v.sp, r.String(), pull.Request{
		Snapshotter: cmp.Or(v.opts.Handlers[handler], v.opts.Snapshotter),
		Labels:      labels,
		KeepLabels:  true,
		Downloads:   v.opts.Downloads,
		Session:     registry.Session{Credentials: creds},
		Progress:    watch.hear,
		Names: func(img image.Image) []string {
			id = img.Config.Digest
			return names(r, img)
		},
	})
	if err != nil {
		return "", err
	}
	return id, nil
}

// names are the records that a pull of r makes.
func names(r ref.Reference, img image.Image) []string {
	byDigest := ref.Reference{Host: r.Host, Path: r.Path, Digest: img.Target().Digest}
	list := []string{r.String()}
	if r.Digest == "" {
		list = append(list, byDigest.String())
	}
	return append(list, img.Config.Digest.String())
}
