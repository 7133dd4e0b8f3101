package daemon

import (
	"cmp"
	"maps"
	"path/filepath"
	"slices"

	"github.com/holdfast-dev/holdfast/internal/api"
	"github.com/holdfast-dev/holdfast/internal/config"
	"github.com/holdfast-dev/holdfast/internal/cri"
	"github.com/holdfast-dev/holdfast/internal/cri/image"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// What the kubelet is served is a plugin of containerd's, or two, and can be
// left out.
const (
	partCRI       = "io.containerd.grpc.v1.cri"
	partCRIImages = "io.containerd.cri.v1.images"
)

func offersKubelet(cfg *config.Config) bool { return cfg.Offers(partCRI) && cfg.Offers(partCRIImages) }

// serveKubelet adds the kubelet's services to the same socket.
func (d *Daemon) serveKubelet(cfg *config.Config, db *meta.DB, drivers map[string]snapshot.Driver, dirs map[string]string, build Build) {
	if !offersKubelet(cfg) {
		return
	}
	disks := image.Disks{ContentDir: filepath.Join(cfg.Root, dirContent), Snapshotters: map[string]image.Snapshotter{}}
	for name, drv := range drivers {
		disks.Snapshotters[name] = image.Snapshotter{Dir: dirs[name], Driver: drv}
	}
	if drivers[cfg.CRI.Snapshotter] == nil {
		d.log.Warn("the kubelet can't pull: its snapshotter is not offered", "snapshotter", cfg.CRI.Snapshotter,
			"set", cfg.Origin("plugins", partCRIImages, "snapshotter"))
	}
	cri.Register(d.server, cri.Options{
		Version: build.api(),
		Images: image.New(db, d.pulls, image.Options{
			Snapshotter:     cfg.CRI.Snapshotter,
			Handlers:        cfg.CRI.Snapshotters,
			Pinned:          slices.Collect(maps.Values(cfg.CRI.PinnedImages)),
			Downloads:       boundDownloads(cfg.CRIDownloads()),
			ProgressTimeout: cfg.CRI.PullProgressTimeout,
			Collect:         d.gc.ScheduleAndWait,
			Disks:           disks,
			Log:             d.log,
		}),
	})
}

// boundDownloads is the number of layers that a setting allows, 0 being no
// bound.
func boundDownloads(n int) int { return min(cmp.Or(n, maxDownloads), maxDownloads) }

// kubeletPlugins are the two as Introspection lists them.
func kubeletPlugins(cfg *config.Config) []api.Plugin {
	if !offersKubelet(cfg) {
		return nil
	}
	return []api.Plugin{
		{Type: "io.containerd.cri.v1", ID: "images", Requires: []string{api.TypeLease, api.TypeMetadata, api.TypeSnapshotter}},
		{Type: api.TypeGRPC, ID: "cri", Requires: []string{"io.containerd.cri.v1", api.TypeLease}},
	}
}
