// Package snapshot defines a snapshot driver: prepare, mount, commit, remove.
package snapshot

import (
	"context"
	"iter"
	"time"

	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
)

// Kind says what may be done with a snapshot. The values are those that
// containerd writes in metadata.db.
type Kind uint8

// The kinds of snapshot.
const (
	KindView      Kind = 1 // read-only, can't be committed
	KindActive    Kind = 2 // writable, can be committed
	KindCommitted Kind = 3 // never changes, can be a parent
)

// String names the kind as containerd's API does.
func (k Kind) String() string {
	switch k {
	case KindView:
		return "View"
	case KindActive:
		return "Active"
	case KindCommitted:
		return "Committed"
	}
	return "Unknown"
}

// Labels that say how the user and group ids of a snapshot's files are mapped
// when it is mounted: `container:host:size[,...]`.
const (
	LabelUIDMapping = "containerd.io/snapshot/uidmapping"
	LabelGIDMapping = "containerd.io/snapshot/gidmapping"
)

// Info describes one snapshot.
type Info struct {
	Key     string // the name, once committed
	Parent  string
	Kind    Kind
	Labels  map[string]string // nil if there are none
	Created time.Time         // UTC
	Updated time.Time         // UTC
}

// Usage is what a snapshot holds of its own: inodes, and bytes on disk.
type Usage = layer.Usage

// Form is how a layer's deletions lie in the directory of an active snapshot.
type Form uint8

// The forms.
const (
	// FormPlain: the directory is the whole tree; a deletion just happens in it.
	FormPlain Form = iota
	// FormOverlay: the directory is an overlay upper; a deletion is a 0/0
	// character device, an opaque directory an xattr.
	FormOverlay
)

// Traits describe what a driver can do.
type Traits struct {
	Rebase       bool // an active snapshot without parent may get one at commit
	RemapIDs     bool // mounts may be id-mapped by the kernel
	OnlyRemapIDs bool // owners are never changed by copying instead
	Form         Form
}

// New describes a snapshot to create.
type New struct {
	Key    string
	Parent string // the name of a committed snapshot, or ""
	Kind   Kind   // KindActive or KindView
	Labels map[string]string
}

// Commit describes one step of CommitChain: the active Key becomes Name.
type Commit struct {
	Key    string
	Name   string
	Parent string            // for drivers that rebase: the parent that Key gets now; may be the Name of an earlier step
	Labels map[string]string // replace those of Key

	// Usage, if not nil, was counted while the layer was written into the
	// active snapshot, which was empty; else the driver walks the directory.
	Usage *Usage
	// Implied names directories (slash-separated, relative) that a layer
	// wrote into without describing them. The driver gives them the
	// attributes that they have in the parent. FormOverlay only.
	Implied []string
	// Links names files that a layer hard-linked to files of a lower layer,
	// which was not there yet: name -> target, both relative. The driver
	// copies the target up and links it. FormOverlay only.
	Links []layer.Link
}

// Driver keeps snapshots. All names are backend keys; a driver knows no
// namespaces. Errors are errdefs kinds: ErrNotFound, ErrAlreadyExists,
// ErrFailedPrecondition (a snapshot with children can't be removed),
// ErrInvalidArgument. Its methods may be called at once from several goroutines.
//
// What survives a power cut. When Create returns, the snapshots and their
// empty directories do; a copy of a parent's files does not yet. When
// CommitChain returns, the commit does, and all that the driver has itself
// done to the directories; *contents are the caller's*: whoever wrote into an
// active snapshot, or had it copied from a parent, syncs its file system
// before CommitChain (inv 1). Once committed, a directory never changes (inv 4).
//
// What a crash leaves: directories that no key names, never a key without
// its directory. Cleanup removes them; it must run once after Open before
// anything else does, and may run again at any time. If a directory is
// missing all the same (somebody deleted it), Stat, Mounts, Usage and Dir say
// ErrNotFound, Walk still lists the key, and Remove removes it.
type Driver interface {
	// Traits says what the driver can do.
	Traits() Traits
	// Stat describes a snapshot.
	Stat(ctx context.Context, key string) (Info, error)
	// Update replaces the labels that fields name (`labels.<key>`), or all
	// labels when there are no fields or `labels` is one. A label set to ""
	// is removed. Other fields are ErrInvalidArgument.
	Update(ctx context.Context, key string, labels map[string]string, fields ...string) (Info, error)
	// Usage counts what a snapshot holds of its own: for a committed one it
	// is known, an active one is walked, and a view holds nothing.
	Usage(ctx context.Context, key string) (Usage, error)
	// Mounts says how to mount an active snapshot or a view; a committed one
	// is ErrFailedPrecondition.
	Mounts(ctx context.Context, key string) ([]mount.Mount, error)
	// Create makes snapshots, all or none, in one transaction of the driver's
	// index. A parent must be committed.
	Create(ctx context.Context, news ...New) error
	// Dir is the directory that a layer is unpacked into: the tree of an
	// active snapshot itself, in Traits().Form. For a committed snapshot it
	// is to be read only; a view is ErrFailedPrecondition.
	Dir(ctx context.Context, key string) (string, error)
	// Parents lists the directories below a snapshot's own, nearest first.
	// Empty for drivers of FormPlain.
	Parents(ctx context.Context, key string) ([]string, error)
	// CommitChain commits active snapshots, bottom first, all or none, in one
	// transaction of the driver's index. A step's Parent may differ from the
	// parent that Key was created with only if that was "" and
	// Traits().Rebase, else it is ErrInvalidArgument.
	CommitChain(ctx context.Context, steps ...Commit) error
	// Remove forgets a snapshot, then removes its directory. When the
	// directory can't be removed now, it is left for Cleanup and Remove
	// succeeds: the snapshot is gone.
	Remove(ctx context.Context, key string) error
	// Walk yields every snapshot, in the order of keys. It holds no
	// transaction while it yields, so what changes meanwhile may show.
	Walk(ctx context.Context) iter.Seq2[Info, error]
	// Cleanup removes directories that no snapshot names: what Remove left
	// and what a crash left. It goes on after an error and joins them.
	Cleanup(ctx context.Context) error
	// Close waits for transactions under way and releases the index. A second
	// call does nothing.
	Close() error
}
