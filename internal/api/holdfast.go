package api

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/survey"
	"github.com/holdfast-dev/holdfast/internal/trace"
	"github.com/holdfast-dev/holdfast/internal/wire"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// holdfastService is our own service, holdfast.v1.
type holdfastService struct {
	holdfastv1.UnimplementedHoldfastServer
	door
	puller Puller
	tree   func(ctx context.Context, ns string) ([]survey.Node, error)
	check  func(ctx context.Context, deep bool) (fsck.Report, error)
	traces *trace.Recorder
}

func (s *holdfastService) Tree(req *holdfastv1.TreeRequest, stream holdfastv1.Holdfast_TreeServer) error {
	if s.tree == nil {
		return s.UnimplementedHoldfastServer.Tree(req, stream)
	}
	ns := ""
	if !req.GetAllNamespaces() {
		sp, err := s.space(stream.Context())
		if err != nil {
			return wire.Error(err)
		}
		ns = sp.Namespace()
	}
	nodes, err := s.tree(stream.Context(), ns)
	if err != nil {
		return wire.Error(err)
	}
	for _, n := range nodes {
		if err := stream.Send(nodeToWire(n)); err != nil {
			return err
		}
	}
	return nil
}

func (s *holdfastService) Check(req *holdfastv1.CheckRequest, stream holdfastv1.Holdfast_CheckServer) error {
	if s.check == nil {
		return s.UnimplementedHoldfastServer.Check(req, stream)
	}
	began := time.Now()
	report, err := s.check(stream.Context(), req.GetDeep())
	if err != nil {
		return wire.Error(err)
	}
	for _, f := range report.Findings {
		if err := stream.Send(findingToWire(f)); err != nil {
			return err
		}
	}
	return stream.Send(&holdfastv1.CheckEvent{Event: &holdfastv1.CheckEvent_Summary{Summary: &holdfastv1.CheckSummary{
		Blobs:     int64(report.Blobs),
		Snapshots: int64(report.Snapshots),
		Images:    int64(report.Images),
		Bytes:     report.Bytes,
		Findings:  int64(len(report.Findings)),
		Elapsed:   durationpb.New(time.Since(began)),
	}}})
}

func (s *holdfastService) Collect(ctx context.Context, _ *holdfastv1.CollectRequest) (*holdfastv1.CollectResponse, error) {
	c, err := s.collect(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	return collectedToWire(c), nil
}

func nodeToWire(n survey.Node) *holdfastv1.TreeNode {
	return &holdfastv1.TreeNode{
		Depth:   clampUint32(n.Depth),
		Kind:    n.Kind,
		Name:    n.Name,
		Path:    n.Path,
		Size:    n.Size,
		Note:    n.Note,
		Holders: n.Holders,
	}
}

func findingToWire(f fsck.Finding) *holdfastv1.CheckEvent {
	return &holdfastv1.CheckEvent{Event: &holdfastv1.CheckEvent_Finding{Finding: &holdfastv1.CheckFinding{
		Class:     string(f.Class),
		Namespace: f.Namespace,
		Subject:   f.Subject,
		Problem:   f.Detail,
		Advice:    f.Repair,
	}}}
}

func collectedToWire(c meta.Collected) *holdfastv1.CollectResponse {
	return &holdfastv1.CollectResponse{
		Blobs:     int64(c.Blobs),
		Snapshots: int64(c.Snapshots),
		Images:    int64(c.Images),
		Leases:    int64(c.Leases),
		Ingests:   int64(c.Ingests),
		Bytes:     c.Bytes,
		Elapsed:   durationpb.New(c.Elapsed),
	}
}
