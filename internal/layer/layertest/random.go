package layertest

import (
	"archive/tar"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"time"
)

// Random returns an image of random layers, the same for the same seed. It can
// be unpacked, and comes out the same on every kind of driver: the generator
// keeps a model of the merged tree, writes through no symbolic link, links
// across layers only to files with one name (an overlay's copy-up would part
// the others) and with the attributes that they have, and gives directories no
// extended attributes (one that a layer describes again keeps them on a plain
// directory only) and no set-gid bit (a child that is made before the bit is
// known does not inherit the group).
func Random(seed uint64) Image {
	g := &generator{
		rnd:  rand.New(rand.NewPCG(seed, 1)),
		tree: make(map[string]*object),
	}
	img := Image{Name: fmt.Sprintf("random-%d", seed)}
	for range 2 + g.rnd.IntN(5) {
		img.Layers = append(img.Layers, g.layer())
	}
	return img
}

type generator struct {
	rnd   *rand.Rand
	tree  map[string]*object // the merged tree so far, without its root
	own   map[string]bool    // what this layer has written, or written into
	round int                // number of the layer
	seq   int
}

// object is one file, directory or other; hard links share it.
type object struct {
	kind  byte
	names int
	round int // of the layer that made it or linked to it
	entry Entry
}

func (g *generator) layer() []byte {
	g.round++
	g.own = make(map[string]bool)
	var entries []Entry
	for range 5 + g.rnd.IntN(40) {
		if e, ok := g.entry(); ok {
			entries = append(entries, e)
		}
	}
	return Archive(entries...)
}

func (g *generator) entry() (Entry, bool) {
	name := g.name()
	if !g.reachable(name) {
		return Entry{}, false
	}
	switch g.rnd.IntN(12) {
	case 0, 1:
		g.remove(name)
		g.imply(path.Dir(name))
		return Whiteout(name), true
	case 2:
		return g.opaque()
	case 3, 4, 5:
		if o := g.tree[name]; o == nil || o.kind != tar.TypeDir {
			g.remove(name)
		}
		g.imply(name)
		return g.attributes(Dir(name, 0)), true
	case 6, 7:
		return g.link(name)
	case 8:
		return g.add(g.attributes(Symlink(name, g.name()))), true
	case 9:
		return g.add(g.attributes(Node(name, tar.TypeFifo, 0, 0))), true
	}
	e := g.attributes(File(name, strings.Repeat(name, g.rnd.IntN(200))))
	if g.rnd.IntN(4) == 0 {
		e = e.Xattr("user.x", name)
	}
	return g.add(e), true
}

// opaque marks a directory that is there. Layers put the marker before or
// after what it must not touch.
func (g *generator) opaque() (Entry, bool) {
	dir := path.Dir(g.name())
	if dir != "." && (!g.reachable(dir) || g.tree[dir] == nil || g.tree[dir].kind != tar.TypeDir) {
		return Entry{}, false
	}
	for name := range maps.Clone(g.tree) {
		if dir == "." || strings.HasPrefix(name, dir+"/") {
			if !g.own[name] {
				g.remove(name)
			}
		}
	}
	g.imply(dir)
	return Opaque(dir), true
}

func (g *generator) link(name string) (Entry, bool) {
	var targets []string
	for _, t := range slices.Sorted(maps.Keys(g.tree)) {
		o := g.tree[t]
		if o.kind == tar.TypeDir || t == name || strings.HasPrefix(t, name+"/") || o.round != g.round && o.names > 1 {
			continue
		}
		targets = append(targets, t)
	}
	if len(targets) == 0 {
		return Entry{}, false
	}
	target := targets[g.rnd.IntN(len(targets))]
	o := g.tree[target]
	e := Link(name, target)
	e.Mode, e.Uid, e.Gid, e.ModTime = o.entry.Mode, o.entry.Uid, o.entry.Gid, o.entry.ModTime
	g.add(e)
	g.tree[name] = o
	o.names++
	o.round = g.round
	return e, true
}

// add makes an object, replacing what was there.
func (g *generator) add(e Entry) Entry {
	g.remove(e.Name)
	g.imply(path.Dir(e.Name))
	g.tree[e.Name] = &object{kind: e.Typeflag, names: 1, round: g.round, entry: e}
	g.own[e.Name] = true
	return e
}

// imply notes that the layer has dir, and those above it.
func (g *generator) imply(dir string) {
	for ; dir != "."; dir = path.Dir(dir) {
		g.own[dir] = true
		if g.tree[dir] == nil {
			g.tree[dir] = &object{kind: tar.TypeDir, names: 1, round: g.round}
		}
	}
}

func (g *generator) remove(name string) {
	for other, o := range maps.Clone(g.tree) {
		if other == name || strings.HasPrefix(other, name+"/") {
			o.names--
			delete(g.tree, other)
			delete(g.own, other)
		}
	}
}

// reachable reports whether all above name are directories or absent.
func (g *generator) reachable(name string) bool {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if o := g.tree[dir]; o != nil && o.kind != tar.TypeDir {
			return false
		}
	}
	return true
}

func (g *generator) name() string {
	parts := make([]string, 1+g.rnd.IntN(4))
	for i := range parts {
		parts[i] = string(rune('a' + g.rnd.IntN(4)))
	}
	return strings.Join(parts, "/")
}

func (g *generator) attributes(e Entry) Entry {
	g.seq++
	e = e.Owned(g.rnd.IntN(3), g.rnd.IntN(3)*1000)
	modes := []int64{0o755, 0o700, 0o1777, 0o644, 0o4711, 0o2755}
	switch e.Typeflag {
	case tar.TypeSymlink:
	case tar.TypeDir:
		e = e.Moded(modes[g.rnd.IntN(4)])
	default:
		e = e.Moded(modes[g.rnd.IntN(len(modes))])
	}
	return e.With(func(h *tar.Header) { h.ModTime = Epoch.Add(time.Duration(g.seq) * 1_000_003 * time.Microsecond) })
}
