package compat

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/test/harness"
)

// tree is all that a file system shows, by slash-separated path; the root is ".".
type tree map[string]node

// node is one file of a tree.
type node struct {
	dir   bool
	what  string // type, mode, owner, device, content, attributes and hard links, as text
	mtime time.Time
}

// ghost is a file that a directory lists and nobody can look at: a whiteout
// where overlayfs expects none.
const ghost = "listed, and not there"

// readTree reads the tree below dir.
func readTree(dir string) (tree, error) {
	read := make(tree)
	names := make(map[uint64][]string) // of each inode
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); errors.Is(err, fs.ErrNotExist) {
			read[rel] = node{what: ghost}
			return nil
		} else if err != nil {
			return fmt.Errorf("stat %s: %w", name, err)
		}
		what := fmt.Sprintf("%s %06o %d:%d", entry.Type(), st.Mode, st.Uid, st.Gid)
		content, err := contentOf(name, &st)
		if err != nil {
			return err
		}
		attributes, err := attributesOf(name)
		if err != nil {
			return err
		}
		what += content + attributes
		if !entry.IsDir() {
			names[st.Ino] = append(names[st.Ino], rel)
		}
		read[rel] = node{entry.IsDir(), what, time.Unix(st.Mtim.Sec, st.Mtim.Nsec).UTC()}
		return nil
	})
	// The number of links that the kernel tells counts names that upper layers hide.
	for _, links := range names {
		for _, name := range links {
			if len(links) > 1 {
				n := read[name]
				n.what += fmt.Sprintf(" linked as %q", links)
				read[name] = n
			}
		}
	}
	return read, err
}

func contentOf(name string, st *unix.Stat_t) (string, error) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		f, err := os.Open(name)
		if err != nil {
			return "", err
		}
		defer f.Close()
		hash := sha256.New()
		if _, err := io.Copy(hash, f); err != nil {
			return "", fmt.Errorf("read %s: %w", name, err)
		}
		return fmt.Sprintf(" %d bytes %.16s", st.Size, hex.EncodeToString(hash.Sum(nil))), nil
	case unix.S_IFLNK:
		target, err := os.Readlink(name)
		return fmt.Sprintf(" -> %q", target), err
	case unix.S_IFCHR, unix.S_IFBLK:
		return fmt.Sprintf(" device %d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
	}
	return "", nil
}

// maxAttributes is the most that the kernel lists or holds for one attribute, in bytes.
const maxAttributes = 64 << 10

func attributesOf(name string) (string, error) {
	list := make([]byte, maxAttributes)
	n, err := unix.Llistxattr(name, list)
	if err != nil {
		return "", fmt.Errorf("list attributes of %s: %w", name, err)
	}
	var b strings.Builder
	keys := strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00")
	slices.Sort(keys)
	for _, key := range keys {
		if key == "" {
			continue
		}
		value := make([]byte, maxAttributes)
		n, err := unix.Lgetxattr(name, key, value)
		if errors.Is(err, syscall.ENODATA) {
			continue
		} else if err != nil {
			return "", fmt.Errorf("attribute %s of %s: %w", key, name, err)
		}
		fmt.Fprintf(&b, " %s=%q", key, value[:n])
	}
	return b.String(), nil
}

// differences says what got has otherwise, by path. Times of directories are
// not compared where timeless says so.
func (want tree) differences(got tree, timeless func(dir string) bool) map[string]string {
	lines := make(map[string]string)
	for name, w := range want {
		g, ok := got[name]
		switch {
		case !ok:
			lines[name] = fmt.Sprintf("missing, want %s", w.what)
		case g.what != w.what:
			lines[name] = fmt.Sprintf("is %s, want %s", g.what, w.what)
		case !g.mtime.Equal(w.mtime) && !(w.dir && timeless(name)):
			lines[name] = fmt.Sprintf("time is %s, want %s", g.mtime.Format(time.RFC3339Nano), w.mtime.Format(time.RFC3339Nano))
		}
	}
	for name, g := range got {
		if _, ok := want[name]; !ok {
			lines[name] = "should not be there, is " + g.what
		}
	}
	return lines
}

// shownDifferences bounds the lines of one failure.
const shownDifferences = 12

// listing is differences as one text.
func listing(lines map[string]string) string {
	var b strings.Builder
	for i, name := range slices.Sorted(maps.Keys(lines)) {
		if i == shownDifferences {
			fmt.Fprintf(&b, "\n  and %d more", len(lines)-i)
			break
		}
		fmt.Fprintf(&b, "\n  %q: %s", shorten(name), lines[name])
	}
	return b.String()
}

func shorten(name string) string {
	const most = 120
	if len(name) <= most {
		return name
	}
	return name[:most/2] + "..." + name[len(name)-most/2:]
}

// imageTree mounts a view of an unpacked image as a container's root and reads it.
func (d *daemon) imageTree(t testing.TB, ns, snapshotter, name string) tree {
	t.Helper()
	ctx := in(t, ns)
	img, err := d.client.GetImage(ctx, name)
	if err != nil {
		t.Fatalf("image %s of %s: %v", name, d.kind, err)
	}
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		t.Fatalf("layers of image %s of %s: %v", name, d.kind, err)
	}
	read, err := d.snapshotTree(t, ns, snapshotter, identity.ChainID(diffIDs).String())
	if err != nil {
		t.Fatalf("read image %s of %s: %v", name, d.kind, err)
	}
	return read
}

// snapshotTree mounts a view of a committed snapshot and reads it.
func (d *daemon) snapshotTree(t testing.TB, ns, snapshotter, name string) (_ tree, err error) {
	t.Helper()
	ctx, done, err := d.client.WithLease(in(t, ns), leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		return nil, fmt.Errorf("make a lease: %w", err)
	}
	defer func() { err = errors.Join(err, done(ctx)) }()
	service := d.client.SnapshotService(snapshotter)
	key := "compat-" + filepath.Base(harness.TempDir(t))
	mounts, err := service.View(ctx, key, name)
	if err != nil {
		return nil, fmt.Errorf("view snapshot %s: %w", name, err)
	}
	defer func() { err = errors.Join(err, service.Remove(ctx, key)) }()
	dir := harness.TempDir(t)
	if err := mount.All(mounts, dir); err != nil {
		return nil, fmt.Errorf("mount snapshot %s: %w", name, err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(dir, 0)) }()
	return readTree(dir)
}

// pull fetches an image and unpacks it as `ctr images pull --local` does: one
// layer after the other, through the daemon's own doors for contents,
// snapshots and differences.
func (d *daemon) pull(t testing.TB, ns, snapshotter, reference string) error {
	t.Helper()
	ctx, done, err := d.client.WithLease(in(t, ns))
	if err != nil {
		return fmt.Errorf("make a lease: %w", err)
	}
	defer done(ctx)
	fetched, err := d.client.Fetch(ctx, reference, containerd.WithResolver(plainResolver()))
	if err != nil {
		return fmt.Errorf("fetch %s: %w", reference, err)
	}
	if err := containerd.NewImage(d.client, fetched).Unpack(ctx, snapshotter); err != nil {
		return fmt.Errorf("unpack %s: %w", reference, err)
	}
	return nil
}
