package oci

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
)

// Matcher tells which platforms may run here and which of two runs better.
type Matcher = platforms.MatchComparer

// Host matches what this machine runs best.
func Host() Matcher { return platforms.Default() }

// ParsePlatform reads `linux/arm64/v8` and the like; "" is the host. Errors
// are errdefs.ErrInvalidArgument.
func ParsePlatform(s string) (Matcher, error) {
	if s == "" {
		return Host(), nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return nil, fmt.Errorf("platform %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return platforms.Only(p), nil
}

// NoPlatform is the error of an index that lists no image for a platform, of
// kind errdefs.ErrNotFound.
type NoPlatform struct {
	Have []string // the platforms that there are
}

func (n *NoPlatform) Error() string {
	if len(n.Have) == 0 {
		return "the index lists no image: " + errdefs.ErrNotFound.Error()
	}
	return fmt.Sprintf("no image for this platform; there are %s: %v", strings.Join(n.Have, ", "), errdefs.ErrNotFound)
}

func (n *NoPlatform) Unwrap() error { return errdefs.ErrNotFound }

// Select returns the manifest of idx that m likes best. A manifest without a
// platform is taken only when nothing else matches. The error is a *NoPlatform.
func Select(idx Index, m Matcher) (Descriptor, error) {
	var fit, bare []Descriptor
	var have []string
	for _, d := range idx.Manifests {
		if !IsManifest(d.MediaType) && !IsIndex(d.MediaType) {
			continue
		}
		switch {
		case d.Platform == nil:
			bare = append(bare, d)
		case m.Match(*d.Platform):
			fit = append(fit, d)
		default:
			have = append(have, platforms.Format(*d.Platform))
		}
	}
	slices.SortStableFunc(fit, func(a, b Descriptor) int {
		switch {
		case m.Less(*a.Platform, *b.Platform):
			return -1
		case m.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	if all := append(fit, bare...); len(all) > 0 {
		return all[0], nil
	}
	return Descriptor{}, &NoPlatform{have}
}
