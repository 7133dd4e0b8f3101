// Package cri answers the kubelet: one method per file, no logic of its own.
//
// Source of the protocol: k8s.io/cri-api, runtime/v1. Pods and containers are
// not run yet: of the RuntimeService, Version and Status answer, and every
// other method is Unimplemented.
package cri

import (
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/cri/image"
)

// Options of the services. Images is required.
type Options struct {
	Images *image.View

	// Version is what the kubelet is told, a semantic version that begins
	// with the containerd release whose behaviour this is.
	Version string
}

// Register adds the kubelet's two services to srv.
func Register(srv *grpc.Server, opts Options) {
	runtimeapi.RegisterImageServiceServer(srv, &imageService{images: opts.Images})
	runtimeapi.RegisterRuntimeServiceServer(srv, &runtimeService{version: opts.Version})
}

type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	images *image.View
}

type runtimeService struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	version string
}
