package trace

import (
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

const msec = time.Millisecond

func at(s Stage, start, end int) Span {
	return Span{Stage: s, Start: time.Duration(start) * msec, Elapsed: time.Duration(end-start) * msec}
}

// unpack is a pass: how long each part worked in it.
func unpack(start, end, network, inflate, emit int) []Span {
	pass := at("", start, end)
	part := func(s Stage, busy int) Span {
		p := pass
		p.Stage, p.Busy = s, time.Duration(busy)*msec
		return p
	}
	spans := []Span{part(StageFetch, network), part(StageInflate, inflate), part(StageEmit, emit)}
	spans[0].Bytes, spans[0].Note = 1_000_000, "r.example"
	spans[1].Starved = time.Duration(network) * msec
	return spans
}

// lying is a record whose layers lie one on the other.
func lying(elapsed int, layers ...[]Span) Record {
	rec := Record{Elapsed: time.Duration(elapsed) * msec, Spans: []Span{at(StageLayers, 0, elapsed)}}
	parent := digest.Digest("")
	for i, spans := range layers {
		id := digest.Digest("sha256:" + strings.Repeat(string(rune('a'+i)), 64))
		rec.Layers = append(rec.Layers, Layer{ID: id, Parent: parent, Digest: id, Spans: spans})
		parent = id
	}
	return rec
}

func joined(rec Record, i int) Record {
	rec.Layers[i].Joined = true
	return rec
}

// TestCriticalPath has the rule of Verdict, case by case.
func TestCriticalPath(t *testing.T) {
	for _, test := range []struct {
		name string
		rec  Record
		want map[Resource]int // ms; what is not here is 0
		text string
	}{
		{"a pass is divided", lying(1000, unpack(0, 1000, 300, 600, 200)),
			map[Resource]int{Network: 300, Inflate: 600, Files: 100},
			"bounded by: inflating layer 1 of 1 (sha256:aaaaaaaaaaaa), 600 ms of 1.0 s on the critical path; the network waited 70 % of it"},
		{"the layer that ends last counts", lying(1000, unpack(0, 400, 0, 400, 0), unpack(0, 1000, 900, 100, 0)),
			map[Resource]int{Network: 900, Inflate: 100},
			"bounded by: the network, layer 2 of 2 (sha256:bbbbbbbbbbbb), 900 ms of 1.0 s on the critical path; 1.111MB/s from r.example"},
		{"a wait for the layer below is what that did", lying(1000,
			unpack(0, 950, 0, 950, 0),
			append(unpack(0, 100, 100, 0, 0), at(StageParent, 100, 950), at(StageMeta, 950, 1000))),
			map[Resource]int{Inflate: 850, Network: 100, Commit: 50}, "inflating layer 1 of 2"},
		{"a wait for a slot is what the holder did", lying(1000,
			unpack(0, 800, 0, 800, 0),
			append([]Span{at(StageQueue, 0, 800)}, unpack(800, 1000, 200, 0, 0)...)),
			map[Resource]int{Inflate: 800, Network: 200}, "inflating layer 1 of 2"},
		{"unless that waited for the registry", lying(1000,
			append(unpack(0, 800, 800, 0, 0), at(StageAnswer, 0, 700)),
			append([]Span{at(StageQueue, 0, 800)}, unpack(800, 1000, 200, 0, 0)...)),
			map[Resource]int{Slots: 700, Network: 300}, "too few downloads at once, layer 1 of 2"},
		{"a slot that nobody is known to have held", lying(1000, append([]Span{at(StageQueue, 0, 800)}, unpack(800, 1000, 200, 0, 0)...)),
			map[Resource]int{Slots: 800, Network: 200}, "too few downloads"},
		{"slots that came one after the other", lying(900,
			unpack(0, 300, 0, 300, 0),
			append([]Span{at(StageQueue, 0, 300)}, unpack(300, 600, 300, 0, 0)...),
			append([]Span{at(StageQueue, 0, 600)}, unpack(600, 900, 0, 0, 300)...)),
			map[Resource]int{Inflate: 300, Network: 300, Files: 300}, "layer"},
		{"a commit in front", lying(1000,
			append(unpack(0, 100, 100, 0, 0), at(StageSync, 100, 900), at(StageMeta, 900, 950)),
			append(unpack(0, 150, 150, 0, 0), at(StageBatch, 150, 950), at(StageMeta, 950, 1000))),
			map[Resource]int{Sync: 750, Network: 150, Commit: 100}, "syncing the disk, layer 1 of 2"},
		{"company to commit with", lying(1000,
			append(unpack(0, 100, 100, 0, 0), at(StageBatch, 100, 900), at(StageSync, 900, 1000)),
			append(unpack(0, 900, 200, 700, 0), at(StageSync, 900, 1000))),
			map[Resource]int{Sync: 100, Inflate: 622, Network: 178 + 100}, "inflating layer 2 of 2"},
		{"another pull's layer", joined(lying(1000, unpack(0, 1000, 0, 900, 0)), 0),
			map[Resource]int{Joined: 1000}, "another pull's work, layer 1 of 1"},
		{"upon another pull's layer", joined(lying(1000,
			unpack(0, 900, 0, 900, 0),
			append(unpack(0, 100, 100, 0, 0), at(StageParent, 100, 900), at(StageMeta, 900, 1000))), 0),
			map[Resource]int{Joined: 800, Network: 100, Commit: 100}, "another pull's work, layer 1 of 2"},
		{"logins and answers in a pass", lying(1000, append(unpack(0, 1000, 800, 200, 0),
			at(StageLogin, 0, 450), at(StageAnswer, 450, 600), at(StageRetry, 500, 700))),
			map[Resource]int{Login: 450, Registry: 250, Network: 100, Inflate: 200}, "logging in, layer 1 of 1"},
		{"a gap", lying(1000, unpack(0, 300, 300, 0, 0)),
			map[Resource]int{Other: 700, Network: 300}, "time that no stage accounts for"},
		{"no layer at all", lying(1000), map[Resource]int{Other: 1000}, "time that no stage accounts for"},
		{"nothing", Record{}, nil, "bounded by: nothing that took time"},
		{"the operation's own phases", Record{Elapsed: time.Second, Spans: []Span{
			at(StageResolve, 0, 500), at(StageLogin, 50, 450), at(StageAnswer, 450, 490), at(StageBegin, 500, 600),
			at(StageDocuments, 600, 700), at(StageClaim, 700, 800), at(StageRecord, 800, 990)}},
			map[Resource]int{Login: 400, Registry: 100, Other: 110, Commit: 390}, "logging in, 400 ms of 1.0 s"},
	} {
		t.Run(test.name, func(t *testing.T) {
			v := judge(test.rec)
			got := map[Resource]int{}
			for _, p := range v.Parts {
				got[p.Resource] = int(p.Took.Round(msec) / msec)
			}
			for r, n := range test.want {
				if got[r] != n {
					t.Errorf("%d ms of %s, want %d", got[r], r, n)
				}
				delete(got, r)
			}
			if len(got) > 0 {
				t.Errorf("and %v", got)
			}
			if !strings.Contains(v.Text, test.text) {
				t.Errorf("%q, want %q", v.Text, test.text)
			}
		})
	}
}

// TestWalkEnds: spans that point at one another, which no pull makes, end the walk.
func TestWalkEnds(t *testing.T) {
	rec := lying(1000,
		[]Span{at(StageParent, 0, 1000), at(StageBatch, 0, 1000)},
		[]Span{at(StageParent, 0, 1000), at(StageQueue, 0, 999), at(StageMeta, 0, 1000)})
	rec.Layers[0].Parent = rec.Layers[1].ID
	if v := judge(rec); v.Text == "" {
		t.Error("no verdict")
	}
}
