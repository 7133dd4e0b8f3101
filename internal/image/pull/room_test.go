package pull

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// smallDisk mounts a file system of size bytes for one test.
func smallDisk(t *testing.T, kind string, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	at := filepath.Join(dir, "disk")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"-t", "tmpfs", "-o", fmt.Sprintf("size=%d", size), "none", at}
	if kind == "ext4" {
		file := filepath.Join(dir, "image")
		f, err := os.Create(file)
		if err == nil {
			err = f.Truncate(size)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("mkfs.ext4", "-q", "-m", "1", file).CombinedOutput(); err != nil {
			t.Skipf("mkfs.ext4: %v: %s", err, out)
		}
		args = []string{"-o", "loop", file, at}
	}
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(at, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return at
}

// zeros is a layer that unpacks to size bytes and hardly has any.
func zeros(name string, size int) registrytest.Layer {
	return gzipped(layertest.Archive(layertest.File(name, string(make([]byte, size)))))
}

// refusedFor fails unless err is the refusal of an image that is too large.
func refusedFor(t *testing.T, err error, dir string) {
	t.Helper()
	wantError(t, err, "needs about", "free on "+dir, "holdfast rmi")
	if !errdefs.IsResourceExhausted(err) {
		t.Errorf("%v is not of the kind", err)
	}
	if strings.Contains(err.Error(), "no space left") {
		t.Errorf("the disk was full: %v", err)
	}
}

// TestTooLargeFromTheStart: an image that can't fit leaves nothing, and not a byte of its layers is asked for.
func TestTooLargeFromTheStart(t *testing.T) {
	dir := smallDisk(t, "tmpfs", 40<<20)
	h := newHouse(t, settings{dir: dir})
	h.push("small", "1", simple(1, 1<<20))
	h.mustPull("small:1", Request{})
	img := h.push("large", "1", simple(2, 21<<20))
	before := h.dump()
	refusedFor(t, h.pull("large:1", Request{}), dir)
	if n := h.requests(img.Layers[0]); n != 0 {
		t.Errorf("%d requests for the layer", n)
	}
	after := h.dump()
	if len(after.Leases) != 0 || len(after.Ingests) != 0 || len(after.Blobs) != len(before.Blobs) || len(after.Snapshots) != len(before.Snapshots) {
		t.Errorf("left: leases %v, ingests %v, blobs %d instead of %d, snapshots %d instead of %d",
			after.Leases, after.Ingests, len(after.Blobs), len(before.Blobs), len(after.Snapshots), len(before.Snapshots))
	}
	h.whole("small:1", "overlayfs")
	h.mustPull("large:1", Request{NoUnpack: true}) // packed it fits
	h.whole("large:1", "")
}

// TestTooLargeAsItTurnsOut: an image that takes more than its size says is stopped before the disk is full, and gives
// back what it took.
func TestTooLargeAsItTurnsOut(t *testing.T) {
	for _, kind := range []string{"ext4"} { // on a tmpfs zeros are written faster than a busy machine lets anybody look
		t.Run(kind, func(t *testing.T) {
			dir := smallDisk(t, kind, 160<<20)
			h := newHouse(t, settings{dir: dir})
			h.push("small", "1", simple(1, 1<<20))
			h.mustPull("small:1", Request{})
			h.push("bomb", "1", zeros("a", 60<<20), zeros("b", 300<<20))
			least := watchFree(t, dir)
			refusedFor(t, h.pull("bomb:1", Request{}), dir)
			if free := least(); free < 1<<20 {
				t.Errorf("only %d bytes were free at the worst", free)
			}
			h.whole("small:1", "overlayfs")
			h.collect()
			if room, err := durable.RoomOf(dir); err != nil || room.Free < 100<<20 {
				t.Errorf("%d bytes are free afterwards, %v", room.Free, err)
			}
			h.push("fits", "1", zeros("c", 60<<20), simple(3, 4<<20))
			h.mustPull("fits:1", Request{})
			h.whole("fits:1", "overlayfs")
		})
	}
}

// watchFree tells how little was free on the file system of dir since.
func watchFree(t *testing.T, dir string) (least func() int64) {
	stop, done, min := make(chan struct{}), make(chan struct{}), int64(1<<62)
	go func() {
		defer close(done)
		for {
			if room, err := durable.RoomOf(dir); err == nil && room.Free < min {
				min = room.Free
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	return func() int64 { close(stop); <-done; return min }
}

// TestJustFits: what fits is pulled, though two images side by side would be one too many if they took what images
// usually take.
func TestJustFits(t *testing.T) {
	dir := smallDisk(t, "ext4", 128<<20)
	h := newHouse(t, settings{dir: dir})
	h.push("one", "1", simple(1, 10<<20), simple(2, 3<<20))
	h.push("two", "1", simple(3, 12<<20))
	var all sync.WaitGroup
	for _, name := range []string{"one:1", "two:1"} {
		all.Go(func() {
			if err := h.pull(name, Request{}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	h.whole("one:1", "overlayfs")
	h.whole("two:1", "overlayfs")
	if n := len(h.puller.rooms.shares) + len(h.puller.rooms.disks); n != 0 {
		t.Errorf("%d shares and disks are still in the account", n)
	}
}

// books keeps those of pulls of one layer each on a disk of made-up size.
func books(free *int64, sizes ...int64) (*rooms, []*account) {
	m := &rooms{content: "/c", snapshots: map[string]string{"d": "/s"}, disks: make(map[uint64]*filesystem), warn: func(string, ...any) {}}
	m.measure = func(string) (durable.Room, error) { return durable.Room{Device: 1, Size: 1 << 20, Free: *free}, nil }
	var accounts []*account
	for _, size := range sizes {
		j := &job{key: layerKey{driver: "d"}, layer: image.Layer{Desc: oci.Descriptor{Size: size, MediaType: "tar+gzip"}}}
		j.ctx, j.cancel = context.WithCancelCause(context.Background())
		s := &share{rooms: m, holders: 1}
		m.shares = append(m.shares, s)
		if err := m.open(s, j, 0); err != nil {
			panic(err)
		}
		accounts = append(accounts, s.accounts[0])
	}
	return m, accounts
}

// TestEstimates: at the start a pull is refused only if it can't fit at all; later, what was seen counts more and more.
func TestEstimates(t *testing.T) {
	const gb = 1 << 30
	free := int64(100 * gb)
	m, a := books(&free, 10*gb)
	fs := a[0].blobs
	if got := m.need(fs, a[0].share, seen); got != 19*gb {
		t.Errorf("10 GB are said to need %g GB at least, want 19", got/gb)
	}
	step := func(done float64, ratio float64) float64 {
		n := int64(done*10*gb) - a[0].kept
		free -= n + int64(ratio*float64(n))
		a[0].book(int64(done*10*gb), n, true, true)
		if m.look(fs); a[0].job.ctx.Err() != nil {
			t.Fatal(context.Cause(a[0].job.ctx))
		}
		return m.need(fs, a[0].share, seen) / gb
	}
	if got := step(0.1, 10); got < 9*(1+0.9) || got > 9*(1+2) { // ten times as much for a tenth says little of the rest
		t.Errorf("after a tenth that unpacked to ten times as much: %g GB", got)
	}
	if got := step(0.5, 1); got < 5*(1+0.9) || got > 5*(1+2.5) {
		t.Errorf("after a half that unpacked to 2.8 times as much: %g GB", got)
	}
	if got := step(0.9, 4); got < 1*(1+3) || got > 1*(1+3.5) {
		t.Errorf("after nine tenths that unpacked to 3.3 times as much: %g GB", got)
	}
	if got := step(1, 4); got != 0 {
		t.Errorf("after all: %g GB", got)
	}
}

// TestTheYoungerGivesWay: of two pulls that don't fit together the older one goes on.
func TestTheYoungerGivesWay(t *testing.T) {
	const gb = 1 << 30
	free := int64(30 * gb)
	m, a := books(&free, 10*gb, 10*gb)
	if err := m.lacks(a[0].blobs, a[0].share, 1); err != nil {
		t.Errorf("the first: %v", err)
	}
	if err := m.lacks(a[0].blobs, a[1].share, 1); err == nil {
		t.Error("the second is let in, beside what the first has still to write")
	}
	free = 18 * gb // somebody else writes
	if m.look(a[0].blobs); a[1].job.ctx.Err() == nil || a[0].job.ctx.Err() != nil {
		t.Errorf("the younger ends with %v and the older with %v", context.Cause(a[1].job.ctx), context.Cause(a[0].job.ctx))
	}
	if m.look(a[0].blobs); a[0].job.ctx.Err() != nil {
		t.Errorf("the older gives way while the younger gives back: %v", context.Cause(a[0].job.ctx))
	}
	a[1].close()
	if m.look(a[0].blobs); !errdefs.IsResourceExhausted(context.Cause(a[0].job.ctx)) {
		t.Errorf("alone and without room: %v", context.Cause(a[0].job.ctx))
	}
	if a[0].close(); len(m.disks) != 0 || len(m.shares) != 0 {
		t.Errorf("%d disks and %d shares are left", len(m.disks), len(m.shares))
	}
}
