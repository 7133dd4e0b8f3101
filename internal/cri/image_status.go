package cri

import (
	"context"
	"encoding/json"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/cri/image"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// ImageStatus describes one image; one that isn't there is an empty answer and
// no error.
func (s *imageService) ImageStatus(ctx context.Context, req *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	img, err := s.images.Find(ctx, req.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, wire.Error(err)
	}
	resp := &runtimeapi.ImageStatusResponse{Image: imageToWire(img)}
	if req.GetVerbose() {
		if resp.Info, err = s.imageInfo(ctx, img); err != nil {
			return nil, wire.Error(err)
		}
	}
	return resp, nil
}

// imageInfo is what `crictl inspecti` shows beside the status, in containerd's
// form.
func (s *imageService) imageInfo(ctx context.Context, img image.Image) (map[string]string, error) {
	spec, err := s.images.Spec(ctx, img)
	if err != nil {
		return nil, err
	}
	info, err := json.Marshal(struct {
		ChainID   string    `json:"chainID"`
		ImageSpec oci.Image `json:"imageSpec"`
	}{string(img.ChainID), spec})
	return map[string]string{"info": string(info)}, err
}
