package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/config"
	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

var build = Build{Version: "v0.1.0", Revision: "abc"}

// place is a temporary directory in which a daemon is at home.
type place struct {
	t   *testing.T
	dir string
	log *logBuffer
}

func newPlace(t *testing.T) *place {
	if os.Geteuid() != 0 {
		t.Skip("the daemon runs as root")
	}
	// Not t.TempDir(): its paths may be longer than a socket's may be.
	dir, err := os.MkdirTemp("", "holdfast")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &place{t, dir, &logBuffer{}}
}

func (p *place) path(name string) string { return filepath.Join(p.dir, name) }

// config is a config of this place, with more TOML at its end.
func (p *place) config(more ...string) *config.Config {
	p.t.Helper()
	doc := fmt.Sprintf("version = 4\nroot = '%s'\nstate = '%s'\n", p.path("root"), p.path("state"))
	doc += strings.Join(more, "\n")
	doc += fmt.Sprintf("\n[plugins.'io.containerd.server.v1.grpc']\naddress = '%s'\n[plugins.'io.containerd.internal.v1.opt']\npath = '%s'\n", p.path("sock/s"), p.path("opt"))
	must(p.t, os.WriteFile(p.path("config.toml"), []byte(doc), 0o600))
	cfg, err := config.Load(p.path("config.toml"), config.Flags{})
	must(p.t, err)
	return cfg
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// logBuffer is a log that may be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (p *place) logger() *slog.Logger { return slog.New(slog.NewTextHandler(p.log, nil)) }

// try builds a daemon and closes it.
func (p *place) try(cfg *config.Config) error {
	p.t.Helper()
	d, err := New(p.t.Context(), cfg, build, p.logger())
	if err != nil {
		if d != nil {
			p.t.Error("an error, and a daemon")
		}
		return err
	}
	return d.Close()
}

// running is a daemon that serves.
type running struct {
	t    *testing.T
	conn *grpc.ClientConn
	stop context.CancelFunc
	done chan error
}

func (p *place) start(cfg *config.Config) *running {
	p.t.Helper()
	d, err := New(p.t.Context(), cfg, build, p.logger())
	must(p.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{t: p.t, stop: cancel, done: make(chan error, 1)}
	go func() { r.done <- d.Run(ctx) }()
	r.conn, err = grpc.NewClient("unix:"+cfg.GRPC.Address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	must(p.t, err)
	return r
}

// end stops the daemon and fails unless it ends in order.
func (r *running) end() {
	r.t.Helper()
	r.stop()
	if err := <-r.done; err != nil {
		r.t.Errorf("run: %v", err)
	}
	r.conn.Close()
}

// in is a context of calls in a namespace.
func in(t *testing.T, ns string) context.Context {
	return metadata.AppendToOutgoingContext(t.Context(), "containerd-namespace", ns)
}

func (r *running) version() *versionapi.VersionResponse {
	r.t.Helper()
	v, err := versionapi.NewVersionClient(r.conn).Version(r.t.Context(), &emptypb.Empty{})
	must(r.t, err)
	return v
}

func (r *running) pull(ref string) error {
	stream, err := holdfastv1.NewHoldfastClient(r.conn).Pull(in(r.t, "default"), &holdfastv1.PullRequest{Reference: ref, PlainHttp: true})
	for err == nil {
		_, err = stream.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// check fails unless the store is whole.
func (r *running) check() {
	r.t.Helper()
	stream, err := holdfastv1.NewHoldfastClient(r.conn).Check(in(r.t, "default"), &holdfastv1.CheckRequest{Deep: true})
	must(r.t, err)
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return
		}
		must(r.t, err)
		if f := e.GetFinding(); f != nil {
			r.t.Errorf("%v", f)
		}
	}
}

// umask keeps the test's modes from depending on the caller's.
func umask(t *testing.T) {
	old := syscall.Umask(0o022)
	t.Cleanup(func() { syscall.Umask(old) })
}

// TestDirectories has the modes of everything that a first start makes; a
// second one tightens what was left open and leaves alone what isn't ours.
func TestDirectories(t *testing.T) {
	umask(t)
	p := newPlace(t)
	must(t, p.try(p.config()))
	want := map[string]fs.FileMode{
		"root":  fs.ModeDir | 0o700,
		"state": fs.ModeDir | 0o711,
		"sock":  fs.ModeDir | 0o711,
		"opt":   fs.ModeDir | 0o711, "opt/bin": fs.ModeDir | 0o711, "opt/lib": fs.ModeDir | 0o711,
		"root/io.containerd.content.v1.content":                 fs.ModeDir | 0o755,
		"root/io.containerd.content.v1.content/blobs":           fs.ModeDir | 0o755,
		"root/io.containerd.content.v1.content/ingest":          fs.ModeDir | 0o755,
		"root/io.containerd.metadata.v1.bolt":                   fs.ModeDir | 0o711,
		"root/io.containerd.metadata.v1.bolt/meta.db":           0o644,
		"root/io.containerd.runtime.v2.task":                    fs.ModeDir | 0o711,
		"root/io.containerd.snapshotter.v1.native":              fs.ModeDir | 0o700,
		"root/io.containerd.snapshotter.v1.native/snapshots":    fs.ModeDir | 0o700,
		"root/io.containerd.snapshotter.v1.overlayfs":           fs.ModeDir | 0o700,
		"root/io.containerd.snapshotter.v1.overlayfs/snapshots": fs.ModeDir | 0o700,
		"root/io.holdfast.v1.trace":                             fs.ModeDir | 0o700,
		"root/io.holdfast.v1.trash":                             fs.ModeDir | 0o700,
		"root/tmpmounts":                                        fs.ModeDir | 0o700,
		"state/io.containerd.runtime.v2.task":                   fs.ModeDir | 0o711,
	}
	compare := func() {
		t.Helper()
		got := p.modes()
		delete(got, "config.toml")
		for name, mode := range want {
			if got[name] != mode {
				t.Errorf("%s is %v, want %v", name, got[name], mode)
			}
			delete(got, name)
		}
		for name, mode := range got {
			if !strings.HasSuffix(name, "metadata.db") { // made when a driver is first asked
				t.Errorf("%s (%v) is not expected", name, mode)
			}
		}
	}
	compare()
	for _, dir := range []string{"root", "state", "root/tmpmounts", "root/io.containerd.metadata.v1.bolt", "root/io.holdfast.v1.trace", "root/io.holdfast.v1.trash"} {
		must(t, os.Chmod(p.path(dir), 0o755))
	}
	must(t, os.Mkdir(p.path("root/io.containerd.runtime.v1.linux"), 0o755))
	want["root/io.containerd.runtime.v1.linux"] = fs.ModeDir | 0o755
	must(t, os.MkdirAll(p.path("root/tmpmounts/containerd-mount1"), 0o700))
	must(t, p.try(p.config()))
	compare()
}

func (p *place) modes() map[string]fs.FileMode {
	all := make(map[string]fs.FileMode)
	must(p.t, filepath.WalkDir(p.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == p.dir {
			return err
		}
		info, err := e.Info()
		rel, _ := filepath.Rel(p.dir, path)
		all[rel] = info.Mode()
		return err
	}))
	return all
}

// TestSecondDaemon starts another daemon where one is, and is told who that is.
func TestSecondDaemon(t *testing.T) {
	p := newPlace(t)
	first := p.start(p.config())
	defer first.end()
	first.version()
	comm, err := os.ReadFile("/proc/self/comm")
	must(t, err)
	me := fmt.Sprintf("pid %d (%s)", os.Getpid(), strings.TrimSpace(string(comm)))

	other := newPlace(t)
	for _, test := range []struct {
		name   string
		change func(*config.Config)
		want   string
	}{
		{"all the same", func(*config.Config) {}, "address " + p.path("sock/s") + " is served by " + me},
		{"same root", func(c *config.Config) { c.State, c.GRPC.Address = other.path("state"), other.path("s") },
			"root " + p.path("root") + " is in use by " + me + ": stop it, or give this daemon another --root"},
		{"same state", func(c *config.Config) { c.Root, c.GRPC.Address = other.path("root"), other.path("s") },
			"state directory " + p.path("state") + " is in use by " + me},
		{"same address", func(c *config.Config) { c.Root, c.State = other.path("root"), other.path("state") },
			"address " + p.path("sock/s") + " is served by " + me},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := p.config()
			test.change(cfg)
			err := p.try(cfg)
			if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
	first.version() // it has noticed nothing
	must(t, other.try(other.config()))
}

// TestForeignHolder has a containerd on the root: it holds meta.db, and
// nothing of its is touched.
func TestForeignHolder(t *testing.T) {
	p := newPlace(t)
	must(t, p.try(p.config()))
	half := p.path("root/io.containerd.content.v1.content/ingest/" + strings.Repeat("ab", 32)) // being made
	must(t, os.Mkdir(half, 0o755))
	before := p.modes()
	db, err := bolt.Open(p.path("root/io.containerd.metadata.v1.bolt/meta.db"), 0o644, nil)
	must(t, err)
	err = p.try(p.config())
	if want := fmt.Sprintf("root %s is in use by pid %d (", p.path("root"), os.Getpid()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
	if after := p.modes(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("the root was\n%v and is\n%v", before, after)
	}
	must(t, db.Close())
	must(t, p.try(p.config()))
}

func TestSocket(t *testing.T) {
	umask(t)
	p := newPlace(t)
	cfg := p.config()
	cfg.GRPC.UID, cfg.GRPC.GID = 12, 34
	must(t, os.MkdirAll(p.path("sock"), 0o755))

	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: cfg.GRPC.Address, Net: "unix"})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	must(t, stale.Close())
	r := p.start(cfg)
	r.version()
	info, err := os.Stat(cfg.GRPC.Address)
	must(t, err)
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode() != fs.ModeSocket|0o660 || st.Uid != 12 || st.Gid != 34 {
		t.Errorf("the socket is %v of %d:%d", info.Mode(), st.Uid, st.Gid)
	}
	r.end()
	if names, err := os.ReadDir(p.path("sock")); err != nil || len(names) > 0 {
		t.Errorf("left beside the socket: %v, %v", names, err)
	}

	must(t, os.WriteFile(cfg.GRPC.Address, []byte("precious"), 0o600))
	if err := p.try(cfg); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a file in the socket's place: %v", err)
	}
	if data, _ := os.ReadFile(cfg.GRPC.Address); string(data) != "precious" {
		t.Errorf("the file now holds %q", data)
	}

	cfg.GRPC.Address = p.path(strings.Repeat("long", 30))
	if err := p.try(cfg); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "at most 104: choose a shorter one") {
		t.Errorf("a long address: %v", err)
	}
	// A path that leaves no room for the name of a temporary directory beside it.
	cfg.GRPC.Address = p.path(strings.Repeat("x", maxSocketPath-len(p.dir)-1))
	r = p.start(cfg)
	r.version()
	r.end()
}

// TestOOMScore asks for what the kernel refuses.
func TestOOMScore(t *testing.T) {
	p := newPlace(t)
	cfg := p.config()
	cfg.OOMScore = 5000
	must(t, p.try(cfg))
	if got := p.log.String(); !strings.Contains(got, "level=WARN msg=\"oom_score is not set") || !strings.Contains(got, "oom_score=5000") {
		t.Errorf("the log says\n%s", got)
	}
}

// inUse counts what a daemon must give back.
func inUse(t *testing.T) (files, goroutines int) {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(names), runtime.NumGoroutine()
}

// backTo fails unless files and goroutines come down to what they were.
func backTo(t *testing.T, files, goroutines int) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second) // what has ended may take a moment to be gone
	for {
		f, g := inUse(t)
		if f <= files && g <= goroutines {
			return
		}
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Errorf("%d files and %d goroutines, were %d and %d\n%s", f, g, files, goroutines, buf[:runtime.Stack(buf, true)])
			return
		}
		runtime.Gosched()
	}
}

// TestFailingHalfway has New fail at each part that can, with everything
// before it given back: the next start, with the obstacle gone, works.
func TestFailingHalfway(t *testing.T) {
	block := func(name string) func(*testing.T, *place) func() {
		return func(t *testing.T, p *place) func() {
			must(t, os.MkdirAll(filepath.Dir(p.path(name)), 0o700))
			must(t, os.WriteFile(p.path(name), []byte("in the way"), 0o600))
			return func() { must(t, os.Remove(p.path(name))) }
		}
	}
	for _, test := range []struct {
		name string
		more string // of the config
		harm func(*testing.T, *place) (undo func())
		want string
	}{
		{"required part", "required_plugins = ['io.containerd.grpc.v1.cri']", nil, "required_plugins"},
		{"root is a file", "", block("root"), "not a directory"},
		{"state is a file", "", block("state"), "not a directory"},
		{"content is a file", "", block("root/io.containerd.content.v1.content"), "not a directory"},
		{"drivers", "disabled_plugins = ['io.containerd.snapshotter.v1.overlayfs', 'io.containerd.snapshotter.v1.native']", nil, "no snapshotter can be used"},
		{"both drivers", "", func(t *testing.T, p *place) func() {
			a, b := block("root/io.containerd.snapshotter.v1.overlayfs")(t, p), block("root/io.containerd.snapshotter.v1.native")(t, p)
			return func() { a(); b() }
		}, "the warnings above say why"},
		{"meta.db", "", block("root/io.containerd.metadata.v1.bolt/meta.db"), "meta.db"},
		{"socket's directory", "", block("sock"), "not a directory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPlace(t)
			files, goroutines := inUse(t)
			cfg := p.config(test.more)
			undo := func() {}
			if test.harm != nil {
				undo = test.harm(t, p)
			}
			if err := p.try(cfg); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			backTo(t, files, goroutines)
			undo()
			must(t, p.try(p.config()))
			backTo(t, files, goroutines)
		})
	}
}

func TestOneDriverLess(t *testing.T) {
	p := newPlace(t)
	must(t, os.MkdirAll(p.path("root"), 0o700))
	must(t, os.WriteFile(p.path("root/io.containerd.snapshotter.v1.overlayfs"), nil, 0o600))
	must(t, p.try(p.config()))
	if !strings.Contains(p.log.String(), "snapshotter is not offered\" snapshotter=overlayfs") {
		t.Errorf("the log says\n%s", p.log)
	}
}

// TestTwentyTimes starts, asks and stops, with a pull every time.
func TestTwentyTimes(t *testing.T) {
	p := newPlace(t)
	srv := registrytest.New(t)
	push(srv, "demo", "one")
	cfg := p.config()
	files, goroutines := inUse(t)
	for i := range 20 {
		r := p.start(cfg)
		if i == 0 {
			if v := r.version(); v.Version != "v2.4.2+holdfast.0.1.0" || v.Revision != "abc" {
				t.Errorf("version %v", v)
			}
		}
		must(t, r.pull(srv.Host()+"/demo:1"))
		r.end()
		if _, err := os.Lstat(cfg.GRPC.Address); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is left: %v", err)
		}
	}
	srv.Close()
	backTo(t, files, goroutines)
}

// TestStoppedAtOnce stops a daemon before it has begun to serve.
func TestStoppedAtOnce(t *testing.T) {
	p := newPlace(t)
	d, err := New(t.Context(), p.config(), build, p.logger())
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, d.Run(ctx))
	must(t, d.Close())
}

// push puts an image of one small layer for this machine into a registry.
func push(srv *registrytest.Server, name, text string) registrytest.Image {
	body := strings.Repeat(text, 100_000)
	platform := ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	return srv.PushFormat(name, "1", registrytest.Format{Platform: platform},
		registrytest.Layer{Data: layertest.Archive(layertest.Dir(text, 0o755), layertest.File(text+"/file", body))})
}

// TestDrain stops the daemon while a layer is on its way. The pull ends with a
// reason, the daemon does not wait for the network, and the next one goes on
// from what is there.
func TestDrain(t *testing.T) {
	p := newPlace(t)
	srv := registrytest.New(t)
	img := push(srv, "demo", "slow")
	const kept = 200_000
	blob := "/blobs/" + img.Layers[0].Digest.String()
	srv.Fault(blob, registrytest.Fault{Stall: true, At: kept})
	r := p.start(p.config())
	stream, err := holdfastv1.NewHoldfastClient(r.conn).Pull(in(t, "default"), &holdfastv1.PullRequest{Reference: srv.Host() + "/demo:1", PlainHttp: true})
	must(t, err)
	for here := int64(0); here < kept; {
		e, err := stream.Recv()
		must(t, err)
		here = max(here, e.GetLayer().GetOffset())
	}
	began := time.Now()
	r.stop()
	for err == nil {
		_, err = stream.Recv()
	}
	if want := "the daemon is stopping"; !strings.Contains(err.Error(), want) {
		t.Errorf("the pull ends with %v, want %q", err, want)
	}
	r.end()
	if took := time.Since(began); took > shutdownTimeout/2 {
		t.Errorf("stopping took %s", took)
	}

	srv.Heal()
	srv.Forget()
	r = p.start(p.config())
	must(t, r.pull(srv.Host()+"/demo:1"))
	r.check()
	r.end()
	if n := srv.Bytes(blob); n != img.Layers[0].Size-kept {
		t.Errorf("the second pull fetched %d bytes, want %d", n, img.Layers[0].Size-kept)
	}
}

// TestLog has a line for a pull, and one for a collection that removed something.
func TestLog(t *testing.T) {
	p := newPlace(t)
	srv := registrytest.New(t)
	img := push(srv, "demo", "one")
	r := p.start(p.config())
	name := srv.Host() + "/demo:1"
	must(t, r.pull(name))
	must(t, r.pull(name))
	_, err := imagesapi.NewImagesClient(r.conn).Delete(in(t, "default"), &imagesapi.DeleteImageRequest{Name: name, Sync: true})
	must(t, err)
	_, err = holdfastv1.NewHoldfastClient(r.conn).Collect(in(t, "default"), &holdfastv1.CollectRequest{})
	must(t, err)
	r.end()
	var got []string
	for line := range strings.Lines(p.log.String()) {
		if strings.Contains(line, "msg=pulled") || strings.Contains(line, "msg=collected") {
			line = regexp.MustCompile(` (duration|pause)=\S+`).ReplaceAllString(line, "")
			got = append(got, line[strings.Index(line, "level="):])
		}
	}
	pulled := fmt.Sprintf("level=INFO msg=pulled image=%s namespace=default digest=%s layers=", name, img.Descriptor.Digest)
	total := img.Layers[0].Size + img.Config.Size + img.Descriptor.Size
	want := []string{
		pulled + fmt.Sprintf("1 bytes=%d layers_present=0\n", img.Layers[0].Size),
		pulled + "0 bytes=0 layers_present=1\n",
		fmt.Sprintf("level=INFO msg=collected images=0 blobs=3 snapshots=1 leases=0 ingests=0 bytes=%d\n", total),
	}
	if !slices.Equal(got, want) {
		t.Errorf("the log says\n%q, want\n%q", got, want)
	}
}

// TestMessageSize sends and gets more than the config allows.
func TestMessageSize(t *testing.T) {
	p := newPlace(t)
	cfg := p.config()
	cfg.GRPC.MaxRecvMessage, cfg.GRPC.MaxSendMessage = 10_000, 1_000
	r := p.start(cfg)
	defer r.end()
	images := imagesapi.NewImagesClient(r.conn)
	_, err := images.Delete(in(t, "default"), &imagesapi.DeleteImageRequest{Name: strings.Repeat("x", 20_000)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a large request: %v", err)
	}
	_, err = images.Get(in(t, "default"), &imagesapi.GetImageRequest{Name: strings.Repeat("x", 5_000)})
	if status.Code(err) != codes.NotFound {
		t.Errorf("a request within the limit: %v", err)
	}
	_, err = images.Create(in(t, "default"), &imagesapi.CreateImageRequest{Image: &imagesapi.Image{
		Name: "demo", Labels: map[string]string{"long": strings.Repeat("x", 2_000)},
		Target: &types.Descriptor{MediaType: "application/x", Digest: digest.FromString("x").String(), Size: 1},
	}})
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "send") {
		t.Errorf("a large answer: %v", err)
	}
}
