package api

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types"
	transfertypes "github.com/containerd/containerd/api/types/transfer"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/stream"
)

// Bounds of a report (inv 10).
const (
	maxProgress   = 64 << 10        // bytes of one message
	maxParents    = 20_000          // things whose place in the tree is remembered; further ones hang at the root
	reportTimeout = 3 * time.Second // for the client to take what is left at the end
)

// report tells a client how its transfer goes, in containerd's words. The
// things have names (those of their ingests) and stand below those that refer to them:
//
//	"Resolving from OCI Registry (REF)"
//	"Pulling from OCI Registry (REF)"
//	REF                     "fetching image content"
//	  index-sha256:..         "waiting", "complete" or "already exists"
//	    manifest-sha256:..
//	      config-sha256:..
//	      layer-sha256:..       "waiting", "downloading", "extracting", "extracted"; "complete" if it stays packed
//	"Completed pull from OCI Registry (REF)"
//	NAME                    "saved"
//
// Source: containerd core/transfer/local/{pull,progress}.go.
type report struct {
	end     *stream.End // nil: nobody wants to know
	news    *relay[*transfertypes.Progress]
	sending sync.WaitGroup
	cancel  context.CancelFunc // of sending
	root    string
	from    string

	mu      sync.Mutex
	parents map[digest.Digest][]string
}

// openReport takes the progress stream that a client has opened; "" is none.
func (s *transferService) openReport(ns, id string) (*report, error) {
	r := &report{parents: make(map[digest.Digest][]string)}
	if id == "" {
		return r, nil
	}
	var err error
	if r.end, err = s.streams.Take(ns, id); err != nil {
		return nil, fmt.Errorf("progress stream: %w", err)
	}
	r.news = newRelay[*transfertypes.Progress]()
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	r.sending.Go(func() {
		// A client that doesn't listen any more still wants its image.
		_ = r.news.run(func(p *transfertypes.Progress) error {
			msg, err := wireMessage(p)
			if err != nil || len(msg.Value) > maxProgress {
				return nil // a stranger's names: not worth a message
			}
			return r.end.Send(ctx, msg)
		})
	})
	return r, nil
}

// close sends what is left, for a while, and ends the stream.
func (r *report) close() {
	if r.end == nil {
		return
	}
	r.news.close()
	patience := time.NewTimer(reportTimeout)
	defer patience.Stop()
	sent := make(chan struct{})
	go func() { r.sending.Wait(); close(sent) }()
	select {
	case <-sent:
		r.end.Close()
	case <-patience.C:
		r.cancel()
		<-sent
		r.end.Close()
		return
	}
	r.cancel()
	// Clients stop listening when the transfer returns, so it waits until the last message is out.
	select {
	case <-r.end.Gone():
	case <-patience.C:
	}
}

// send queues news about a thing; what was not sent yet is forgotten.
func (r *report) send(p *transfertypes.Progress) {
	if r.end == nil {
		return
	}
	key := p.GetName()
	if key == "" {
		key = "\x00" + p.GetEvent() // of the transfer as a whole: few, and each is sent
	}
	r.news.add(key, p)
}

// note says something about the transfer that containerd doesn't.
func (r *report) note(name, text string) {
	r.send(&transfertypes.Progress{Event: text, Name: clean(name)})
}

func (r *report) begin(reference string) {
	r.root = clean(reference)
	r.from = "OCI Registry (" + r.root + ")"
	r.send(&transfertypes.Progress{Event: "Resolving from " + r.from})
}

func (r *report) saved(recs []meta.Image) {
	// First, since `ctr` shows it with what comes next.
	r.send(&transfertypes.Progress{Event: "Completed pull from " + r.from})
	for _, rec := range recs {
		r.send(&transfertypes.Progress{Event: "saved", Name: clean(rec.Name), Desc: bare(rec.Target)})
	}
}

// hear takes an event of the pull.
func (r *report) hear(e pull.Event) {
	if r.end == nil {
		return
	}
	switch e.Stage {
	case pull.StageResolving, pull.StageDone:
		return // told by begin and saved
	case pull.StageResolved:
		r.send(&transfertypes.Progress{Event: "Pulling from " + r.from})
		r.send(&transfertypes.Progress{Event: "fetching image content", Name: r.root, Desc: bare(e.Desc)})
		return
	case pull.StageMissing:
		r.note(e.Platform, "no image for this platform")
		return
	}
	word, offset := progressWord(e)
	r.send(&transfertypes.Progress{
		Event: word, Name: clean(oci.Key(e.Desc)), Parents: r.place(e),
		Progress: offset, Total: e.Desc.Size, Desc: bare(e.Desc),
	})
}

// place finds the parents of what e is about, and remembers it as the parent of
// what it refers to.
func (r *report) place(e pull.Event) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	name := clean(oci.Key(e.Desc))
	for _, ch := range e.Children {
		if _, known := r.parents[ch.Digest]; !known && len(r.parents) >= maxParents {
			continue
		}
		if of := r.parents[ch.Digest]; !slices.Contains(of, name) && len(of) < maxPlatforms {
			r.parents[ch.Digest] = append(slices.Clip(of), name)
		}
	}
	if of := r.parents[e.Desc.Digest]; len(of) > 0 {
		return of
	}
	return []string{r.root}
}

// progressWord is what containerd calls a stage, and how far it counts the
// thing to be.
func progressWord(e pull.Event) (word string, offset int64) {
	switch e.Stage {
	case pull.StageExists, pull.StageKnown:
		return "already exists", e.Desc.Size
	case pull.StageRead:
		return "complete", e.Desc.Size
	case pull.StageFetching:
		return "downloading", e.Offset
	case pull.StageUnpacking, pull.StageCommit:
		if e.Packed {
			return "downloading", e.Desc.Size
		}
		return "extracting", e.Desc.Size
	case pull.StageComplete:
		if e.Packed {
			return "complete", e.Desc.Size
		}
		return "extracted", e.Desc.Size
	}
	return "waiting", 0
}

// bare is a descriptor without its annotations, which nobody shows.
func bare(desc oci.Descriptor) *types.Descriptor {
	return &types.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size}
}

// clean makes text from elsewhere fit for protobuf.
func clean(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
