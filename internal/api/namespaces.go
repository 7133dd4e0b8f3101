package api

import (
	"context"
	"fmt"

	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// namespacesService is about namespaces and not in one: it needs no header.
type namespacesService struct {
	namespacesapi.UnimplementedNamespacesServer
	door
}

func (s *namespacesService) Get(ctx context.Context, req *namespacesapi.GetNamespaceRequest) (*namespacesapi.GetNamespaceResponse, error) {
	ns, err := s.db.Namespace(ctx, req.GetName())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &namespacesapi.GetNamespaceResponse{Namespace: namespaceToWire(ns)}, nil
}

func (s *namespacesService) List(ctx context.Context, _ *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	// The request's `filter` is of no effect in containerd either; its clients
	// have no way to set it.
	nss, err := s.db.Namespaces(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &namespacesapi.ListNamespacesResponse{Namespaces: convertAll(nss, namespaceToWire)}, nil
}

func (s *namespacesService) Create(ctx context.Context, req *namespacesapi.CreateNamespaceRequest) (*namespacesapi.CreateNamespaceResponse, error) {
	ns := namespaceFromWire(req.GetNamespace())
	if ns.Name == "" {
		return nil, wire.Error(fmt.Errorf("Namespace.Name required: %w", errdefs.ErrInvalidArgument))
	}
	if err := s.db.CreateNamespace(ctx, ns); err != nil {
		return nil, wire.Error(err)
	}
	return &namespacesapi.CreateNamespaceResponse{Namespace: namespaceToWire(ns)}, nil
}

func (s *namespacesService) Update(ctx context.Context, req *namespacesapi.UpdateNamespaceRequest) (*namespacesapi.UpdateNamespaceResponse, error) {
	ns, err := s.db.UpdateNamespace(ctx, namespaceFromWire(req.GetNamespace()), req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &namespacesapi.UpdateNamespaceResponse{Namespace: namespaceToWire(ns)}, nil
}

func (s *namespacesService) Delete(ctx context.Context, req *namespacesapi.DeleteNamespaceRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, wire.Error(s.db.DeleteNamespace(ctx, req.GetName()))
}

func namespaceToWire(ns meta.Namespace) *namespacesapi.Namespace {
	return &namespacesapi.Namespace{Name: ns.Name, Labels: ns.Labels}
}

func namespaceFromWire(ns *namespacesapi.Namespace) meta.Namespace {
	return meta.Namespace{Name: ns.GetName(), Labels: ns.GetLabels()}
}
