package trace

import (
	"context"
	"path"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// Puller passes pulls on and records them.
type Puller struct {
	next interface {
		Pull(ctx context.Context, sp meta.Space, reference string, req pull.Request) (meta.Image, error)
	}
	to *Recorder
}

// NewPuller makes a Puller before next, which is a *pull.Puller.
func NewPuller(next *pull.Puller, to *Recorder) *Puller { return &Puller{next: next, to: to} }

// Pull pulls as pull.Puller does. The record's ID is the request's; the
// request's hooks, and those of its session, are the record's alone.
func (p *Puller) Pull(ctx context.Context, sp meta.Space, reference string, req pull.Request) (meta.Image, error) {
	if req.ID == "" {
		req.ID = NewID()
	}
	op := p.to.Begin(req.ID, "pull", sp.Namespace(), reference)
	req.Trace = pull.Hooks{Layers: op.shares, Span: op.span}
	req.Session.Hooks = registry.Hooks{
		Exchange:   op.Exchange,
		Retry:      func(host, p string, _ int, wait time.Duration, err error) { op.Retry(host, path.Base(p), wait, err) },
		Resume:     func(host string, dgst digest.Digest, _ int64, err error) { op.Retry(host, dgst.String(), 0, err) },
		MirrorDown: op.Down,
	}
	img, err := p.next.Pull(ctx, sp, reference, req)
	op.End(img.Target.Digest, err)
	return img, err
}

// shares records what the image consists of.
func (op *Operation) shares(list []pull.Share) {
	op.note(func(*Record) {
		for _, s := range list {
			l := op.layer(s.ID)
			if l == nil {
				continue
			}
			l.Parent, l.Digest, l.Size, l.Joined, l.Present = s.Parent, s.Desc.Digest, s.Desc.Size, s.Joined, s.Present
			if _, ok := op.blobs[l.Digest]; !ok {
				op.blobs[l.Digest] = op.layers[s.ID]
			}
		}
	})
}

// span records that a phase begins, or what it came to.
func (op *Operation) span(s pull.Span) {
	op.note(func(rec *Record) {
		spans := op.spansOf(s.Layer)
		if spans == nil {
			rec.Dropped++
			return
		}
		row := Span{Stage: Stage(s.Phase), Start: s.Start.Sub(rec.Start)}
		if s.End.IsZero() {
			row.Open = true
			op.add(spans, row)
			return
		}
		op.remove(spans, row)
		row.Elapsed = s.End.Sub(s.Start)
		if s.Pass == nil {
			op.add(spans, row)
			return
		}
		if l := op.layer(s.Layer); l != nil {
			l.Fetched += s.Pass.Fetched
			if s.Phase == pull.PhaseUnpack && l.Fetched == 0 {
				l.Kept = s.Pass.Kept
			}
			if s.Pass.Host != "" {
				l.Host = clip(s.Pass.Host, maxText)
			}
		}
		for _, part := range parts(row, *s.Pass) {
			op.add(spans, part)
		}
	})
}

// remove takes back a span that was open.
func (op *Operation) remove(spans *[]Span, row Span) {
	for i, s := range *spans {
		if s.Open && s.Stage == row.Stage && s.Start == max(0, row.Start) {
			*spans = append((*spans)[:i], (*spans)[i+1:]...)
			op.spans--
			return
		}
	}
}

// parts takes a pass apart.
func parts(row Span, p pull.Pass) (rows []Span) {
	add := func(stage Stage, busy time.Duration, bytes int64, note string) {
		part := row
		part.Stage, part.Busy, part.Bytes, part.Note = stage, busy, bytes, note
		rows = append(rows, part)
	}
	if p.Open+p.Network > 0 {
		add(StageFetch, p.Open+p.Network, p.Fetched, p.Host)
	}
	if p.Fetched > 0 {
		add(StageKeep, p.Keep, p.Fetched, "")
	}
	if p.Kept > 0 {
		add(StageRead, p.Read, p.Kept, "")
	}
	if Stage(row.Stage) != StageUnpack {
		return rows
	}
	add(StageInflate, p.Times.Inflate, p.Unpacked, "")
	rows[len(rows)-1].Starved = p.Times.Hungry
	add(StageVerify, p.Times.Hash, p.Unpacked, "")
	add(StageEmit, p.Times.Emit, p.Unpacked, "")
	return rows
}
