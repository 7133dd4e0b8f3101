package api

import (
	"context"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

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
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/diff"
	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/native"
	"github.com/holdfast-dev/holdfast/internal/snapshot/overlay"
	"github.com/holdfast-dev/holdfast/internal/stream"
	"github.com/holdfast-dev/holdfast/internal/survey"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// fixture is a server on real stores in a directory of its own, and the
// generated clients on a connection to it.
type fixture struct {
	root    string
	blobs   *content.Store
	drivers map[string]snapshot.Driver
	db      *meta.DB
	conn    *grpc.ClientConn

	collections int // that a client has waited for

	content       contentapi.ContentClient
	diff          diffapi.DiffClient
	health        healthapi.HealthClient
	images        imagesapi.ImagesClient
	introspection introspectionapi.IntrospectionClient
	leases        leasesapi.LeasesClient
	namespaces    namespacesapi.NamespacesClient
	snapshots     snapshotsapi.SnapshotsClient
	streaming     streamingapi.StreamingClient
	transfer      transferapi.TransferClient
	version       versionapi.VersionClient
	holdfast      holdfastv1.HoldfastClient
}

// start serves new stores until the test ends; edit may change the options.
func start(t *testing.T, edit ...func(*Options)) *fixture {
	t.Helper()
	f := &fixture{root: t.TempDir()}
	f.drivers = openDrivers(t, f.root)
	blobs, err := content.Open(filepath.Join(f.root, "content"), filepath.Join(f.root, "trash"), content.Options{})
	check(t, err)
	t.Cleanup(func() { check(t, blobs.Close()) })
	f.blobs = blobs
	f.db, err = meta.Open(t.Context(), filepath.Join(f.root, "meta.db"), blobs, f.drivers, meta.Options{})
	check(t, err)
	t.Cleanup(func() {
		f.checkStore(t)
		check(t, f.db.Close())
	})

	opts := Options{
		DB:   f.db,
		Diff: diff.New(diff.Options{Temp: mount.Temp{Dir: filepath.Join(f.root, "tmpmounts")}}),
		Collect: func(ctx context.Context) (meta.Collected, error) {
			f.collections++
			return f.db.Collect(ctx)
		},
		Version:     "v2.4.2+holdfast.0.0.0",
		Revision:    "c0ffee",
		IdentityDir: filepath.Join(f.root, "io.containerd.grpc.v1.introspection"),
		Plugins: StorePlugins(Stores{ContentDir: filepath.Join(f.root, "content"), MetaFile: filepath.Join(f.root, "meta.db"),
			Snapshotters: map[string]Snapshotter{
				"native":    {Dir: filepath.Join(f.root, "native"), Traits: f.drivers["native"].Traits()},
				"overlayfs": {Dir: filepath.Join(f.root, "overlayfs"), Traits: f.drivers["overlayfs"].Traits()},
			}}),
	}
	for _, e := range edit {
		e(&opts)
	}
	f.serve(t, opts)
	return f
}

// checkStore compares what the test has left with what its records promise.
func (f *fixture) checkStore(t *testing.T) {
	report, err := fsck.Check(context.Background(), fsck.Store{DB: f.db, Content: f.blobs, Drivers: f.drivers}, fsck.Options{Deep: true})
	if err != nil {
		t.Errorf("check the store: %v", err)
	}
	for _, found := range report.Findings {
		if found.Class.Damage() {
			t.Errorf("the store is damaged: %+v", found)
		}
	}
}

func openDrivers(t *testing.T, root string) map[string]snapshot.Driver {
	t.Helper()
	nat, err := native.Open(filepath.Join(root, "native"), native.Options{})
	check(t, err)
	t.Cleanup(func() { check(t, nat.Close()) })
	ovl, err := overlay.Open(filepath.Join(root, "overlayfs"), overlay.Options{})
	check(t, err)
	t.Cleanup(func() { check(t, ovl.Close()) })
	return map[string]snapshot.Driver{"native": nat, "overlayfs": ovl}
}

func (f *fixture) serve(t *testing.T, opts Options) {
	t.Helper()
	srv := NewServer()
	Register(srv, opts)
	lis := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	conn, err := grpc.NewClient("passthrough:///test",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)))
	check(t, err)
	t.Cleanup(func() {
		check(t, conn.Close())
		srv.Stop()
		check(t, <-served)
	})
	f.conn = conn
	f.content = contentapi.NewContentClient(conn)
	f.diff = diffapi.NewDiffClient(conn)
	f.health = healthapi.NewHealthClient(conn)
	f.images = imagesapi.NewImagesClient(conn)
	f.introspection = introspectionapi.NewIntrospectionClient(conn)
	f.leases = leasesapi.NewLeasesClient(conn)
	f.namespaces = namespacesapi.NewNamespacesClient(conn)
	f.snapshots = snapshotsapi.NewSnapshotsClient(conn)
	f.streaming = streamingapi.NewStreamingClient(conn)
	f.transfer = transferapi.NewTransferClient(conn)
	f.version = versionapi.NewVersionClient(conn)
	f.holdfast = holdfastv1.NewHoldfastClient(conn)
}

// in is a client's context in a namespace and, if given, under a lease.
func in(t *testing.T, ns string, lease ...string) context.Context {
	ctx := metadata.AppendToOutgoingContext(t.Context(), headerNamespace, ns)
	for _, id := range lease {
		ctx = metadata.AppendToOutgoingContext(ctx, headerLease, id)
	}
	return ctx
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantCode fails unless err has the code and its message contains text.
func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	st := status.Convert(err)
	if st.Code() != code || !strings.Contains(st.Message(), text) {
		t.Errorf("got %v %q, want %v with %q", st.Code(), st.Message(), code, text)
	}
}

// methods says for every method that a server of ours answers which test
// calls it for what it does. Methods that only answer Unimplemented are
// empty. TestMethods compares it with what is registered.
var methods = map[string]string{
	"containerd.services.content.v1.Content/Abort":                  "TestContentIngests",
	"containerd.services.content.v1.Content/Delete":                 "TestContentRecords",
	"containerd.services.content.v1.Content/Info":                   "TestContentRecords",
	"containerd.services.content.v1.Content/List":                   "TestContentList",
	"containerd.services.content.v1.Content/ListStatuses":           "TestContentIngests",
	"containerd.services.content.v1.Content/Read":                   "TestContentRead",
	"containerd.services.content.v1.Content/Status":                 "TestContentIngests",
	"containerd.services.content.v1.Content/Update":                 "TestContentRecords",
	"containerd.services.content.v1.Content/Write":                  "TestContentWrite",
	"containerd.services.diff.v1.Diff/Apply":                        "TestDiff",
	"containerd.services.diff.v1.Diff/Diff":                         "TestDiff",
	"containerd.services.images.v1.Images/Create":                   "TestImages",
	"containerd.services.images.v1.Images/Delete":                   "TestImages",
	"containerd.services.images.v1.Images/Get":                      "TestImages",
	"containerd.services.images.v1.Images/List":                     "TestImages",
	"containerd.services.images.v1.Images/Update":                   "TestImages",
	"containerd.services.introspection.v1.Introspection/PluginInfo": "TestPluginInfo",
	"containerd.services.introspection.v1.Introspection/Plugins":    "TestPlugins",
	"containerd.services.introspection.v1.Introspection/Server":     "TestServerIdentity",
	"containerd.services.leases.v1.Leases/AddResource":              "TestLeaseResources",
	"containerd.services.leases.v1.Leases/Create":                   "TestLeases",
	"containerd.services.leases.v1.Leases/Delete":                   "TestLeases",
	"containerd.services.leases.v1.Leases/DeleteResource":           "TestLeaseResources",
	"containerd.services.leases.v1.Leases/List":                     "TestLeases",
	"containerd.services.leases.v1.Leases/ListResources":            "TestLeaseResources",
	"containerd.services.namespaces.v1.Namespaces/Create":           "TestNamespaces",
	"containerd.services.namespaces.v1.Namespaces/Delete":           "TestNamespaces",
	"containerd.services.namespaces.v1.Namespaces/Get":              "TestNamespaces",
	"containerd.services.namespaces.v1.Namespaces/List":             "TestNamespaces",
	"containerd.services.namespaces.v1.Namespaces/Update":           "TestNamespaces",
	"containerd.services.snapshots.v1.Snapshots/Cleanup":            "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/Commit":             "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/List":               "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/Mounts":             "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/Prepare":            "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/Remove":             "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/Stat":               "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/Update":             "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/Usage":              "TestSnapshots",
	"containerd.services.snapshots.v1.Snapshots/View":               "TestSnapshots",
	"containerd.services.streaming.v1.Streaming/Stream":             "TestStreaming",
	"containerd.services.transfer.v1.Transfer/Transfer":             "TestTransferPull",
	"containerd.services.version.v1.Version/Version":                "TestVersion",
	"grpc.health.v1.Health/Check":                                   "TestHealth",
	"grpc.health.v1.Health/List":                                    "TestHealth",
	"grpc.health.v1.Health/Watch":                                   "TestHealth",
	"holdfast.v1.Holdfast/Check":                                    "TestHoldfastCheck",
	"holdfast.v1.Holdfast/Collect":                                  "TestHoldfastCollect",
	"holdfast.v1.Holdfast/Pull":                                     "TestHoldfastPull",
	"holdfast.v1.Holdfast/Traces":                                   "TestHoldfastTraces",
	"holdfast.v1.Holdfast/Tree":                                     "TestHoldfastTree",
}

func TestMethods(t *testing.T) {
	f := start(t, func(o *Options) {
		o.Traces = openTraces(t)
		o.Pull = &pull.Puller{}
		o.Streams = stream.New(stream.Options{})
		o.Tree = func(context.Context, string) ([]survey.Node, error) { return nil, nil }
		o.Check = func(context.Context, bool) (fsck.Report, error) { return fsck.Report{}, nil }
	})
	srv := NewServer()
	Register(srv, Options{DB: f.db})
	sources := testSources(t)
	registered := make(map[string]bool)
	for name, info := range srv.GetServiceInfo() {
		for _, m := range info.Methods {
			full := name + "/" + m.Name
			registered[full] = true
			test, known := methods[full]
			if !known {
				t.Errorf("%s is registered and in no table", full)
				continue
			}
			if !strings.Contains(sources, "func "+test+"(t *testing.T)") {
				t.Errorf("%s: there is no test %q", full, test)
			}
			// Every message of protobuf may be empty; none may bring the
			// server down or find nobody at home.
			st := callEmpty(t, f.conn, full, m.IsServerStream || m.IsClientStream)
			if nobodyHome(st) || st.Code() == codes.Unavailable || st.Code() == codes.Internal {
				t.Errorf("%s: an empty request gets %v", full, st)
			}
		}
	}
	for full := range methods {
		if !registered[full] {
			t.Errorf("%s is in the table and not registered", full)
		}
	}
	for _, full := range []string{"containerd.services.tasks.v1.Tasks/List", "runtime.v1.RuntimeService/Version"} {
		if st := callEmpty(t, f.conn, full, false); !nobodyHome(st) {
			t.Errorf("%s, which is not there, answers %v", full, st)
		}
	}
}

// testSources is the text of this package's tests.
func testSources(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob("*_test.go")
	check(t, err)
	var all strings.Builder
	for _, name := range files {
		data, err := os.ReadFile(name)
		check(t, err)
		all.Write(data)
	}
	return all.String()
}

// nobodyHome tells gRPC's own Unimplemented from that of a service which has
// looked at the request.
func nobodyHome(st *status.Status) bool {
	return st.Code() == codes.Unimplemented &&
		(strings.Contains(st.Message(), "unknown service") || strings.HasPrefix(st.Message(), "method "))
}

// callEmpty calls a method with an empty message and returns the status of
// the first answer.
func callEmpty(t *testing.T, conn *grpc.ClientConn, full string, stream bool) *status.Status {
	t.Helper()
	ctx, cancel := context.WithCancel(in(t, "default"))
	defer cancel()
	if !stream {
		return status.Convert(conn.Invoke(ctx, "/"+full, &emptypb.Empty{}, &emptypb.Empty{}))
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+full)
	check(t, err)
	check(t, s.SendMsg(&emptypb.Empty{}))
	check(t, s.CloseSend())
	if err := s.RecvMsg(&emptypb.Empty{}); err != io.EOF {
		return status.Convert(err)
	}
	return nil
}

// Every method that works in a namespace says so when there is none.
func TestNamespaceRequired(t *testing.T) {
	f := start(t, func(o *Options) {
		o.Pull, o.Streams, o.Traces = &pull.Puller{}, stream.New(stream.Options{}), openTraces(t)
	})
	srv := NewServer()
	Register(srv, Options{DB: f.db})
	none := []string{"Introspection/", "Namespaces/", "Version/", "Health/", "Holdfast/Check", "Holdfast/Collect", "Holdfast/Tree"}
	for name, info := range srv.GetServiceInfo() {
		for _, m := range info.Methods {
			full := name + "/" + m.Name
			if slices.ContainsFunc(none, func(s string) bool { return strings.Contains(full, s) }) {
				continue
			}
			var err error
			if m.IsServerStream || m.IsClientStream {
				var s grpc.ClientStream
				s, err = f.conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/"+full)
				check(t, err)
				check(t, s.SendMsg(withDriver(full)))
				check(t, s.CloseSend())
				err = s.RecvMsg(&emptypb.Empty{})
			} else {
				err = f.conn.Invoke(t.Context(), "/"+full, withDriver(full), &emptypb.Empty{})
			}
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "namespace is required") {
				t.Errorf("%s without a namespace: %v", full, err)
			}
		}
	}
}

// withDriver is an empty request, but for those that name a driver first.
func withDriver(full string) any {
	if strings.Contains(full, "Snapshots/") {
		return &snapshotsapi.CleanupRequest{Snapshotter: "native"} // field 1 of all of them
	}
	return &emptypb.Empty{}
}

func TestNamespaceInvalid(t *testing.T) {
	f := start(t)
	_, err := f.images.List(in(t, "not/a/name"), &imagesapi.ListImagesRequest{})
	wantCode(t, err, codes.InvalidArgument, "")
}

func TestVersion(t *testing.T) {
	f := start(t)
	v, err := f.version.Version(t.Context(), &emptypb.Empty{})
	check(t, err)
	if v.Version != "v2.4.2+holdfast.0.0.0" || v.Revision != "c0ffee" {
		t.Errorf("got %v", v)
	}
}

func TestHealth(t *testing.T) {
	f := start(t)
	resp, err := f.health.Check(t.Context(), &healthapi.HealthCheckRequest{})
	check(t, err)
	if resp.Status != healthapi.HealthCheckResponse_SERVING {
		t.Errorf("check: %v", resp.Status)
	}
	w, err := f.health.Watch(t.Context(), &healthapi.HealthCheckRequest{})
	check(t, err)
	first, err := w.Recv()
	check(t, err)
	if first.Status != healthapi.HealthCheckResponse_SERVING {
		t.Errorf("watch: %v", first.Status)
	}
	all, err := f.health.List(t.Context(), &healthapi.HealthListRequest{})
	check(t, err)
	if len(all.Statuses) != 1 || all.Statuses[""].GetStatus() != healthapi.HealthCheckResponse_SERVING {
		t.Errorf("list: %v", all.Statuses)
	}
}

func TestMessageLimit(t *testing.T) {
	f := start(t)
	s, err := f.content.Write(in(t, "default"), grpc.MaxCallSendMsgSize(2*MaxMessage))
	check(t, err)
	s.Send(&contentapi.WriteContentRequest{Ref: "big", Action: contentapi.WriteAction_WRITE, Data: make([]byte, MaxMessage+1)})
	_, err = s.Recv()
	wantCode(t, err, codes.ResourceExhausted, "")
	put(t, f, in(t, "default"), "fits", make([]byte, MaxMessage-1<<10))
}

// eventually asks the server until ok: for what it does after a stream has
// ended at the client's side. Every ok is a call, so the loop is not a hot one.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func sameLabels(t *testing.T, got, want map[string]string) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Errorf("labels are %v, want %v", got, want)
	}
}
