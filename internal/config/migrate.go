package config

import (
	"maps"
	"slices"
	"strings"
)

// The URIs that a migration or a binding names.
const (
	grpcServer    = "io.containerd.server.v1.grpc"
	grpcTCPServer = "io.containerd.server.v1.grpc-tcp"
	ttrpcServer   = "io.containerd.server.v1.ttrpc"
	debugServer   = "io.containerd.server.v1.debug"
	metricsServer = "io.containerd.server.v1.metrics"
	prometheus    = "io.containerd.metrics.v1.grpc-prometheus"
	criServer     = "io.containerd.grpc.v1.cri"
	criImages     = "io.containerd.cri.v1.images"
	criRuntime    = "io.containerd.cri.v1.runtime"
	shimManager   = "io.containerd.shim.v1.manager"
	taskRuntime   = "io.containerd.runtime.v2.task"
	metaBolt      = "io.containerd.metadata.v1.bolt"
	gcScheduler   = "io.containerd.gc.v1.scheduler"
	overlay       = "io.containerd.snapshotter.v1.overlayfs"
	native        = "io.containerd.snapshotter.v1.native"
	optService    = "io.containerd.internal.v1.opt"
	transfer      = "io.containerd.transfer.v1.local"
)

// migrate turns a document of the given version into version 4, in place.
// Values keep the line and the key they were written with. Where a document
// has a setting under its old and its new name, the new one wins and the old
// one stays where it is, for Check to report.
func migrate(doc *value, version int64) {
	if version <= 1 {
		migrateShortNames(doc)
	}
	if version <= 3 {
		// containerd runs these at each step from 1 to 4; they change nothing the second time.
		migrateRenamedPlugins(doc)
		migrateCRI(doc)
		migrateServers(doc)
	}
}

// shortNames are the plugin ids of version 1 that don't become
// io.containerd.grpc.v1.<id>.
var shortNames = map[string]string{
	"cgroups":      "io.containerd.monitor.v1.cgroups",
	"linux":        "io.containerd.runtime.v1.linux",
	"scheduler":    gcScheduler,
	"bolt":         metaBolt,
	"task":         taskRuntime,
	"opt":          optService,
	"restart":      "io.containerd.internal.v1.restart",
	"tracing":      "io.containerd.internal.v1.tracing",
	"otlp":         "io.containerd.tracing.processor.v1.otlp",
	"aufs":         "io.containerd.snapshotter.v1.aufs",
	"btrfs":        "io.containerd.snapshotter.v1.btrfs",
	"devmapper":    "io.containerd.snapshotter.v1.devmapper",
	"native":       native,
	"overlayfs":    overlay,
	"zfs":          "io.containerd.snapshotter.v1.zfs",
	"windows":      "io.containerd.snapshotter.v1.windows",
	"windows-lcow": "io.containerd.snapshotter.v1.windows-lcow",
}

// fullName is the URI of a plugin that version 1 calls name.
func fullName(name string) string {
	if full, ok := shortNames[name]; ok {
		return full
	}
	switch {
	case strings.Contains(name, "."):
		return name
	case strings.HasSuffix(name, "-service"):
		return "io.containerd.service.v1." + name
	}
	return "io.containerd.grpc.v1." + name
}

func migrateShortNames(doc *value) {
	plugins := doc.lookup("plugins")
	if plugins != nil {
		for _, name := range slices.Collect(maps.Keys(plugins.table)) {
			rename(doc, []string{"plugins", name}, []string{"plugins", fullName(name)})
		}
	}
	for _, key := range []string{"disabled_plugins", "required_plugins"} {
		names := doc.lookup(key)
		if names == nil {
			continue
		}
		list, _ := names.leaf.([]any)
		for i, item := range list {
			if name, ok := item.(string); ok {
				list[i] = fullName(name)
			}
		}
	}
}

// rename moves the value at from to to, unless to is taken.
func rename(doc *value, from, to []string) {
	if doc.isTaken(to...) {
		return
	}
	if v := doc.take(from...); v != nil {
		doc.put(v, to...)
	}
}

func migrateRenamedPlugins(doc *value) {
	for _, r := range [][2]string{
		{"io.containerd.internal.v1.restart", "io.containerd.monitor.container.v1.restart"},
		{"io.containerd.monitor.v1.cgroups", "io.containerd.monitor.task.v1.cgroups"},
	} {
		rename(doc, []string{"plugins", r[0]}, []string{"plugins", r[1]})
	}
	core := doc.lookup("plugins", taskRuntime, "sched_core")
	if core == nil {
		return
	}
	if on, ok := core.leaf.(bool); ok {
		doc.take("plugins", taskRuntime, "sched_core")
		if on && doc.lookup("plugins", shimManager, "env") == nil {
			doc.put(&value{leaf: []any{"SCHED_CORE=1"}, from: core.from}, "plugins", shimManager, "env")
		}
	}
}

// The keys of the one CRI plugin of version 2 that went to the image plugin,
// and those that stayed with the server. All others went to the runtime plugin.
var (
	criImageKeys  = []string{"registry", "image_decryption", "max_concurrent_downloads", "image_pull_progress_timeout", "image_pull_with_sync_fs", "stats_collect_period"}
	criServerKeys = []string{"disable_tcp_service", "stream_server_address", "stream_server_port", "stream_idle_timeout", "enable_tls_streaming", "x509_key_pair_streaming"}
	// criImageContainerdKeys stood in its table `containerd`.
	criImageContainerdKeys = []string{"snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers"}
)

func migrateCRI(doc *value) {
	cri := doc.lookup("plugins", criServer)
	if cri == nil || cri.table == nil {
		return
	}
	rename(doc, []string{"plugins", criServer, "sandbox_image"}, []string{"plugins", criImages, "pinned_images", "sandbox"})
	for _, key := range criImageKeys {
		rename(doc, []string{"plugins", criServer, key}, []string{"plugins", criImages, key})
	}
	for _, key := range criImageContainerdKeys {
		rename(doc, []string{"plugins", criServer, "containerd", key}, []string{"plugins", criImages, key})
	}
	if dir := doc.lookup("plugins", criServer, "cni", "bin_dir"); dir != nil && doc.lookup("plugins", criServer, "cni", "bin_dirs") == nil && !doc.isTaken("plugins", criRuntime, "cni", "bin_dirs") {
		doc.take("plugins", criServer, "cni", "bin_dir")
		doc.put(&value{leaf: []any{dir.leaf}, from: dir.from}, "plugins", criRuntime, "cni", "bin_dirs")
	}
	for _, key := range slices.Sorted(maps.Keys(cri.table)) {
		if !slices.Contains(criServerKeys, key) {
			moveInto(doc, []string{"plugins", criServer, key}, []string{"plugins", criRuntime, key})
		}
	}
	if runtimes := doc.lookup("plugins", criRuntime, "containerd", "runtimes"); runtimes != nil {
		for name := range runtimes.table {
			at := []string{"plugins", criRuntime, "containerd", "runtimes", name}
			rename(doc, append(slices.Clip(at), "sandbox_mode"), append(slices.Clip(at), "sandboxer"))
		}
	}
}

// moveInto moves the value at from to to; where to is a table already, its
// keys win and the others are added.
func moveInto(doc *value, from, to []string) {
	v := doc.lookup(from...)
	if v == nil {
		return
	}
	for _, key := range slices.Collect(maps.Keys(v.table)) {
		moveInto(doc, append(slices.Clip(from), key), append(slices.Clip(to), key))
	}
	if len(v.table) == 0 {
		rename(doc, from, to)
		if v.table != nil {
			doc.take(from...)
		}
	}
}

// migrateServers moves the sections that version 4 made plugins. A section
// moves whole, and only where the document doesn't have the plugin.
func migrateServers(doc *value) {
	grpc := doc.lookup("grpc")
	address := grpc.lookup("address")
	if address.isEmpty() {
		address = nil
	}
	hasTTRPC := doc.lookup("plugins", ttrpcServer) != nil
	if address != nil && !hasTTRPC && doc.lookup("ttrpc", "address").isEmpty() {
		if path, ok := address.leaf.(string); ok {
			doc.put(&value{leaf: path + ".ttrpc", from: address.from}, "plugins", ttrpcServer, "address")
			for _, key := range []string{"uid", "gid"} {
				if id := grpc.lookup(key); id != nil && doc.lookup("ttrpc", key).isEmpty() {
					doc.put(&value{leaf: id.leaf, from: id.from}, "plugins", ttrpcServer, key)
				}
			}
		}
	}
	// The TCP server has the message sizes too.
	if !doc.lookup("grpc", "tcp_address").isEmpty() && doc.lookup("plugins", grpcTCPServer) == nil {
		for _, key := range []string{"max_recv_message_size", "max_send_message_size"} {
			if size := grpc.lookup(key); !size.isEmpty() {
				doc.put(&value{leaf: size.leaf, from: size.from}, "plugins", grpcTCPServer, key)
			}
		}
		for _, key := range []string{"address", "tls_ca", "tls_cert", "tls_key", "tls_common_name"} {
			moveSet(doc, []string{"grpc", "tcp_" + key}, []string{"plugins", grpcTCPServer, key})
		}
	}
	if doc.lookup("plugins", grpcServer) == nil {
		for _, key := range []string{"address", "max_recv_message_size", "max_send_message_size"} {
			moveSet(doc, []string{"grpc", key}, []string{"plugins", grpcServer, key})
		}
		for _, key := range []string{"uid", "gid"} {
			rename(doc, []string{"grpc", key}, []string{"plugins", grpcServer, key})
		}
	}
	if !hasTTRPC {
		for _, key := range []string{"address", "uid", "gid"} {
			moveSet(doc, []string{"ttrpc", key}, []string{"plugins", ttrpcServer, key})
		}
	}
	if !doc.lookup("debug", "address").isEmpty() && doc.lookup("plugins", debugServer) == nil {
		for _, key := range []string{"address", "uid", "gid"} {
			moveSet(doc, []string{"debug", key}, []string{"plugins", debugServer, key})
		}
	}
	rename(doc, []string{"metrics", "grpc_histogram"}, []string{"plugins", prometheus, "grpc_histogram"})
	rename(doc, []string{"metrics", "address"}, []string{"plugins", metricsServer, "address"})
	for _, section := range []string{"grpc", "ttrpc", "metrics", "debug"} {
		if v := doc.lookup(section); v != nil && v.table != nil && len(v.table) == 0 {
			doc.take(section)
		}
	}
}

// isEmpty says whether v is absent or zero: the old sections don't tell the
// two apart.
func (v *value) isEmpty() bool { return v == nil || v.isZero() }

// moveSet moves a value of an old section to its plugin; an empty one said
// nothing, and goes.
func moveSet(doc *value, from, to []string) {
	v := doc.lookup(from...)
	if v.isEmpty() {
		doc.take(from...)
		return
	}
	rename(doc, from, to)
}
