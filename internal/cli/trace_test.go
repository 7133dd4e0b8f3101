package cli

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func ms(n int) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Millisecond) }

func stage(name string, start, elapsed int) *holdfastv1.TraceSpan {
	return &holdfastv1.TraceSpan{Stage: name, Start: ms(start), Elapsed: ms(elapsed)}
}

// part is a stage beside others.
func part(name string, start, elapsed, busy int, bytes int64) *holdfastv1.TraceSpan {
	return &holdfastv1.TraceSpan{Stage: name, Start: ms(start), Elapsed: ms(elapsed), Busy: ms(busy), Bytes: bytes}
}

// record is a pull of three seconds, of which one layer was inflated for two;
// one came by way of another pull, and one was here.
func record() *holdfastv1.Trace {
	dgst := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	return &holdfastv1.Trace{
		Id: "20260102-030405.678-abcd", Operation: "pull", Namespace: "default", Reference: "docker.io/library/demo:1", Target: dgst("0"),
		Start: timestamppb.New(time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)), Elapsed: ms(3000),
		Verdict: &holdfastv1.TraceVerdict{
			Resource: "inflate", Text: "bounded by: inflating layer 3 of 3 (sha256:333333333333), 2.0 s of 3.0 s on the critical path; the network waited 71 % of it",
			Parts: []*holdfastv1.TracePart{{Resource: "inflate", Took: ms(2000)}, {Resource: "network", Took: ms(500)}, {Resource: "other", Took: ms(1)}},
		},
		Spans: []*holdfastv1.TraceSpan{
			stage("resolve", 0, 200), stage("dns", 1, 20), stage("connect", 21, 40), stage("tls", 61, 60), stage("login", 121, 50), stage("answer", 171, 29),
			stage("begin", 200, 3), stage("documents", 203, 97), stage("answer", 204, 90), stage("claim", 300, 20), stage("layers", 320, 2600), stage("record", 2920, 80),
		},
		Layers: []*holdfastv1.TraceLayer{
			{Digest: dgst("1"), Size: 4 << 20, Present: true},
			{Digest: dgst("2"), Size: 1000, Joined: true, Spans: []*holdfastv1.TraceSpan{part("fetch", 320, 100, 50, 1000)}},
			{Digest: dgst("3"), Size: 30e6, Host: "mirror.example", Fetched: 20e6, Kept: 10e6, Retries: 1, Spans: []*holdfastv1.TraceSpan{
				stage("queue", 320, 100), part("fetch", 420, 2300, 667, 20e6), part("keep", 420, 2300, 60, 20e6), part("read", 420, 2300, 8, 10e6),
				part("inflate", 420, 2300, 1990, 90e6), part("verify", 420, 2300, 180, 90e6), part("emit", 420, 2300, 900, 90e6),
				stage("retry", 500, 200), stage("parent", 2720, 2), stage("sync", 2725, 150), stage("meta", 2880, 40),
			}},
		},
		Hosts: []*holdfastv1.TraceHost{{Name: "mirror.example", Requests: 4, Failures: 1, Down: "no byte\x1b[2J arrived"}, {Name: "docker.io", Requests: 2}},
	}
}

func TestTraceShow(t *testing.T) {
	f := serve(t, &fake{traces: []*holdfastv1.Trace{record()}})
	golden(t, "trace.txt", f.run(t, "trace", "show").ok(t))
	if f.traced.Id != "" || f.traced.Limit != 1 || f.traced.Brief {
		t.Errorf("asked for %v", f.traced)
	}
	golden(t, "trace.json", f.run(t, "trace", "show", "--json", record().Id).ok(t))
	if f.traced.Id != record().Id {
		t.Errorf("asked for %v", f.traced)
	}
	f.traces = nil
	if r := f.run(t, "trace", "show"); r.code != ExitFailure || !strings.Contains(r.err, "nothing was pulled in namespace default of late") {
		t.Errorf("%+v", r)
	}
}

// TestWaterfallFits: no picture is wider than the terminal, and none breaks on
// odd records.
func TestWaterfallFits(t *testing.T) {
	odd := record()
	odd.Elapsed, odd.Running, odd.Error, odd.Dropped = ms(0), true, "it\nfailed", 7
	odd.Spans = append(odd.Spans, stage("before", -500, 1<<40), stage("after", 1<<40, -1))
	open := record()
	open.Running = true
	open.Layers[2].Spans = []*holdfastv1.TraceSpan{{Stage: "unpack", Start: ms(420), Elapsed: ms(99_999), Open: true}}
	for name, rec := range map[string]*holdfastv1.Trace{"record": record(), "odd": odd, "open": open, "empty": {}} {
		for _, width := range []int{80, 100, 120} {
			for line := range strings.Lines(waterfall(rec, width)) {
				if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width && strings.HasPrefix(line, "  ") {
					t.Errorf("%s in %d columns: a line has %d: %q", name, width, n, line)
				}
				if strings.ContainsRune(line, '\x1b') {
					t.Errorf("%s: %q moves the cursor", name, line)
				}
			}
		}
	}
}

func TestTraceList(t *testing.T) {
	failed, running := record(), record()
	failed.Error, running.Running = "no", true
	f := serve(t, &fake{traces: []*holdfastv1.Trace{running, failed, record()}})
	got := f.run(t, "trace", "ls").ok(t)
	var results []string
	for line := range strings.Lines(got) {
		for _, word := range []string{"RESULT", "under way", "failed", "done"} {
			if strings.Contains(line, word) {
				results = append(results, word)
			}
		}
	}
	if !slices.Equal(results, []string{"RESULT", "under way", "failed", "done"}) || strings.Count(got, "inflate") != 3 || f.traced.AllNamespaces || !f.traced.Brief {
		t.Errorf("prints\n%s\nasked for %v", got, f.traced)
	}
	var rows []map[string]any
	if err := json.Unmarshal([]byte(f.run(t, "trace", "ls", "-A", "--json").ok(t)), &rows); err != nil || len(rows) != 3 || rows[2]["boundedBy"] != "inflate" || !f.traced.AllNamespaces {
		t.Errorf("%v, %v; asked for %v", rows, err, f.traced)
	}
	f.traces = nil
	if got := f.run(t, "trace", "ls", "--json").ok(t); got != "[]\n" {
		t.Errorf("no trace is %q, want an empty list", got)
	}
}

// TestPullTrace shows the record of that very pull, of one that fails too.
func TestPullTrace(t *testing.T) {
	const id = "20260102-030405.678-abcd"
	begun := &holdfastv1.PullEvent{Trace: id}
	f := serve(t, &fake{events: append([]*holdfastv1.PullEvent{begun}, story()...), traces: []*holdfastv1.Trace{record()}})
	if got := f.run(t, "pull", "demo:1").ok(t); strings.Contains(got, "bounded by") {
		t.Errorf("unasked, a pull shows its trace: %s", got)
	}
	if got := f.run(t, "pull", "--trace", "demo:1").ok(t); !strings.HasSuffix(got, "the network waited 71 % of it\n") || !strings.Contains(got, "2 new layers") || f.traced.Id != id {
		t.Errorf("prints\n%s\nasked for %v", got, f.traced)
	}
	f.events, f.err = []*holdfastv1.PullEvent{begun}, status.Error(codes.NotFound, "pull demo: not found")
	if r := f.run(t, "pull", "--trace", "demo"); r.code != ExitFailure || !strings.Contains(r.out, "bounded by") || r.err != "holdfast: pull demo: not found\n" {
		t.Errorf("%+v", r)
	}
	f.events, f.err = story(), nil
	if r := f.run(t, "pull", "--trace", "demo"); r.code != ExitFailure || !strings.Contains(r.err, "the daemon keeps no traces") {
		t.Errorf("a daemon without traces: %+v", r)
	}
}
