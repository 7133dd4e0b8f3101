package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"golang.org/x/sys/unix"
)

// Directory emits a layer into the directory that holds the whole tree:
// deletions happen in it.
type Directory struct {
	tree

	// own are directories that hold nothing of lower layers: those made by
	// this layer and those that it made opaque. Of the others, written names
	// what this layer put into them. An opaque marker may come after entries
	// that it must not delete, and each directory is searched for what it must
	// delete once at most, so that nested markers cost no more than one.
	own     map[string]struct{}
	written map[string]map[string]struct{}
}

// NewDirectory emits into dir, which holds the tree of the lower layers.
func NewDirectory(dir string) (*Directory, error) {
	return &Directory{
		tree:    tree{dir: dir},
		own:     make(map[string]struct{}),
		written: make(map[string]map[string]struct{}),
	}, nil
}

func (d *Directory) parents(name string) (string, error) {
	real, made, err := d.tree.parents(name)
	for _, m := range made {
		if err := errors.Join(d.wrote(m), d.owns(m)); err != nil {
			return "", err
		}
	}
	return real, err
}

func (d *Directory) put(e *entry, body io.Reader) error {
	if err := d.count(1); err != nil {
		return err
	}
	real, err := d.parents(e.name)
	if err != nil {
		return err
	}
	if e.kind == tar.TypeLink {
		err = d.link(real, e)
	} else {
		var merged bool
		merged, _, err = d.write(real, e, body)
		if err == nil && e.kind == tar.TypeDir && !merged {
			err = d.owns(real)
		}
	}
	if err != nil {
		return err
	}
	return d.wrote(real)
}

// link makes a hard link, and gives the file the attributes of the link's
// entry, which usually are the same.
func (d *Directory) link(real string, e *entry) error {
	dir, err := d.root.Real(path.Dir(e.link))
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", brief(e.link), err)
	}
	target := path.Join(dir, path.Base(e.link))
	if target != real { // tar can make a link to itself of a file given twice
		if _, err := d.root.Lstat(target); err != nil {
			return fmt.Errorf("hard link to %q: %w", brief(e.link), err)
		}
		if _, _, err := d.clear(real, e.kind); err != nil {
			return err
		}
		if err := d.root.Link(target, real); err != nil {
			return err
		}
		d.few.dir(path.Dir(real))
	}
	if _, err = d.attributes(real, &e.attributes); err != nil {
		return fmt.Errorf("hard link to %q: %w", brief(e.link), err)
	}
	d.few.file(real)
	return nil
}

func (d *Directory) whiteout(name string) error {
	if err := d.count(1); err != nil {
		return err
	}
	real, err := d.parents(name)
	if err != nil {
		return err
	}
	if err := d.wrote(path.Dir(real)); err != nil {
		return err
	}
	return d.remove(real)
}

func (d *Directory) opaque(dir string) error {
	if err := d.count(1); err != nil {
		return err
	}
	real, err := d.parents(path.Join(dir, whiteoutOpaque))
	if err != nil {
		return err
	}
	real = path.Dir(real)
	if err := d.wrote(real); err != nil {
		return err
	}
	for todo := []string{real}; len(todo) > 0; {
		dir := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if _, ok := d.own[dir]; ok {
			continue
		}
		more, err := d.purge(dir)
		if err != nil {
			return err
		}
		todo = append(todo, more...)
	}
	return nil
}

// purge removes from a directory what lower layers put there, and returns the
// subdirectories that may hold more of it.
func (d *Directory) purge(dir string) (more []string, err error) {
	written := d.written[dir]
	for name, err := range d.root.Names(dir) {
		if err != nil {
			return nil, err
		}
		real := path.Join(dir, name)
		if _, ok := written[name]; !ok {
			if err := d.remove(real); err != nil {
				return nil, err
			}
			continue
		}
		st, err := d.root.Lstat(real)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil && isDir(st) {
			more = append(more, real)
		}
	}
	delete(d.written, dir)
	return more, d.owns(dir)
}

// owns notes that a directory holds nothing of lower layers, now and for good:
// whatever takes its place later is this layer's.
func (d *Directory) owns(real string) error {
	if _, ok := d.own[real]; ok {
		return nil
	}
	d.own[real] = struct{}{}
	return d.retain(real)
}

// wrote notes that this layer wrote real, and so has something to keep in all
// directories above it.
func (d *Directory) wrote(real string) error {
	for real != "." {
		dir, base := path.Dir(real), path.Base(real)
		if _, ok := d.own[dir]; ok {
			return nil
		}
		names := d.written[dir]
		if names == nil {
			names = make(map[string]struct{})
			d.written[dir] = names
			if err := d.retain(dir); err != nil {
				return err
			}
		}
		if _, ok := names[base]; ok {
			return nil
		}
		names[base] = struct{}{}
		if err := d.retain(base); err != nil {
			return err
		}
		real = dir
	}
	return nil
}

func (d *Directory) finish(res *Result) error {
	if err := d.settle(); err != nil {
		return err
	}
	d.result(res)
	return nil
}

// isWhiteout knows the character device 0/0 that deletes on an overlay.
func isWhiteout(st unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}
