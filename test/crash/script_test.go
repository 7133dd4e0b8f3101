package crash

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	content "github.com/containerd/containerd/api/services/content/v1"
	diff "github.com/containerd/containerd/api/services/diff/v1"
	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	namespaces "github.com/containerd/containerd/api/services/namespaces/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/test/harness"
)

// world is the images that all scripts pull.
type world struct {
	images []*harness.Image
	slow   *harness.Image // the one that is interrupted
}

// newWorld makes an image of one layer, one of three, and one that shares two of those.
func newWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	three, one, other := harness.Random(seed, 3), harness.Random(seed+1, 1), harness.Random(seed+2, 3)
	return &world{
		images: []*harness.Image{
			harness.NewImage(t, one...),
			harness.NewImage(t, three...),
			harness.NewImage(t, three[0], three[1], other[2]),
		},
		slow: harness.NewImage(t, other...),
	}
}

// script leads a daemon through everything that changes its store.
type script struct {
	*world
	t        *testing.T
	opts     harness.Options
	registry *harness.Registry
	refs     []string // of images
	slowRef  string
	daemon   *harness.Daemon
	stopped  bool // the script itself ended the daemon
}

func newScript(t *testing.T, w *world) *script {
	s := &script{
		world:    w,
		t:        t,
		opts:     harness.Options{Root: harness.TempDir(t), State: harness.TempDir(t)},
		registry: harness.NewRegistry(t),
	}
	for i, img := range w.images {
		s.refs = append(s.refs, s.registry.Push(img, fmt.Sprintf("image%d", i)))
	}
	s.slowRef = s.registry.Push(w.slow, "slow")
	return s
}

// steps are done in this order, each on what the ones before left.
var steps = []struct {
	name string
	do   func(*script, context.Context) error
}{
	{"first start", (*script).start},
	{"pull one layer", func(s *script, _ context.Context) error { return s.daemon.Pull(s.refs[0]) }},
	{"pull three layers", func(s *script, _ context.Context) error { return s.daemon.Pull(s.refs[1]) }},
	{"pull shared layers", func(s *script, _ context.Context) error { return s.daemon.Pull(s.refs[2]) }},
	{"pull again", func(s *script, _ context.Context) error { return s.daemon.Pull(s.refs[0]) }},
	{"pull into native", func(s *script, _ context.Context) error {
		return s.daemon.Pull(s.refs[1], "--snapshotter", "native")
	}},
	{"snapshots", (*script).snapshots},
	{"content", (*script).content},
	{"namespaces", (*script).namespaces},
	{"identity", func(s *script, ctx context.Context) error {
		_, err := introspection.NewIntrospectionClient(s.daemon.Conn).Server(ctx, &emptypb.Empty{})
		return err
	}},
	{"orderly restart", func(s *script, ctx context.Context) error {
		s.stopped = true
		s.daemon.Stop(s.t)
		return s.start(ctx)
	}},
	{"killed pull, restart", (*script).killPull},
	{"resume the pull", func(s *script, _ context.Context) error { return s.daemon.Pull(s.slowRef) }},
	{"garbage, restart", (*script).litter},
	{"remove images", func(s *script, ctx context.Context) error {
		for _, ref := range append(s.refs, s.slowRef) {
			if err := s.daemon.RemoveImage(ctx, ref); err != nil {
				return err
			}
		}
		return nil
	}},
	{"collect", func(s *script, ctx context.Context) error { return s.daemon.Collect(ctx) }},
	{"stop", func(s *script, ctx context.Context) error {
		s.stopped = true
		s.daemon.Stop(s.t)
		return s.start(ctx)
	}},
}

// run does the steps until the daemon kills itself, and returns the one in which it did; "" if it never does.
func (s *script) run() (killedIn string) {
	s.t.Helper()
	for _, step := range steps {
		s.stopped = false
		err := step.do(s, harness.Context(s.t))
		if !s.stopped && s.daemon != nil && killed(s.daemon, err) {
			return step.name
		}
		if err != nil {
			s.t.Fatalf("step %q: %v", step.name, err)
		}
	}
	return ""
}

func (s *script) start(context.Context) (err error) {
	s.daemon, err = harness.TryStart(s.t, s.opts)
	s.stopped = false
	return err
}

// killPull ends the daemon by SIGKILL when half of an image is there.
func (s *script) killPull(ctx context.Context) error {
	reached := s.registry.Hold(s.slow.LayerBytes() / 2)
	ended := make(chan error, 1)
	go func() { ended <- s.daemon.Pull(s.slowRef) }()
	select {
	case <-reached:
	case err := <-ended:
		return fmt.Errorf("the pull ended before half of it: %w", err)
	case <-s.daemon.Done():
		return errors.Join(errors.New("the daemon died before half of the pull"), <-ended)
	}
	s.stopped = true
	s.daemon.Kill()
	s.registry.Release()
	<-ended
	return s.start(ctx)
}

// litter puts what crashes of any kind may leave between a stopped daemon and the next start.
func (s *script) litter(ctx context.Context) error {
	leased, _, err := s.daemon.Leased(ctx)
	if err != nil {
		return err
	}
	sealed := []byte("sealed")
	ref := "layer-" + digest.FromBytes(sealed).String()
	if err := write(leased, content.NewContentClient(s.daemon.Conn), []*content.WriteContentRequest{{Action: content.WriteAction_WRITE, Ref: ref, Data: sealed}}); err != nil {
		return err
	}
	s.stopped = true
	s.daemon.Stop(s.t)
	stray := digest.FromString("stray")
	for _, dir := range []string{
		filepath.Join(harness.OverlayDir, "9999", "fs", "sub"),
		filepath.Join(harness.OverlayDir, "new-123"),
		filepath.Join(harness.NativeDir, "9999", "sub"),
		filepath.Join(harness.NativeDir, "../rm-77", "sub"),
		filepath.Join(harness.TrashDir, "old", "sub"),
		filepath.Join(harness.TmpmountDir, "containerd-mount1"),
		filepath.Join(harness.IngestDir, digest.FromString("nobody").Encoded()),
	} {
		if err := os.MkdirAll(filepath.Join(s.opts.Root, dir), 0o755); err != nil {
			return err
		}
	}
	file := filepath.Join(s.opts.Root, harness.BlobsDir, "sha256", stray.Encoded())
	if err := os.WriteFile(file, []byte("stray"), 0o444); err != nil {
		return err
	}
	if err := s.seal(ref, digest.FromBytes(sealed)); err != nil {
		return err
	}
	return s.start(ctx)
}

// seal moves an ingest's bytes to a blob's place, as a commit does just before it makes the record.
func (s *script) seal(ref string, dgst digest.Digest) error {
	files, err := filepath.Glob(filepath.Join(s.opts.Root, harness.IngestDir, "*", "ref"))
	if err != nil {
		return err
	}
	for _, file := range files {
		body, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if strings.HasSuffix(string(body), "/"+ref) {
			return os.Rename(filepath.Join(filepath.Dir(file), "data"), filepath.Join(s.opts.Root, harness.BlobsDir, "sha256", dgst.Encoded()))
		}
	}
	return fmt.Errorf("no ingest %s on disk", ref)
}

// snapshots walks the life of a snapshot over the unpacked image, and writes a layer into one and makes one from it.
func (s *script) snapshots(ctx context.Context) error {
	ctx, end, err := s.daemon.Leased(ctx)
	if err != nil {
		return err
	}
	client, differ := snapshots.NewSnapshotsClient(s.daemon.Conn), diff.NewDiffClient(s.daemon.Conn)
	for _, driver := range []string{"overlayfs", "native"} {
		prepared, err := client.Prepare(ctx, &snapshots.PrepareSnapshotRequest{Snapshotter: driver, Key: "active", Parent: s.images[1].ChainID.String()})
		if err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
		if _, err := differ.Apply(ctx, &diff.ApplyRequest{Diff: wireDescriptor(s.images[0].Layers[0]), Mounts: prepared.Mounts}); err != nil {
			return fmt.Errorf("apply: %w", err)
		}
		if _, err := client.Commit(ctx, &snapshots.CommitSnapshotRequest{Snapshotter: driver, Key: "active", Name: "committed"}); err != nil {
			return fmt.Errorf("commit: %w", err)
		}
		viewed, err := client.View(ctx, &snapshots.ViewSnapshotRequest{Snapshotter: driver, Key: "view", Parent: "committed"})
		if err != nil {
			return fmt.Errorf("view: %w", err)
		}
		below, err := client.View(ctx, &snapshots.ViewSnapshotRequest{Snapshotter: driver, Key: "below", Parent: s.images[1].ChainID.String()})
		if err != nil {
			return fmt.Errorf("view: %w", err)
		}
		if _, err := differ.Diff(ctx, &diff.DiffRequest{Left: below.Mounts, Right: viewed.Mounts, Ref: "diff-" + driver}); err != nil {
			return fmt.Errorf("diff: %w", err)
		}
		for _, key := range []string{"below", "view", "committed"} {
			if _, err := client.Remove(ctx, &snapshots.RemoveSnapshotRequest{Snapshotter: driver, Key: key}); err != nil {
				return fmt.Errorf("remove %s: %w", key, err)
			}
		}
	}
	return end()
}

func wireDescriptor(desc ocispec.Descriptor) *types.Descriptor {
	return &types.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size}
}

// content writes a blob in two sittings, gives another up, and deletes the first.
func (s *script) content(ctx context.Context) error {
	ctx, end, err := s.daemon.Leased(ctx)
	if err != nil {
		return err
	}
	client := content.NewContentClient(s.daemon.Conn)
	body := bytes.Repeat([]byte("holdfast"), 10_000)
	dgst := digest.FromBytes(body).String()
	half := int64(len(body) / 2)
	for _, requests := range [][]*content.WriteContentRequest{
		{{Action: content.WriteAction_WRITE, Ref: "blob", Total: int64(len(body)), Data: body[:half]}},
		{{Action: content.WriteAction_COMMIT, Ref: "blob", Total: int64(len(body)), Expected: dgst, Offset: half, Data: body[half:]}},
		{{Action: content.WriteAction_WRITE, Ref: "given up", Data: body}},
	} {
		if err := write(ctx, client, requests); err != nil {
			return err
		}
	}
	if _, err := client.Abort(ctx, &content.AbortRequest{Ref: "given up"}); err != nil {
		return fmt.Errorf("abort: %w", err)
	}
	if _, err := client.Delete(ctx, &content.DeleteContentRequest{Digest: dgst}); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	return end()
}

func write(ctx context.Context, client content.ContentClient, requests []*content.WriteContentRequest) error {
	stream, err := client.Write(ctx)
	if err != nil {
		return err
	}
	for _, request := range requests {
		if err := stream.Send(request); err != nil {
			break // Recv says why
		}
		if _, err := stream.Recv(); err != nil {
			return fmt.Errorf("%s %s: %w", request.Action, request.Ref, err)
		}
	}
	stream.CloseSend()
	if _, err := stream.Recv(); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("end of a write: %w", err)
	}
	return nil
}

func (s *script) namespaces(ctx context.Context) error {
	client := namespaces.NewNamespacesClient(s.daemon.Conn)
	if _, err := client.Create(ctx, &namespaces.CreateNamespaceRequest{Namespace: &namespaces.Namespace{Name: "other", Labels: map[string]string{"a": "b"}}}); err != nil {
		return fmt.Errorf("create a namespace: %w", err)
	}
	if _, err := client.Delete(ctx, &namespaces.DeleteNamespaceRequest{Name: "other"}); err != nil {
		return fmt.Errorf("delete a namespace: %w", err)
	}
	return nil
}
