package image

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/ref"
)

// Tags lists the image's references with a tag, `host/path:tag`.
func (img Image) Tags() []string {
	return img.references(func(r ref.Reference) bool { return r.Digest == "" && r.Tag != "" })
}

// Digests lists the image's references by digest, `host/path@sha256:...`.
func (img Image) Digests() []string {
	return img.references(func(r ref.Reference) bool { return r.Digest != "" })
}

func (img Image) references(want func(ref.Reference) bool) (list []string) {
	for _, name := range img.Names {
		if r, ok := reference(name); ok && want(r) {
			list = append(list, r.String())
		}
	}
	return list
}

// reference reads the name of a record. The ids among them are no references,
// and other clients may have named an image anything.
func reference(name string) (ref.Reference, bool) {
	if _, err := digest.Parse(name); err == nil {
		return ref.Reference{}, false
	}
	r, err := ref.Parse(name)
	if err != nil {
		r, err = ref.Normalize(name)
	}
	return r, err == nil
}

// find looks name up: as a whole id, as a reference, and as the beginning of
// an id, with or without `sha256:`.
func find(all []Image, name string) (Image, error) {
	if name == "" {
		return Image{}, fmt.Errorf("an image is required: give its id or its name: %w", errdefs.ErrInvalidArgument)
	}
	if len(name) > ref.MaxLength {
		return Image{}, fmt.Errorf("the image's name is longer than %d bytes: %w", ref.MaxLength, errdefs.ErrInvalidArgument)
	}
	full := normal(name)
	ways := []func(Image) bool{
		func(img Image) bool { return slices.Contains(img.Names, full) },
		func(img Image) bool { return slices.Contains(img.Names, name) },
		func(img Image) bool { return slices.Contains(img.Tags(), full) || slices.Contains(img.Digests(), full) },
	}
	if _, err := digest.Parse(name); err == nil {
		ways = []func(Image) bool{
			func(img Image) bool { return string(img.ID) == name },
			func(img Image) bool { return img.ID == "" && slices.Contains(img.Names, name) },
		}
	}
	for _, isNamed := range ways {
		if i := slices.IndexFunc(all, isNamed); i >= 0 {
			return all[i], nil
		}
	}
	return findPrefix(all, name)
}

func findPrefix(all []Image, name string) (Image, error) {
	alg, prefix, hasAlg := strings.Cut(name, ":")
	if !hasAlg {
		prefix = name
	}
	var found []Image
	for _, img := range all {
		if img.ID == "" || prefix == "" || hasAlg && alg != string(img.ID.Algorithm()) {
			continue
		}
		if strings.HasPrefix(img.ID.Encoded(), prefix) {
			found = append(found, img)
		}
	}
	switch len(found) {
	case 0:
		return Image{}, fmt.Errorf("image %q: %w", name, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return Image{}, fmt.Errorf("the ids of %d images begin with %q: give more of it: %w", len(found), name, errdefs.ErrInvalidArgument)
}
