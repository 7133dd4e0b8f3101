package layer

import (
	"archive/tar"
	"errors"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

// writebackFrom is the size from which writing a file to the disk is begun as
// soon as it is there. For smaller ones that costs more than it saves: 15,000
// files of 15 KiB on ext4 took half as long again when it was done for each.
const writebackFrom = 1 << 20

// tree is what the emitters have in common: it writes entries into a
// directory, and counts. Names given to it are real ones (without links)
// wherever they are called real.
type tree struct {
	dir     string
	private string // extended attributes that an archive may not set
	root    *inroot.Root
	limits  Limits

	made     int   // entries and implied directories
	retained int64 // bytes of names kept until the end
	dirs     map[string]*dirTimes
	usage    Usage
	files    int
	bytes    int64

	few fewChanges
}

// dirTimes is what has to be done with a directory when nothing more is
// written into it.
type dirTimes struct {
	atime, mtime unix.Timespec
	explicit     bool  // it has an entry, so the times count
	blocks       int64 // counted in usage already
}

func (t *tree) begin(limits Limits) error {
	root, err := inroot.Open(t.dir)
	if err != nil {
		return err
	}
	t.root = root
	t.limits = limits
	t.dirs = make(map[string]*dirTimes)
	return nil
}

func (t *tree) end() {
	if t.root != nil {
		t.root.Close()
		t.root = nil
	}
}

// count counts one more object against the limit.
func (t *tree) count(n int) error {
	if t.made += n; t.made > t.limits.Entries {
		return exceeded("more than %d entries and directories implied by them", t.limits.Entries)
	}
	return nil
}

// retain counts a name that is kept in memory, with what the map around it takes.
func (t *tree) retain(name string) error {
	if t.retained += int64(len(name)) + 64; t.retained > t.limits.NameBytes {
		return exceeded("more than %d bytes of names to remember", t.limits.NameBytes)
	}
	return nil
}

// parents makes what is missing above name; it returns the real name of what
// lies there, and the directories made.
func (t *tree) parents(name string) (real string, made []string, err error) {
	dir, base := inroot.Split(name)
	above, err := t.root.Real(dir)
	if err != nil {
		made, err = t.root.MkdirAll(dir, 0o755)
		for _, m := range made {
			if err := errors.Join(t.count(1), t.madeDir(m)); err != nil {
				return "", made, err
			}
		}
		if err != nil {
			return "", made, err
		}
		if above, err = t.root.Real(dir); err != nil {
			return "", made, err
		}
	}
	if above == dir {
		return name, made, nil
	}
	return path.Join(above, base), made, nil
}

// madeDir counts a directory that was made without an entry.
func (t *tree) madeDir(real string) error {
	st, err := t.root.Lstat(real)
	if err != nil {
		return err
	}
	return t.newDir(real, st.Blocks, nil)
}

// newDir counts a directory that was made, and keeps the times of its entry.
func (t *tree) newDir(real string, blocks int64, e *entry) error {
	t.usage.Inodes++
	t.usage.Size += blocks * 512
	t.few.dir(real)
	t.few.dir(parentOf(real))
	if d := t.dirs[real]; d != nil { // it was there before, and was removed
		*d = dirTimes{blocks: blocks}
	}
	return t.times(real, blocks, e)
}

// times keeps the times of a directory's entry until the end.
func (t *tree) times(real string, blocks int64, e *entry) error {
	d, ok := t.dirs[real]
	if !ok {
		if err := t.retain(real); err != nil {
			return err
		}
		d = &dirTimes{blocks: blocks}
		t.dirs[real] = d
	}
	if e != nil {
		d.explicit, d.atime, d.mtime = true, e.atime, e.mtime
	}
	return nil
}

// clear removes what stands in the way of an entry, and reports whether a
// directory is there that the entry merges with, or whether something else was.
func (t *tree) clear(real string, kind byte) (merge, replaced bool, err error) {
	st, err := t.root.Lstat(real)
	if errors.Is(err, fs.ErrNotExist) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	if isDir(st) && kind == tar.TypeDir {
		return true, false, nil
	}
	return false, true, t.remove(real)
}

// remove removes a subtree.
func (t *tree) remove(real string) error {
	got, err := t.root.RemoveAll(real)
	t.usage.Inodes -= got.Inodes
	t.usage.Size -= got.Bytes
	t.few.dir(parentOf(real))
	return err
}

// claim has the object of an entry made, at once or, if something stands in the
// way, when that is removed. merged says that it is a directory as the entry is,
// and nothing was made.
func (t *tree) claim(real string, kind byte, make func() error) (merged, replaced bool, err error) {
	if err = make(); !errors.Is(err, fs.ErrExist) {
		return false, false, err
	}
	if merged, replaced, err = t.clear(real, kind); err != nil || merged {
		return merged, replaced, err
	}
	return false, replaced, make()
}

// write makes the object of an entry, in place of what has its name so far; a
// directory that is there keeps its content (merged). Hard links are the
// emitters'.
func (t *tree) write(real string, e *entry, body io.Reader) (merged, replaced bool, err error) {
	switch e.kind {
	case tar.TypeReg:
		var f *inroot.File
		merged, replaced, err = t.claim(real, e.kind, func() (err error) {
			f, err = t.root.Create(real, e.early())
			return err
		})
		if err == nil {
			err = errors.Join(t.fill(f, e, body), f.Close())
			t.few.file(real)
		}
	case tar.TypeDir:
		return t.writeDir(real, e)
	case tar.TypeSymlink:
		if merged, replaced, err = t.claim(real, e.kind, func() error { return t.root.Symlink(e.link, real) }); err == nil {
			err = t.dress(real, e)
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if merged, replaced, err = t.claim(real, e.kind, func() error { return t.root.Mknod(real, nodeType(e.kind), e.dev) }); err == nil {
			err = t.dress(real, e)
		}
	}
	t.few.dir(parentOf(real))
	return merged, replaced, err
}

// fill gives a new file its bytes and attributes.
func (t *tree) fill(f *inroot.File, e *entry, body io.Reader) error {
	var to io.Writer = f
	if e.sparse {
		to = &holeWriter{file: f}
	}
	if e.size > 0 || e.sparse {
		n, err := io.Copy(to, body)
		if err != nil {
			return err
		}
		if n != e.size {
			return io.ErrUnexpectedEOF
		}
	}
	if e.sparse {
		if err := f.Truncate(e.size); err != nil {
			return err
		}
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := e.set(&f.Node, &st, e.kind, t.private); err != nil {
		return err
	}
	if len(e.xattrs) > 0 { // they may take blocks
		if st, err = f.Stat(); err != nil {
			return err
		}
	}
	if err := e.setTimes(&f.Node); err != nil {
		return err
	}
	if e.size >= writebackFrom {
		durable.StartWriteback(f.Fd())
	}
	t.usage.Inodes++
	t.usage.Size += st.Blocks * 512
	t.files++
	t.bytes += e.size
	return nil
}

// writeDir makes a directory, or gives the one that is there its attributes;
// the times are settle's.
func (t *tree) writeDir(real string, e *entry) (merged, replaced bool, err error) {
	var n *inroot.Node
	merged, replaced, err = t.claim(real, e.kind, func() (err error) {
		n, err = t.root.MakeDir(real, e.early())
		return err
	})
	if err != nil {
		return merged, replaced, err
	}
	if merged {
		st, err := t.attributes(real, &e.attributes)
		if err != nil {
			return merged, replaced, err
		}
		t.few.dir(real)
		return merged, replaced, t.times(real, st.Blocks, e)
	}
	st, err := n.Stat()
	if err != nil {
		return merged, replaced, err
	}
	if err := e.set(n, &st, e.kind, t.private); err != nil {
		return merged, replaced, err
	}
	if len(e.xattrs) > 0 {
		if st, err = n.Stat(); err != nil {
			return merged, replaced, err
		}
	}
	return merged, replaced, t.newDir(real, st.Blocks, e)
}

// dress gives a new link, device or FIFO its attributes. A link mostly needs
// none but its times, and so needs no opening.
func (t *tree) dress(real string, e *entry) error {
	var st unix.Stat_t
	var err error
	if e.kind == tar.TypeSymlink && len(e.xattrs) == 0 {
		if st, err = t.root.Lstat(real); err != nil {
			return err
		}
		if e.foreign(&st) {
			if err := e.explain(t.root.Lchown(real, e.uid, e.gid)); err != nil {
				return err
			}
		}
		err = t.root.Lutimes(real, e.atime, e.mtime)
	} else {
		st, err = t.attributes(real, &e.attributes)
	}
	if err != nil {
		return err
	}
	t.usage.Inodes++
	t.usage.Size += st.Blocks * 512
	return nil
}

// attributes sets those of an object that is there, and says what it is now.
func (t *tree) attributes(real string, a *attributes) (unix.Stat_t, error) {
	n, err := t.root.Node(real)
	if err != nil {
		return unix.Stat_t{}, err
	}
	defer n.Close()
	st, err := n.Stat()
	if err != nil {
		return st, err
	}
	if err := a.setAll(n, kindOf(st), t.private); err != nil {
		return st, err
	}
	return n.Stat()
}

// settle gives the directories their times, now that nothing is written into
// them any more, and counts what they have grown.
func (t *tree) settle() error {
	for _, real := range slices.Sorted(maps.Keys(t.dirs)) {
		d := t.dirs[real]
		st, ok, err := t.still(real)
		if err != nil {
			return err
		}
		if !ok || !isDir(st) {
			continue // removed again
		}
		t.usage.Size += (st.Blocks - d.blocks) * 512
		if d.explicit {
			if err := t.root.Lutimes(real, d.atime, d.mtime); err != nil {
				return err
			}
		}
	}
	return nil
}

// still describes what a real name is now; ok is false if there is nothing, or
// it can only be reached through a link that took the place of a directory.
func (t *tree) still(real string) (st unix.Stat_t, ok bool, err error) {
	above := parentOf(real)
	dir, err := t.root.Real(above)
	if err == nil && dir == above {
		if st, err = t.root.Lstat(real); err == nil {
			return st, true, nil
		}
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		err = nil
	}
	return st, false, err
}

// result fills in what was counted.
func (t *tree) result(res *Result) {
	res.Usage, res.Files, res.Bytes = t.usage, t.files, t.bytes
}

// holeWriter leaves holes where whole blocks are zero.
type holeWriter struct{ file *inroot.File }

const holeBlock = 4096

var zeros [holeBlock]byte

func (h *holeWriter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := 0 // how far data goes
		for done+n < len(p) {
			block := p[done+n : min(done+n+holeBlock, len(p))]
			if string(block) == string(zeros[:len(block)]) {
				break
			}
			n += len(block)
		}
		if n > 0 {
			if _, err := h.file.Write(p[done : done+n]); err != nil {
				return done, err
			}
			done += n
			continue
		}
		n = min(holeBlock, len(p)-done)
		if err := h.file.Skip(int64(n)); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func isDir(st unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFDIR }

// parentOf is the directory of a clean name.
func parentOf(name string) string {
	dir, _ := inroot.Split(name)
	return dir
}

// nodeType is the mode's type of a device or FIFO.
func nodeType(kind byte) uint32 {
	switch kind {
	case tar.TypeChar:
		return unix.S_IFCHR
	case tar.TypeBlock:
		return unix.S_IFBLK
	}
	return unix.S_IFIFO
}

// kindOf is the archive's type of what st describes.
func kindOf(st unix.Stat_t) byte {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return tar.TypeDir
	case unix.S_IFREG:
		return tar.TypeReg
	case unix.S_IFLNK:
		return tar.TypeSymlink
	case unix.S_IFCHR:
		return tar.TypeChar
	case unix.S_IFBLK:
		return tar.TypeBlock
	}
	return tar.TypeFifo
}
