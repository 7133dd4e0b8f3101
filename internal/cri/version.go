package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What Version answers, beside the daemon's own version. The kubelet and its
// tools know the runtime by containerd's name.
const (
	kubeletAPIVersion = "0.1.0"
	runtimeName       = "containerd"
	runtimeAPIVersion = "v1"
)

// Version names the runtime and the protocol.
func (s *runtimeService) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version:           kubeletAPIVersion,
		RuntimeName:       runtimeName,
		RuntimeVersion:    s.version,
		RuntimeApiVersion: runtimeAPIVersion,
	}, nil
}
