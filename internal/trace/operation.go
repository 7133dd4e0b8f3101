package trace

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/registry"
)

// Operation is one operation under way. Its methods may be called from several
// goroutines; after End they do nothing.
type Operation struct {
	r  *Recorder
	id string

	mu     sync.Mutex
	rec    Record
	spans  int                   // in rec, of all layers
	layers map[digest.Digest]int // by ID
	blobs  map[digest.Digest]int // by the blob's digest: the lowest layer of it
}

// Begin begins to record an operation. id is of NewID, and used once.
func (r *Recorder) Begin(id, operation, namespace, reference string) *Operation {
	op := &Operation{r: r, id: id,
		rec:    Record{ID: id, Operation: operation, Namespace: namespace, Reference: clip(reference, maxError), Start: time.Now(), Running: true},
		layers: map[digest.Digest]int{}, blobs: map[digest.Digest]int{}}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live[id] = op
	return op
}

// End ends the operation, which turned target out or failed with err.
func (op *Operation) End(target digest.Digest, err error) {
	op.mu.Lock()
	if !op.rec.Running {
		op.mu.Unlock()
		return
	}
	rec := &op.rec
	rec.Running, rec.Elapsed, rec.Target = false, time.Since(rec.Start), target
	if err != nil {
		rec.Error = clip(err.Error(), maxError)
	}
	rec.stretch(true)
	rec.Verdict = judge(*rec)
	op.mu.Unlock()

	r := op.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		select {
		case r.pending <- op:
			return
		default:
		}
	}
	delete(r.live, op.id)
	r.opts.Log.Warn("the trace of an operation is lost: too many wait to be written", "id", op.id)
}

// stretch lets the spans that have not ended last until the record's own end,
// and with cut ends them there.
func (rec *Record) stretch(cut bool) {
	one := func(spans []Span) {
		for i := range spans {
			if s := &spans[i]; s.Open {
				s.Elapsed, s.Open = max(0, rec.Elapsed-s.Start), !cut
			}
		}
	}
	one(rec.Spans)
	for i := range rec.Layers {
		one(rec.Layers[i].Spans)
	}
}

// snapshot copies the record as it is.
func (op *Operation) snapshot() Record {
	op.mu.Lock()
	defer op.mu.Unlock()
	rec := op.rec
	rec.Spans, rec.Layers, rec.Hosts = slices.Clone(rec.Spans), slices.Clone(rec.Layers), slices.Clone(rec.Hosts)
	for i := range rec.Layers {
		rec.Layers[i].Spans = slices.Clone(rec.Layers[i].Spans)
	}
	if rec.Running {
		rec.Elapsed = time.Since(rec.Start)
		rec.stretch(false)
		rec.Verdict = judge(rec)
	}
	return rec
}

// note calls f with the record unless it has ended.
func (op *Operation) note(f func(rec *Record)) {
	op.mu.Lock()
	defer op.mu.Unlock()
	if op.rec.Running {
		f(&op.rec)
	}
}

// layer finds or makes a layer; nil beyond the bounds.
func (op *Operation) layer(id digest.Digest) *Layer {
	i, ok := op.layers[id]
	if !ok {
		if len(op.rec.Layers) == maxLayers {
			op.rec.Dropped++
			return nil
		}
		i = len(op.rec.Layers)
		op.layers[id] = i
		op.rec.Layers = append(op.rec.Layers, Layer{ID: id})
	}
	return &op.rec.Layers[i]
}

// spansOf is where the spans of a layer, or of the operation for "", are kept.
func (op *Operation) spansOf(id digest.Digest) *[]Span {
	if id == "" {
		return &op.rec.Spans
	}
	if l := op.layer(id); l != nil {
		return &l.Spans
	}
	return nil
}

// add adds a span, which may have begun before the operation did.
func (op *Operation) add(to *[]Span, s Span) {
	if to == nil || op.spans == maxSpans {
		op.rec.Dropped++
		return
	}
	if s.Start < 0 {
		s.Start, s.Elapsed = 0, max(0, s.Elapsed+s.Start)
	}
	s.Note = clip(s.Note, maxText)
	*to = append(*to, s)
	op.spans++
}

// Exchange records a request to a registry.
func (op *Operation) Exchange(e registry.Exchange) {
	op.note(func(rec *Record) {
		h := op.host(e.Host)
		if e.Err != nil || e.Status == 429 || e.Status >= 500 {
			h.Failures++
		}
		if e.Status != 0 || e.Err != nil {
			h.Requests++
		}
		to := &rec.Spans
		if i, ok := op.blobs[digest.Digest(e.Object)]; ok {
			to = &rec.Layers[i].Spans
		}
		answer := StageAnswer
		if e.Status == 401 {
			answer = StageLogin
		}
		at := e.Start.Sub(rec.Start)
		for _, part := range []struct {
			stage Stage
			took  time.Duration
		}{{StageLogin, e.Login}, {StageDNS, e.DNS}, {StageConnect, e.Connect}, {StageTLS, e.TLS}, {answer, e.Wait}} {
			if part.took >= shortest {
				op.add(to, Span{Stage: part.stage, Start: at, Elapsed: part.took, Note: e.Host})
			}
			at += part.took
		}
	})
}

// shortest bounds what a part of a request takes to be recorded: below it is
// the look at a token that is there.
const shortest = 20 * time.Microsecond

// host finds or makes a host. Beyond the bound all are one.
func (op *Operation) host(name string) *Host {
	rec, name := &op.rec, clip(name, maxText) // looked for in the form in which it is kept
	if len(rec.Hosts) >= maxHosts-1 && !slices.ContainsFunc(rec.Hosts, func(h Host) bool { return h.Name == name }) {
		name = "others"
	}
	for i := range rec.Hosts {
		if rec.Hosts[i].Name == name {
			return &rec.Hosts[i]
		}
	}
	rec.Hosts = append(rec.Hosts, Host{Name: name})
	return &rec.Hosts[len(rec.Hosts)-1]
}

// Retry records that a request for object is repeated after wait.
func (op *Operation) Retry(host, object string, wait time.Duration, err error) {
	op.note(func(rec *Record) {
		to := &rec.Spans
		if i, ok := op.blobs[digest.Digest(object)]; ok {
			to = &rec.Layers[i].Spans
			rec.Layers[i].Retries++
		}
		op.add(to, Span{Stage: StageRetry, Start: time.Since(rec.Start), Elapsed: wait, Note: host + ": " + reason(err)})
	})
}

// Down records that a mirror is not asked any more.
func (op *Operation) Down(host string, err error) {
	op.note(func(*Record) { op.host(host).Down = clip(reason(err), maxText) })
}

func reason(err error) string {
	if err == nil {
		err = errors.New("no reason is known")
	}
	return err.Error()
}
