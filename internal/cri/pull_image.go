package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/cri/image"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// PullImage makes an image local. Annotations of the image and the sandbox
// have no say in it: they are the pod's author's, not the node's.
func (s *imageService) PullImage(ctx context.Context, req *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	id, err := s.images.Pull(ctx, req.GetImage().GetImage(), authFromWire(req.GetAuth()), req.GetImage().GetRuntimeHandler())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &runtimeapi.PullImageResponse{ImageRef: string(id)}, nil
}

func authFromWire(a *runtimeapi.AuthConfig) image.Auth {
	return image.Auth{
		Username:      a.GetUsername(),
		Password:      a.GetPassword(),
		Auth:          a.GetAuth(),
		IdentityToken: a.GetIdentityToken(),
		RegistryToken: a.GetRegistryToken(),
		Server:        a.GetServerAddress(),
	}
}
