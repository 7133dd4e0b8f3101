package survey

import (
	"slices"
	"strings"
	"time"

	"github.com/holdfast-dev/holdfast/internal/meta"
)

// holders says what keeps each record, by namespace, type and id.
type holders map[resource][]string

type resource struct{ ns, typ, id string }

func (h holders) of(ns, typ, id string) []string { return h[resource{ns, typ, id}] }

func (h holders) hold(ns, typ, id, holder string) {
	r := resource{ns, typ, id}
	if !slices.Contains(h[r], holder) {
		h[r] = append(h[r], holder)
	}
}

// read finds out who holds what: by the records' own fields, by the labels
// that refer to others, and by labels that make a record a root.
func (h holders) read(d meta.Dump, named roles) {
	for _, img := range d.Images {
		h.hold(img.Namespace, "content", img.Target.Digest.String(), "image "+img.Name)
		h.refer(img.Namespace, "images", img.Name, "image "+img.Name, img.Labels)
	}
	for _, b := range d.Blobs {
		dgst := b.Digest.String()
		h.refer(b.Namespace, "content", dgst, named.role(blob(dgst), "blob")+" "+brief(dgst), b.Labels)
	}
	for _, s := range d.Snapshots {
		typ := "snapshots/" + s.Driver
		if s.Parent != "" {
			h.hold(s.Namespace, typ, s.Parent, "snapshot "+brief(s.Key))
		}
		h.refer(s.Namespace, typ, s.Key, "snapshot "+brief(s.Key), s.Labels)
	}
	for _, c := range d.Containers {
		h.hold(c.Namespace, "snapshots/"+c.Driver, c.SnapshotKey, "container "+c.ID)
		h.refer(c.Namespace, "containers", c.ID, "container "+c.ID, c.Labels)
	}
	for _, s := range d.Sandboxes {
		h.refer(s.Namespace, "sandboxes", s.ID, "sandbox "+s.ID, s.Labels)
	}
	for _, in := range d.Ingests {
		if !in.ExpireAt.IsZero() {
			h.hold(in.Namespace, "ingests", in.Ref, "its age, until "+in.ExpireAt.UTC().Format(time.RFC3339))
		}
	}
	for _, l := range d.Leases {
		for _, r := range l.Resources {
			h.hold(l.Namespace, r.Type, r.ID, "lease "+l.ID)
		}
		h.refer(l.Namespace, "leases", l.ID, "lease "+l.ID, l.Labels)
	}
}

// refer reads the labels of the record of a type and id, which name is short for.
func (h holders) refer(ns, typ, id, name string, labels map[string]string) {
	for _, ref := range meta.References(labels) {
		switch ref.Direction {
		case meta.Back:
			kind := strings.TrimSuffix(strings.Split(ref.Type, "/")[0], "s")
			h.hold(ns, typ, id, kind+" "+brief(ref.ID))
		case meta.Conditional:
			h.hold(ns, ref.Type, ref.ID, name+" while it is used")
		default:
			h.hold(ns, ref.Type, ref.ID, name)
		}
	}
	for label := range labels {
		if strings.HasPrefix(label, "containerd.io/gc.root") {
			h.hold(ns, typ, id, "its label "+label)
		}
	}
}
