package pull

import (
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// Phase is what a stretch of a pull's time went to.
type Phase string

// The phases of a pull, which follow one another; those of a layer go on
// during PhaseLayers.
const (
	PhaseResolve   Phase = "resolve"
	PhaseBegin     Phase = "begin"     // T1
	PhaseDocuments Phase = "documents" // the plan is made of them
	PhaseClaim     Phase = "claim"     // T2
	PhaseLayers    Phase = "layers"
	PhaseRecord    Phase = "record" // T4
)

// The phases of a layer, which follow one another too.
const (
	PhaseQueue    Phase = "queue"    // waits for a download slot
	PhaseFetch    Phase = "fetch"    // its bytes go to the store, and no further yet
	PhaseParent   Phase = "parent"   // waits for the layer below
	PhaseUnpack   Phase = "unpack"   // its bytes go to its files, those that are not here yet by way of the store
	PhaseFlush    Phase = "flush"    // its files are synced one by one
	PhaseBatch    Phase = "batch"    // waits for other layers to commit with, and until the commit in front is through
	PhaseSync     Phase = "sync"     // the file systems are synced
	PhaseSeal     Phase = "seal"     // its blob goes to its place
	PhaseSnapshot Phase = "snapshot" // the driver commits
	PhaseMeta     Phase = "meta"     // the records commit: T3
)

// Hooks are told where the time of one pull goes. Any may be nil; they are
// called from several goroutines, even after Pull has returned if another
// pull goes on with a layer, and must not block.
type Hooks struct {
	// Layers lists what the image consists of, bottom first, as soon as it is
	// known who fetches what, and again when that changes.
	Layers func([]Share)
	// Span tells of a phase twice: when it begins, without an End, and when it
	// is over. Of a layer that another pull has begun it may tell only the
	// latter, and of phases before this pull's time.
	Span func(Span)
}

// Share is a pull's part in one layer.
type Share struct {
	ID      digest.Digest  // the ChainID; of a layer that stays packed, the blob's digest
	Parent  digest.Digest  // the ID of the layer below, "" for none
	Desc    oci.Descriptor // of the blob
	Joined  bool           // another pull has begun it
	Present bool           // it is here: nothing is done
}

// Span is one phase of a layer, or of the pull itself if Layer is "".
type Span struct {
	Layer      digest.Digest // a Share's ID
	Phase      Phase
	Start, End time.Time
	Pass       *Pass // of PhaseFetch and PhaseUnpack, in the end
}

// Pass says what a pass over the bytes of a layer came to. Open, Network, Keep
// and Read follow one another; where the layer is unpacked they are what
// Times.Source is made of.
type Pass struct {
	Host     string // that sent the last bytes; "" when none did
	Fetched  int64  // bytes that came from the registry
	Kept     int64  // bytes that were here
	Unpacked int64  // bytes of the plain archive, once all of it is unpacked

	Open    time.Duration // until the registry answered
	Network time.Duration // waiting for its bytes
	Keep    time.Duration // digesting them and writing them to the store
	Read    time.Duration // reading those that were here
	Times   layer.Times
}

func (h Hooks) span(s Span) {
	if h.Span != nil {
		h.Span(s)
	}
}

// begin tells that the pull has come to a phase; the func that it is over.
func (r *run) begin(p Phase) (end func()) {
	s := Span{Phase: p, Start: time.Now()}
	r.req.Trace.span(s)
	return func() {
		s.End = time.Now()
		r.req.Trace.span(s)
	}
}

// begin tells that the layer has come to a phase; the func that it is over.
func (j *job) begin(p Phase) (end func(*Pass)) {
	s := Span{Layer: j.key.id, Phase: p, Start: time.Now()}
	j.tell(s)
	return func(pass *Pass) {
		s.End, s.Pass = time.Now(), pass
		j.tell(s)
	}
}

// tell passes a span on to the pull that started the job, which may have left
// it, and to those that have joined.
func (j *job) tell(s Span) {
	hooks := []Hooks{j.by.req.Trace}
	j.mu.Lock()
	for _, c := range j.claims {
		if !c.led {
			hooks = append(hooks, c.trace)
		}
	}
	j.mu.Unlock()
	for _, h := range hooks {
		h.span(s)
	}
}

// shares tells who does what.
func (r *run) shares(claims []*claim, present []*job) {
	if r.req.Trace.Layers == nil {
		return
	}
	here := make(map[*job]bool, len(present))
	for _, j := range present {
		here[j] = true
	}
	list := make([]Share, 0, len(claims))
	for _, c := range claims {
		s := Share{ID: c.job.key.id, Desc: c.job.layer.Desc, Joined: !c.led, Present: here[c.job]}
		if c.job.parent != nil {
			s.Parent = c.job.parent.key.id
		}
		list = append(list, s)
	}
	r.req.Trace.Layers(list)
}

// begin tells that all layers of a batch have come to a phase.
func (c *committer) begin(batch []*ready, p Phase) (end func()) {
	ends := make([]func(*Pass), len(batch))
	for i, rd := range batch {
		ends[i] = rd.job.begin(p)
	}
	return func() {
		for _, end := range ends {
			end(nil)
		}
	}
}
