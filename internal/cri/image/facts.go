package image

import (
	"context"
	"log/slog"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// facts are what the documents below a target say of the image for this
// machine. The target's digest fixes them, so they are true for as long as
// anybody remembers them.
type facts struct {
	id       digest.Digest // of the config
	size     int64         // bytes
	chain    digest.Digest
	uid      *int64
	username string
	needs    []digest.Digest
}

// image is an Image without names. Without facts it has no ID.
func (f facts) image() *Image {
	return &Image{ID: f.id, Size: f.size, ChainID: f.chain, UID: f.uid, Username: f.username, needs: f.needs}
}

// Bounds of what is remembered; beyond them documents are read anew.
const (
	maxFacts = 20_000  // targets
	maxNeeds = 200_000 // digests of all targets together
)

// factsCache remembers the facts of the targets that the last look at the
// records found, and forgets all others: it never outgrows the records.
type factsCache struct {
	mu    sync.Mutex
	known map[digest.Digest]facts
	bad   map[digest.Digest]bool // those that are told of already
}

// of returns the facts of the records' targets, and nothing for a target whose
// documents are missing, unreadable or for other platforms only. That is not
// remembered: a pull may bring what is missing.
func (c *factsCache) of(ctx context.Context, docs image.Documents, records []meta.Image, log *slog.Logger) (map[digest.Digest]facts, error) {
	c.mu.Lock()
	before, told := c.known, c.bad
	c.mu.Unlock()
	needs := 0
	found := make(map[digest.Digest]facts, len(records))
	keep := make(map[digest.Digest]facts, len(records))
	bad := map[digest.Digest]bool{}
	for _, rec := range records {
		dgst := rec.Target.Digest
		if _, done := found[dgst]; done || bad[dgst] {
			continue
		}
		f, ok := before[dgst]
		if !ok {
			loaded, err := load(ctx, docs, rec.Target)
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err != nil {
				bad[dgst] = true
				if !errdefs.IsNotFound(err) && !told[dgst] {
					log.Warn("an image's documents can't be read: `holdfast fsck` says more", "image", rec.Name, "error", err)
				}
				continue
			}
			f = loaded
		}
		found[dgst] = f
		if len(keep) < maxFacts && needs+len(f.needs) <= maxNeeds {
			keep[dgst] = f
			needs += len(f.needs)
		}
	}
	c.mu.Lock()
	c.known, c.bad = keep, bad
	c.mu.Unlock()
	return found, nil
}

func load(ctx context.Context, docs image.Documents, target oci.Descriptor) (facts, error) {
	img, err := image.Load(ctx, docs, target, oci.Host())
	if err != nil {
		return facts{}, err
	}
	f := facts{id: img.Config.Digest, size: img.Size(), chain: img.TopChain()}
	for _, idx := range img.Path[:len(img.Path)-1] {
		f.size += idx.Size // containerd counts these, too
	}
	f.uid, f.username = user(img.Spec.Config.User)
	for _, l := range img.Layers {
		f.needs = append(f.needs, l.Desc.Digest)
	}
	slices.Sort(f.needs)
	f.needs = slices.Compact(f.needs)
	return f, nil
}
