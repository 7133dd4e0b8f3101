package api

import (
	"maps"
	"slices"

	"github.com/containerd/platforms"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// The types of containerd's plugins that have a counterpart here. Clients ask
// for them by name, which makes the names part of the API.
const (
	TypeContent     = "io.containerd.content.v1"
	TypeSnapshotter = "io.containerd.snapshotter.v1"
	TypeMetadata    = "io.containerd.metadata.v1"
	TypeGC          = "io.containerd.gc.v1"
	TypeLease       = "io.containerd.lease.v1"
	TypeDiffer      = "io.containerd.differ.v1"
	TypeTransfer    = "io.containerd.transfer.v1"
	TypeStreaming   = "io.containerd.streaming.v1"
	TypeGRPC        = "io.containerd.grpc.v1"
)

// Plugin is one part of the daemon as Introspection shows it: under the type
// and id of the plugin that does the same in containerd. Only parts that are
// really there are listed.
type Plugin struct {
	Type, ID     string
	Requires     []string // types
	Platforms    []oci.Platform
	Exports      map[string]string
	Capabilities []string
	Err          error // why it can't be used; nil when it can
}

// Stores says where the daemon keeps its data, for StorePlugins.
type Stores struct {
	ContentDir   string // .../io.containerd.content.v1.content
	MetaFile     string // .../io.containerd.metadata.v1.bolt/meta.db
	Isolated     bool   // blobs are not shared between namespaces
	Snapshotters map[string]Snapshotter
}

// Snapshotter is one snapshot driver, for StorePlugins.
type Snapshotter struct {
	Dir    string // its root directory
	Traits snapshot.Traits
	Err    error // why it could not be opened; Traits then say nothing
}

// StorePlugins describes the stores and what stands on them in the words of
// containerd's plugins: the exports and capabilities that its clients read.
func StorePlugins(s Stores) []Plugin {
	host := []oci.Platform{platforms.DefaultSpec()}
	list := []Plugin{{Type: TypeContent, ID: "content", Exports: map[string]string{"root": s.ContentDir}}}
	for _, name := range slices.Sorted(maps.Keys(s.Snapshotters)) {
		sn := s.Snapshotters[name]
		list = append(list, Plugin{
			Type: TypeSnapshotter, ID: name, Platforms: host,
			Exports:      map[string]string{"root": sn.Dir},
			Capabilities: capabilities(sn.Traits),
			Err:          sn.Err,
		})
	}
	policy := "shared"
	if s.Isolated {
		policy = "isolated"
	}
	return append(list,
		Plugin{Type: TypeMetadata, ID: "bolt", Requires: []string{TypeContent, TypeSnapshotter},
			Exports: map[string]string{"policy": policy, "path": s.MetaFile}},
		Plugin{Type: TypeGC, ID: "scheduler", Requires: []string{TypeMetadata}},
		Plugin{Type: TypeLease, ID: "manager", Requires: []string{TypeMetadata, TypeGC}},
		Plugin{Type: TypeDiffer, ID: "walking", Requires: []string{TypeMetadata}, Platforms: host},
		Plugin{Type: TypeStreaming, ID: "manager", Requires: []string{TypeMetadata}},
		Plugin{Type: TypeTransfer, ID: "local", Requires: []string{TypeLease, TypeMetadata, TypeDiffer, TypeSnapshotter}},
	)
}

// capabilities are a driver's traits in containerd's words.
//
// `rebase` is not among them, though drivers have the trait. A client that
// finds it prepares the layers of an image side by side, without parents, and
// so gives directories that a layer implies other attributes than they have
// below. Clients that don't find it unpack one layer after the other, into the
// right root file system; our own pull does both, side by side and right.
func capabilities(t snapshot.Traits) []string {
	var caps []string
	if t.RemapIDs {
		caps = append(caps, "remap-ids")
	}
	if t.OnlyRemapIDs {
		caps = append(caps, "only-remap-ids")
	}
	return caps
}

// servicePlugins are the containerd services that Register registers.
func servicePlugins() []Plugin {
	return []Plugin{
		{Type: TypeGRPC, ID: "content", Requires: []string{TypeMetadata}},
		{Type: TypeGRPC, ID: "diff", Requires: []string{TypeDiffer}},
		{Type: TypeGRPC, ID: "healthcheck"},
		{Type: TypeGRPC, ID: "images", Requires: []string{TypeMetadata, TypeGC}},
		{Type: TypeGRPC, ID: "introspection"},
		{Type: TypeGRPC, ID: "leases", Requires: []string{TypeLease}},
		{Type: TypeGRPC, ID: "namespaces", Requires: []string{TypeMetadata}},
		{Type: TypeGRPC, ID: "snapshots", Requires: []string{TypeMetadata}},
		{Type: TypeGRPC, ID: "streaming", Requires: []string{TypeStreaming}},
		{Type: TypeGRPC, ID: "transfer", Requires: []string{TypeTransfer, TypeStreaming}},
		{Type: TypeGRPC, ID: "version"},
	}
}
