// Package survey joins images, blobs, snapshots, containers, leases and mounts into one picture of who holds what.
//
// Of containers there are the records only, which containerd may have left;
// mounts join the picture when the daemon runs containers.
package survey

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Store is what is looked at. Its parts belong to the caller.
type Store struct {
	Root    string // the daemon's root directory
	DB      *meta.DB
	Content *content.Store
	Drivers map[string]snapshot.Driver
	Dirs    map[string]string // of the drivers, by name; default: their places in Root
}

// Node is one thing of the store.
type Node struct {
	Depth   int    // 0 for the root; the parent is the last node before with a depth smaller by one
	Kind    string // directory, file, blob, ingest, snapshot, image, lease, container
	Name    string
	Path    string   // where it lies; "" for what is only a record, and for a view
	Size    int64    // bytes on disk; -1 when not known
	Note    string   // what it is for, in a few words; never ""
	Holders []string // what keeps it, nearest first; empty for what nothing keeps, and for what keeps itself
}

// Tree returns the store as it lies on disk, parents before children, with a
// word on each thing. namespace "" means all, and then the notes name the
// namespaces; else only what that namespace names is listed.
func Tree(ctx context.Context, s Store, namespace string) ([]Node, error) {
	dump, err := s.DB.Dump(ctx)
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	t := tree{store: s, ns: namespace, dump: dump}
	if err := t.explain(ctx); err != nil {
		return nil, err
	}
	t.add(0, "directory", s.Root, s.Root, -1, "everything that this daemon keeps", nil)
	t.content(ctx)
	t.records()
	if err := t.snapshots(ctx); err != nil {
		return nil, err
	}
	return t.nodes, nil
}

// tree is one Tree under construction.
type tree struct {
	store Store
	ns    string
	dump  meta.Dump
	roles
	holders
	nodes []Node
}

func (t *tree) add(depth int, kind, name, path string, size int64, note string, holders []string) {
	t.nodes = append(t.nodes, Node{depth, kind, name, path, size, note, holders})
}

func (t *tree) shown(ns string) bool { return t.ns == "" || t.ns == ns }

// in says in which namespace something is, where several are shown.
func (t *tree) in(ns, what string) string {
	if t.ns != "" {
		return what
	}
	return what + ", in " + ns
}

func (t *tree) content(ctx context.Context) {
	dir := filepath.Join(t.store.Root, "io.containerd.content.v1.content")
	t.add(1, "directory", filepath.Base(dir), dir, -1, "documents and packed layers, as they came from registries", nil)
	blobs := make(map[digest.Digest][]meta.DumpBlob)
	for _, b := range t.dump.Blobs {
		if t.shown(b.Namespace) {
			blobs[b.Digest] = append(blobs[b.Digest], b)
		}
	}
	t.add(2, "directory", "blobs", filepath.Join(dir, "blobs"), -1, fmt.Sprintf("whole and verified: %d", len(blobs)), nil)
	for _, dgst := range slices.Sorted(maps.Keys(blobs)) {
		var holders []string
		for _, b := range blobs[dgst] {
			for _, h := range t.of(b.Namespace, "content", dgst.String()) {
				if t.ns == "" {
					h += " in " + b.Namespace
				}
				holders = append(holders, h)
			}
		}
		path := filepath.Join(dir, "blobs", dgst.Algorithm().String(), dgst.Encoded())
		note := t.role(blob(dgst.String()), "part of no image that is here")
		size := fileSize(path)
		if size < 0 {
			note += "; its file is gone: run `holdfast store check`"
		}
		t.add(3, "blob", dgst.String(), path, size, note, holders)
	}
	t.ingests(ctx, dir)
}

func (t *tree) ingests(ctx context.Context, dir string) {
	t.add(2, "directory", "ingest", filepath.Join(dir, "ingest"), -1, "half-written downloads, kept to be resumed", nil)
	for _, in := range t.dump.Ingests {
		if !t.shown(in.Namespace) {
			continue
		}
		path := filepath.Join(dir, "ingest", digest.FromString(in.Backend).Encoded())
		note, size := "not begun", int64(-1)
		if in.Expected != "" {
			note, path = "another namespace has all of it", ""
		} else if st, err := t.store.Content.Status(in.Backend); err == nil {
			note, size = "begun", st.Offset
			if st.Total > 0 {
				note = fmt.Sprintf("%d of %d bytes are here", st.Offset, st.Total)
			}
		}
		t.add(3, "ingest", in.Ref, path, size, t.in(in.Namespace, note), t.of(in.Namespace, "ingests", in.Ref))
	}
}

// records lists what is only a name.
func (t *tree) records() {
	path := filepath.Join(t.store.Root, "io.containerd.metadata.v1.bolt", "meta.db")
	t.add(1, "file", "io.containerd.metadata.v1.bolt/meta.db", path, fileSize(path), "the names: images, and what they need", nil)
	for _, img := range t.dump.Images {
		if t.shown(img.Namespace) {
			note := t.in(img.Namespace, "stands for "+img.Target.Digest.String())
			t.add(2, "image", img.Name, "", -1, note, t.of(img.Namespace, "images", img.Name))
		}
	}
	for _, c := range t.dump.Containers {
		if t.shown(c.Namespace) {
			t.add(2, "container", c.ID, "", -1, t.in(c.Namespace, "made from "+cmp.Or(c.Image, "no image")), t.of(c.Namespace, "containers", c.ID))
		}
	}
	for _, l := range t.dump.Leases {
		if t.shown(l.Namespace) {
			t.add(2, "lease", l.ID, "", -1, t.in(l.Namespace, leaseNote(l)), nil)
		}
	}
}

func leaseNote(l meta.DumpLease) string {
	note := fmt.Sprintf("holds %d things", len(l.Resources))
	if len(l.Resources) == 1 {
		note = "holds 1 thing"
	}
	if ref := l.Labels["io.holdfast/pull.ref"]; ref != "" {
		note += " of a pull of " + ref
	}
	if until := l.Labels["containerd.io/gc.expire"]; until != "" {
		return note + " until " + until
	}
	return note + " until it is deleted"
}

func (t *tree) snapshots(ctx context.Context) error {
	byDriver := make(map[string][]meta.DumpSnapshot)
	for _, s := range t.dump.Snapshots {
		if t.shown(s.Namespace) {
			byDriver[s.Driver] = append(byDriver[s.Driver], s)
		}
	}
	names := slices.Collect(maps.Keys(t.store.Drivers))
	for name := range byDriver {
		if t.store.Drivers[name] == nil {
			names = append(names, name) // of containerd's, not configured here
		}
	}
	slices.Sort(names)
	for _, name := range names {
		id := "io.containerd.snapshotter.v1." + name
		dir := cmp.Or(t.store.Dirs[name], filepath.Join(t.store.Root, id))
		t.add(1, "directory", id, dir, -1, fmt.Sprintf("unpacked layers and what is written above them: %d", len(byDriver[name])), nil)
		var nodes []Node
		for _, s := range byDriver[name] {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			nodes = append(nodes, t.snapshot(ctx, t.store.Drivers[name], s))
		}
		slices.SortStableFunc(nodes, byAge)
		t.nodes = append(t.nodes, nodes...)
	}
	return nil
}

// byAge puts snapshots in the order in which their directories came, so that
// parents stand above children; those without one come last.
func byAge(a, b Node) int {
	if (a.Path == "") != (b.Path == "") {
		return cmp.Compare(len(b.Path), len(a.Path))
	}
	return cmp.Or(cmp.Compare(len(a.Path), len(b.Path)), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Name, b.Name))
}

func (t *tree) snapshot(ctx context.Context, d snapshot.Driver, s meta.DumpSnapshot) Node {
	n := Node{Depth: 2, Kind: "snapshot", Name: s.Key, Size: -1, Holders: t.of(s.Namespace, "snapshots/"+s.Driver, s.Key)}
	if d == nil {
		n.Note = t.in(s.Namespace, "of a snapshotter that this daemon doesn't offer")
		return n
	}
	info, err := d.Stat(ctx, s.Backend)
	switch {
	case errdefs.IsNotFound(err):
		n.Note = "gone from the snapshotter: run `holdfast store check`"
	case err != nil:
		n.Note = "the snapshotter can't tell: " + err.Error()
	case info.Kind == snapshot.KindActive:
		n.Note = "being written"
	case info.Kind == snapshot.KindView:
		n.Note = "a read-only view"
	default:
		n.Note = t.role(unpacked(s.Key), "part of no image that is here")
		if u, err := d.Usage(ctx, s.Backend); err == nil {
			n.Size = u.Size // counted when it was committed
		}
	}
	if s.Parent != "" && err == nil && info.Kind != snapshot.KindCommitted {
		n.Note += " above " + brief(s.Parent)
	}
	n.Note = t.in(s.Namespace, n.Note)
	if dir, err := d.Dir(ctx, s.Backend); err == nil {
		n.Path = dir
	}
	return n
}

// fileSize is a file's length in bytes, -1 if it can't be asked.
func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return info.Size()
}

// brief is enough of a digest to know it by; other names stay whole.
func brief(name string) string {
	d, err := digest.Parse(name)
	if err != nil || len(d.Encoded()) <= 12 {
		return name
	}
	return strings.TrimSuffix(d.String(), d.Encoded()[12:])
}
