// Package survey joins images, blobs, snapshots, containers, leases and mounts into one picture of who holds what.
//
// Containers and mounts join the picture when the daemon runs containers.
package survey

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Store is what is looked at. Its parts belong to the caller.
type Store struct {
	Root    string // the daemon's root directory
	DB      *meta.DB
	Content *content.Store
	Drivers map[string]snapshot.Driver
}

// Node is one thing of the store.
type Node struct {
	Depth   int    // 0 for the root; the parent is the last node before with a depth smaller by one
	Kind    string // directory, file, blob, ingest, snapshot, image, lease
	Name    string
	Path    string   // where it lies; "" for what is only a record
	Size    int64    // bytes on disk; -1 when not known
	Note    string   // what it is for, in a few words
	Holders []string // what keeps it, nearest first; empty for what nothing keeps
}

// Tree returns the store as it lies on disk, parents before children, with a
// word on each thing. namespace "" means all; else only what that namespace
// names is listed.
func Tree(ctx context.Context, s Store, namespace string) ([]Node, error) {
	dump, err := s.DB.Dump(ctx)
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	t := tree{store: s, ns: namespace, dump: dump, roles: map[string]string{}, holders: map[string][]string{}}
	t.explain(ctx)
	t.add(0, "directory", s.Root, s.Root, -1, "everything that this daemon keeps", nil)
	if err := t.content(ctx); err != nil {
		return nil, err
	}
	t.metadata()
	if err := t.snapshots(ctx); err != nil {
		return nil, err
	}
	return t.nodes, nil
}

// tree is one Tree under construction.
type tree struct {
	store   Store
	ns      string
	dump    meta.Dump
	roles   map[string]string   // digest or chain ID -> what it is in an image
	holders map[string][]string // key(...) -> who refers to it
	nodes   []Node
}

func (t *tree) add(depth int, kind, name, path string, size int64, note string, holders []string) {
	t.nodes = append(t.nodes, Node{depth, kind, name, path, size, note, holders})
}

func (t *tree) shown(ns string) bool { return t.ns == "" || t.ns == ns }

// named shows a record's name, with its namespace where several are shown.
func (t *tree) named(ns, what string) string {
	if t.ns != "" {
		return what
	}
	return what + " in " + ns
}

func key(ns, typ, id string) string { return ns + "|" + typ + "|" + id }

func (t *tree) hold(ns, typ, id, holder string) {
	k := key(ns, typ, id)
	if !slices.Contains(t.holders[k], holder) {
		t.holders[k] = append(t.holders[k], holder)
	}
}

// explain finds out who holds what, and what each blob and chain is for.
func (t *tree) explain(ctx context.Context) {
	for _, l := range t.dump.Leases {
		for _, r := range l.Resources {
			t.hold(l.Namespace, r.Type, r.ID, "lease "+l.ID)
		}
	}
	for _, img := range t.dump.Images {
		t.hold(img.Namespace, "content", img.Target.Digest.String(), "image "+img.Name)
		t.explainImage(ctx, img)
	}
	for _, b := range t.dump.Blobs {
		t.refer(b.Namespace, t.role(b.Digest.String(), "blob ")+short(b.Digest), b.Labels)
	}
	for _, s := range t.dump.Snapshots {
		if s.Parent != "" {
			t.hold(s.Namespace, "snapshots/"+s.Driver, s.Parent, "snapshot "+brief(s.Key))
		}
		t.refer(s.Namespace, "snapshot "+brief(s.Key), s.Labels)
	}
	for _, c := range t.dump.Containers {
		t.hold(c.Namespace, "snapshots/"+c.Driver, c.SnapshotKey, "container "+c.ID)
		t.refer(c.Namespace, "container "+c.ID, c.Labels)
	}
}

func (t *tree) refer(ns, bearer string, labels map[string]string) {
	for _, ref := range meta.References(labels) {
		if ref.Direction == meta.Forward {
			t.hold(ns, ref.Type, ref.ID, bearer)
		}
	}
}

func (t *tree) role(id, fallback string) string {
	if r := t.roles[id]; r != "" {
		return r + " "
	}
	return fallback
}

// explainImage names the parts of one image. A part that can't be read has
// no name then; fsck is there to say so.
func (t *tree) explainImage(ctx context.Context, img meta.DumpImage) {
	sp := t.store.DB.Space(img.Namespace)
	docs := documents{sp}
	found, err := image.Load(ctx, docs, img.Target, oci.Host())
	if err != nil {
		t.roles[img.Target.Digest.String()] = "document"
		return
	}
	for _, d := range found.Path {
		if oci.IsIndex(d.MediaType) {
			t.roles[d.Digest.String()] = "index"
		} else {
			t.roles[d.Digest.String()] = "manifest"
		}
	}
	t.roles[found.Config.Digest.String()] = "config"
	for i, l := range found.Layers {
		name := fmt.Sprintf("layer %d of %d", i+1, len(found.Layers))
		t.roles[l.Desc.Digest.String()], t.roles[l.ChainID.String()] = name, name+", unpacked"
	}
}

type documents struct{ sp meta.Space }

// ReadDocument implements image.Documents.
func (d documents) ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	return d.sp.ReadBlob(ctx, desc, oci.MaxDocument)
}

func (t *tree) content(ctx context.Context) error {
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
			for _, h := range t.holders[key(b.Namespace, "content", dgst.String())] {
				holders = append(holders, t.named(b.Namespace, h))
			}
		}
		path := filepath.Join(dir, "blobs", dgst.Algorithm().String(), dgst.Encoded())
		t.add(3, "blob", dgst.String(), path, blobs[dgst][0].Size, cmp.Or(t.roles[dgst.String()], "blob"), holders)
	}
	t.add(2, "directory", "ingest", filepath.Join(dir, "ingest"), -1, "half-written downloads, kept to be resumed", nil)
	for _, in := range t.dump.Ingests {
		if !t.shown(in.Namespace) {
			continue
		}
		size := int64(-1)
		if st, err := t.store.DB.Space(in.Namespace).Ingest(ctx, in.Ref); err == nil {
			size = st.Offset
		}
		path := filepath.Join(dir, "ingest", digest.FromString(in.Backend).Encoded())
		t.add(3, "ingest", in.Ref, path, size, "on its way", t.holders[key(in.Namespace, "ingests", in.Ref)])
	}
	return nil
}

func (t *tree) metadata() {
	path := filepath.Join(t.store.Root, "io.containerd.metadata.v1.bolt", "meta.db")
	t.add(1, "file", "io.containerd.metadata.v1.bolt/meta.db", path, fileSize(path), "the names: images, and what they need", nil)
	for _, img := range t.dump.Images {
		if t.shown(img.Namespace) {
			t.add(2, "image", t.named(img.Namespace, img.Name), "", -1, "stands for "+img.Target.Digest.String(), nil)
		}
	}
	for _, l := range t.dump.Leases {
		if t.shown(l.Namespace) {
			t.add(2, "lease", t.named(l.Namespace, l.ID), "", -1, leaseNote(l), nil)
		}
	}
}

func leaseNote(l meta.DumpLease) string {
	until := l.Labels["containerd.io/gc.expire"]
	if until == "" {
		return fmt.Sprintf("holds %d things until it is deleted", len(l.Resources))
	}
	return fmt.Sprintf("holds %d things until %s", len(l.Resources), until)
}

func (t *tree) snapshots(ctx context.Context) error {
	byDriver := make(map[string][]meta.DumpSnapshot)
	for _, s := range t.dump.Snapshots {
		if t.shown(s.Namespace) {
			byDriver[s.Driver] = append(byDriver[s.Driver], s)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.store.Drivers)) {
		d := t.store.Drivers[name]
		dir := "io.containerd.snapshotter.v1." + name
		t.add(1, "directory", dir, filepath.Join(t.store.Root, dir), -1, fmt.Sprintf("unpacked layers and what is written above them: %d", len(byDriver[name])), nil)
		for _, s := range byDriver[name] {
			if err := t.snapshot(ctx, d, s); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *tree) snapshot(ctx context.Context, d snapshot.Driver, s meta.DumpSnapshot) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	note, size := "gone from the driver: run `holdfast store check`", int64(-1)
	if info, err := d.Stat(ctx, s.Backend); err == nil {
		note = cmp.Or(t.roles[s.Key], "layer")
		switch info.Kind {
		case snapshot.KindActive:
			note = "being written"
		case snapshot.KindView:
			note = "a read-only view"
		}
		if info.Kind == snapshot.KindCommitted {
			if u, err := d.Usage(ctx, s.Backend); err == nil {
				size = u.Size
			}
		}
	}
	path, err := d.Dir(ctx, s.Backend)
	if err != nil {
		path = ""
	}
	t.add(2, "snapshot", s.Key, path, size, note, t.holders[key(s.Namespace, "snapshots/"+s.Driver, s.Key)])
	return nil
}

func short(d digest.Digest) string {
	if e := d.Encoded(); len(e) > 12 {
		return e[:12]
	}
	return d.Encoded()
}

func brief(k string) string {
	if d, err := digest.Parse(k); err == nil {
		return short(d)
	}
	return k
}
