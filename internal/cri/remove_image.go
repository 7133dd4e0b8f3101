package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/wire"
)

// RemoveImage removes an image with all its names.
func (s *imageService) RemoveImage(ctx context.Context, req *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	if err := s.images.Remove(ctx, req.GetImage().GetImage()); err != nil {
		return nil, wire.Error(err)
	}
	return &runtimeapi.RemoveImageResponse{}, nil
}
