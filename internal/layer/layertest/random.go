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

// Orderly returns an image of random layers as builders write them: each name
// is touched once in a layer, deletions come first and are of what lower
// layers have, and a new directory has its entry before what is in it.
// containerd too unpacks these, on a plain directory; and on an overlay if
// across, which asks for hard links into lower layers, is false.
func Orderly(seed uint64, across bool) Image {
	g := &generator{
		rnd:     rand.New(rand.NewPCG(seed, 2)),
		tree:    make(map[string]*object),
		orderly: true,
		across:  across,
	}
	img := Image{Name: fmt.Sprintf("orderly-%d", seed)}
	for range 2 + g.rnd.IntN(5) {
		img.Layers = append(img.Layers, g.layer())
	}
	return img
}

type generator struct {
	rnd     *rand.Rand
	orderly bool
	across  bool // hard links to lower layers, if orderly
	touched map[string]bool

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
	g.touched = make(map[string]bool)
	var entries []Entry
	for range g.rnd.IntN(8) {
		if e, ok := g.deletion(); ok {
			entries = append(entries, e)
		}
	}
	for range 5 + g.rnd.IntN(40) {
		if e, ok := g.entry(); ok {
			entries = append(entries, e)
		}
	}
	return Archive(entries...)
}

// deletion is how an orderly layer begins.
func (g *generator) deletion() (Entry, bool) {
	name := g.name()
	o := g.tree[name]
	if !g.orderly || o == nil || o.round == g.round || g.near(name) {
		return Entry{}, false
	}
	g.touched[name] = true
	if o.kind == tar.TypeDir && g.rnd.IntN(2) == 0 {
		for other := range maps.Clone(g.tree) {
			if strings.HasPrefix(other, name+"/") {
				g.remove(other)
			}
		}
		g.imply(name)
		return Opaque(name), true
	}
	g.remove(name)
	g.imply(path.Dir(name))
	return Whiteout(name), true
}

// near reports whether the layer has touched name, or deleted something above
// or below it.
func (g *generator) near(name string) bool {
	for t := range g.touched {
		if t == name || strings.HasPrefix(t, name+"/") || strings.HasPrefix(name, t+"/") {
			return true
		}
	}
	return false
}

// fits reports whether an orderly layer may have an entry for name: nothing
// below it was written, and what is above it is there.
func (g *generator) fits(name string) bool {
	o := g.tree[name]
	if g.touched[name] || g.own[name] || o != nil && o.kind == tar.TypeDir {
		return false
	}
	dir := path.Dir(name)
	return dir == "." || g.tree[dir] != nil && g.tree[dir].kind == tar.TypeDir
}

func (g *generator) entry() (Entry, bool) {
	name := g.name()
	if !g.reachable(name) || g.orderly && !g.fits(name) {
		return Entry{}, false
	}
	pick := g.rnd.IntN(12)
	if g.orderly {
		pick = 3 + g.rnd.IntN(9)
		g.touched[name] = true
	}
	switch pick {
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
		if g.orderly && !g.across && (o.round != g.round || !g.own[t]) {
			continue
		}
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
