// Package api answers containerd clients: one file per service, no logic of its own.
package api

import (
	"context"
	"fmt"
	"iter"
	"math"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/stream"
	"github.com/holdfast-dev/holdfast/internal/survey"
	"github.com/holdfast-dev/holdfast/internal/trace"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// Bounds of one server. MaxMessage is containerd's default both ways; its
// clients refuse larger answers and cut their writes to fit.
const (
	MaxMessage = 16 << 20 // bytes of one message, sent or received

	// Streams of one connection at a time. Further calls wait in the client.
	// It is high because clients hold a call open for as long as a container
	// runs.
	maxStreams = 16 << 10
)

// The gRPC metadata in which a client says what namespace and lease it works
// in. Source: containerd pkg/namespaces/grpc.go, core/leases/grpc.go.
const (
	headerNamespace = "containerd-namespace"
	headerLease     = "containerd-lease"
)

// Options are the parts of the daemon that the services speak for. DB is
// required; a service whose part is nil answers Unimplemented.
type Options struct {
	DB   *meta.DB
	Diff Differ
	Pull Puller

	// Streams pairs the streams that clients open with the calls that use
	// them. Transfer needs it, and Pull.
	Streams *stream.Manager

	// Collect runs a collection that begins after the call, and waits for it.
	// It serves deletions that ask to be synchronous. Default: DB.Collect.
	Collect func(ctx context.Context) (meta.Collected, error)

	// Version is what clients show and some compare as a semantic version, so
	// it begins with the containerd release whose API this is and carries our
	// own after a plus sign, which comparisons ignore:
	// `v2.4.2+holdfast.0.1.0`.
	Version  string
	Revision string // the commit, as hexadecimal digits

	// IdentityDir is the directory in which the daemon's own UUID is kept, by
	// containerd's layout `<root>/io.containerd.grpc.v1.introspection`. It is
	// made at the first question.
	IdentityDir string

	// Plugins are the parts that clients may ask Introspection for. The
	// services of this package need not be among them.
	Plugins []Plugin

	// Tree lists the things of the store, parents first; ns "" means every
	// namespace.
	Tree func(ctx context.Context, ns string) ([]survey.Node, error)

	// Check compares records with files, and with deep every digest with its
	// bytes.
	Check func(ctx context.Context, deep bool) (fsck.Report, error)

	// Traces keeps the records of pulls, if Pull makes some.
	Traces *trace.Recorder
}

// NewServer makes a gRPC server with the limits of this API. It adds opts,
// which may hold a stats handler or transport credentials.
func NewServer(opts ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
	}, opts...)...)
}

// Register adds every service to srv. Services of containerd that are not
// among them answer Unimplemented, as its own do when their plugin is absent.
func Register(srv *grpc.Server, opts Options) {
	if opts.Collect == nil {
		opts.Collect = opts.DB.Collect
	}
	d := door{db: opts.DB, collect: opts.Collect}
	contentapi.RegisterContentServer(srv, &contentService{door: d})
	diffapi.RegisterDiffServer(srv, &diffService{door: d, differ: opts.Diff})
	healthapi.RegisterHealthServer(srv, health.NewServer()) // SERVING as long as the socket answers
	imagesapi.RegisterImagesServer(srv, &imagesService{door: d})
	introspectionapi.RegisterIntrospectionServer(srv, newIntrospection(opts.IdentityDir, opts.Plugins))
	leasesapi.RegisterLeasesServer(srv, &leasesService{door: d})
	namespacesapi.RegisterNamespacesServer(srv, &namespacesService{door: d})
	snapshotsapi.RegisterSnapshotsServer(srv, &snapshotsService{door: d})
	streamingapi.RegisterStreamingServer(srv, &streamingService{door: d, streams: opts.Streams})
	transferapi.RegisterTransferServer(srv, &transferService{door: d, puller: opts.Pull, streams: opts.Streams})
	versionapi.RegisterVersionServer(srv, &versionService{version: opts.Version, revision: opts.Revision})
	holdfastv1.RegisterHoldfastServer(srv, &holdfastService{
		door: d, puller: opts.Pull, tree: opts.Tree, check: opts.Check, traces: opts.Traces,
	})
}

// door is what the services share.
type door struct {
	db      *meta.DB
	collect func(ctx context.Context) (meta.Collected, error)
}

// space reads the namespace and the lease of a call. This is the one place
// that takes them from the wire; from here on they are a value.
func (d door) space(ctx context.Context) (meta.Space, error) {
	ns := header(ctx, headerNamespace)
	if ns == "" {
		return meta.Space{}, fmt.Errorf("namespace is required: %w", errdefs.ErrFailedPrecondition)
	}
	sp := d.db.Space(ns)
	if id := header(ctx, headerLease); id != "" {
		sp = sp.Leased(id)
	}
	return sp, nil
}

func header(ctx context.Context, name string) string {
	if vs := metadata.ValueFromIncomingContext(ctx, name); len(vs) > 0 {
		return vs[0]
	}
	return ""
}

// sync waits for a collection when a deletion asks for one.
func (d door) sync(ctx context.Context, wanted bool) error {
	if !wanted {
		return nil
	}
	_, err := d.collect(ctx)
	return err
}

// chunk is how many items of a streamed list travel in one message, as in
// containerd.
const chunk = 100

// sendChunks converts the items of a list and sends them in messages of at
// most chunk items. A list without items sends nothing.
func sendChunks[T, P any](items iter.Seq2[T, error], convert func(T) P, send func([]P) error) error {
	var batch []P
	for item, err := range items {
		if err != nil {
			return err
		}
		if batch = append(batch, convert(item)); len(batch) == chunk {
			if err := send(batch); err != nil {
				return err
			}
			batch = nil
		}
	}
	if len(batch) == 0 {
		return nil
	}
	return send(batch)
}

// convertAll converts the items of a list that travels in one message.
func convertAll[T, P any](items []T, convert func(T) P) []P {
	out := make([]P, 0, len(items))
	for _, item := range items {
		out = append(out, convert(item))
	}
	return out
}

// clampUint32 narrows a count that is never negative.
func clampUint32(n int) uint32 { return uint32(min(uint64(max(n, 0)), math.MaxUint32)) }
