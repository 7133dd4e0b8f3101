package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

// maxCopied bounds the bytes of lower layers that one layer's hard links may
// have copied up: 64 GiB. (A header of 1 KiB is enough to ask for a copy.)
const maxCopied = 64 << 30

// Complete finishes an overlay layer whose parents are now known. dir is its
// upper directory, parents are the directories below it, nearest first and
// complete themselves, none of them mounted; implied and links are those of
// the layer's Result.
//
// Directories that the layer implied get the owner, mode, extended attributes
// and times that they have below. Files that it links to are copied up with
// all attributes, to their own place if they are visible there, and linked.
// Whiteouts that would show as devices, since no parent has their directory,
// go. All of it is synced. The usage returned is what came on top of
// Result.Usage. An error names the entry at fault.
func Complete(dir string, parents []string, implied []string, links []Link) (Usage, error) {
	root, err := inroot.Open(dir)
	if err != nil {
		return Usage{}, err
	}
	defer root.Close()
	return complete(root, parents, implied, links)
}

// completion is one run of Complete.
type completion struct {
	root   *inroot.Root // the layer's own
	upper  *stack       // it alone
	lower  *stack       // the parents
	merged *stack       // all

	implied map[string]struct{}
	before  map[string][2]unix.Timespec // times of directories that were changed
	copies  map[string]string           // path below -> name of its copy in the layer
	copied  int64
	usage   Usage
	few     fewChanges
}

func complete(root *inroot.Root, parents, implied []string, links []Link) (Usage, error) {
	c := &completion{
		root:    root,
		upper:   newStack(root),
		lower:   newStack(),
		merged:  newStack(root),
		implied: make(map[string]struct{}),
		before:  make(map[string][2]unix.Timespec),
		copies:  make(map[string]string),
	}
	for _, dir := range parents {
		p, err := inroot.Open(dir)
		if err != nil {
			return Usage{}, err
		}
		defer p.Close()
		p.Keep(stackKeep)
		c.lower.layers = append(c.lower.layers, p)
		c.merged.layers = append(c.merged.layers, p)
	}
	for _, dir := range implied {
		c.implied[dir] = struct{}{}
	}
	for _, l := range links {
		var err error
		if l.Target == "" {
			err = c.show(l.Name)
		} else {
			err = c.link(l)
		}
		if err != nil {
			return Usage{}, fmt.Errorf("layer entry %q: %w", brief(l.Name), err)
		}
	}
	if err := fault.Point("layer.complete.linked"); err != nil {
		return Usage{}, err
	}
	for _, dir := range slices.Sorted(maps.Keys(c.implied)) {
		if err := c.inherit(dir); err != nil {
			return Usage{}, fmt.Errorf("attributes of directory %q: %w", brief(dir), err)
		}
	}
	if err := c.restoreTimes(); err != nil {
		return Usage{}, err
	}
	return c.usage, c.sync()
}

func (c *completion) sync() error {
	if err := fault.Point("layer.complete.written"); err != nil {
		return err
	}
	done, err := c.few.sync(c.root)
	if err == nil && !done {
		err = c.root.SyncFS()
	}
	return err
}

// changed notes that a directory of the layer is about to be changed.
func (c *completion) changed(dir string) error {
	if _, ok := c.before[dir]; ok {
		return nil
	}
	st, err := c.root.Lstat(dir)
	if err != nil {
		return err
	}
	c.before[dir] = [2]unix.Timespec{st.Atim, st.Mtim}
	c.few.dir(dir)
	return nil
}

func (c *completion) restoreTimes() error {
	for dir, t := range c.before {
		if _, ok := c.implied[dir]; ok {
			continue // has what it has below
		}
		n, err := c.root.Node(dir)
		if err != nil {
			return err
		}
		err = n.Utimes(t[0], t[1])
		n.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// forget makes the lookups see what was changed in the layer.
func (c *completion) forget() {
	c.upper.changed()
	c.merged.changed()
}

// link puts a file of a lower layer in the place that was held for it.
func (c *completion) link(l Link) error {
	source, err := c.source(l)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", brief(l.Target), err)
	}
	if source != l.Name {
		if err := c.vacate(l.Name); err != nil {
			return err
		}
		if err := c.root.Link(source, l.Name); err != nil {
			return err
		}
	}
	c.few.file(source)
	if l.attrs == nil {
		return nil
	}
	n, err := c.root.Node(source)
	if err != nil {
		return err
	}
	defer n.Close()
	st, err := n.Stat()
	if err != nil {
		return err
	}
	return l.attrs.setAll(n, kindOf(st), "")
}

// source returns the name, in the layer, of what a link is to be linked to.
//
// The target was not in the layer when its entry came, so it is what the
// parents have, even if the layer has put something else there since. Only if
// they have nothing may it be a file of the layer that is reached through
// links below. (One reached so, where the parents have another at the same
// place, would be missed; no archive of that kind is known, and containerd's
// overlay fails on all of these.)
func (c *completion) source(l Link) (string, error) {
	f, err := c.lower.lookup(l.Target, false)
	if errors.Is(err, fs.ErrNotExist) {
		m, err2 := c.merged.lookup(l.Target, false)
		switch {
		case err2 == nil && m.layer == 0 && !isDir(m.st):
			return m.path, nil
		case err2 == nil && m.layer > 0:
			m.layer--
			f, err = m, nil
		}
	}
	if err != nil {
		return "", err
	}
	if isDir(f.st) {
		return "", invalid("it is a directory")
	}
	if name, ok := c.copies[f.path]; ok {
		return name, nil
	}
	name, err := c.copyPlace(f.path, l.Name)
	if err != nil {
		return "", err
	}
	if err := c.copyUp(f, name); err != nil {
		return "", fmt.Errorf("copy up: %w", err)
	}
	c.copies[f.path] = name
	return name, nil
}

// copyPlace frees a name for the copy of a lower file: its own if the layer
// has nothing there and hides nothing there, so that both names share one
// file; else the link's.
func (c *completion) copyPlace(own, link string) (string, error) {
	_, err := c.upper.lookup(own, false)
	m, ok := errors.AsType[*missing](err)
	if ok && !m.hidden && path.Join(m.path, m.rest) == own { // and not through a link of the layer
		return own, c.makeParents(own)
	}
	if err != nil && !ok && !errors.Is(err, unix.ELOOP) {
		return "", err
	}
	return link, c.vacate(link)
}

// vacate removes the placeholder that holds a name.
func (c *completion) vacate(name string) error {
	if err := c.changed(path.Dir(name)); err != nil {
		return err
	}
	defer c.forget()
	return c.root.Remove(name)
}

// makeParents makes the directories above name that only lower layers have.
func (c *completion) makeParents(name string) error {
	dir := path.Dir(name)
	for d := dir; ; d = path.Dir(d) {
		err := c.changed(d)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	made, err := c.root.MkdirAll(dir, 0o755)
	if err != nil {
		return err
	}
	for _, m := range made {
		st, err := c.root.Lstat(m)
		if err != nil {
			return err
		}
		c.implied[m] = struct{}{}
		c.usage.Inodes++
		c.usage.Size += st.Blocks * 512
		c.few.dir(m)
	}
	c.forget()
	return nil
}

// copyUp copies a lower file, or whatever else is no directory, to a free name
// of the layer.
func (c *completion) copyUp(f found, to string) error {
	if c.copied += f.st.Blocks * 512; c.copied > maxCopied {
		return exceeded("hard links to more than %d bytes of lower layers", int64(maxCopied))
	}
	from := c.lower.layers[f.layer]
	var err error
	switch kindOf(f.st) {
	case tar.TypeReg:
		err = copyFile(from, f.path, c.root, to)
	case tar.TypeSymlink:
		var target string
		if target, err = from.Readlink(f.path); err == nil {
			err = c.root.Symlink(target, to)
		}
	default:
		err = c.root.Mknod(to, f.st.Mode&unix.S_IFMT, f.st.Rdev)
	}
	if err != nil {
		return err
	}
	c.forget()
	st, err := copyAttributes(from, f.path, c.root, to)
	if err != nil {
		return err
	}
	c.usage.Inodes++
	c.usage.Size += st.Blocks * 512
	c.few.file(to)
	c.few.dir(path.Dir(to))
	return nil
}

// show does what whiteouts need that depends on the parents.
func (c *completion) show(dir string) error {
	if dir == "." {
		if err := c.hideBelow(); err != nil {
			return err
		}
	}
	f, err := c.merged.lookup(dir, false)
	if err != nil || len(f.dirs) > 1 || !isDir(f.st) {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}
	if err := c.changed(dir); err != nil {
		return err
	}
	var whiteouts []string
	for name, err := range c.root.Names(dir) {
		if err != nil {
			return err
		}
		st, err := c.root.Lstat(path.Join(dir, name))
		if err != nil {
			return err
		}
		if isWhiteout(st) {
			whiteouts = append(whiteouts, path.Join(dir, name))
		}
	}
	for _, name := range whiteouts {
		if err := c.root.Remove(name); err != nil {
			return err
		}
		c.usage.Inodes--
	}
	c.forget()
	return nil
}

// hideBelow makes an opaque root what it says: the kernel merges the roots of
// all layers whatever their attributes, so each name below gets its whiteout,
// and each directory that the layer has too is made opaque.
func (c *completion) hideBelow() error {
	top, err := c.root.Node(".")
	if err != nil {
		return err
	}
	defer top.Close()
	key, err := opaqueKey(top)
	if err != nil || key == "" {
		return err
	}
	if err := c.changed("."); err != nil {
		return err
	}
	for _, p := range c.lower.layers {
		for name, err := range p.Names(".") {
			if err == nil {
				err = c.hide(name, key)
			}
			if err != nil {
				return err
			}
		}
	}
	if err := top.Removexattr(key); err != nil {
		return err
	}
	c.forget()
	return nil
}

func (c *completion) hide(name, key string) error {
	st, err := c.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		c.usage.Inodes++
		return c.root.Mknod(name, unix.S_IFCHR, 0)
	}
	if err != nil || !isDir(st) {
		return err
	}
	n, err := c.root.Node(name)
	if err != nil {
		return err
	}
	defer n.Close()
	return n.Setxattr(key, []byte("y"))
}

// inherit gives an implied directory the attributes that it has below. As with
// containerd a link below is followed, so that a layer's `bin/x` over `bin ->
// usr/bin` makes a directory like `usr/bin`; but not if the layer describes
// `bin` as a directory, which then is new and empty.
func (c *completion) inherit(dir string) error {
	st, err := c.root.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !isDir(st) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := c.lower.lookup(dir, true)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || err == nil && !isDir(f.st) {
		return c.inheritGroup(dir)
	}
	if err != nil {
		return err
	}
	if f.path != dir {
		link, err := c.firstLink(dir)
		if err != nil {
			return err
		}
		if _, ok := c.implied[link]; !ok {
			return c.inheritGroup(dir)
		}
	}
	c.few.dir(dir)
	_, err = copyAttributes(c.lower.layers[f.layer], f.path, c.root, dir)
	return err
}

// firstLink returns the first part of a name that is a link below.
func (c *completion) firstLink(name string) (string, error) {
	for i := 1; i < len(name); i++ {
		if name[i] != '/' {
			continue
		}
		f, err := c.lower.lookup(name[:i], false)
		if err != nil || f.st.Mode&unix.S_IFMT == unix.S_IFLNK {
			return name[:i], err
		}
	}
	return name, nil
}

// inheritGroup gives a directory that is new altogether the group of the one
// it is in, if that has the set-gid bit but did not show it yet when the
// directory was made.
func (c *completion) inheritGroup(dir string) error {
	above := path.Dir(dir)
	if _, ok := c.implied[above]; !ok {
		return nil
	}
	st, err := c.root.Lstat(above)
	if err != nil || st.Mode&unix.S_ISGID == 0 {
		return err
	}
	n, err := c.root.Node(dir)
	if err != nil {
		return err
	}
	defer n.Close()
	c.few.dir(dir)
	return n.Chown(-1, int(st.Gid))
}

// copyAttributes gives an object the owner, extended attributes, mode and
// times of one in another root, and says what it is then. Attributes that only
// mean something where they are (`trusted.`) stay there.
func copyAttributes(from *inroot.Root, path string, to *inroot.Root, name string) (unix.Stat_t, error) {
	src, err := from.Node(path)
	if err != nil {
		return unix.Stat_t{}, err
	}
	defer src.Close()
	dst, err := to.Node(name)
	if err != nil {
		return unix.Stat_t{}, err
	}
	defer dst.Close()
	st, err := src.Stat()
	if err != nil {
		return st, err
	}
	a := attributes{uid: int(st.Uid), gid: int(st.Gid), mode: st.Mode & 0o7777, atime: st.Atim, mtime: st.Mtim}
	keys, err := src.Listxattr()
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return st, err
	}
	for _, key := range keys {
		if strings.HasPrefix(key, "trusted.") {
			continue
		}
		value, err := src.Getxattr(key)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
			continue
		}
		if err != nil {
			return st, err
		}
		a.xattrs = append(a.xattrs, xattr{key, value})
	}
	if err := a.setAll(dst, kindOf(st), opaqueUser); err != nil {
		return st, err
	}
	return dst.Stat()
}
