package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

const (
	whiteoutPrefix = ".wh."
	// whiteoutMeta begins names that aufs used for itself. Only the opaque
	// marker among them means something, the others are passed over.
	whiteoutMeta   = whiteoutPrefix + whiteoutPrefix
	whiteoutOpaque = whiteoutMeta + ".opq"

	xattrRecord = "SCHILY.xattr." // the PAX records that hold extended attributes
)

// entry is one entry of the archive that is to exist, checked.
type entry struct {
	name   string // clean, relative to the root
	kind   byte   // tar.TypeReg, TypeDir, TypeLink, TypeSymlink, TypeChar, TypeBlock or TypeFifo
	link   string // what a link points to; clean for a hard link
	dev    uint64
	size   int64
	sparse bool // holes of the file are holes of the archive's
	attributes
}

// attributes are what any entry may have.
type attributes struct {
	uid, gid     int
	mode         uint32 // 07777
	atime, mtime unix.Timespec
	xattrs       []xattr
}

type xattr struct {
	key   string
	value []byte
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func exceeded(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrResourceExhausted)...)
}

// cleanName checks and cleans a name of the archive.
func cleanName(name string, limits Limits) (string, error) {
	name, err := inroot.Clean(name)
	if err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if n := strings.Count(name, "/") + 1; n > limits.Depth {
		return "", exceeded("%d directories deep where %d are allowed", n, limits.Depth)
	}
	return name, nil
}

// newEntry checks what the archive says about one object.
func newEntry(hdr *tar.Header, name string, limits Limits) (*entry, error) {
	e := &entry{name: name, kind: hdr.Typeflag, size: hdr.Size}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		// An old GNU sparse file and a "contiguous" one are files like others;
		// containerd refuses both.
		e.kind = tar.TypeReg
		e.sparse = isSparse(hdr)
	case tar.TypeDir, tar.TypeFifo:
	case tar.TypeSymlink:
		if e.link = hdr.Linkname; e.link == "" || strings.IndexByte(e.link, 0) >= 0 {
			return nil, invalid("link to %q", e.link)
		}
	case tar.TypeLink:
		var err error
		if e.link, err = cleanName(hdr.Linkname, limits); err != nil {
			return nil, fmt.Errorf("hard link: %w", err)
		}
	case tar.TypeChar, tar.TypeBlock:
		// The kernel would cut larger numbers to 12 and 20 bits.
		if hdr.Devmajor < 0 || hdr.Devmajor > 0xfff || hdr.Devminor < 0 || hdr.Devminor > 0xfffff {
			return nil, invalid("device number %d:%d", hdr.Devmajor, hdr.Devminor)
		}
		e.dev = unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	default:
		return nil, invalid("entry of unknown type %q", hdr.Typeflag)
	}
	return e, e.attributes.read(hdr, limits)
}

// isSparse reports whether the archive leaves holes out of the file.
func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func (a *attributes) read(hdr *tar.Header, limits Limits) error {
	for _, id := range []int{hdr.Uid, hdr.Gid} {
		// -1 would mean "leave as it is" to chown.
		if id < 0 || int64(id) >= math.MaxUint32 {
			return invalid("owner %d:%d", hdr.Uid, hdr.Gid)
		}
	}
	a.uid, a.gid = hdr.Uid, hdr.Gid
	a.mode = uint32(hdr.Mode & 0o7777)
	a.mtime = timespec(hdr.ModTime)
	a.atime = a.mtime
	if hdr.AccessTime.After(hdr.ModTime) {
		a.atime = timespec(hdr.AccessTime)
	}
	var total int64
	for record, value := range hdr.PAXRecords {
		key, ok := strings.CutPrefix(record, xattrRecord)
		if !ok {
			continue
		}
		if total += int64(len(key) + len(value)); total > limits.XattrBytes {
			return exceeded("more than %d bytes of extended attributes", limits.XattrBytes)
		}
		a.xattrs = append(a.xattrs, xattr{key, []byte(value)})
	}
	slices.SortFunc(a.xattrs, func(x, y xattr) int { return strings.Compare(x.key, y.key) })
	return nil
}

// timespec converts a time of the archive; like containerd's, those before
// 1970 or after 2262 become 1970.
func timespec(t time.Time) unix.Timespec {
	if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, math.MaxInt64)) {
		return unix.Timespec{}
	}
	return unix.NsecToTimespec(t.UnixNano())
}

// whiteoutTarget says what base, a name that begins with the whiteout prefix,
// deletes.
func whiteoutTarget(dir, base string) (string, error) {
	deleted := base[len(whiteoutPrefix):]
	if deleted == "" || deleted == "." || deleted == ".." {
		return "", invalid("whiteout of nothing")
	}
	return path.Join(dir, deleted), nil
}

// hasMeta reports whether a component of a name is one of aufs' own.
func hasMeta(name string) bool {
	return strings.HasPrefix(name, whiteoutMeta) || strings.Contains(name, "/"+whiteoutMeta)
}

// setAll gives a node that was there before its attributes: all of them, since
// even a chown that changes nothing takes away set-id bits and capabilities.
func (a *attributes) setAll(n *inroot.Node, kind byte, private string) error {
	if err := a.set(n, nil, kind, private); err != nil {
		return err
	}
	return a.setTimes(n)
}

// set gives a node its owner, extended attributes and mode. The order matters:
// chown takes away set-id bits and capabilities, and an ACL changes the mode.
//
// fresh describes a node that was just made, or is nil. What such a node has
// already is not set again; but what a user namespace shows as its owner may
// not be the real one.
func (a *attributes) set(n *inroot.Node, fresh *unix.Stat_t, kind byte, private string) error {
	chown := fresh == nil || a.foreign(fresh)
	if chown {
		if err := a.explain(n.Chown(a.uid, a.gid)); err != nil {
			return err
		}
	}
	for _, x := range a.xattrs {
		if err := x.set(n, kind, private); err != nil {
			return err
		}
	}
	if kind != tar.TypeSymlink && (chown || len(a.xattrs) > 0 || fresh.Mode&0o7777 != a.mode) {
		if err := n.Chmod(a.mode); err != nil {
			return fmt.Errorf("set mode %#o: %w", a.mode, err)
		}
	}
	return nil
}

// early is the part of the mode that a new object may have while it has the
// owner that the kernel gave it: nobody must get in who won't be allowed to. So
// set-id bits wait, and what only the group may do, or only the others, since
// in a set-group-id directory the group is at first not even ours.
func (a *attributes) early() uint32 {
	both := a.mode >> 3 & a.mode & 7
	return a.mode&0o700 | both<<3 | both
}

// foreign reports whether the owner is to be another one.
func (a *attributes) foreign(st *unix.Stat_t) bool {
	return int(st.Uid) != a.uid || int(st.Gid) != a.gid || inUserNamespace()
}

// setTimes comes last.
func (a *attributes) setTimes(n *inroot.Node) error {
	if err := n.Utimes(a.atime, a.mtime); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// explain says why an owner could not be set.
func (a *attributes) explain(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EINVAL) && inUserNamespace() {
		return fmt.Errorf("owner %d:%d has no place in this user namespace; give it more ids in /etc/subuid and /etc/subgid: %w", a.uid, a.gid, err)
	}
	return fmt.Errorf("set owner %d:%d: %w", a.uid, a.gid, err)
}

// set sets one attribute. Those of the administrator's namespace are never
// taken from an archive, nor those whose names begin with private; what the
// file system can't hold is left out, as containerd leaves it out.
func (x xattr) set(n *inroot.Node, kind byte, private string) error {
	if strings.HasPrefix(x.key, "trusted.") || private != "" && strings.HasPrefix(x.key, private) {
		return nil
	}
	err := n.Setxattr(x.key, x.value)
	switch {
	case err == nil, errors.Is(err, unix.ENOTSUP):
		return nil
	case errors.Is(err, unix.EPERM) && strings.HasPrefix(x.key, "user.") && kind != tar.TypeReg && kind != tar.TypeDir:
		return nil // only files and directories can have user attributes
	}
	return fmt.Errorf("set attribute %q: %w", x.key, err)
}
