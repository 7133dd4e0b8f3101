package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/stream"
	"github.com/holdfast-dev/holdfast/internal/survey"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// pulling serves stores with a puller on them.
func pulling(t *testing.T, edit ...func(*Options)) *fixture {
	client := registry.New(registry.Options{})
	remote := func(reference string, s registry.Session) (*registry.Repository, string, string, error) {
		r, err := ref.Parse(reference)
		if err != nil {
			return nil, "", "", err
		}
		repo, err := client.Repository(r, s)
		return repo, r.Host, r.Path, err
	}
	return start(t, func(o *Options) {
		o.Streams = stream.New(stream.Options{})
		p := pull.New(o.DB, remote, nil, pull.Options{})
		t.Cleanup(func() { check(t, p.Close()) })
		o.Pull = p
		for _, e := range edit {
			e(o)
		}
	})
}

func pullAll(t *testing.T, f *fixture, ctx context.Context, req *holdfastv1.PullRequest) (events []*holdfastv1.PullEvent, err error) {
	t.Helper()
	s, err := f.holdfast.Pull(ctx, req)
	check(t, err)
	for {
		e, err := s.Recv()
		if err == io.EOF {
			return events, nil
		}
		if err != nil {
			return events, err
		}
		events = append(events, e)
	}
}

func TestHoldfastPull(t *testing.T) {
	reg := registrytest.New(t)
	layer := archive(t, map[string]string{"hello": "world"})
	pushed := reg.Push("demo", "1", registrytest.Layer{Data: layer, DiffID: digest.FromBytes(layer), MediaType: ocispec.MediaTypeImageLayer})
	f := pulling(t)
	ctx := in(t, "default")
	req := &holdfastv1.PullRequest{Reference: reg.Host() + "/demo:1", PlainHttp: true, Platform: "linux/amd64", Labels: map[string]string{"k": "v"}}
	events, err := pullAll(t, f, ctx, req)
	check(t, err)
	if len(events) < 3 {
		t.Fatalf("events: %v", events)
	}
	resolved := events[0].GetResolved()
	if resolved.GetReference() != req.Reference || resolved.GetTarget().GetDigest() != pushed.Descriptor.Digest.String() {
		t.Errorf("the first event is %v", events[0])
	}
	last := events[len(events)-2].GetLayer()
	if last.GetStage() != holdfastv1.PullLayer_COMPLETE || last.GetDescriptor_().GetDigest() != digest.FromBytes(layer).String() {
		t.Errorf("the last event of the layer is %v", last)
	}
	done := events[len(events)-1].GetDone()
	if done.GetName() != req.Reference || done.GetTarget().GetDigest() != pushed.Descriptor.Digest.String() || done.GetLabels()["k"] != "v" {
		t.Errorf("the last event is %v", events[len(events)-1])
	}
	if img, err := f.images.Get(ctx, &imagesapi.GetImageRequest{Name: req.Reference}); err != nil || img.Image.Target.Digest != done.GetTarget().GetDigest() {
		t.Errorf("the image is %v (%v)", img, err)
	}
	if got := get(t, f, ctx, digest.FromBytes(layer)); string(got) != string(layer) {
		t.Error("the layer has other bytes")
	}

	events, err = pullAll(t, f, ctx, req)
	check(t, err)
	if l := events[1].GetLayer(); l.GetStage() != holdfastv1.PullLayer_EXISTS {
		t.Errorf("pulled again, the layer is %v", l)
	}
	_, err = pullAll(t, f, ctx, &holdfastv1.PullRequest{Reference: reg.Host() + "/demo:2", PlainHttp: true})
	wantCode(t, err, codes.NotFound, "")
	_, err = pullAll(t, f, ctx, &holdfastv1.PullRequest{Reference: "Not A Reference"})
	wantCode(t, err, codes.InvalidArgument, "")
	_, err = pullAll(t, f, ctx, &holdfastv1.PullRequest{Reference: reg.Host() + "/demo:1", PlainHttp: true, Snapshotter: "zfs"})
	wantCode(t, err, codes.InvalidArgument, "zfs")
}

// watched tells when a pull has returned.
type watched struct {
	Puller
	returned chan error
}

// before puts w before the fixture's puller.
func (w *watched) before(o *Options) { w.Puller, o.Pull = o.Pull, w }

func (w watched) Pull(ctx context.Context, sp meta.Space, reference string, req pull.Request) (meta.Image, error) {
	img, err := w.Puller.Pull(ctx, sp, reference, req)
	w.returned <- err
	return img, err
}

// A client that goes away takes its pull with it, and the next pull succeeds.
func TestHoldfastPullCancelled(t *testing.T) {
	reg := registrytest.New(t)
	layer := archive(t, map[string]string{"hello": "world"})
	reg.Push("demo", "1", registrytest.Layer{Data: layer, DiffID: digest.FromBytes(layer), MediaType: ocispec.MediaTypeImageLayer})
	reg.Fault("blobs/"+digest.FromBytes(layer).String(), registrytest.Fault{At: 100, Stall: true})
	w := watched{returned: make(chan error, 2)}
	f := pulling(t, w.before)
	req := &holdfastv1.PullRequest{Reference: reg.Host() + "/demo:1", PlainHttp: true, Platform: "linux/amd64"}
	ctx, cancel := context.WithCancel(in(t, "default"))
	s, err := f.holdfast.Pull(ctx, req)
	check(t, err)
	for {
		e, err := s.Recv()
		check(t, err)
		if e.GetLayer().GetStage() == holdfastv1.PullLayer_FETCHING {
			break
		}
	}
	cancel()
	if err := <-w.returned; !errors.Is(err, context.Canceled) {
		t.Errorf("the pull ends with %v", err)
	}
	reg.Heal()
	_, err = pullAll(t, f, in(t, "default"), req)
	check(t, err)
}

// Credentials of a request open the registry that it names.
func TestHoldfastPullCredential(t *testing.T) {
	reg := registrytest.New(t)
	layer := archive(t, map[string]string{"hello": "world"})
	reg.Push("demo", "1", registrytest.Layer{Data: layer, DiffID: digest.FromBytes(layer), MediaType: ocispec.MediaTypeImageLayer})
	reg.Require(registrytest.Auth{User: "me", Password: "secret"})
	f := pulling(t)
	req := &holdfastv1.PullRequest{Reference: reg.Host() + "/demo:1", PlainHttp: true, Platform: "linux/amd64"}
	_, err := pullAll(t, f, in(t, "default"), req)
	wantCode(t, err, codes.Unauthenticated, "")
	req.Credential = &holdfastv1.Credential{Username: "me", Password: "secret"}
	_, err = pullAll(t, f, in(t, "default"), req)
	check(t, err)
}

func TestHoldfastAbsent(t *testing.T) {
	f := start(t)
	_, err := pullAll(t, f, in(t, "default"), &holdfastv1.PullRequest{})
	wantCode(t, err, codes.Unimplemented, "")
	tree, err := f.holdfast.Tree(t.Context(), &holdfastv1.TreeRequest{})
	check(t, err)
	_, err = tree.Recv()
	wantCode(t, err, codes.Unimplemented, "")
	findings, err := f.holdfast.Check(t.Context(), &holdfastv1.CheckRequest{})
	check(t, err)
	_, err = findings.Recv()
	wantCode(t, err, codes.Unimplemented, "")
}

func event(name string, stage pull.Stage, offset int64) pull.Event {
	return pull.Event{Stage: stage, Desc: oci.Descriptor{Digest: digest.FromString(name), Size: 100}, Offset: offset}
}

// A client that takes its time gets the latest of each blob, in the order of
// their first change, and the last one always.
func TestRelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRelay[pull.Event]()
		var got []pull.Event
		gate := make(chan struct{})
		ended := make(chan error)
		go func() {
			ended <- r.run(func(e pull.Event) error {
				<-gate
				got = append(got, e)
				return nil
			})
		}()
		add := func(e pull.Event) { r.add(e.Desc.Digest.String(), e) }
		add(event("target", pull.StageResolved, 0))
		synctest.Wait() // it is being sent
		add(event("b", pull.StageWaiting, 0))
		for i := range int64(1000) {
			add(event("a", pull.StageFetching, i))
			add(event("b", pull.StageFetching, i))
		}
		close(gate)
		time.Sleep(2 * relayPause) // the bubble's time
		add(event("a", pull.StageComplete, 100))
		r.close()
		add(event("a", pull.StageFetching, 5)) // a straggler
		if err := <-ended; err != nil {
			t.Error(err)
		}
		want := []pull.Event{
			event("target", pull.StageResolved, 0), event("b", pull.StageFetching, 999),
			event("a", pull.StageFetching, 999), event("a", pull.StageComplete, 100),
		}
		if !slices.EqualFunc(got, want, func(a, b pull.Event) bool { return fmt.Sprint(a) == fmt.Sprint(b) }) {
			t.Errorf("sent %v, want %v", got, want)
		}
	})
}

func TestRelayFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRelay[pull.Event]()
		r.add("a", event("a", pull.StageWaiting, 0))
		broken := errors.New("gone")
		if err := r.run(func(pull.Event) error { return broken }); err != broken {
			t.Errorf("run ends with %v", err)
		}
		r.add("b", event("b", pull.StageWaiting, 0)) // nobody takes it, nobody waits
		r.close()
	})
}

func TestHoldfastTree(t *testing.T) {
	nodes := []survey.Node{
		{Depth: 0, Kind: "directory", Name: "/root", Path: "/root", Size: -1, Note: "everything"},
		{Depth: 1, Kind: "blob", Name: "sha256:x", Path: "/root/x", Size: 7, Note: "config", Holders: []string{"image a", "lease l"}},
	}
	asked := make(chan string, 3)
	f := start(t, func(o *Options) {
		o.Tree = func(_ context.Context, ns string) ([]survey.Node, error) {
			asked <- ns
			if ns == "broken" {
				return nil, fmt.Errorf("no such thing: %w", errdefs.ErrNotFound)
			}
			return nodes, nil
		}
	})
	s, err := f.holdfast.Tree(in(t, "default"), &holdfastv1.TreeRequest{})
	check(t, err)
	for _, want := range nodes {
		got, err := s.Recv()
		check(t, err)
		if int(got.Depth) != want.Depth || got.Kind != want.Kind || got.Name != want.Name || got.Path != want.Path ||
			got.Size != want.Size || got.Note != want.Note || !slices.Equal(got.Holders, want.Holders) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("the tree ends with %v", err)
	}
	s, err = f.holdfast.Tree(t.Context(), &holdfastv1.TreeRequest{AllNamespaces: true})
	check(t, err)
	_, err = s.Recv()
	check(t, err)
	s, err = f.holdfast.Tree(in(t, "broken"), &holdfastv1.TreeRequest{})
	check(t, err)
	_, err = s.Recv()
	wantCode(t, err, codes.NotFound, "no such thing")
	if got := []string{<-asked, <-asked, <-asked}; !slices.Equal(got, []string{"default", "", "broken"}) {
		t.Errorf("the trees of %q were asked for", got)
	}
	s, err = f.holdfast.Tree(t.Context(), &holdfastv1.TreeRequest{})
	check(t, err)
	_, err = s.Recv()
	wantCode(t, err, codes.FailedPrecondition, "namespace is required")
}

func TestHoldfastCheck(t *testing.T) {
	var deep atomic.Bool
	f := start(t, func(o *Options) {
		o.Check = func(_ context.Context, d bool) (fsck.Report, error) {
			deep.Store(d)
			return fsck.Report{Findings: []fsck.Finding{{Class: fsck.BlobMissing, Namespace: "ns", Subject: "sha256:x", Detail: "it is gone", Repair: "pull"}}, Images: 1, Blobs: 2, Snapshots: 3, Bytes: 4}, nil
		}
	})
	s, err := f.holdfast.Check(t.Context(), &holdfastv1.CheckRequest{Deep: true})
	check(t, err)
	e, err := s.Recv()
	check(t, err)
	found := e.GetFinding()
	if found.GetClass() != "blob-missing" || found.GetNamespace() != "ns" || found.GetSubject() != "sha256:x" || found.GetProblem() != "it is gone" || found.GetAdvice() != "pull" || !deep.Load() {
		t.Errorf("found %v", e)
	}
	e, err = s.Recv()
	check(t, err)
	sum := e.GetSummary()
	if sum.GetImages() != 1 || sum.GetBlobs() != 2 || sum.GetSnapshots() != 3 || sum.GetBytes() != 4 || sum.GetFindings() != 1 {
		t.Errorf("the summary is %v", e)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("the check ends with %v", err)
	}
}

func TestHoldfastCollect(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	dgst := put(t, f, ctx, "r", []byte("garbage"))
	resp, err := f.holdfast.Collect(t.Context(), &holdfastv1.CollectRequest{})
	check(t, err)
	if f.collections != 1 || resp.Blobs != 1 || resp.Bytes != 7 || resp.Elapsed == nil {
		t.Errorf("collected %v in %d collections", resp, f.collections)
	}
	_, _, err = read(f, ctx, &contentapi.ReadContentRequest{Digest: dgst.String()})
	wantCode(t, err, codes.NotFound, "")
}
