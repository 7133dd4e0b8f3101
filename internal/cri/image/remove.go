package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/meta"
)

// Remove forgets the image that name stands for, under all its names in one
// transaction, and waits until what only it held is gone. An image that isn't
// there is no error.
func (v *View) Remove(ctx context.Context, name string) error {
	all, err := v.all(ctx)
	if err != nil {
		return err
	}
	img, err := find(all, name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	targets := make(map[digest.Digest]bool, len(img.targets))
	for _, t := range img.targets {
		targets[t.Digest] = true
	}
	// The names are read anew: one may have been added or moved since.
	err = v.sp.Update(ctx, func(tx *meta.Tx) error {
		records, err := tx.Images()
		if err != nil {
			return err
		}
		for _, rec := range records {
			if !targets[rec.Target.Digest] {
				continue
			}
			if err := tx.DeleteImage(rec.Name, ""); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove image %q: %w", name, err)
	}
	if _, err := v.opts.Collect(ctx); err != nil {
		return fmt.Errorf("image %q is removed; free its room: %w", name, err)
	}
	return nil
}
