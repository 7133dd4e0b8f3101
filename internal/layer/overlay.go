package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

// Overlay emits a layer into an overlay's upper directory. A deletion is a
// character device 0/0 there, and an opaque directory an attribute, as the
// kernel has them (https://docs.kernel.org/filesystems/overlayfs.html).
//
// Nothing below the layer is mounted, so two things have to wait until the
// parents are known, which may be at commit only. A directory that is written
// into without an entry is made, and gets its attributes from below later
// (implied). A hard link to what the layer doesn't hold is made as one more
// name of an empty file, the placeholder, so that whatever the archive does
// with that name works as it should; Complete puts the real file there.
type Overlay struct {
	tree
	parents []string
	known   bool // the parents are
	opaqueX string

	implied   map[string]struct{}
	cut       map[string]struct{} // directories made opaque
	whiteouts map[string]struct{} // directories with whiteouts, and an opaque root
	links     []Link              // in the archive's order; Name "" where given up
	waiting   map[string]int      // name -> its place in links
	places    map[uint64]*inroot.File
	place     *inroot.File // the placeholder in use
}

// OverlayOptions say how the overlay will be mounted.
type OverlayOptions struct {
	// UserXattr is for overlays mounted with `userxattr`: the attributes that
	// mean something to the overlay are in the user namespace then.
	UserXattr bool
}

// NewOverlay emits into dir, an overlay upper that is not mounted. parents are
// the directories of the lower layers, nearest first; nil means that they are
// not known yet and Result.Implied and Result.Links will say what is left to do.
func NewOverlay(dir string, parents []string, opts OverlayOptions) (*Overlay, error) {
	o := &Overlay{
		tree:      tree{dir: dir},
		parents:   parents,
		known:     parents != nil,
		opaqueX:   opaqueTrusted,
		implied:   make(map[string]struct{}),
		cut:       make(map[string]struct{}),
		whiteouts: make(map[string]struct{}),
		waiting:   make(map[string]int),
		places:    make(map[uint64]*inroot.File),
	}
	if opts.UserXattr {
		o.opaqueX = opaqueUser
		o.private = "user.overlay."
	}
	return o, nil
}

func (o *Overlay) end() {
	for _, f := range o.places {
		f.Close()
	}
	clear(o.places)
	o.tree.end()
}

// above makes what is missing above name, and notes it as implied. A whiteout
// in the way is a directory that this layer deleted: a new one takes its place.
func (o *Overlay) above(name string) (real string, err error) {
	for {
		real, made, err := o.tree.parents(name)
		for _, m := range made {
			if o.isCut(m) {
				delete(o.implied, m) // new, whatever lies below
				continue
			}
			o.implied[m] = struct{}{}
			if err := o.retain(m); err != nil {
				return "", err
			}
		}
		if !errors.Is(err, unix.ENOTDIR) {
			return real, err
		}
		if ok, err2 := o.revive(path.Dir(name)); !ok {
			return "", errors.Join(err, err2)
		}
	}
}

// isCut reports whether this layer has made a directory above dir opaque so far.
func (o *Overlay) isCut(dir string) bool {
	for len(o.cut) > 0 && dir != "." {
		dir = path.Dir(dir)
		if _, ok := o.cut[dir]; ok {
			return true
		}
	}
	return false
}

// revive makes an empty directory of the first whiteout in a name, if there is one.
func (o *Overlay) revive(dir string) (bool, error) {
	parts := strings.Split(dir, "/")
	for i := range parts {
		name := path.Join(parts[:i+1]...)
		st, err := o.root.Lstat(name)
		if err != nil {
			return false, err
		}
		if !isWhiteout(st) {
			continue
		}
		in, err := o.root.Real(path.Dir(name))
		if err != nil {
			return false, err
		}
		real := path.Join(in, path.Base(name))
		if err := o.remove(real); err != nil {
			return false, err
		}
		if err := o.root.Mkdir(real, 0o755); err != nil {
			return false, err
		}
		if err := o.madeDir(real); err != nil {
			return false, err
		}
		delete(o.implied, real)
		return true, o.setOpaque(real)
	}
	return false, nil
}

func (o *Overlay) put(e *entry, body io.Reader) error {
	if err := o.count(1); err != nil {
		return err
	}
	real, err := o.above(e.name)
	if err != nil {
		return err
	}
	if e.kind == tar.TypeLink {
		return o.link(real, e)
	}
	_, replaced, err := o.write(real, e, body)
	if err != nil || e.kind != tar.TypeDir {
		return err
	}
	delete(o.implied, real)
	if replaced {
		// This layer deleted what was here, or put something else here, so a
		// lower directory of that name must not shine through. (containerd's
		// overlay forgets that.)
		return o.setOpaque(real)
	}
	return nil
}

func (o *Overlay) whiteout(name string) error {
	if err := o.count(1); err != nil {
		return err
	}
	real, err := o.above(name)
	if err != nil {
		return err
	}
	_, replaced, err := o.claim(real, tar.TypeChar, func() error { return o.root.Mknod(real, unix.S_IFCHR, 0) })
	if err != nil {
		return err
	}
	if replaced {
		delete(o.implied, real)
	}
	o.usage.Inodes++
	o.few.dir(path.Dir(real))
	return o.mayShow(path.Dir(real))
}

func (o *Overlay) opaque(dir string) error {
	if err := o.count(1); err != nil {
		return err
	}
	real, err := o.above(path.Join(dir, whiteoutOpaque))
	if err != nil {
		return err
	}
	real = path.Dir(real)
	if real == "." {
		// The kernel always merges roots; Complete hides what is below.
		if err := o.mayShow("."); err != nil {
			return err
		}
	}
	return o.setOpaque(real)
}

func (o *Overlay) setOpaque(real string) error {
	n, err := o.root.Node(real)
	if err != nil {
		return err
	}
	defer n.Close()
	o.few.dir(real)
	if err := n.Setxattr(o.opaqueX, []byte("y")); err != nil {
		return fmt.Errorf("make directory opaque by %s: %w", o.opaqueX, err)
	}
	o.cut[real] = struct{}{}
	return o.retain(real)
}

// mayShow notes a directory whose whiteouts would show as devices if no lower
// layer has it.
func (o *Overlay) mayShow(dir string) error {
	if _, ok := o.whiteouts[dir]; ok {
		return nil
	}
	o.whiteouts[dir] = struct{}{}
	return o.retain(dir)
}

// link makes a hard link within the layer, or leaves it to Complete.
func (o *Overlay) link(real string, e *entry) error {
	target, st, err := o.find(e.link)
	if m, ok := errors.AsType[*missing](err); ok && !m.hidden {
		return o.await(real, path.Join(m.path, m.rest), e)
	}
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", brief(e.link), err)
	}
	if isDir(st) {
		return invalid("hard link to %q, a directory", brief(e.link))
	}
	if i, ok := o.waiting[target]; ok && o.places[st.Ino] != nil {
		return o.await(real, o.links[i].Target, e)
	}
	if target != real { // tar can make a link to itself of a file given twice
		if _, _, err := o.clear(real, e.kind); err != nil {
			return err
		}
		if err := o.root.Link(target, real); err != nil {
			return err
		}
		o.few.dir(path.Dir(real))
	}
	o.few.file(real)
	_, err = o.attributes(real, &e.attributes)
	return err
}

// find looks for a link's target in this layer. If it is *missing, the error
// says whether it may lie below.
func (o *Overlay) find(name string) (real string, st unix.Stat_t, err error) {
	if dir, err := o.root.Real(path.Dir(name)); err == nil {
		real = path.Join(dir, path.Base(name))
		if st, err := o.root.Lstat(real); err == nil && !isWhiteout(st) {
			return real, st, nil
		}
	}
	f, err := newStack(o.root).lookup(name, false)
	return f.path, f.st, err
}

// await gives a name to the placeholder until the link's target can be had.
func (o *Overlay) await(real, target string, e *entry) error {
	if _, _, err := o.clear(real, e.kind); err != nil {
		return err
	}
	if err := o.holdPlace(real); err != nil {
		return err
	}
	if i, ok := o.waiting[real]; ok {
		o.links[i].Name = ""
	}
	o.waiting[real] = len(o.links)
	attrs := e.attributes
	o.links = append(o.links, Link{Name: real, Target: target, attrs: &attrs})
	o.few.dir(path.Dir(real))
	for _, x := range attrs.xattrs {
		o.retained += int64(len(x.key) + len(x.value))
	}
	return o.retain(real + target)
}

// holdPlace gives one more name to the placeholder. It makes another when the
// last one has lost all its names, or can take no more of them.
func (o *Overlay) holdPlace(real string) error {
	if o.place != nil {
		err := o.root.LinkNode(&o.place.Node, real)
		if !errors.Is(err, unix.EMLINK) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if errors.Is(err, fs.ErrNotExist) {
			st, err := o.place.Stat()
			if err != nil {
				return err
			}
			delete(o.places, st.Ino)
			o.place.Close()
		}
	}
	f, err := o.root.Create(real, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	o.place = f
	o.places[st.Ino] = f
	o.usage.Inodes++
	return nil
}

func (o *Overlay) finish(res *Result) error {
	if err := o.settle(); err != nil {
		return err
	}
	top, err := o.root.Lstat(".")
	if err != nil {
		return err
	}
	o.usage.Inodes++
	o.usage.Size += top.Blocks * 512
	for _, f := range o.places {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if st.Nlink > 0 {
			o.usage.Inodes-- // it will be gone
		}
	}
	implied, err := o.stillDirs(o.implied)
	if err != nil {
		return err
	}
	links, err := o.left()
	if err != nil {
		return err
	}
	if o.known {
		more, err := complete(o.root, o.parents, implied, links)
		if err != nil {
			return err
		}
		o.usage.Inodes += more.Inodes
		o.usage.Size += more.Size
	} else {
		res.Implied, res.Links = implied, links
	}
	o.result(res)
	return nil
}

// left lists what waits for the parents.
func (o *Overlay) left() ([]Link, error) {
	var left []Link
	for _, l := range o.links {
		if l.Name == "" {
			continue
		}
		st, ok, err := o.still(l.Name)
		if err != nil {
			return nil, err
		}
		if ok && o.places[st.Ino] != nil {
			left = append(left, l)
		}
	}
	dirs, err := o.stillDirs(o.whiteouts)
	for _, dir := range dirs {
		left = append(left, Link{Name: dir})
	}
	return left, err
}

// stillDirs lists those of the names that are directories now.
func (o *Overlay) stillDirs(names map[string]struct{}) ([]string, error) {
	var dirs []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		st, ok, err := o.still(name)
		if err != nil {
			return nil, err
		}
		if ok && isDir(st) {
			dirs = append(dirs, name)
		}
	}
	return dirs, nil
}
