package trace

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
)

// Resource is what an operation waits for or works with.
type Resource string

const (
	Registry Resource = "registry" // the time until it answers: names, connections, handshakes, its own thinking
	Login    Resource = "login"    // refusals, credentials, tokens
	Network  Resource = "network"  // the bytes of blobs
	Store    Resource = "store"    // digesting compressed bytes, writing and reading them
	Inflate  Resource = "inflate"  // the CPU that decompresses
	Verify   Resource = "verify"   // the CPU that digests the plain archive
	Files    Resource = "files"    // writing the unpacked tree
	Sync     Resource = "sync"     // making bytes durable
	Commit   Resource = "commit"   // transactions, and the wait for those in front
	Slots    Resource = "slots"    // too few downloads at once
	Joined   Resource = "joined"   // another pull's work on a layer
	Other    Resource = "other"    // what no span accounts for
)

// Verdict says which resource bounded an operation: the one that its critical
// path spent most of its time on.
//
// The critical path goes back from the operation's end. Its own phases follow
// one another. From the end of the layers it follows the one that came last,
// and where that waited for another, it goes on with what the other did then:
//
//   - for the layer below: with that;
//   - for a download slot: with the layer that held it until then. Time in which
//     that waited for the registry to answer counts as Slots, since such waits
//     could overlap; its other time would have been longer with more at once;
//   - for others to commit with, or for the commit in front: with the layer that
//     came last, or was in it;
//   - a layer that another pull has begun is Joined, whatever that does.
//
// The parts of a pass over a layer's bytes go on side by side and are measured
// without their places, so a pass is divided in proportion: what decompression
// waited for its source belongs to what the source did then, what it worked to
// Inflate, and the rest, in which it waited for the other side or had ended,
// to what that does: Files and Verify.
type Verdict struct {
	Resource Resource      `json:"resource"`
	Layer    int           `json:"layer,omitempty"` // from 1: the one that most of it is for; 0 for none
	Took     time.Duration `json:"took"`            // on the critical path
	Parts    []Part        `json:"parts,omitempty"` // the whole path, longest first
	Text     string        `json:"text"`            // one line for people
}

// Part is one resource's time on the critical path.
type Part struct {
	Resource Resource      `json:"resource"`
	Took     time.Duration `json:"took"`
}

// judge finds the verdict on a record whose spans have all ended.
func judge(rec Record) Verdict {
	w := newWalk(&rec)
	w.operation()
	total, v := map[Resource]time.Duration{}, Verdict{}
	for at, d := range w.spent {
		total[at.resource] += d
	}
	for r, d := range total {
		if d > 0 {
			v.Parts = append(v.Parts, Part{r, d})
		}
	}
	slices.SortFunc(v.Parts, func(a, b Part) int {
		return cmp.Or(cmp.Compare(b.Took, a.Took), cmp.Compare(a.Resource, b.Resource))
	})
	if len(v.Parts) == 0 {
		v.Resource, v.Text = Other, "bounded by: nothing that took time"
		return v
	}
	v.Resource, v.Took = v.Parts[0].Resource, v.Parts[0].Took
	layers, most := 0, time.Duration(0)
	for i := range rec.Layers {
		d := w.spent[place{i, v.Resource}]
		if d > 0 {
			layers++
		}
		if d > most {
			v.Layer, most = i+1, d
		}
	}
	if w.spent[place{own, v.Resource}] > most {
		v.Layer = 0
	}
	v.Text = v.sentence(rec, layers)
	return v
}

// own is the layer of what is no layer's.
const own = -1

type place struct {
	layer    int
	resource Resource
}

// walk is the way along the critical path.
type walk struct {
	rec   *Record
	lines [][]window // of each layer, in order
	index map[digest.Digest]int
	spent map[place]time.Duration
}

// window is a phase of a layer with its spans: one, or the parts of a pass.
type window struct {
	start, end time.Duration
	stage      Stage // StageUnpack for every pass
	parts      []Span
}

func newWalk(rec *Record) *walk {
	w := &walk{rec: rec, lines: make([][]window, len(rec.Layers)), index: map[digest.Digest]int{}, spent: map[place]time.Duration{}}
	for i, l := range rec.Layers {
		w.lines[i] = windows(l.Spans)
		w.index[l.ID] = i
	}
	return w
}

func windows(spans []Span) (line []window) {
	for _, s := range spans {
		switch {
		case s.Stage.ofRequest():
		case !s.Stage.ofPass():
			line = append(line, window{s.Start, s.end(), s.Stage, nil})
		default:
			i := slices.IndexFunc(line, func(o window) bool { return o.stage == StageUnpack && o.start == s.Start && o.end == s.end() })
			if i < 0 {
				i = len(line)
				line = append(line, window{s.Start, s.end(), StageUnpack, nil})
			}
			line[i].parts = append(line[i].parts, s)
		}
	}
	slices.SortStableFunc(line, func(a, b window) int { return cmp.Compare(a.start, b.start) })
	return line
}

func (w *walk) add(layer int, r Resource, d time.Duration) {
	if d > 0 {
		w.spent[place{layer, r}] += d
	}
}

// operation walks the phases of the operation itself.
func (w *walk) operation() {
	cur := w.rec.Elapsed
	line := windows(w.rec.Spans)
	for _, s := range slices.Backward(line) {
		if s.start >= cur {
			continue
		}
		end := min(s.end, cur)
		w.add(own, Other, cur-end)
		switch s.stage {
		case StageResolve, StageDocuments:
			w.requests(own, w.rec.Spans, s.start, end, end-s.start, Registry)
		case StageLayers:
			w.layers(s.start, end)
		default:
			w.add(own, Commit, end-s.start)
		}
		cur = s.start
	}
	w.add(own, Other, cur)
}

// requests divides d of the time between from and to among the requests that
// spans tell of, and returns what is left. With rest, that is added to it if
// there was any request.
func (w *walk) requests(layer int, spans []Span, from, to, d time.Duration, rest Resource) time.Duration {
	login := min(d, covered(spans, from, to, func(s Stage) bool { return s == StageLogin }))
	all := min(d, covered(spans, from, to, Stage.ofRequest))
	w.add(layer, Login, login)
	w.add(layer, Registry, all-login)
	switch {
	case rest == "":
		return d - all
	case all == 0:
		rest = Other
	}
	w.add(layer, rest, d-all)
	return 0
}

// covered is how much of the time between from and to spans of some stages
// cover.
func covered(spans []Span, from, to time.Duration, is func(Stage) bool) (d time.Duration) {
	some := slices.DeleteFunc(slices.Clone(spans), func(s Span) bool { return !is(s.Stage) })
	slices.SortFunc(some, func(a, b Span) int { return cmp.Compare(a.Start, b.Start) })
	for _, s := range some {
		start, end := max(s.Start, from), min(s.end(), to)
		if end > start {
			d += end - start
			from = end
		}
	}
	return d
}

// layers walks back from the layer that ended last.
func (w *walk) layers(from, to time.Duration) {
	last, at := own, time.Duration(-1)
	for i, line := range w.lines {
		for _, s := range line {
			if s.start < to && min(s.end, to) > at {
				last, at = i, min(s.end, to)
			}
		}
	}
	if last == own {
		w.add(own, Other, to-from)
		return
	}
	w.layer(last, from, to, hop{})
}

// hop says how the path has come to a layer.
type hop struct {
	depth int
	slot  bool // the layer holds a slot that is waited for
}

// maxDepth bounds how often the path changes from one layer to another at one
// moment.
const maxDepth = 200

// layer walks a layer from to back to from.
func (w *walk) layer(i int, from, to time.Duration, h hop) {
	if w.rec.Layers[i].Joined {
		w.add(i, Joined, to-from)
		return
	}
	for _, s := range slices.Backward(w.lines[i]) {
		if to <= from {
			return
		}
		if s.start >= to || s.end <= from && s.start < from {
			continue
		}
		end := max(min(s.end, to), from)
		w.add(i, Other, to-end)
		to = max(s.start, from)
		if end > to {
			w.window(i, s, to, end, h)
		}
	}
	w.add(i, Other, to-from)
}

// window divides what of a window lies between from and to.
func (w *walk) window(i int, s window, from, to time.Duration, h hop) {
	next := own
	resource := Commit
	switch s.stage {
	case StageUnpack:
		w.pass(i, s, from, to, h)
		return
	case StageFlush, StageSync:
		resource = Sync
	case StageSeal:
		resource = Commit
	case StageQueue:
		next, resource, h.slot = w.ended(i, from, to, StageUnpack, StageFlush), Slots, true
	case StageBatch:
		next = w.ended(i, from, to, StageUnpack, StageFlush, StageSync, StageSeal, StageSnapshot, StageMeta)
	case StageParent:
		resource = Other
		if p, ok := w.index[w.rec.Layers[i].Parent]; ok {
			next = p
		}
	}
	if h.depth++; next == own || h.depth > maxDepth {
		w.add(i, resource, to-from)
		return
	}
	w.layer(next, from, to, h)
}

// ended finds the layer beside i whose window of one of the stages was the
// last to end between from and to.
func (w *walk) ended(i int, from, to time.Duration, stages ...Stage) int {
	last, at := own, from
	for o, line := range w.lines {
		for _, s := range line {
			if o != i && !w.rec.Layers[o].Joined && s.end > at && s.end <= to && slices.Contains(stages, s.stage) {
				last, at = o, s.end
			}
		}
	}
	return last
}

// pass divides the share of a pass that lies between from and to.
func (w *walk) pass(i int, s window, from, to time.Duration, h hop) {
	busy := map[Stage]time.Duration{}
	whole := s.end - s.start
	source := whole // of a pass that only fetches
	for _, p := range s.parts {
		busy[p.Stage] += p.Busy
		if p.Stage == StageInflate {
			source = min(whole, p.Starved)
		}
	}
	spent := map[Resource]time.Duration{}
	one := &walk{rec: w.rec, spent: map[place]time.Duration{}}
	left := one.requests(i, w.rec.Layers[i].Spans, s.start, s.end, source, "")
	for at, d := range one.spent {
		if h.slot && at.resource == Registry {
			at.resource = Slots
		}
		spent[at.resource] += d
	}
	network := max(0, busy[StageFetch]-(source-left))
	divide(spent, left, map[Resource]time.Duration{Network: network, Store: busy[StageKeep] + busy[StageRead]}, Network)
	inflate := min(whole-source, busy[StageInflate])
	spent[Inflate] += inflate
	divide(spent, whole-source-inflate, map[Resource]time.Duration{Files: busy[StageEmit], Verify: busy[StageVerify]}, Files)
	for r, d := range spent {
		w.add(i, r, time.Duration(float64(d)*float64(to-from)/float64(whole)))
	}
}

// divide adds d to the resources in the proportion of how busy they were; all
// of it to one if none was.
func divide(spent map[Resource]time.Duration, d time.Duration, busy map[Resource]time.Duration, one Resource) {
	total := time.Duration(0)
	for _, b := range busy {
		total += b
	}
	if total == 0 {
		spent[one] += d
		return
	}
	for r, b := range busy {
		spent[r] += time.Duration(float64(d) * float64(b) / float64(total))
	}
}

var doing = map[Resource]string{
	Registry: "the registry's answers",
	Login:    "logging in",
	Network:  "the network",
	Store:    "digesting and keeping the compressed bytes",
	Inflate:  "inflating",
	Verify:   "digesting the unpacked archive",
	Files:    "writing files",
	Sync:     "syncing the disk",
	Commit:   "committing to the store",
	Slots:    "too few downloads at once",
	Joined:   "another pull's work",
	Other:    "time that no stage accounts for",
}

// sentence is the verdict in one line. layers is how many it is about.
func (v Verdict) sentence(rec Record, layers int) string {
	text := "bounded by: " + doing[v.Resource]
	if v.Layer > 0 {
		l := rec.Layers[v.Layer-1]
		name := fmt.Sprintf("layer %d of %d (%s)", v.Layer, len(rec.Layers), short(l.Digest))
		switch {
		case layers > 1:
			text += fmt.Sprintf(", for most of it %s", name)
		case v.Resource == Inflate:
			text += " " + name
		default:
			text += ", " + name
		}
	}
	text += fmt.Sprintf(", %s of %s on the critical path", seconds(v.Took), seconds(rec.Elapsed))
	if more := v.more(rec); more != "" {
		text += "; " + more
	}
	return text
}

// more says what one may want to know next.
func (v Verdict) more(rec Record) string {
	var fetch Span
	var l Layer
	if v.Layer > 0 {
		l = rec.Layers[v.Layer-1]
		for _, s := range l.Spans {
			if s.Stage == StageFetch && s.Bytes > fetch.Bytes {
				fetch = s
			}
		}
	}
	switch v.Resource {
	case Network:
		if fetch.Busy > 0 {
			return fmt.Sprintf("%s/s from %s", units.HumanSize(float64(fetch.Bytes)/fetch.Busy.Seconds()), fetch.Note)
		}
	case Store, Inflate, Verify, Files:
		if fetch.Elapsed > 0 {
			return fmt.Sprintf("the network waited %d %% of it", 100-100*min(fetch.Busy, fetch.Elapsed)/fetch.Elapsed)
		}
	case Registry:
		n := 0
		for _, h := range rec.Hosts {
			n += h.Requests
		}
		if l.Retries > 0 {
			return fmt.Sprintf("%d of %d requests repeated", l.Retries, n)
		}
		if n == 1 {
			return "1 request"
		}
		return fmt.Sprintf("%d requests", n)
	case Slots:
		return "allow more downloads at once"
	}
	return ""
}

// short is a digest for people.
func short(d digest.Digest) string {
	if s := d.String(); len(s) > 19 {
		return s[:19]
	}
	return d.String()
}

// seconds rounds for people.
func seconds(d time.Duration) string {
	switch {
	case d >= 100*time.Second:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= 10*time.Millisecond:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}
