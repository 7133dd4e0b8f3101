package api

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/trace"
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
	id := ""
	if s.traces != nil {
		id = trace.NewID()
		if err := stream.Send(&holdfastv1.PullEvent{Trace: id}); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	events := newRelay[pull.Event]()
	var sending sync.WaitGroup
	sending.Go(func() {
		send := func(e pull.Event) error { return sendEvent(stream, r.String(), e) }
		if err := events.run(send); err != nil {
			cancel(fmt.Errorf("the client takes no more events: %w: %w", err, errdefs.ErrAborted))
		}
	})
	img, err := s.puller.Pull(ctx, sp, r.String(), pull.Request{
		ID:          id,
		Snapshotter: req.GetSnapshotter(),
		Platform:    req.GetPlatform(),
		Labels:      req.GetLabels(),
		NoUnpack:    req.GetNoUnpack(),
		Session: registry.Session{
			Credentials: credentials(r, req.GetCredential()),
			PlainHTTP:   req.GetPlainHttp(),
			SkipVerify:  req.GetSkipVerify(),
		},
		Progress: func(e pull.Event) {
			if _, ofLayer := stages[e.Stage]; ofLayer || e.Stage == pull.StageResolved {
				events.add(e.Desc.Digest.String(), e)
			}
		},
	})
	events.close()
	sending.Wait()
	if err != nil {
		return wire.Error(err)
	}
	return stream.Send(&holdfastv1.PullEvent{Event: &holdfastv1.PullEvent_Done{Done: pulledImage(img)}, Trace: id})
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
