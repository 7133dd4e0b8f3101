package image

import (
	"context"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Disks says where images lie.
type Disks struct {
	ContentDir   string // the directory of the blobs
	Snapshotters map[string]Snapshotter
}

// Snapshotter is one snapshot driver and its directory.
type Snapshotter struct {
	Dir    string
	Driver snapshot.Driver
}

// DiskUsage is what images take up below one directory.
type DiskUsage struct {
	Dir    string
	At     time.Time
	Bytes  int64
	Inodes int64
}

// DiskUsage counts what the images of all namespaces take up, the default
// snapshotter first. No directory is walked: a layer was measured when it was
// unpacked, and blobs have their size. Blobs are counted with the default
// snapshotter, or, if they lie on a disk of their own, last and by themselves.
func (v *View) DiskUsage(ctx context.Context) ([]DiskUsage, error) {
	blobs, err := v.blobUsage(ctx)
	if err != nil {
		return nil, err
	}
	sized := map[sizeKey]snapshot.Usage{}
	var list []DiskUsage
	for _, name := range v.snapshotters() {
		s, ok := v.opts.Disks.Snapshotters[name]
		if !ok {
			continue
		}
		u := DiskUsage{Dir: s.Dir, At: time.Now()}
		if err := v.snapshotUsage(ctx, name, s.Driver, sized, &u); err != nil {
			return nil, err
		}
		list = append(list, u)
	}
	v.sizes.keep(sized)
	if len(list) > 0 && onOneDisk(list[0].Dir, blobs.Dir) {
		list[0].Bytes += blobs.Bytes
		list[0].Inodes += blobs.Inodes
		return list, nil
	}
	return append(list, blobs), nil
}

// onOneDisk compares file systems; what can't be looked at counts as one.
func onOneDisk(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX != nil || errY != nil || x.Sys().(*syscall.Stat_t).Dev == y.Sys().(*syscall.Stat_t).Dev
}

// blobUsage counts each blob once, however many namespaces share it.
func (v *View) blobUsage(ctx context.Context) (DiskUsage, error) {
	u := DiskUsage{Dir: v.opts.Disks.ContentDir, At: time.Now()}
	all, err := v.db.Namespaces(ctx)
	if err != nil {
		return u, err
	}
	seen := map[digest.Digest]bool{}
	for _, ns := range all {
		for b, err := range v.db.Space(ns.Name).Blobs(ctx) {
			if err != nil {
				return u, err
			}
			if seen[b.Digest] {
				continue
			}
			seen[b.Digest] = true
			u.Bytes += b.Size
			u.Inodes++
		}
	}
	return u, nil
}

// snapshotUsage adds up a driver's committed snapshots; active ones are
// containers'.
func (v *View) snapshotUsage(ctx context.Context, name string, drv snapshot.Driver, sized map[sizeKey]snapshot.Usage, sum *DiskUsage) error {
	for in, err := range drv.Walk(ctx) {
		if err != nil {
			return err
		}
		if in.Kind != snapshot.KindCommitted {
			continue
		}
		key := sizeKey{name, in.Key}
		u, ok := v.sizes.look(key)
		if !ok {
			if u, err = drv.Usage(ctx, in.Key); errdefs.IsNotFound(err) {
				continue // removed meanwhile
			} else if err != nil {
				return err
			}
		}
		sized[key] = u
		sum.Bytes += u.Size
		sum.Inodes += u.Inodes
	}
	return nil
}

// sizeKey is a driver and its own key of a snapshot. meta never gives a key out
// twice, so a committed snapshot of one key has one size (inv 4).
type sizeKey struct{ driver, key string }

// sizeCache remembers the sizes of the committed snapshots that the last count
// found, and so never outgrows them.
type sizeCache struct {
	mu    sync.Mutex
	known map[sizeKey]snapshot.Usage
}

func (c *sizeCache) look(key sizeKey) (snapshot.Usage, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	u, ok := c.known[key]
	return u, ok
}

func (c *sizeCache) keep(known map[sizeKey]snapshot.Usage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known = known
}
