package api

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/wire"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// Puller makes remote images local: pull.Puller.
type Puller interface {
	Pull(ctx context.Context, sp meta.Space, reference string, req pull.Request) (meta.Image, error)
}

func (s *holdfastService) Pull(req *holdfastv1.PullRequest, stream holdfastv1.Holdfast_PullServer) error {
	if s.puller == nil {
		return s.UnimplementedHoldfastServer.Pull(req, stream)
	}
	sp, err := s.space(stream.Context())
	if err != nil {
		return wire.Error(err)
	}
	r, err := ref.Normalize(req.GetReference())
	if err != nil {
		return wire.Error(err)
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	events := newRelay()
	var sending sync.WaitGroup
	sending.Go(func() {
		send := func(e pull.Event) error { return sendEvent(stream, r.String(), e) }
		if err := events.run(send); err != nil {
			cancel(fmt.Errorf("the client takes no more events: %w: %w", err, errdefs.ErrAborted))
		}
	})
	img, err := s.puller.Pull(ctx, sp, r.String(), pull.Request{
		Snapshotter: req.GetSnapshotter(),
		Platform:    req.GetPlatform(),
		Labels:      req.GetLabels(),
		NoUnpack:    req.GetNoUnpack(),
		Session: registry.Session{
			Credentials: credentials(r, req.GetCredential()),
			PlainHTTP:   req.GetPlainHttp(),
			SkipVerify:  req.GetSkipVerify(),
		},
		Progress: events.add,
	})
	events.close()
	sending.Wait()
	if err != nil {
		return wire.Error(err)
	}
	return stream.Send(&holdfastv1.PullEvent{Event: &holdfastv1.PullEvent_Done{Done: pulledImage(img)}})
}

// credentials are for the registry that the reference names, and no other: a
// mirror or a host that a layer lies on does not get them.
func credentials(r ref.Reference, c *holdfastv1.Credential) auth.Credentials {
	if c == nil {
		return nil
	}
	return auth.For(r.Host, auth.Credential{
		Username:      c.GetUsername(),
		Password:      c.GetPassword(),
		IdentityToken: c.GetIdentityToken(),
		RegistryToken: c.GetRegistryToken(),
	})
}

// stages are those of a layer; the others are the pull's.
var stages = map[pull.Stage]holdfastv1.PullLayer_Stage{
	pull.StageWaiting:   holdfastv1.PullLayer_WAITING,
	pull.StageExists:    holdfastv1.PullLayer_EXISTS,
	pull.StageFetching:  holdfastv1.PullLayer_FETCHING,
	pull.StageUnpacking: holdfastv1.PullLayer_UNPACKING,
	pull.StageCommit:    holdfastv1.PullLayer_COMMITTING,
	pull.StageComplete:  holdfastv1.PullLayer_COMPLETE,
}

func sendEvent(stream holdfastv1.Holdfast_PullServer, reference string, e pull.Event) error {
	if stage, ok := stages[e.Stage]; ok {
		return stream.Send(&holdfastv1.PullEvent{Event: &holdfastv1.PullEvent_Layer{Layer: &holdfastv1.PullLayer{
			Descriptor_: descriptor(e.Desc), Stage: stage, Offset: e.Offset,
		}}})
	}
	if e.Stage == pull.StageResolved {
		return stream.Send(&holdfastv1.PullEvent{Event: &holdfastv1.PullEvent_Resolved{Resolved: &holdfastv1.PullResolved{
			Reference: reference, Target: descriptor(e.Desc),
		}}})
	}
	return nil
}

func descriptor(desc oci.Descriptor) *holdfastv1.Descriptor {
	return &holdfastv1.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size}
}

func pulledImage(img meta.Image) *holdfastv1.Image {
	return &holdfastv1.Image{
		Name:      img.Name,
		Target:    descriptor(img.Target),
		Labels:    img.Labels,
		CreatedAt: wire.Time(img.Created),
		UpdatedAt: wire.Time(img.Updated),
	}
}

// relayPause is how long a relay waits after it has sent what there was. An
// eye sees no more than twenty steps a second.
const relayPause = 50 * time.Millisecond

// relay carries events from a pull, which must not wait, to a client, which
// may be slow. It keeps the latest event of each blob and forgets the ones
// before, so it holds no more events than an image has blobs
// (oci.MaxChildren); and blobs are sent in the order of their first change.
type relay struct {
	mu      sync.Mutex
	latest  map[digest.Digest]pull.Event
	changed []digest.Digest // keys of latest that were not sent yet
	closed  bool

	wake chan struct{} // holds a token when changed is not empty
	end  chan struct{} // closed by close
}

func newRelay() *relay {
	return &relay{
		latest: make(map[digest.Digest]pull.Event),
		wake:   make(chan struct{}, 1),
		end:    make(chan struct{}),
	}
}

// add takes an event. After close, events are dropped: layers that are
// shared with another pull go on without this one.
func (r *relay) add(e pull.Event) {
	if e.Stage == pull.StageResolving || e.Stage == pull.StageDone {
		return // the client knows that it asked, and gets the image itself in the end
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	if _, unsent := r.latest[e.Desc.Digest]; !unsent {
		r.changed = append(r.changed, e.Desc.Digest)
	}
	r.latest[e.Desc.Digest] = e
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// take returns the events that were not sent yet.
func (r *relay) take() []pull.Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	events := make([]pull.Event, 0, len(r.changed))
	for _, key := range r.changed {
		events = append(events, r.latest[key])
	}
	clear(r.latest)
	r.changed = r.changed[:0]
	return events
}

// close ends run once it has sent everything.
func (r *relay) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	close(r.end)
}

// run sends events until close, or until sending fails.
func (r *relay) run(send func(pull.Event) error) error {
	for ended := false; !ended; {
		select {
		case <-r.wake:
		case <-r.end:
			ended = true
		}
		for _, e := range r.take() {
			if err := send(e); err != nil {
				return err
			}
		}
		select {
		case <-time.After(relayPause):
		case <-r.end:
		}
	}
	return nil
}
