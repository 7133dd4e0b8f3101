package daemon

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"google.golang.org/grpc"

	"github.com/holdfast-dev/holdfast/internal/api"
	"github.com/holdfast-dev/holdfast/internal/config"
	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/gc"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/native"
	"github.com/holdfast-dev/holdfast/internal/snapshot/overlay"
)

// openDrivers opens the snapshot drivers that the config offers, and returns
// them and their directories by name. One that can't work on this file system
// is left out, with a warning: the others may do.
func (d *Daemon) openDrivers(cfg *config.Config) (map[string]snapshot.Driver, map[string]string, error) {
	open := map[string]func(dir string) (snapshot.Driver, error){
		"overlayfs": func(dir string) (snapshot.Driver, error) {
			return overlay.Open(dir, overlay.Options{
				MountOptions:  cfg.Overlay.MountOptions,
				UpperdirLabel: cfg.Overlay.UpperdirLabel,
				SlowChown:     cfg.Overlay.SlowChown,
			})
		},
		"native": func(dir string) (snapshot.Driver, error) { return native.Open(dir, native.Options{}) },
	}
	dirs := map[string]string{"overlayfs": cfg.Overlay.RootPath, "native": cfg.Native.RootPath}
	drivers := make(map[string]snapshot.Driver)
	for _, name := range slices.Sorted(maps.Keys(open)) {
		if !cfg.Offers(dirSnapshotter + name) {
			delete(dirs, name)
			continue
		}
		if dirs[name] == "" {
			dirs[name] = filepath.Join(cfg.Root, dirSnapshotter+name)
		}
		drv, err := open[name](dirs[name])
		if err != nil {
			d.log.Warn("snapshotter is not offered", "snapshotter", name, "error", err)
			delete(dirs, name)
			continue
		}
		drivers[name] = drv
		d.onClose(drv.Close)
	}
	if len(drivers) == 0 {
		return nil, nil, fmt.Errorf("no snapshotter can be used in %s: the warnings above say why", cfg.Root)
	}
	return drivers, dirs, nil
}

// gcOptions says in gc's words what the config says in containerd's: a zero
// there is no default but "never" or "no share".
func gcOptions(cfg *config.Config, log *slog.Logger) gc.Options {
	return gc.Options{
		PauseThreshold:    cmp.Or(cfg.GC.PauseThreshold, -1),
		DeletionThreshold: cfg.GC.DeletionThreshold,
		MutationThreshold: cmp.Or(cfg.GC.MutationThreshold, 1),
		ScheduleDelay:     cfg.GC.ScheduleDelay,
		StartupDelay:      cmp.Or(cfg.GC.StartupDelay, -1),
		Collected:         logCollected(log),
		Log:               log,
	}
}

// serverOptions are the limits that the config sets. A server that is stopped
// waits for its calls: they use what is closed next.
func serverOptions(cfg config.GRPC) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(cfg.MaxRecvMessage),
		grpc.MaxSendMsgSize(cfg.MaxSendMessage),
		grpc.WaitForHandlers(true),
	}
}

// maxDownloads is what a config without a bound gets all the same.
const maxDownloads = 64

// downloads is how many layers a pull fetches at once; 0 is no bound.
func downloads(cfg *config.Config) int { return boundDownloads(cfg.Pull.MaxConcurrentDownloads) }

// disk is a durable.FS as a pull sees it.
type disk struct{ fs *durable.FS }

// Begin implements pull.Disk.
func (d disk) Begin() func(context.Context) error {
	mark := d.fs.Mark()
	return func(ctx context.Context) error { return d.fs.SyncSince(ctx, mark) }
}

// openDisks opens each file system that the store lies on once.
func (d *Daemon) openDisks(root string, drivers map[string]string) ([]pull.Disk, error) {
	var disks []pull.Disk
	seen := make(map[uint64]bool)
	for _, dir := range append([]string{root}, slices.Sorted(maps.Values(drivers))...) {
		info, err := os.Stat(dir)
		if err != nil {
			return nil, err
		}
		dev := uint64(info.Sys().(*syscall.Stat_t).Dev)
		if seen[dev] {
			continue
		}
		seen[dev] = true
		fs, err := durable.OpenFS(dir)
		if err != nil {
			return nil, err
		}
		d.onClose(fs.Close)
		disks = append(disks, disk{fs})
	}
	return disks, nil
}

// remote opens the repositories that references name.
func remote(client *registry.Client) pull.Remote {
	return func(reference string, s registry.Session) (*registry.Repository, string, string, error) {
		r, err := ref.Parse(reference)
		if err != nil {
			return nil, "", "", err
		}
		repo, err := client.Repository(r, s)
		return repo, r.Host, r.Path, err
	}
}

func warnHosts(log *slog.Logger) func(file string, err error) {
	return func(file string, err error) {
		log.Warn("hosts.toml can't be used and counts as absent", "file", file, "error", err)
	}
}

func plugins(cfg *config.Config, drivers map[string]snapshot.Driver, dirs map[string]string) []api.Plugin {
	stores := api.Stores{
		ContentDir:   filepath.Join(cfg.Root, dirContent),
		MetaFile:     filepath.Join(cfg.Root, dirMetadata, "meta.db"),
		Isolated:     cfg.Metadata.ContentSharing == "isolated",
		Snapshotters: map[string]api.Snapshotter{},
	}
	for name, drv := range drivers {
		stores.Snapshotters[name] = api.Snapshotter{Dir: dirs[name], Traits: drv.Traits()}
	}
	return append(api.StorePlugins(stores), kubeletPlugins(cfg)...)
}
