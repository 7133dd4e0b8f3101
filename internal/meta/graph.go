package meta

import (
	"strings"
	"time"
)

// kind is a type of record in the graph of who needs whom.
type kind uint8

const (
	kindBlob kind = iota
	kindSnapshot
	kindImage
	kindContainer
	kindLease
	kindIngest
)

// node is a record, or the name of one that doesn't exist (yet). The id of a
// snapshot is <driver>/<key>.
type node struct {
	kind kind
	flat bool // reached from a flat lease: it keeps itself, but not what its labels refer to
	ns   string
	id   string
}

// graph finds what is needed. It reads one transaction.
type graph struct {
	v1  bucket
	now time.Time

	roots []node
	back  map[node][]node // what lives as long as the key does, by labels of the values
	live  map[node]struct{}
}

// condition is a Conditional reference that waits for its target's time.
type condition struct {
	bearer, target node
	ref            Reference
}

// mark returns the set of nodes that are needed, without their flat bits. It
// holds names of records that don't exist too.
func mark(v1 bucket, now time.Time) map[node]struct{} {
	g := &graph{v1: v1, now: now, back: make(map[node][]node), live: make(map[node]struct{})}
	var conditions []condition
	used := make(map[node]time.Time)
	for name, ns := range v1.subs() {
		conditions = append(conditions, g.scan(name, ns, used)...)
	}
	for _, c := range conditions {
		if at, ok := used[c.target]; ok && c.ref.holds(at, now) {
			g.back[c.bearer] = append(g.back[c.bearer], c.target)
		}
	}
	return g.close()
}

// close follows edges from the roots until nothing new is found.
func (g *graph) close() map[node]struct{} {
	todo := g.roots
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if _, seen := g.live[n]; seen {
			continue
		}
		g.live[n] = struct{}{}
		todo = append(todo, g.needs(n)...)
	}
	for n := range g.live {
		if n.flat {
			delete(g.live, n)
			n.flat = false
			g.live[n] = struct{}{}
		}
	}
	return g.live
}

func (g *graph) root(n node) { g.roots = append(g.roots, n) }

// scan finds a namespace's roots, and the edges that can't be followed from
// where they begin because the label is at their other end.
func (g *graph) scan(name string, ns bucket, used map[node]time.Time) (conditions []condition) {
	g.scanLeases(name, ns)
	edges := func(bearer node, b bucket) {
		for k, v := range gcLabels(b) {
			r, ok := parseReference(k, v)
			switch {
			case isRoot(k) && bearer.kind != kindImage:
				g.root(bearer)
			case ok && r.Direction == Back:
				g.back[r.target(name)] = append(g.back[r.target(name)], bearer)
			case ok && r.Direction == Conditional && bearer.kind != kindSnapshot:
				conditions = append(conditions, condition{bearer, r.target(name), r})
			}
		}
	}
	for key, b := range ns.sub(keyImages).subs() {
		n := node{kind: kindImage, ns: name, id: key}
		if !expired(b.sub(keyLabels), g.now) {
			g.root(n)
		}
		edges(n, b)
	}
	for key, b := range ns.sub(keyContent, keyBlob).subs() {
		edges(node{kind: kindBlob, ns: name, id: key}, b)
	}
	for driver, keys := range ns.sub(keySnapshots).subs() {
		for key, b := range keys.subs() {
			n := snapshotNode(name, driver, key)
			edges(n, b)
			if t, err := time.Parse(time.RFC3339, b.sub(keyLabels).text(labelUsedAt)); err == nil {
				used[n] = t
			}
		}
	}
	for ref, b := range ns.sub(keyContent, keyIngests).subs() {
		if t, err := b.time(keyExpireAt); err == nil && t.After(g.now) {
			g.root(node{kind: kindIngest, ns: name, id: ref})
		}
	}
	for id := range ns.sub(keyContainers).subs() {
		g.root(node{kind: kindContainer, ns: name, id: id})
	}
	for _, b := range ns.sub(keySandboxes).subs() {
		for _, n := range forward(name, b) {
			g.root(n) // a sandbox is never collected, and isn't a node
		}
	}
	return conditions
}

// scanLeases makes what unexpired leases hold roots.
func (g *graph) scanLeases(name string, ns bucket) {
	for id, lease := range ns.sub(keyLeases).subs() {
		labels := lease.sub(keyLabels)
		if expired(labels, g.now) {
			continue
		}
		g.root(node{kind: kindLease, ns: name, id: id})
		flat := labels.has(labelFlat)
		for _, r := range resources(lease) {
			n := target(name, r.Type, r.ID)
			n.flat = flat && n.kind != kindIngest
			g.root(n)
		}
	}
}

// needs lists what n keeps alive.
func (g *graph) needs(n node) (all []node) {
	all = append(all, g.back[n]...) // a flat node isn't a key there
	ns := g.v1.sub(n.ns)
	switch n.kind {
	case kindBlob:
		if !n.flat {
			all = append(all, forward(n.ns, ns.sub(keyContent, keyBlob, n.id))...)
		}
	case kindSnapshot:
		driver, key, _ := strings.Cut(n.id, "/")
		b := ns.sub(keySnapshots, driver, key)
		if parent := b.text(keyParent); parent != "" {
			p := snapshotNode(n.ns, driver, parent)
			p.flat = n.flat
			all = append(all, p)
		}
		if !n.flat {
			all = append(all, forward(n.ns, b)...)
		}
	case kindImage:
		b := ns.sub(keyImages, n.id)
		if dgst := b.sub(keyTarget).text(keyDigest); dgst != "" {
			all = append(all, node{kind: kindBlob, flat: n.flat, ns: n.ns, id: dgst})
		}
		if !n.flat {
			all = append(all, forward(n.ns, b)...)
		}
	case kindIngest:
		if dgst := ns.sub(keyContent, keyIngests, n.id).text(keyExpected); dgst != "" {
			all = append(all, node{kind: kindBlob, ns: n.ns, id: dgst})
		}
	case kindContainer:
		b := ns.sub(keyContainers, n.id)
		if driver := b.text(keySnapshotter); driver != "" {
			all = append(all, snapshotNode(n.ns, driver, b.text(keySnapshotKey)))
		}
		all = append(all, forward(n.ns, b)...)
	}
	return all
}

// forward lists what the labels of a record refer to.
func forward(ns string, b bucket) (all []node) {
	for k, v := range gcLabels(b) {
		if r, ok := parseReference(k, v); ok && r.Direction == Forward {
			all = append(all, r.target(ns))
		}
	}
	return all
}

// gcLabels yields the labels of a record that may say something to us.
func gcLabels(b bucket) func(yield func(k, v string) bool) {
	return func(yield func(k, v string) bool) {
		labels := b.sub(keyLabels)
		if !labels.exists() {
			return
		}
		c := labels.b.Cursor()
		for k, v := c.Seek([]byte(labelPrefix)); k != nil && strings.HasPrefix(string(k), labelPrefix); k, v = c.Next() {
			if !yield(string(k), string(v)) {
				return
			}
		}
	}
}

func snapshotNode(ns, driver, key string) node {
	return node{kind: kindSnapshot, ns: ns, id: driver + "/" + key}
}

// target is the node that a reference leads to.
func (r Reference) target(ns string) node { return target(ns, r.Type, r.ID) }

// target is the node of a Resource or Reference.
func target(ns, typ, id string) node {
	switch typ {
	case keyContent:
		return node{kind: kindBlob, ns: ns, id: id}
	case keyImages:
		return node{kind: kindImage, ns: ns, id: id}
	case keyIngests:
		return node{kind: kindIngest, ns: ns, id: id}
	case keyContainers:
		return node{kind: kindContainer, ns: ns, id: id}
	}
	driver := strings.TrimPrefix(typ, refSnapshot)
	return snapshotNode(ns, driver, id)
}
