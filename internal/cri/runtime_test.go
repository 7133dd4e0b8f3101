package cri

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/internal/cri/image"
)

// TestVersion is what `crictl version` shows.
func TestVersion(t *testing.T) {
	h := newHouse(t, image.Options{})
	v, err := h.runtime.Version(t.Context(), &runtimeapi.VersionRequest{Version: "v1"})
	h.must(err)
	if v.Version != "0.1.0" || v.RuntimeName != "containerd" || v.RuntimeVersion != "v2.4.2+holdfast.test" || v.RuntimeApiVersion != "v1" {
		t.Errorf("got %v", v)
	}
}

// TestStatus: the kubelet is told that pods can't be run, and why.
func TestStatus(t *testing.T) {
	h := newHouse(t, image.Options{})
	for _, verbose := range []bool{false, true} {
		s, err := h.runtime.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: verbose})
		h.must(err)
		got := map[string]*runtimeapi.RuntimeCondition{}
		for _, c := range s.Status.Conditions {
			got[c.Type] = c
		}
		for _, want := range []string{"RuntimeReady", "NetworkReady"} {
			if c := got[want]; c == nil || c.Status || c.Reason != "ContainersNotSupported" || c.Message == "" {
				t.Errorf("%s is %v", want, c)
			}
		}
		if c := got["ContainerdHasNoDeprecationWarnings"]; c == nil || !c.Status {
			t.Errorf("deprecations: %v", c)
		}
		if verbose != (len(s.Info) > 0) || verbose && !strings.HasPrefix(s.Info["golang"], `"go`) {
			t.Errorf("verbose %t: %v", verbose, s.Info)
		}
	}
}

// TestPods: what needs containers is Unimplemented.
func TestPods(t *testing.T) {
	h := newHouse(t, image.Options{})
	_, run := h.runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{})
	_, list := h.runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
	for _, err := range []error{run, list} {
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("got %v", err)
		}
	}
}
