package api

import (
	"context"
	"fmt"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

type imagesService struct {
	imagesapi.UnimplementedImagesServer
	door
}

func (s *imagesService) Get(ctx context.Context, req *imagesapi.GetImageRequest) (*imagesapi.GetImageResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	img, err := sp.Image(ctx, req.GetName())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &imagesapi.GetImageResponse{Image: imageToWire(img)}, nil
}

func (s *imagesService) List(ctx context.Context, req *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	imgs, err := sp.Images(ctx, req.GetFilters()...)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &imagesapi.ListImagesResponse{Images: convertAll(imgs, imageToWire)}, nil
}

func (s *imagesService) Create(ctx context.Context, req *imagesapi.CreateImageRequest) (*imagesapi.CreateImageResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	img, err := imageFromWire(req.GetImage(), req.GetSourceDateEpoch())
	if err != nil {
		return nil, wire.Error(err)
	}
	if img, err = sp.CreateImage(ctx, img); err != nil {
		return nil, wire.Error(err)
	}
	return &imagesapi.CreateImageResponse{Image: imageToWire(img)}, nil
}

func (s *imagesService) Update(ctx context.Context, req *imagesapi.UpdateImageRequest) (*imagesapi.UpdateImageResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	img, err := imageFromWire(req.GetImage(), req.GetSourceDateEpoch())
	if err != nil {
		return nil, wire.Error(err)
	}
	if img, err = sp.UpdateImage(ctx, img, req.GetUpdateMask().GetPaths()...); err != nil {
		return nil, wire.Error(err)
	}
	return &imagesapi.UpdateImageResponse{Image: imageToWire(img)}, nil
}

func (s *imagesService) Delete(ctx context.Context, req *imagesapi.DeleteImageRequest) (*emptypb.Empty, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	var target digest.Digest // "" deletes whatever the name means
	if req.GetTarget() != nil {
		if target, err = parseDigest(req.GetTarget().GetDigest()); err != nil {
			return nil, wire.Error(err)
		}
	}
	if err := sp.DeleteImage(ctx, req.GetName(), target); err != nil {
		return nil, wire.Error(err)
	}
	return &emptypb.Empty{}, wire.Error(s.sync(ctx, req.GetSync()))
}

func imageToWire(img meta.Image) *imagesapi.Image {
	return &imagesapi.Image{
		Name:      img.Name,
		Labels:    img.Labels,
		Target:    wire.Descriptor(img.Target),
		CreatedAt: wire.Time(img.Created),
		UpdatedAt: wire.Time(img.Updated),
	}
}

// imageFromWire takes over what a client may say of an image. The times are
// the daemon's to set; only SOURCE_DATE_EPOCH, for reproducible builds, stands
// above its clock.
func imageFromWire(img *imagesapi.Image, epoch *timestamppb.Timestamp) (meta.Image, error) {
	if img.GetName() == "" {
		return meta.Image{}, fmt.Errorf("Image.Name required: %w", errdefs.ErrInvalidArgument)
	}
	out := meta.Image{Name: img.GetName(), Labels: img.GetLabels(), Target: wire.FromDescriptor(img.GetTarget())}
	var err error
	out.Created, err = epochTime(epoch)
	out.Updated = out.Created
	return out, err
}

// epochTime reads a SOURCE_DATE_EPOCH; without one it is the zero time.
func epochTime(epoch *timestamppb.Timestamp) (time.Time, error) {
	if epoch == nil {
		return time.Time{}, nil
	}
	if err := epoch.CheckValid(); err != nil {
		return time.Time{}, fmt.Errorf("source_date_epoch: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return epoch.AsTime(), nil
}
