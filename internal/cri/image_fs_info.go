package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/wire"
)

// ImageFsInfo says what images take up. The kubelet looks at the first entry.
func (s *imageService) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	list, err := s.images.DiskUsage(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	resp := &runtimeapi.ImageFsInfoResponse{}
	for _, u := range list {
		resp.ImageFilesystems = append(resp.ImageFilesystems, &runtimeapi.FilesystemUsage{
			Timestamp:  u.At.UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: u.Dir},
			UsedBytes:  &runtimeapi.UInt64Value{Value: uint64(max(u.Bytes, 0))},
			InodesUsed: &runtimeapi.UInt64Value{Value: uint64(max(u.Inodes, 0))},
		})
	}
	return resp, nil
}
