package compat

import (
	"archive/tar"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

// randomImage makes an image as builders do: each layer tells how one tree
// became the next, every path at most once, parents before children. What
// builders leave to chance is random: whether an unchanged parent has an entry,
// whether a directory is emptied by whiteouts or an opaque marker, names for the same file in several layers.
// The same seed gives the same image. (layertest.Random is wilder: most of its images fail in
// containerd, which could then say nothing.)
func randomImage(seed uint64) layertest.Image {
	b := builder{rnd: rand.New(rand.NewPCG(seed, 2)), tree: make(map[string]layertest.Entry)}
	b.links = b.rnd.IntN(3) == 0
	img := layertest.Image{Name: fmt.Sprintf("random-%d", seed)}
	for range 2 + b.rnd.IntN(5) {
		img.Layers = append(img.Layers, b.layer())
	}
	return img
}

// builder is where the making of an image stands.
type builder struct {
	rnd   *rand.Rand
	tree  map[string]layertest.Entry // what there is, by path
	links bool                       // whether layers link to files of lower ones
	clock int
}

// change is what one layer does.
type change struct {
	deleted map[string]bool // the top of what is gone
	emptied map[string]bool // directories of which nothing below stays but what is written
	written map[string]layertest.Entry
	targets map[string]bool // what links of the layer link to
}

func (b *builder) layer() []byte {
	c := change{make(map[string]bool), make(map[string]bool), make(map[string]layertest.Entry), make(map[string]bool)}
	before := slices.Sorted(maps.Keys(b.tree))
	for range b.rnd.IntN(6) {
		if len(before) > 0 {
			b.delete(c, before[b.rnd.IntN(len(before))])
		}
	}
	for range 3 + b.rnd.IntN(25) {
		b.write(c, before)
	}
	return layertest.Archive(c.entries()...)
}

// entries puts a change into the order of an archive.
func (c change) entries() []layertest.Entry {
	var entries []layertest.Entry
	paths := slices.Collect(maps.Keys(c.written))
	paths = append(paths, slices.Collect(maps.Keys(c.emptied))...)
	paths = append(paths, slices.Collect(maps.Keys(c.deleted))...)
	slices.Sort(paths)
	for _, name := range slices.Compact(paths) {
		if e, ok := c.written[name]; ok {
			entries = append(entries, e)
		}
		if c.emptied[name] {
			entries = append(entries, layertest.Opaque(name))
		}
		if c.deleted[name] {
			entries = append(entries, layertest.Whiteout(name))
		}
	}
	// Links come last: what they link to may stand later in the order of names.
	slices.SortStableFunc(entries, func(x, y layertest.Entry) int {
		return linkRank(x) - linkRank(y)
	})
	return entries
}

func linkRank(e layertest.Entry) int {
	if e.Typeflag == tar.TypeLink {
		return 1
	}
	return 0
}

// delete takes a path away, or what is in it.
func (b *builder) delete(c change, name string) {
	if _, ok := b.tree[name]; !ok || c.touches(name) {
		return
	}
	dir := b.tree[name].Typeflag == tar.TypeDir
	b.forget(name)
	if dir && b.rnd.IntN(2) == 0 {
		c.emptied[name] = true
		c.written[name] = b.attributes(layertest.Dir(name, 0))
		b.tree[name] = c.written[name]
	} else {
		c.deleted[name] = true
	}
}

// touches reports whether a change has to do with a path, something above or something below.
func (c change) touches(name string) bool {
	for _, paths := range []map[string]bool{c.deleted, c.emptied} {
		for other := range paths {
			if related(name, other) {
				return true
			}
		}
	}
	for other := range c.written {
		if related(name, other) {
			return true
		}
	}
	return false
}

func related(x, y string) bool {
	return x == y || strings.HasPrefix(x, y+"/") || strings.HasPrefix(y, x+"/")
}

func (b *builder) forget(name string) {
	maps.DeleteFunc(b.tree, func(other string, _ layertest.Entry) bool {
		return other == name || strings.HasPrefix(other, name+"/")
	})
}

// write makes or changes one path, if nothing that the layer did before is in the way.
func (b *builder) write(c change, before []string) {
	name := b.name()
	if c.deleted[name] || c.emptied[name] || c.targets[name] {
		return
	}
	if _, ok := c.written[name]; ok {
		return
	}
	old, exists := b.tree[name]
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if e, ok := b.tree[dir]; c.deleted[dir] || ok && e.Typeflag != tar.TypeDir {
			return
		}
	}
	e := b.entry(c, name, before)
	if e.Typeflag != tar.TypeDir && (exists && old.Typeflag == tar.TypeDir || c.touches(name)) {
		return // a file in place of a directory comes by deleting first, a layer lower
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		parent, ok := b.tree[dir]
		if _, told := c.written[dir]; told || ok && b.rnd.IntN(2) == 0 {
			continue
		}
		if !ok {
			if b.rnd.IntN(4) == 0 {
				b.tree[dir] = layertest.Dir(dir, 0o755) // implied
				continue
			}
			parent = b.attributes(layertest.Dir(dir, 0))
		}
		c.written[dir], b.tree[dir] = parent, parent
	}
	c.written[name], b.tree[name] = e, e
}

func (b *builder) entry(c change, name string, before []string) layertest.Entry {
	switch b.rnd.IntN(10) {
	case 0, 1:
		return b.attributes(layertest.Dir(name, 0))
	case 2:
		return b.attributes(layertest.Symlink(name, b.name()))
	case 3:
		return b.attributes(layertest.Node(name, tar.TypeFifo, 0, 0))
	case 4, 5:
		if e, ok := b.link(c, name, before); ok {
			return e
		}
	}
	e := b.attributes(layertest.File(name, strings.Repeat(name, b.rnd.IntN(200))))
	if b.rnd.IntN(4) == 0 {
		e = e.Xattr("user.x", name)
	}
	return e
}

// link is a second name for a file that the layer writes, or a lower one did.
func (b *builder) link(c change, name string, before []string) (layertest.Entry, bool) {
	targets := slices.Sorted(maps.Keys(c.written))
	if b.links {
		targets = append(targets, before...)
	}
	targets = slices.DeleteFunc(targets, func(t string) bool {
		e, ok := b.tree[t]
		// A link to a link would come before it, or not. Of a lower file with several names an overlay would
		// take along only the one that is linked to.
		_, own := c.written[t]
		return !ok || e.Typeflag != tar.TypeReg || related(t, name) || !own && b.linked(t)
	})
	if len(targets) == 0 {
		return layertest.Entry{}, false
	}
	target := targets[b.rnd.IntN(len(targets))]
	to := b.tree[target]
	c.targets[target] = true
	e := layertest.Link(name, target)
	e.Mode, e.Uid, e.Gid, e.ModTime, e.PAXRecords = to.Mode, to.Uid, to.Gid, to.ModTime, to.PAXRecords
	return e, true
}

// linked reports whether a file has more names than one.
func (b *builder) linked(name string) bool {
	for _, e := range b.tree {
		if e.Typeflag == tar.TypeLink && e.Linkname == name {
			return true
		}
	}
	return false
}

func (b *builder) name() string {
	parts := make([]string, 1+b.rnd.IntN(4))
	for i := range parts {
		parts[i] = string(rune('a' + b.rnd.IntN(4)))
	}
	return strings.Join(parts, "/")
}

func (b *builder) attributes(e layertest.Entry) layertest.Entry {
	b.clock++
	e = e.Owned(b.rnd.IntN(3), b.rnd.IntN(3)*1000)
	modes := []int64{0o755, 0o700, 0o1777, 0o644, 0o4711, 0o2755}
	switch e.Typeflag {
	case tar.TypeSymlink:
	case tar.TypeDir:
		e = e.Moded(modes[b.rnd.IntN(3)])
	default:
		e = e.Moded(modes[b.rnd.IntN(len(modes))])
	}
	return e.With(func(h *tar.Header) {
		h.ModTime = layertest.Epoch.Add(time.Duration(b.clock) * 1_000_003 * time.Microsecond)
	})
}
