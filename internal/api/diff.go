package api

import (
	"context"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"

	"github.com/holdfast-dev/holdfast/internal/diff"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// Differ applies layers to mounts and makes layers from them: diff.Differ.
type Differ interface {
	Apply(ctx context.Context, sp meta.Space, desc oci.Descriptor, mounts []mount.Mount) (oci.Descriptor, error)
	Diff(ctx context.Context, sp meta.Space, lower, upper []mount.Mount, opts diff.DiffOptions) (oci.Descriptor, error)
}

type diffService struct {
	diffapi.UnimplementedDiffServer
	door
	differ Differ
}

// Apply needs no sync_fs, since what is applied is synced always (inv 1), and
// no payloads, since they are for stream processors and there are none.
func (s *diffService) Apply(ctx context.Context, req *diffapi.ApplyRequest) (*diffapi.ApplyResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	if s.differ == nil {
		return s.UnimplementedDiffServer.Apply(ctx, req)
	}
	desc := wire.FromDescriptor(req.GetDiff())
	applied, err := s.differ.Apply(ctx, sp, desc, wire.FromMounts(req.GetMounts()))
	if err != nil {
		return nil, wire.Error(err)
	}
	return &diffapi.ApplyResponse{Applied: wire.Descriptor(applied)}, nil
}

func (s *diffService) Diff(ctx context.Context, req *diffapi.DiffRequest) (*diffapi.DiffResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	if s.differ == nil {
		return s.UnimplementedDiffServer.Diff(ctx, req)
	}
	opts := diff.DiffOptions{MediaType: req.GetMediaType(), Ref: req.GetRef(), Labels: req.GetLabels()}
	if opts.Epoch, err = epochTime(req.GetSourceDateEpoch()); err != nil {
		return nil, wire.Error(err)
	}
	desc, err := s.differ.Diff(ctx, sp, wire.FromMounts(req.GetLeft()), wire.FromMounts(req.GetRight()), opts)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &diffapi.DiffResponse{Diff: wire.Descriptor(desc)}, nil
}
