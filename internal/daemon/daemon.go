// Package daemon builds every part in order and closes them in reverse; the only place that knows the whole.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	sdnotify "github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"

	"github.com/holdfast-dev/holdfast/internal/api"
	"github.com/holdfast-dev/holdfast/internal/config"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/diff"
	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/gc"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/stream"
	"github.com/holdfast-dev/holdfast/internal/survey"
	"github.com/holdfast-dev/holdfast/internal/trace"
)

// shutdownTimeout bounds how long calls under way may go on after the daemon
// is told to stop. Pulls are cut short before: they resume.
const shutdownTimeout = 10 * time.Second

// defaultBoltOpen is how long we wait for the lock of meta.db when the config
// names no time. containerd waits for ever, without a word for ten seconds.
const defaultBoltOpen = 15 * time.Second

// Build says which program this is.
type Build struct{ Version, Revision string }

// Daemon is the whole.
type Daemon struct {
	log      *slog.Logger
	closers  []func() error // in the order of making
	server   *grpc.Server
	listener net.Listener
	gc       *gc.GC
	collect  func(context.Context) (meta.Collected, error)
	puller   *pull.Puller
	pulls    loggedPuller // the puller as the doors see it
	streams  *stream.Manager
	address  string
	unlink   func() // takes the socket's name away, once
}

// New builds the daemon on its root and takes its socket, without serving yet.
// The error names what stands in the way: another daemon on the root, a file
// that can't be read, a driver that the kernel doesn't support. Close or Run
// must follow, unless there is an error.
func New(ctx context.Context, cfg *config.Config, build Build, log *slog.Logger) (_ *Daemon, err error) {
	d := &Daemon{log: log, address: cfg.GRPC.Address}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if err := d.claim(ctx, cfg); err != nil {
		return nil, err
	}
	blobs, err := content.Open(filepath.Join(cfg.Root, dirContent), filepath.Join(cfg.Root, dirTrash), content.Options{})
	if err != nil {
		return nil, err
	}
	d.onClose(blobs.Close)
	drivers, dirs, err := d.openDrivers(cfg)
	if err != nil {
		return nil, err
	}
	d.gc = gc.New(gcOptions(cfg, log))
	db, err := d.openMeta(ctx, cfg, blobs, drivers)
	if err != nil {
		return nil, err
	}
	disks, err := d.openDisks(cfg.Root, dirs)
	if err != nil {
		return nil, err
	}
	client := registry.New(registry.Options{
		Hosts:       hosts.Dirs{Paths: cfg.Registry.Dirs(), Warn: warnHosts(log)}.Lookup,
		Credentials: auth.DockerConfig{},
		UserAgent:   "holdfast/" + build.own(),
	})
	d.onClose(func() error { client.CloseIdle(); return nil })
	traces, err := trace.Open(filepath.Join(cfg.Root, dirTrace), trace.Options{Log: log})
	if err != nil {
		return nil, err
	}
	d.onClose(traces.Close)
	d.puller = pull.New(db, remote(client), disks, pull.Options{
		Downloads: downloads(cfg), Content: filepath.Join(cfg.Root, dirContent), Snapshots: dirs, Log: log,
	})
	d.onClose(d.puller.Close)
	d.pulls = loggedPuller{trace.NewPuller(d.puller, traces), log}
	d.streams = stream.New(stream.Options{})
	d.onClose(d.streams.Close)

	d.server = api.NewServer(serverOptions(cfg.GRPC)...)
	api.Register(d.server, api.Options{
		DB: db, Diff: diff.New(diff.Options{Temp: mount.Temp{Dir: filepath.Join(cfg.Root, dirTempMounts)}}), Pull: d.pulls,
		Traces:      traces,
		Streams:     d.streams,
		Collect:     d.gc.ScheduleAndWait,
		Version:     build.api(),
		Revision:    build.Revision,
		IdentityDir: filepath.Join(cfg.Root, dirIntrospection),
		Plugins:     plugins(cfg, drivers, dirs),
		Tree: func(ctx context.Context, ns string) ([]survey.Node, error) {
			return survey.Tree(ctx, survey.Store{Root: cfg.Root, DB: db, Content: blobs, Drivers: drivers, Dirs: dirs}, ns)
		},
		Check: func(ctx context.Context, deep bool) (fsck.Report, error) {
			return fsck.Check(ctx, fsck.Store{DB: db, Content: blobs, Drivers: drivers}, fsck.Options{Deep: deep, Settle: d.settle})
		},
	})
	d.serveKubelet(cfg, db, drivers, dirs, build)
	if err := d.listen(cfg.GRPC); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *Daemon) onClose(f func() error) { d.closers = append(d.closers, f) }

// claim makes the directories ours, or says whose they are. Nothing in them is
// touched before.
func (d *Daemon) claim(ctx context.Context, cfg *config.Config) error {
	if err := cfg.Refuse(); err != nil {
		return err
	}
	if cfg.OOMScore != 0 {
		if err := os.WriteFile("/proc/self/oom_score_adj", fmt.Append(nil, cfg.OOMScore), 0o644); err != nil {
			d.log.Warn("oom_score is not set: a lower score than the present one needs CAP_SYS_RESOURCE", "oom_score", cfg.OOMScore, "error", err)
		}
	}
	if err := checkAddress(cfg.GRPC.Address); err != nil {
		return err
	}
	for _, dir := range []struct{ what, path, advice string }{
		{"root", cfg.Root, "another --root and --state"},
		{"state directory", cfg.State, "another --state"},
	} {
		unlock, err := lockDirectory(dir.what, dir.path, dir.advice)
		if err != nil {
			return err
		}
		d.onClose(unlock)
	}
	if err := refuseHeldRoot(cfg.Root, filepath.Join(cfg.Root, dirMetadata, "meta.db")); err != nil {
		return err
	}
	if err := makeDirectories(cfg); err != nil {
		return fmt.Errorf("make directories: %w", err)
	}
	if err := (mount.Temp{Dir: filepath.Join(cfg.Root, dirTempMounts)}).Clean(ctx); err != nil {
		d.log.Warn("temporary mounts of an earlier run stay", "error", err)
	}
	return nil
}

func (d *Daemon) openMeta(ctx context.Context, cfg *config.Config, blobs *content.Store, drivers map[string]snapshot.Driver) (*meta.DB, error) {
	path := filepath.Join(cfg.Root, dirMetadata, "meta.db")
	wait := cfg.BoltOpen
	if wait == 0 {
		wait = defaultBoltOpen
	}
	db, err := meta.Open(ctx, path, blobs, drivers, meta.Options{
		Isolated:    cfg.Metadata.ContentSharing == "isolated",
		OpenTimeout: wait,
		Changed:     d.gc.Changed,
		Log:         d.log,
	})
	if err != nil {
		return nil, err
	}
	d.onClose(db.Close)
	d.collect = db.Collect
	for _, line := range db.Recovered() {
		d.log.Warn("recovered: " + line)
	}
	return db, nil
}

// listen takes the socket. Its name goes when the daemon stops, and only
// once: by then it may be another daemon's.
func (d *Daemon) listen(cfg config.GRPC) (err error) {
	if d.listener, err = listen(cfg); err != nil {
		return err
	}
	d.unlink = sync.OnceFunc(func() { os.Remove(d.address) })
	return nil
}

// settle collects, for a check that has found garbage.
func (d *Daemon) settle(ctx context.Context) error {
	_, err := d.gc.ScheduleAndWait(ctx)
	return err
}

// Run serves until ctx ends, and then closes everything in order.
func (d *Daemon) Run(ctx context.Context) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	collecting := make(chan struct{})
	go func() { defer close(collecting); d.gc.Run(background, d.collect) }()
	d.onClose(func() error { stop(); <-collecting; return nil })

	served := make(chan error, 1)
	go func() { served <- d.server.Serve(d.listener) }()
	d.log.Info("serving", "address", d.address)
	d.notify(sdnotify.SdNotifyReady)
	var err error
	select {
	case err = <-served:
	case <-ctx.Done():
		d.log.Info("stopping")
		d.notify(sdnotify.SdNotifyStopping)
		d.drain()
		if err = <-served; errors.Is(err, grpc.ErrServerStopped) {
			err = nil // told to stop before it began
		}
	}
	return errors.Join(err, d.Close())
}

func (d *Daemon) notify(state string) {
	if _, err := sdnotify.SdNotify(false, state); err != nil {
		d.log.Warn("systemd is not told", "state", state, "error", err)
	}
}

// drain lets calls end by themselves for a while.
func (d *Daemon) drain() {
	d.unlink()
	done := make(chan struct{})
	go func() { d.server.GracefulStop(); close(done) }()
	d.puller.Close()
	d.streams.Close()
	select {
	case <-done:
	case <-time.After(shutdownTimeout):
		d.log.Warn("calls under way are cut off", "after", shutdownTimeout)
		d.server.Stop()
		<-done
	}
}

// Close lets go of everything, newest first. Only the first call counts.
func (d *Daemon) Close() error {
	if d.unlink != nil {
		d.unlink()
	}
	if d.server != nil {
		d.server.Stop()
	}
	if d.listener != nil {
		d.listener.Close()
	}
	var errs []error
	for len(d.closers) > 0 {
		last := len(d.closers) - 1
		errs = append(errs, d.closers[last]())
		d.closers = d.closers[:last]
	}
	return errors.Join(errs...)
}
