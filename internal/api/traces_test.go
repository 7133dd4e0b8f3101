package api

import (
	"io"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/trace"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func openTraces(t *testing.T) *trace.Recorder {
	t.Helper()
	r, err := trace.Open(t.TempDir(), trace.Options{})
	check(t, err)
	t.Cleanup(func() { check(t, r.Close()) })
	return r
}

func tracesOf(t *testing.T, f *fixture, ns string, req *holdfastv1.TracesRequest) (traces []*holdfastv1.Trace) {
	t.Helper()
	s, err := f.holdfast.Traces(in(t, ns), req)
	check(t, err)
	for {
		tr, err := s.Recv()
		if err == io.EOF {
			return traces
		}
		check(t, err)
		traces = append(traces, tr)
	}
}

// Every pull leaves a record, whose ID its first and last event name; a failed
// one leaves one, too.
func TestHoldfastTraces(t *testing.T) {
	reg := registrytest.New(t)
	layer := archive(t, map[string]string{"hello": "world"})
	reg.Push("demo", "1", registrytest.Layer{Data: layer, DiffID: digest.FromBytes(layer), MediaType: ocispec.MediaTypeImageLayer})
	traces := openTraces(t)
	f := pulling(t, func(o *Options) { o.Pull, o.Traces = trace.NewPuller(o.Pull.(*pull.Puller), traces), traces })
	req := &holdfastv1.PullRequest{Reference: reg.Host() + "/demo:1", PlainHttp: true, Platform: "linux/amd64"}
	events, err := pullAll(t, f, in(t, "default"), req)
	check(t, err)
	id := events[0].GetTrace()
	if last := events[len(events)-1]; id == "" || events[0].GetEvent() != nil || last.GetDone() == nil || last.GetTrace() != id {
		t.Fatalf("events %v", events)
	}
	failed, err := pullAll(t, f, in(t, "other"), &holdfastv1.PullRequest{Reference: reg.Host() + "/demo:2", PlainHttp: true})
	wantCode(t, err, codes.NotFound, "")
	if len(failed) != 1 || failed[0].GetTrace() == "" {
		t.Fatalf("a pull that fails at once sends %v", failed)
	}

	got := tracesOf(t, f, "default", &holdfastv1.TracesRequest{})
	if len(got) != 1 || got[0].Id != id || got[0].Running || got[0].Error != "" || got[0].Namespace != "default" || got[0].Reference != req.Reference {
		t.Fatalf("traces of the namespace: %v", got)
	}
	one := got[0]
	if len(one.Layers) != 1 || one.Layers[0].Digest != digest.FromBytes(layer).String() || one.Layers[0].Fetched != int64(len(layer)) ||
		!slices.ContainsFunc(one.Layers[0].Spans, func(s *holdfastv1.TraceSpan) bool { return s.Stage == "inflate" && s.Bytes == int64(len(layer)) }) ||
		len(one.Hosts) != 1 || one.Hosts[0].Name != reg.Host() || one.Verdict.GetText() == "" || len(one.Verdict.GetParts()) == 0 {
		t.Errorf("the record is %v", one)
	}
	all := tracesOf(t, f, "", &holdfastv1.TracesRequest{AllNamespaces: true, Brief: true})
	if len(all) != 2 || all[0].Id != failed[0].GetTrace() || all[0].Error == "" || all[1].Id != id || len(all[1].Spans)+len(all[1].Layers)+len(all[1].Hosts) != 0 {
		t.Errorf("all traces: %v", all)
	}
	if got := tracesOf(t, f, "", &holdfastv1.TracesRequest{AllNamespaces: true, Limit: 1}); len(got) != 1 || got[0].Id != failed[0].GetTrace() {
		t.Errorf("the last trace: %v", got)
	}
	if got := tracesOf(t, f, "other", &holdfastv1.TracesRequest{Id: id}); len(got) != 1 || got[0].Id != id {
		t.Errorf("the trace of an ID: %v", got)
	}
	s, err := f.holdfast.Traces(t.Context(), &holdfastv1.TracesRequest{Id: "../x"})
	check(t, err)
	_, err = s.Recv()
	wantCode(t, err, codes.NotFound, "there is none")
	s, err = start(t).holdfast.Traces(t.Context(), &holdfastv1.TracesRequest{Id: id})
	check(t, err)
	_, err = s.Recv()
	wantCode(t, err, codes.Unimplemented, "")
}
