package api

import (
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/holdfast-dev/holdfast/internal/trace"
	"github.com/holdfast-dev/holdfast/internal/wire"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func (s *holdfastService) Traces(req *holdfastv1.TracesRequest, stream holdfastv1.Holdfast_TracesServer) error {
	if s.traces == nil {
		return s.UnimplementedHoldfastServer.Traces(req, stream)
	}
	if req.GetId() != "" {
		rec, err := s.traces.Get(req.GetId())
		if err != nil {
			return wire.Error(err)
		}
		return stream.Send(traceToWire(rec, req.GetBrief()))
	}
	ns := ""
	if !req.GetAllNamespaces() {
		sp, err := s.space(stream.Context())
		if err != nil {
			return wire.Error(err)
		}
		ns = sp.Namespace()
	}
	sent := uint32(0)
	for rec, err := range s.traces.All(stream.Context()) {
		if err != nil {
			return wire.Error(err)
		}
		if ns != "" && rec.Namespace != ns {
			continue
		}
		if err := stream.Send(traceToWire(rec, req.GetBrief())); err != nil {
			return err
		}
		if sent++; sent == req.GetLimit() {
			return nil
		}
	}
	return nil
}

func traceToWire(rec trace.Record, brief bool) *holdfastv1.Trace {
	t := &holdfastv1.Trace{
		Id:        rec.ID,
		Operation: rec.Operation,
		Namespace: rec.Namespace,
		Reference: rec.Reference,
		Target:    rec.Target.String(),
		Start:     wire.Time(rec.Start),
		Elapsed:   durationpb.New(rec.Elapsed),
		Running:   rec.Running,
		Error:     rec.Error,
		Verdict: &holdfastv1.TraceVerdict{
			Resource: string(rec.Verdict.Resource),
			Text:     rec.Verdict.Text,
			Parts: convertAll(rec.Verdict.Parts, func(p trace.Part) *holdfastv1.TracePart {
				return &holdfastv1.TracePart{Resource: string(p.Resource), Took: durationpb.New(p.Took)}
			}),
		},
		Dropped: int64(rec.Dropped),
	}
	if brief {
		return t
	}
	t.Spans = convertAll(rec.Spans, spanToWire)
	t.Layers = convertAll(rec.Layers, func(l trace.Layer) *holdfastv1.TraceLayer {
		return &holdfastv1.TraceLayer{
			Digest: l.Digest.String(), Size: l.Size, Present: l.Present, Joined: l.Joined, Host: l.Host,
			Fetched: l.Fetched, Kept: l.Kept, Retries: int64(l.Retries), Spans: convertAll(l.Spans, spanToWire),
		}
	})
	t.Hosts = convertAll(rec.Hosts, func(h trace.Host) *holdfastv1.TraceHost {
		return &holdfastv1.TraceHost{Name: h.Name, Requests: int64(h.Requests), Failures: int64(h.Failures), Down: h.Down}
	})
	return t
}

func spanToWire(s trace.Span) *holdfastv1.TraceSpan {
	return &holdfastv1.TraceSpan{
		Stage: string(s.Stage), Start: durationpb.New(s.Start), Elapsed: durationpb.New(s.Elapsed), Busy: durationpb.New(s.Busy),
		Bytes: s.Bytes, Note: s.Note, Open: s.Open,
	}
}
