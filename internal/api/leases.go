package api

import (
	"context"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

type leasesService struct {
	leasesapi.UnimplementedLeasesServer
	door
}

func (s *leasesService) Create(ctx context.Context, req *leasesapi.CreateRequest) (*leasesapi.CreateResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	l, err := sp.CreateLease(ctx, meta.Lease{ID: req.GetID(), Labels: req.GetLabels()})
	if err != nil {
		return nil, wire.Error(err)
	}
	return &leasesapi.CreateResponse{Lease: leaseToWire(l)}, nil
}

func (s *leasesService) Delete(ctx context.Context, req *leasesapi.DeleteRequest) (*emptypb.Empty, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	if err := sp.DeleteLease(ctx, req.GetID()); err != nil {
		return nil, wire.Error(err)
	}
	return &emptypb.Empty{}, wire.Error(s.sync(ctx, req.GetSync()))
}

func (s *leasesService) List(ctx context.Context, req *leasesapi.ListRequest) (*leasesapi.ListResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	ls, err := sp.Leases(ctx, req.GetFilters()...)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &leasesapi.ListResponse{Leases: convertAll(ls, leaseToWire)}, nil
}

func (s *leasesService) AddResource(ctx context.Context, req *leasesapi.AddResourceRequest) (*emptypb.Empty, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	err = sp.AddLeaseResource(ctx, req.GetID(), resourceFromWire(req.GetResource()))
	return &emptypb.Empty{}, wire.Error(err)
}

func (s *leasesService) DeleteResource(ctx context.Context, req *leasesapi.DeleteResourceRequest) (*emptypb.Empty, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	err = sp.DeleteLeaseResource(ctx, req.GetID(), resourceFromWire(req.GetResource()))
	return &emptypb.Empty{}, wire.Error(err)
}

func (s *leasesService) ListResources(ctx context.Context, req *leasesapi.ListResourcesRequest) (*leasesapi.ListResourcesResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	rs, err := sp.LeaseResources(ctx, req.GetID())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &leasesapi.ListResourcesResponse{Resources: convertAll(rs, resourceToWire)}, nil
}

func leaseToWire(l meta.Lease) *leasesapi.Lease {
	return &leasesapi.Lease{ID: l.ID, CreatedAt: wire.Time(l.Created), Labels: l.Labels}
}

func resourceToWire(r meta.Resource) *leasesapi.Resource {
	return &leasesapi.Resource{ID: r.ID, Type: r.Type}
}

func resourceFromWire(r *leasesapi.Resource) meta.Resource {
	return meta.Resource{ID: r.GetID(), Type: r.GetType()}
}
