package api

import (
	"context"
	"errors"
	"fmt"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

type snapshotsService struct {
	snapshotsapi.UnimplementedSnapshotsServer
	door
}

// open finds the snapshots that a request is about.
func (s *snapshotsService) open(ctx context.Context, driver string) (meta.Snapshots, error) {
	if driver == "" {
		return meta.Snapshots{}, fmt.Errorf("snapshotter argument missing: %w", errdefs.ErrInvalidArgument)
	}
	sp, err := s.space(ctx)
	if err != nil {
		return meta.Snapshots{}, err
	}
	sn, err := sp.Snapshots(driver)
	if err != nil {
		return sn, fmt.Errorf("snapshotter not loaded: %s: %w", driver, err)
	}
	return sn, nil
}

func (s *snapshotsService) Prepare(ctx context.Context, req *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	mounts, err := sn.Prepare(ctx, req.GetKey(), req.GetParent(), req.GetLabels())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &snapshotsapi.PrepareSnapshotResponse{Mounts: wire.Mounts(mounts)}, nil
}

func (s *snapshotsService) View(ctx context.Context, req *snapshotsapi.ViewSnapshotRequest) (*snapshotsapi.ViewSnapshotResponse, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	mounts, err := sn.View(ctx, req.GetKey(), req.GetParent(), req.GetLabels())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &snapshotsapi.ViewSnapshotResponse{Mounts: wire.Mounts(mounts)}, nil
}

func (s *snapshotsService) Mounts(ctx context.Context, req *snapshotsapi.MountsRequest) (*snapshotsapi.MountsResponse, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	mounts, err := sn.Mounts(ctx, req.GetKey())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &snapshotsapi.MountsResponse{Mounts: wire.Mounts(mounts)}, nil
}

func (s *snapshotsService) Commit(ctx context.Context, req *snapshotsapi.CommitSnapshotRequest) (*emptypb.Empty, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	if err := syncSnapshot(ctx, sn, req.GetKey()); err != nil {
		return nil, wire.Error(err)
	}
	err = sn.Commit(ctx, req.GetName(), req.GetKey(), req.GetParent(), req.GetLabels())
	return &emptypb.Empty{}, wire.Error(err)
}

// syncSnapshot makes durable what was written to an active snapshot. Clients
// and containers write through its mounts, where nobody sees them, and a
// committed snapshot implies its bytes. // inv 1
func syncSnapshot(ctx context.Context, sn meta.Snapshots, key string) (err error) {
	dir, _, err := sn.Dir(ctx, key)
	if errdefs.IsNotFound(err) {
		return nil // the commit says so, or that its name exists
	}
	if err != nil {
		return err
	}
	fs, err := durable.OpenFS(dir)
	if err != nil {
		return err
	}
	return errors.Join(fs.Sync(ctx), fs.Close())
}

func (s *snapshotsService) Remove(ctx context.Context, req *snapshotsapi.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &emptypb.Empty{}, wire.Error(sn.Remove(ctx, req.GetKey()))
}

func (s *snapshotsService) Stat(ctx context.Context, req *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	info, err := sn.Stat(ctx, req.GetKey())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &snapshotsapi.StatSnapshotResponse{Info: snapshotInfo(info)}, nil
}

func (s *snapshotsService) Update(ctx context.Context, req *snapshotsapi.UpdateSnapshotRequest) (*snapshotsapi.UpdateSnapshotResponse, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	in := req.GetInfo()
	info, err := sn.Update(ctx, in.GetName(), in.GetLabels(), req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &snapshotsapi.UpdateSnapshotResponse{Info: snapshotInfo(info)}, nil
}

func (s *snapshotsService) List(req *snapshotsapi.ListSnapshotsRequest, stream snapshotsapi.Snapshots_ListServer) error {
	sn, err := s.open(stream.Context(), req.GetSnapshotter())
	if err != nil {
		return wire.Error(err)
	}
	infos := sn.Walk(stream.Context(), req.GetFilters()...)
	return wire.Error(sendChunks(infos, snapshotInfo, func(infos []*snapshotsapi.Info) error {
		return stream.Send(&snapshotsapi.ListSnapshotsResponse{Info: infos})
	}))
}

func (s *snapshotsService) Usage(ctx context.Context, req *snapshotsapi.UsageRequest) (*snapshotsapi.UsageResponse, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	u, err := sn.Usage(ctx, req.GetKey())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &snapshotsapi.UsageResponse{Size: u.Size, Inodes: u.Inodes}, nil
}

func (s *snapshotsService) Cleanup(ctx context.Context, req *snapshotsapi.CleanupRequest) (*emptypb.Empty, error) {
	sn, err := s.open(ctx, req.GetSnapshotter())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &emptypb.Empty{}, wire.Error(sn.Cleanup(ctx))
}

func snapshotInfo(info snapshot.Info) *snapshotsapi.Info {
	return &snapshotsapi.Info{
		Name:      info.Key,
		Parent:    info.Parent,
		Kind:      snapshotsapi.Kind(info.Kind), // both number them as metadata.db does
		CreatedAt: wire.Time(info.Created),
		UpdatedAt: wire.Time(info.Updated),
		Labels:    info.Labels,
	}
}
