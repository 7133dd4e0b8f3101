package cli

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// fake is a daemon that answers with what a test has put in.
type fake struct {
	versionapi.UnimplementedVersionServer
	imagesapi.UnimplementedImagesServer
	contentapi.UnimplementedContentServer
	holdfastv1.UnimplementedHoldfastServer

	socket  string
	version *versionapi.VersionResponse
	images  map[string]*imagesapi.Image
	blobs   map[string][]byte
	events  []*holdfastv1.PullEvent
	nodes   []*holdfastv1.TreeNode
	check   []*holdfastv1.CheckEvent
	traces  []*holdfastv1.Trace
	err     error // what every call ends with
	hang    chan struct{}

	mu         sync.Mutex
	namespaces []string // of the calls, in order
	pulled     *holdfastv1.PullRequest
	tree       *holdfastv1.TreeRequest
	traced     *holdfastv1.TracesRequest
	deep       bool
	synced     []bool // of each deletion
}

// serve puts f on a socket for the length of a test.
func serve(t *testing.T, f *fake) *fake {
	t.Helper()
	f.socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.WaitForHandlers(true))
	versionapi.RegisterVersionServer(srv, f)
	imagesapi.RegisterImagesServer(srv, imagesServer{fake: f})
	contentapi.RegisterContentServer(srv, contentServer{fake: f})
	holdfastv1.RegisterHoldfastServer(srv, f)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return f
}

// note remembers in which namespace a call came.
func (f *fake) note(ctx context.Context) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.namespaces = append(f.namespaces, metadata.ValueFromIncomingContext(ctx, "containerd-namespace")...)
}

func (f *fake) Version(context.Context, *emptypb.Empty) (*versionapi.VersionResponse, error) {
	return f.version, f.err
}

func (f *fake) Pull(req *holdfastv1.PullRequest, stream holdfastv1.Holdfast_PullServer) error {
	f.note(stream.Context())
	f.pulled = req
	for _, e := range f.events {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	if f.hang != nil {
		close(f.hang)
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	return f.err
}

func (f *fake) Tree(req *holdfastv1.TreeRequest, stream holdfastv1.Holdfast_TreeServer) error {
	f.note(stream.Context())
	f.tree = req
	for _, n := range f.nodes {
		if err := stream.Send(n); err != nil {
			return err
		}
	}
	return f.err
}

func (f *fake) Check(req *holdfastv1.CheckRequest, stream holdfastv1.Holdfast_CheckServer) error {
	f.deep = req.Deep
	for _, e := range f.check {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return f.err
}

func (f *fake) Traces(req *holdfastv1.TracesRequest, stream holdfastv1.Holdfast_TracesServer) error {
	f.note(stream.Context())
	f.traced = req
	for _, t := range f.traces {
		if err := stream.Send(t); err != nil {
			return err
		}
	}
	return nil
}

type imagesServer struct {
	imagesapi.UnimplementedImagesServer
	*fake
}

func (s imagesServer) List(ctx context.Context, _ *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	s.note(ctx)
	resp := &imagesapi.ListImagesResponse{}
	for _, name := range sortedKeys(s.images) {
		resp.Images = append(resp.Images, s.images[name])
	}
	return resp, s.err
}

func (s imagesServer) Delete(ctx context.Context, req *imagesapi.DeleteImageRequest) (*emptypb.Empty, error) {
	s.note(ctx)
	if s.err != nil {
		return nil, s.err
	}
	if s.images[req.Name] == nil {
		return nil, status.Errorf(codes.NotFound, "image %q: not found", req.Name)
	}
	delete(s.images, req.Name)
	s.synced = append(s.synced, req.Sync)
	return &emptypb.Empty{}, nil
}

type contentServer struct {
	contentapi.UnimplementedContentServer
	*fake
}

// Read sends a blob in two messages, as a daemon may.
func (s contentServer) Read(req *contentapi.ReadContentRequest, stream contentapi.Content_ReadServer) error {
	data, ok := s.blobs[req.Digest]
	if !ok {
		return status.Errorf(codes.NotFound, "content %s: not found", req.Digest)
	}
	half := len(data) / 2
	return errors.Join(
		stream.Send(&contentapi.ReadContentResponse{Data: data[:half]}),
		stream.Send(&contentapi.ReadContentResponse{Offset: int64(half), Data: data[half:]}))
}

// image adds an image whose documents are here, of 2 layers.
func (f *fake) image(name string, updated time.Time) {
	if f.images == nil {
		f.images, f.blobs = make(map[string]*imagesapi.Image), make(map[string][]byte)
	}
	put := func(doc string) string {
		dgst := digest.FromString(doc).String()
		f.blobs[dgst] = []byte(doc)
		return dgst
	}
	sha := "sha256:" + string(bytes.Repeat([]byte("a"), 64))
	config := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + sha + `","` + sha + `"]}}`
	layer := `{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"` + sha + `","size":1048576}`
	manifest := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` +
		put(config) + `","size":1000},"layers":[` + layer + `,` + layer + `]}`
	f.images[name] = &imagesapi.Image{
		Name: name, Labels: map[string]string{"a": "b"},
		Target:    &types.Descriptor{MediaType: "application/vnd.oci.image.manifest.v1+json", Digest: put(manifest), Size: 4096},
		CreatedAt: timestamppb.New(time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)),
		UpdatedAt: timestamppb.New(updated),
	}
}

// result is what one command line did.
type result struct {
	code     int
	out, err string
}

// run is `holdfast --address SOCKET ARGS`.
func (f *fake) run(t *testing.T, args ...string) result {
	t.Helper()
	return runAt(t, f.socket, args...)
}

func runAt(t *testing.T, socket string, args ...string) result {
	t.Helper()
	t.Setenv("CONTAINERD_ADDRESS", "")
	t.Setenv("CONTAINERD_NAMESPACE", "")
	var out, errw bytes.Buffer
	code := Run(t.Context(), append([]string{"--address", socket}, args...), &out, &errw, "0.1.0")
	return result{code, out.String(), errw.String()}
}
