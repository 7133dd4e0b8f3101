package cli

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/docker/go-units"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// picture draws bars over a common time axis:
//
//	stage       took     size and rate    bar
//	fetch       1.2 s    15MB  12MB/s       ▓▓▓▓▓▓▓▓
//
// Columns before the bar are head runes wide.
type picture struct {
	text  strings.Builder
	total time.Duration
	bar   int // columns of the axis
}

const head = 2 + 11 + 1 + 8 + 2 + 18 + 2

// leastShare of the total is what a stage must take to have a row.
const leastShare = 200

// waterfall is a trace as people read it, in so many columns.
func waterfall(t *holdfastv1.Trace, width int) string {
	p := &picture{total: max(t.Elapsed.AsDuration(), 1), bar: width - head}
	p.line("%s %s in %s, %s, %s", t.Operation, t.Reference, t.Namespace, t.Start.AsTime().Format("2006-01-02 15:04:05 UTC"), t.Id)
	end := span(p.total)
	if t.Running {
		end += " and on"
	}
	p.line("%*s0%*s", head, "", p.bar-1, end)
	p.rows(t.Spans)
	for i, l := range t.Layers {
		p.line("%s", layerTitle(i+1, len(t.Layers), l))
		p.rows(l.Spans)
	}
	for _, h := range t.Hosts {
		if h.Failures > 0 || h.Down != "" {
			p.line("%s", hostLine(h))
		}
	}
	if t.Dropped > 0 {
		p.line("%d more stages and layers are not recorded", t.Dropped)
	}
	if t.Error != "" {
		p.line("failed: %s", printable(t.Error))
	}
	if path := criticalPath(t); path != "" {
		p.line("critical path: %s", path)
	}
	p.line("%s", printable(t.Verdict.GetText()))
	return p.text.String()
}

func (p *picture) line(format string, args ...any) {
	p.text.WriteString(strings.TrimRight(fmt.Sprintf(format, args...), " ") + "\n")
}

func layerTitle(n, of int, l *holdfastv1.TraceLayer) string {
	text := fmt.Sprintf("layer %d of %d, %s, %s", n, of, shortDigest(l.Digest), units.HumanSize(float64(l.Size)))
	switch {
	case l.Present:
		return text + ", was here"
	case l.Joined:
		text += ", begun by another pull"
	case l.Host != "":
		text += " from " + printable(l.Host)
	}
	if l.Kept > 0 {
		text += fmt.Sprintf(", %s were here", units.HumanSize(float64(l.Kept)))
	}
	if l.Retries > 0 {
		text += ", " + count(int(l.Retries), "request") + " repeated"
	}
	return text
}

func hostLine(h *holdfastv1.TraceHost) string {
	text := fmt.Sprintf("host %s: %s, %d failed", printable(h.Name), count(int(h.Requests), "request"), h.Failures)
	if h.Down != "" {
		text += ", not asked any more: " + printable(h.Down)
	}
	return text
}

// rows draws one row for all spans of a stage, in the order in which the
// stages began.
func (p *picture) rows(spans []*holdfastv1.TraceSpan) {
	spans = slices.Clone(spans)
	slices.SortStableFunc(spans, func(a, b *holdfastv1.TraceSpan) int {
		return int(a.Start.AsDuration() - b.Start.AsDuration())
	})
	for i, s := range spans {
		same := func(o *holdfastv1.TraceSpan) bool { return o.Stage == s.Stage }
		if slices.IndexFunc(spans, same) == i && s.Stage != "layers" { // that is what the rows below are
			p.row(slices.DeleteFunc(slices.Clone(spans), func(o *holdfastv1.TraceSpan) bool { return !same(o) }))
		}
	}
}

// row draws the spans of one stage, unless they are too short to matter.
func (p *picture) row(spans []*holdfastv1.TraceSpan) {
	var took, elapsed time.Duration
	var bytes int64
	axis := []rune(strings.Repeat(" ", p.bar))
	for _, s := range spans {
		elapsed += s.Elapsed.AsDuration()
		took += worked(s)
		bytes += s.Bytes
		from := min(p.column(s.Start.AsDuration()), p.bar-1)
		to := max(p.column(s.Start.AsDuration()+s.Elapsed.AsDuration()), from+1)
		for i := from; i < to; i++ {
			axis[i] = shade(s)
		}
	}
	if elapsed < p.total/leastShare {
		return
	}
	detail := ""
	if bytes > 0 {
		detail = units.HumanSize(float64(bytes))
		if took > 0 {
			detail += fmt.Sprintf(" %8s/s", units.HumanSizeWithPrecision(float64(bytes)/took.Seconds(), 3))
		}
	}
	p.line("  %-11s %8s  %-18s  %s", stageName(spans[0].Stage), span(took), detail, string(axis))
}

// column is where a time lies on the axis, from 0 to p.bar.
func (p *picture) column(at time.Duration) int {
	share := min(max(float64(at)/float64(p.total), 0), 1) // a damaged record may say anything
	return int(share * float64(p.bar))
}

// worked is how long a span worked: all of its time, unless it went on beside
// others.
func worked(s *holdfastv1.TraceSpan) time.Duration {
	if isPart(s.Stage) && !s.Open {
		return s.Busy.AsDuration()
	}
	return s.Elapsed.AsDuration()
}

func isPart(stage string) bool {
	return slices.Contains([]string{"fetch", "keep", "read", "inflate", "verify", "emit"}, stage)
}

// shade is the darker the more of its time a span worked.
func shade(s *holdfastv1.TraceSpan) rune {
	switch share := float64(worked(s)) / float64(max(s.Elapsed.AsDuration(), 1)); {
	case share >= 2./3:
		return '█'
	case share >= 1./3:
		return '▓'
	case share >= 1./20:
		return '░'
	}
	return '·'
}

// stageName says in people's words what has another name on the wire.
func stageName(stage string) string {
	names := map[string]string{
		"begin": "lease", "claim": "claim", "answer": "first byte", "keep": "store", "emit": "files",
		"parent": "below", "batch": "commit wait", "meta": "records",
	}
	if n, ok := names[stage]; ok {
		return n
	}
	return printable(stage)
}

// criticalPath lists what took at least a hundredth of it.
func criticalPath(t *holdfastv1.Trace) string {
	var parts []string
	for _, part := range t.Verdict.GetParts() {
		if took := part.Took.AsDuration(); took >= t.Elapsed.AsDuration()/100 {
			parts = append(parts, part.Resource+" "+span(took))
		}
	}
	return strings.Join(parts, ", ")
}

// span is a length of time in three digits or so.
func span(d time.Duration) string {
	switch {
	case d >= 1000*time.Hour:
		return "> 1000 h"
	case d >= 100*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= 10*time.Millisecond:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

// printable keeps what a registry has said from moving the cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}
