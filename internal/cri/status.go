package cri

import (
	"context"
	"encoding/json"
	"runtime"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// notYet is why this runtime isn't ready, and what to do.
const (
	notYetReason  = "ContainersNotSupported"
	notYetMessage = "this Holdfast keeps images and doesn't run containers yet: keep the node's pods on containerd, and use this socket as the image service only"
)

// Status says that images can be kept and pods can't be run.
func (s *runtimeService) Status(_ context.Context, req *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	resp := &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
		{Type: runtimeapi.RuntimeReady, Reason: notYetReason, Message: notYetMessage},
		{Type: runtimeapi.NetworkReady, Reason: notYetReason, Message: notYetMessage},
		{Type: "ContainerdHasNoDeprecationWarnings", Status: true},
	}}}
	if req.GetVerbose() {
		golang, err := json.Marshal(runtime.Version())
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"golang": string(golang)}
	}
	return resp, nil
}
