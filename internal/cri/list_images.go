package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/cri/image"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// ListImages lists all images. The filter has no effect, as in containerd;
// who wants one image asks ImageStatus.
func (s *imageService) ListImages(ctx context.Context, _ *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	list, err := s.images.List(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &runtimeapi.ListImagesResponse{Images: imagesToWire(list)}, nil
}

func imagesToWire(list []image.Image) []*runtimeapi.Image {
	out := make([]*runtimeapi.Image, len(list))
	for i, img := range list {
		out[i] = imageToWire(img)
	}
	return out
}

func imageToWire(img image.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id:          string(img.ID),
		RepoTags:    img.Tags(),
		RepoDigests: img.Digests(),
		Size:        uint64(max(img.Size, 0)),
		Username:    img.Username,
		Pinned:      img.Pinned,
	}
	if img.UID != nil {
		out.Uid = &runtimeapi.Int64Value{Value: *img.UID}
	}
	return out
}
