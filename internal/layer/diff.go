package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

// DiffOptions modify Diff; the zero value works.
type DiffOptions struct {
	// SourceDateEpoch, if set, bounds the times of modification from above, so
	// that the same build makes the same archive.
	SourceDateEpoch *time.Time
}

// Diff writes the archive, uncompressed, of what must be applied to the tree
// at lower to get that at upper; lower "" is an empty tree. Entries come in
// the order of their names, each after the directories above it, and times are
// whole seconds; deletions are whiteouts with time zero. So the archive depends
// on the trees alone. Sockets are left out.
//
// upper may be changed meanwhile, also by enemies: what is read lies in it.
func Diff(ctx context.Context, w io.Writer, lower, upper string, opts DiffOptions) error {
	root, err := inroot.Open(upper)
	if err != nil {
		return err
	}
	defer root.Close()
	d := &differ{
		root:    root,
		archive: tar.NewWriter(w),
		opts:    opts,
		written: make(map[string]struct{}),
		names:   make(map[inode]string),
		same:    make(map[inode][]string),
		buf:     make([]byte, copySize),
	}
	err = fs.Changes(ctx, lower, upper, func(kind fs.ChangeKind, name string, _ os.FileInfo, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			name = strings.TrimPrefix(name, "/")
			if err = d.change(kind, name); err != nil {
				err = fmt.Errorf("%q: %w", brief(name), err)
			}
		}
		return err
	})
	if err == nil {
		err = d.archive.Close()
	}
	if err != nil {
		return fmt.Errorf("make layer of the changes in %s: %w", upper, err)
	}
	return nil
}

// differ writes one archive.
type differ struct {
	root    *inroot.Root
	archive *tar.Writer
	opts    DiffOptions
	written map[string]struct{} // directories that have their entry
	names   map[inode]string    // first name written of a file with several
	same    map[inode][]string  // unchanged names, needed once another name changes
	buf     []byte
}

type inode struct{ dev, ino uint64 }

func (d *differ) change(kind fs.ChangeKind, name string) error {
	if kind == fs.ChangeKindDelete {
		return d.write(&tar.Header{
			Typeflag: tar.TypeReg,
			Name:     path.Join(path.Dir(name), whiteoutPrefix+path.Base(name)),
			ModTime:  time.Unix(0, 0),
			Format:   tar.FormatPAX,
		}, nil)
	}
	st, err := d.root.Lstat(name)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFSOCK {
		return nil
	}
	id := inode{uint64(st.Dev), st.Ino}
	several := !isDir(st) && st.Nlink > 1
	if kind == fs.ChangeKindUnmodified && (!several || d.names[id] == "") {
		if several {
			d.same[id] = append(d.same[id], name)
		}
		return nil
	}
	if first := d.names[id]; several && first != "" {
		return d.link(name, first, st)
	}
	if err := d.object(name, st); err != nil || !several {
		return err
	}
	d.names[id] = name
	for _, other := range d.same[id] {
		if err := d.link(other, name, st); err != nil {
			return err
		}
	}
	delete(d.same, id)
	return nil
}

// object writes the entry of an object with its own content.
func (d *differ) object(name string, st unix.Stat_t) error {
	if _, ok := d.written[name]; ok {
		return nil
	}
	hdr := d.header(name, st)
	if err := d.xattrs(hdr, name); err != nil {
		return err
	}
	switch hdr.Typeflag = kindOf(st); hdr.Typeflag {
	case tar.TypeDir:
		hdr.Name += "/"
		d.written[name] = struct{}{}
	case tar.TypeSymlink:
		var err error
		if hdr.Linkname, err = d.root.Readlink(name); err != nil {
			return err
		}
	case tar.TypeChar, tar.TypeBlock:
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case tar.TypeReg:
		f, err := d.root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		hdr.Size = st.Size
		return d.write(hdr, f)
	}
	return d.write(hdr, nil)
}

// link writes one more name of a file that is in the archive.
func (d *differ) link(name, first string, st unix.Stat_t) error {
	hdr := d.header(name, st)
	if err := d.xattrs(hdr, name); err != nil {
		return err
	}
	hdr.Typeflag, hdr.Linkname = tar.TypeLink, first
	return d.write(hdr, nil)
}

func (d *differ) header(name string, st unix.Stat_t) *tar.Header {
	mtime := time.Unix(st.Mtim.Unix())
	if limit := d.opts.SourceDateEpoch; limit != nil && mtime.After(*limit) {
		mtime = *limit
	}
	return &tar.Header{
		Name:    name,
		Mode:    int64(st.Mode & 0o7777),
		Uid:     int(st.Uid),
		Gid:     int(st.Gid),
		ModTime: mtime.Truncate(time.Second),
		Format:  tar.FormatPAX,
	}
}

// xattrs adds the extended attributes that belong to the file, and not to the
// machine that it lies on.
func (d *differ) xattrs(hdr *tar.Header, name string) error {
	n, err := d.root.Node(name)
	if err != nil {
		return err
	}
	defer n.Close()
	keys, err := n.Listxattr()
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	for _, key := range keys {
		switch {
		case key == "security.capability", strings.HasPrefix(key, "user.") && !strings.HasPrefix(key, "user.overlay."), strings.HasPrefix(key, "system.posix_acl_"):
		default:
			continue
		}
		value, err := n.Getxattr(key)
		if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
			continue
		}
		if err != nil {
			return err
		}
		if hdr.PAXRecords == nil {
			hdr.PAXRecords = make(map[string]string)
		}
		hdr.PAXRecords[xattrRecord+key] = string(value)
	}
	return nil
}

// write writes an entry, after those of the directories above it.
func (d *differ) write(hdr *tar.Header, body io.Reader) error {
	if dir := path.Dir(strings.TrimSuffix(hdr.Name, "/")); dir != "." {
		if _, ok := d.written[dir]; !ok {
			st, err := d.root.Lstat(dir)
			if err != nil {
				return err
			}
			if err := d.object(dir, st); err != nil {
				return err
			}
		}
	}
	if err := d.archive.WriteHeader(hdr); err != nil {
		return err
	}
	if body == nil {
		return nil
	}
	n, err := io.CopyBuffer(onlyWriter{d.archive}, onlyReader{body}, d.buf)
	if err == nil && n != hdr.Size {
		err = io.ErrUnexpectedEOF
	}
	return err
}
