package meta

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/filter"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/opencontainers/go-digest"
)

// Image is a name for a root document. Of the Target digest, media type, size
// and annotations are kept; the rest is not.
type Image struct {
	Name             string
	Labels           map[string]string
	Target           oci.Descriptor
	Created, Updated time.Time
}

// Image reads one image. ErrNotFound.
func (sp Space) Image(ctx context.Context, name string) (img Image, err error) {
	err = sp.view(func(ns bucket) error {
		img, err = readImage(name, ns.sub(keyImages, name))
		return err
	})
	return img, err
}

// Images lists the images that match any of the filters, in the order of their names.
func (sp Space) Images(ctx context.Context, filters ...string) (all []Image, err error) {
	match, err := filter.Parse(filters...)
	if err != nil {
		return nil, err
	}
	err = sp.view(func(ns bucket) error {
		for name, b := range ns.sub(keyImages).subs() {
			img, err := readImage(name, b)
			if err != nil {
				return err
			}
			if match.Match(img.fields()) {
				all = append(all, img)
			}
		}
		return nil
	})
	return all, err
}

// CreateImage records an image. ErrAlreadyExists, ErrInvalidArgument.
func (sp Space) CreateImage(ctx context.Context, img Image) (created Image, err error) {
	err = sp.Update(ctx, func(tx *Tx) error {
		if tx.ns().sub(keyImages, img.Name).exists() {
			return fmt.Errorf("image %q: %w", img.Name, errdefs.ErrAlreadyExists)
		}
		created, err = tx.PutImage(img)
		return err
	})
	return created, err
}

// UpdateImage sets what fields name (`labels`, `labels.<key>`, `target`,
// `annotations`, `annotations.<key>`), or all of these when there are no
// fields. ErrNotFound, ErrInvalidArgument.
func (sp Space) UpdateImage(ctx context.Context, img Image, fields ...string) (updated Image, err error) {
	err = sp.Update(ctx, func(tx *Tx) error {
		if img.Name == "" {
			return fmt.Errorf("image name is required: %w", errdefs.ErrInvalidArgument)
		}
		next, err := readImage(img.Name, tx.ns().sub(keyImages, img.Name))
		if err != nil {
			return err
		}
		if len(fields) == 0 {
			next.Labels, next.Target = img.Labels, img.Target
		}
		for _, path := range fields {
			switch {
			case maskTexts(path, keyLabels, &next.Labels, img.Labels):
			case maskTexts(path, keyAnnotations, &next.Target.Annotations, img.Target.Annotations):
			case path == keyTarget:
				next.Target = img.Target
			default:
				return fmt.Errorf("field %q of an image can't be updated: %w", path, errdefs.ErrInvalidArgument)
			}
		}
		tx.deleted = true // the old target may be nobody's now
		updated, err = tx.PutImage(next)
		return err
	})
	return updated, err
}

// DeleteImage forgets an image; what only it held goes with the next
// collection. ErrNotFound, also when target isn't "" and the image has another.
func (sp Space) DeleteImage(ctx context.Context, name string, target digest.Digest) error {
	return sp.Update(ctx, func(tx *Tx) error { return tx.DeleteImage(name, target) })
}

// Image reads one image, as the transaction sees it. ErrNotFound.
func (tx *Tx) Image(name string) (Image, error) {
	return readImage(name, tx.ns().sub(keyImages, name))
}

// Images lists all images of the namespace, as the transaction sees them, in
// the order of their names.
func (tx *Tx) Images() (all []Image, err error) {
	for name, b := range tx.ns().sub(keyImages).subs() {
		img, err := readImage(name, b)
		if err != nil {
			return nil, err
		}
		all = append(all, img)
	}
	return all, nil
}

// DeleteImage is Space.DeleteImage as a part of the transaction.
func (tx *Tx) DeleteImage(name string, target digest.Digest) error {
	img, err := tx.Image(name)
	if err != nil {
		return err
	}
	if target != "" && target != img.Target.Digest {
		return fmt.Errorf("image %q has target %s, not %s: %w", name, img.Target.Digest, target, errdefs.ErrNotFound)
	}
	if err := tx.release(keyImages, name); err != nil {
		return err
	}
	tx.deleted = true
	return tx.ns().sub(keyImages).drop(name)
}

// PutImage creates an image or replaces its labels and target. One that
// expires is put under the lease. ErrInvalidArgument.
func (tx *Tx) PutImage(img Image) (Image, error) {
	if err := img.check(); err != nil {
		return Image{}, err
	}
	b, err := tx.v1.create(tx.sp.ns, keyImages, img.Name)
	if err != nil {
		return Image{}, err
	}
	if img.Created, err = b.time(keyCreatedAt); err != nil {
		return Image{}, fmt.Errorf("image %q: %w", img.Name, err)
	}
	if img.Created.IsZero() {
		img.Created = tx.now
	} else {
		tx.deleted = true
	}
	img.Updated = tx.now
	img.Labels = withoutEmpty(img.Labels)
	img.Target.Annotations = withoutEmpty(img.Target.Annotations)
	if img.Labels[labelExpire] != "" {
		if _, err := tx.hold(keyImages, img.Name); err != nil {
			return Image{}, err
		}
	}
	return img, img.write(b)
}

func (img Image) write(b bucket) error {
	if err := b.putTimes(img.Created, img.Updated); err != nil {
		return err
	}
	if err := b.putTexts(keyLabels, img.Labels); err != nil {
		return err
	}
	if err := b.putTexts(keyAnnotations, img.Target.Annotations); err != nil {
		return err
	}
	target, err := b.create(keyTarget)
	if err != nil {
		return err
	}
	if err := target.putText(keyDigest, string(img.Target.Digest)); err != nil {
		return err
	}
	if err := target.putText(keyMediaType, img.Target.MediaType); err != nil {
		return err
	}
	return target.putNumber(keySize, img.Target.Size)
}

func (img Image) check() error {
	if img.Name == "" {
		return fmt.Errorf("image name is required: %w", errdefs.ErrInvalidArgument)
	}
	if err := img.Target.Digest.Validate(); err != nil {
		return fmt.Errorf("image %q: target digest %q: %w: %w", img.Name, img.Target.Digest, err, errdefs.ErrInvalidArgument)
	}
	if img.Target.Size <= 0 {
		return fmt.Errorf("image %q: target size must be greater than zero: %w", img.Name, errdefs.ErrInvalidArgument)
	}
	if img.Target.MediaType == "" {
		return fmt.Errorf("image %q: target media type is required: %w", img.Name, errdefs.ErrInvalidArgument)
	}
	if err := checkLabels(img.Labels); err != nil {
		return fmt.Errorf("image %q: %w", img.Name, err)
	}
	return nil
}

// fields is what filters see of an image.
func (img Image) fields() fields {
	return fields{
		"name":        textField(img.Name),
		"labels":      mapField(img.Labels),
		"annotations": mapField(img.Target.Annotations),
		"target": fields{
			"digest":    textField(string(img.Target.Digest)),
			"mediatype": textField(img.Target.MediaType),
		}.Field,
	}
}

func readImage(name string, b bucket) (img Image, err error) {
	if !b.exists() {
		return img, fmt.Errorf("image %q: %w", name, errdefs.ErrNotFound)
	}
	img = Image{Name: name, Labels: b.texts(keyLabels)}
	if img.Created, img.Updated, err = b.times(); err != nil {
		return img, fmt.Errorf("image %q: %w", name, err)
	}
	target := b.sub(keyTarget)
	img.Target = oci.Descriptor{
		MediaType:   target.text(keyMediaType),
		Digest:      digest.Digest(target.text(keyDigest)),
		Size:        target.number(keySize),
		Annotations: b.texts(keyAnnotations),
	}
	return img, nil
}
