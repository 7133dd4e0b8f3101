package layertest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// CompareOptions say what may differ; the zero value compares everything.
type CompareOptions struct {
	// IgnoreTimes, if set, is asked whether the time of modification of a name
	// (relative, slash-separated) may differ. For directories that a layer
	// only implied it usually may.
	IgnoreTimes func(name string, dir bool) bool
	// IgnoreRoot leaves out the attributes of the two roots themselves.
	IgnoreRoot bool
	// Uppers is for an overlay's own directories: the attributes
	// `trusted.overlay.*`, which show nowhere else, are compared too, and the
	// times of whiteouts are not.
	Uppers bool
	// FileLinks counts hard links among regular files only. Copies of trees,
	// such as native snapshots (containerd's too) have below their layer, part
	// those of other types.
	FileLinks bool
}

// DirTimes ignores the times of all directories.
func DirTimes(_ string, dir bool) bool { return dir }

// Difference is one way in which two trees differ.
type Difference struct {
	Name string // relative; "." is the root
	What string // "type", "mode", "owner", "device", "size", "content", "target", "times", "xattrs", "links", or "only in a", "only in b"
	A, B string
}

func (d Difference) String() string {
	return fmt.Sprintf("%q: %s: %s | %s", d.Name, d.What, d.A, d.B)
}

// Compare compares two trees entry by entry: type, mode, owner, device number,
// content, link target, times of modification, extended attributes (those of
// `trusted.overlay.` apart), and which names are hard links to each other.
func Compare(a, b string, opts CompareOptions) ([]Difference, error) {
	ta, err := read(a, opts.Uppers)
	if err != nil {
		return nil, err
	}
	tb, err := read(b, opts.Uppers)
	if err != nil {
		return nil, err
	}
	var out []Difference
	names := maps.Clone(ta)
	maps.Copy(names, tb)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		x, inA := ta[name]
		y, inB := tb[name]
		switch {
		case !inA:
			out = append(out, Difference{name, "only in b", "", y["type"]})
			continue
		case !inB:
			out = append(out, Difference{name, "only in a", x["type"], ""})
			continue
		case name == "." && opts.IgnoreRoot:
			continue
		}
		for _, what := range slices.Sorted(maps.Keys(x)) {
			if what == "times" && opts.IgnoreTimes != nil && opts.IgnoreTimes(name, x["type"] == "dir") {
				continue
			}
			if what == "links" && opts.FileLinks && x["type"] != "file" {
				continue
			}
			if x[what] != y[what] {
				out = append(out, Difference{name, what, x[what], y[what]})
			}
		}
	}
	return out, nil
}

// Snapshot describes every entry of a tree, with inode numbers and times of
// change, so that a test can assert that nothing in it was touched.
func Snapshot(dir string) (map[string]string, error) {
	out := make(map[string]string)
	t, err := read(dir, false)
	if err != nil {
		return nil, err
	}
	for name, e := range t {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			return nil, err
		}
		out[name] = fmt.Sprint(e, st.Ino, st.Nlink, st.Ctim)
	}
	return out, nil
}

// read describes each entry of a tree in words that can be compared.
func read(root string, uppers bool) (map[string]map[string]string, error) {
	tree := make(map[string]map[string]string)
	first := make(map[[2]uint64]string) // hard links: the first name of each file
	err := filepath.WalkDir(root, func(full string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, full)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			return fmt.Errorf("lstat %s: %w", full, err)
		}
		e, err := describe(full, st, uppers)
		if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			id := [2]uint64{uint64(st.Dev), st.Ino}
			if first[id] == "" {
				first[id] = name
			}
			e["links"] = first[id]
		}
		tree[name] = e
		return nil
	})
	return tree, err
}

func describe(full string, st unix.Stat_t, uppers bool) (map[string]string, error) {
	e := map[string]string{
		"mode":  fmt.Sprintf("%#o", st.Mode&0o7777),
		"owner": fmt.Sprintf("%d:%d", st.Uid, st.Gid),
		"times": fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec),
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e["type"] = "dir"
	case unix.S_IFREG:
		e["type"] = "file"
		e["size"] = fmt.Sprint(st.Size)
		e["content"], err = sum(full)
	case unix.S_IFLNK:
		e["type"] = "symlink"
		e["target"], err = os.Readlink(full)
	case unix.S_IFIFO:
		e["type"] = "fifo"
	case unix.S_IFCHR, unix.S_IFBLK:
		e["type"] = fmt.Sprintf("device %#o", st.Mode&unix.S_IFMT)
		e["device"] = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		if uppers && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
			delete(e, "times") // nobody sees those of a whiteout
		}
	default:
		e["type"] = fmt.Sprintf("%#o", st.Mode&unix.S_IFMT)
	}
	if err != nil {
		return nil, err
	}
	e["xattrs"], err = xattrs(full, uppers)
	return e, err
}

func sum(full string) (string, error) {
	f, err := os.Open(full)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

func xattrs(full string, uppers bool) (string, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(full, buf)
	if errors.Is(err, unix.ENOTSUP) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("llistxattr %s: %w", full, err)
	}
	keys := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(keys)
	var out strings.Builder
	for _, key := range keys {
		if key == "" || !uppers && strings.HasPrefix(key, "trusted.overlay.") {
			continue
		}
		n, err := unix.Lgetxattr(full, key, buf)
		if err != nil {
			return "", fmt.Errorf("lgetxattr %s %s: %w", full, key, err)
		}
		fmt.Fprintf(&out, "%s=%q ", key, buf[:n])
	}
	return out.String(), nil
}
