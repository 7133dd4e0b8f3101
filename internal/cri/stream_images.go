package cri

import (
	"slices"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/wire"
)

// chunk is how many items of a streamed list travel in one message.
const chunk = 100

// StreamImages is ListImages for nodes whose images don't fit into one
// message.
func (s *imageService) StreamImages(_ *runtimeapi.StreamImagesRequest, stream grpc.ServerStreamingServer[runtimeapi.StreamImagesResponse]) error {
	list, err := s.images.List(stream.Context())
	if err != nil {
		return wire.Error(err)
	}
	for part := range slices.Chunk(list, chunk) {
		if err := stream.Send(&runtimeapi.StreamImagesResponse{Images: imagesToWire(part)}); err != nil {
			return err
		}
	}
	return nil
}
