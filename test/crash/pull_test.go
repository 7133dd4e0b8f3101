package crash

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	content "github.com/containerd/containerd/api/services/content/v1"
	diff "github.com/containerd/containerd/api/services/diff/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-dev/holdfast/test/crash/forgetful"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// TestPullKilled kills the daemon by SIGKILL when a part of an image is there. What
// was fetched is not fetched again, and it is held by a lease that ends.
func TestPullKilled(t *testing.T) {
	harness.NeedRoot(t)
	layers := harness.Random(newSeed(t), 3)
	for _, moment := range []struct {
		name    string
		percent int64
	}{{"early", 5}, {"middle", 50}, {"late", 95}} {
		t.Run(moment.name, func(t *testing.T) {
			t.Parallel()
			reg := harness.NewRegistry(t)
			img := harness.NewImage(t, layers...)
			ref := reg.Push(img, "killed")
			opts := harness.Options{Root: harness.TempDir(t)}
			sent := killDuringPull(t, reg, opts, ref, img.LayerBytes()*moment.percent/100)

			d := harness.Start(t, opts)
			checkStore(t, d)
			checkHeld(t, d)
			if names := d.Images(t); len(names) > 0 {
				t.Errorf("images %v after a pull that did not end", names)
			}
			kept := keptBytes(t, opts.Root, img)
			if lost := sum(sent) - sum(kept); lost > inFlight {
				t.Errorf("%d bytes were sent, %d of them are kept", sum(sent), sum(kept))
			}

			pull(t, d, img, ref)
			for dgst, n := range reg.Served() {
				if want := int64(len(img.Blobs[dgst])) - kept[dgst]; n > want {
					t.Errorf("blob %s: %d bytes fetched again, %d were missing", dgst, n, want)
				}
			}
			dropAll(t, d)
			d.Stop(t)
		})
	}
}

// TestPullKilledAndForgotten kills the daemon in the middle of a pull. Once the lease has ended nothing is left.
func TestPullKilledAndForgotten(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(newSeed(t), 3)...)
	opts := harness.Options{Root: harness.TempDir(t)}
	killDuringPull(t, reg, opts, reg.Push(img, "forgotten"), img.LayerBytes()/2)

	d := harness.Start(t, opts)
	if len(d.Leases(t)) == 0 {
		t.Error("no lease holds what was fetched")
	}
	dropLeases(t, d)
	checkEmpty(t, d)
	checkStore(t, d)
	d.Stop(t)
}

// inFlight bounds what may be on its way from the registry to the files when the
// daemon dies: socket buffers of both sides and the daemon's own, per connection, in bytes.
const inFlight = 2 << 20

// killDuringPull starts a daemon, pulls, and kills it when so many bytes of blobs were sent. It returns what was.
func killDuringPull(t *testing.T, reg *harness.Registry, opts harness.Options, ref string, after int64) map[digest.Digest]int64 {
	t.Helper()
	d := harness.Start(t, opts)
	reached := reg.Hold(after)
	ended := make(chan error, 1)
	go func() { ended <- d.Pull(ref) }()
	select {
	case <-reached:
	case err := <-ended:
		t.Fatalf("the pull ended before %d bytes: %v", after, err)
	}
	waitKept(t, opts.Root, sum(reg.Served())-inFlight)
	d.Kill()
	reg.Release()
	if err := <-ended; err == nil {
		t.Error("the pull succeeded without its daemon")
	}
	return reg.Served()
}

// waitKept waits until a held pull has written what it was sent, or stops getting on.
func waitKept(t *testing.T, root string, atLeast int64) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		n := int64(0)
		files, err := filepath.Glob(filepath.Join(root, harness.IngestDir, "*", "data"))
		if err != nil {
			t.Fatal(err)
		}
		blobs, err := filepath.Glob(filepath.Join(root, harness.BlobsDir, "*", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range append(files, blobs...) {
			if info, err := os.Stat(f); err == nil {
				n += info.Size()
			}
		}
		if n >= atLeast {
			return
		}
	}
}

// keptBytes returns how much of each blob a root has, committed or not.
func keptBytes(t *testing.T, root string, img *harness.Image) map[digest.Digest]int64 {
	t.Helper()
	kept := make(map[digest.Digest]int64)
	refs, err := filepath.Glob(filepath.Join(root, harness.IngestDir, "*", "ref"))
	if err != nil {
		t.Fatal(err)
	}
	for dgst := range img.Blobs {
		if info, err := os.Stat(filepath.Join(root, harness.BlobsDir, dgst.Algorithm().String(), dgst.Encoded())); err == nil {
			kept[dgst] = info.Size()
		}
		for _, file := range refs {
			ref, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(ref), dgst.Encoded()) {
				continue
			}
			if info, err := os.Stat(filepath.Join(filepath.Dir(file), "data")); err == nil {
				kept[dgst] = max(kept[dgst], info.Size())
			}
		}
	}
	return kept
}

func sum(m map[digest.Digest]int64) (n int64) {
	for _, v := range m {
		n += v
	}
	return n
}

// TestFullDisk pulls an image for which there is no room, then makes room. Whether
// the pull is refused, stopped, or told by the kernel is the daemon's business.
func TestFullDisk(t *testing.T) {
	harness.NeedRoot(t)
	layers := harness.Random(newSeed(t), 6)
	zeros := harness.Layer{harness.File("zeros", make([]byte, 40<<20))}
	for _, filled := range []struct {
		when   string
		layers []harness.Layer
		left   int64 // bytes
		// during fills the disk when half of the layers is here.
		during bool
	}{
		{when: "before", layers: layers, left: 6 << 20},
		{when: "before, but for the last of it", layers: layers, left: 8 << 20},
		{when: "before, for what nobody can foresee", layers: []harness.Layer{zeros}, left: 20 << 20},
		{when: "midway", layers: layers, left: 1 << 20, during: true},
		{when: "midway, to the last byte", layers: layers, left: 0, during: true},
	} {
		t.Run(filled.when, func(t *testing.T) {
			t.Parallel()
			dir := smallDisk(t)
			reg := harness.NewRegistry(t)
			img := harness.NewImage(t, filled.layers...)
			ref := reg.Push(img, "big")
			d := harness.Start(t, harness.Options{Root: filepath.Join(dir, "root")})

			before := free(t, dir)
			filler := filepath.Join(dir, "filler")
			if !filled.during {
				fill(t, filler, before-filled.left)
			}
			err := pullHeld(d, reg, ref, img.LayerBytes()/2, func() {
				if filled.during {
					fill(t, filler, free(t, dir)-filled.left)
				}
			})
			checkFull(t, err)
			t.Logf("%d bytes of %d were sent before it failed", sum(reg.Served()), img.LayerBytes())
			checkStore(t, d)
			checkHeld(t, d)
			dropLeases(t, d)
			checkEmpty(t, d)

			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			sync(t, dir)
			if lost := before - free(t, dir); lost > dbGrowth {
				t.Errorf("%d bytes are gone after the failed pull", lost)
			}
			pull(t, d, img, ref)
			d.Stop(t)
		})
	}
}

// TestFullDiskByHand fills the disk by calls that nobody can refuse in advance:
// a blob that is written, then a layer that is unpacked.
func TestFullDiskByHand(t *testing.T) {
	harness.NeedRoot(t)
	dir := smallDisk(t)
	d := harness.Start(t, harness.Options{Root: filepath.Join(dir, "root")})
	ctx, end, err := d.Leased(harness.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	img := harness.NewImage(t, harness.Random(newSeed(t), 1)...)
	layer := img.Layers[0]
	blobs := content.NewContentClient(d.Conn)
	put := func() error {
		body := img.Blobs[layer.Digest]
		return write(ctx, blobs, []*content.WriteContentRequest{
			{Action: content.WriteAction_COMMIT, Ref: "blob", Total: layer.Size, Expected: layer.Digest.String(), Data: body},
		})
	}
	filler := filepath.Join(dir, "filler")

	fill(t, filler, free(t, dir))
	checkFull(t, put())
	checkStore(t, d)
	checkHeld(t, d)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := blobs.Abort(ctx, &content.AbortRequest{Ref: "blob"}); err != nil && status.Code(err) != codes.NotFound {
		t.Error(err)
	}
	if err := put(); err != nil {
		t.Fatal(err)
	}

	prepared, err := snapshots.NewSnapshotsClient(d.Conn).Prepare(ctx, &snapshots.PrepareSnapshotRequest{Snapshotter: snapshotter, Key: "active"})
	if err != nil {
		t.Fatal(err)
	}
	apply := func() error {
		_, err := diff.NewDiffClient(d.Conn).Apply(ctx, &diff.ApplyRequest{Diff: wireDescriptor(layer), Mounts: prepared.Mounts})
		return err
	}
	fill(t, filler, free(t, dir))
	checkFull(t, apply())
	checkStore(t, d)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := apply(); err != nil {
		t.Error(err)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	checkEmpty(t, d)
	d.Stop(t)
}

// smallDisk returns where a new disk is mounted that is soon full.
func smallDisk(t *testing.T) (dir string) {
	t.Helper()
	device := forgetful.Loop(t, forgetful.Memory(t, 64<<20))
	// Blocks kept back for root would let the daemon, which is root, use more than is said to be free.
	mkfs(t, fileSystem{mkfs: append(ext4.mkfs, "-m", "0")}, device)
	dir, _ = forgetful.Mount(t, device, ext4.name, "")
	return dir
}

// checkFull checks that an error tells of a full disk.
func checkFull(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		t.Error("it succeeded on a full disk")
	} else if !strings.Contains(err.Error(), "space") && !strings.Contains(err.Error(), "free") {
		t.Errorf("the error does not speak of space: %v", err)
	}
}

// pullHeld pulls, and does something when so many bytes of blobs were sent, if it comes to that.
func pullHeld(d *harness.Daemon, reg *harness.Registry, ref string, after int64, do func()) error {
	reached := reg.Hold(after)
	ended := make(chan error, 1)
	go func() { ended <- d.Pull(ref) }()
	select {
	case <-reached:
		do()
		reg.Release()
		return <-ended
	case err := <-ended:
		reg.Release()
		return err
	}
}

// dbGrowth bounds what the databases may have grown by, in bytes.
const dbGrowth = 2 << 20

// fill makes a file of so many bytes; where they don't all fit, since a file takes a
// little more than its bytes, one up to the last block of the disk.
func fill(t *testing.T, file string, size int64) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	for block := make([]byte, 4<<10); errors.Is(err, unix.ENOSPC); {
		if _, err := f.Write(block); err != nil {
			return
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

func free(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}
