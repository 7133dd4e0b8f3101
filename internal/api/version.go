package api

import (
	"context"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/protobuf/types/known/emptypb"
)

type versionService struct {
	versionapi.UnimplementedVersionServer
	version, revision string
}

func (s *versionService) Version(context.Context, *emptypb.Empty) (*versionapi.VersionResponse, error) {
	return &versionapi.VersionResponse{Version: s.version, Revision: s.revision}, nil
}
