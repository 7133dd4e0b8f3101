package crash

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

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

// TestFullDisk pulls an image for which there is no room, then makes room.
func TestFullDisk(t *testing.T) {
	harness.NeedRoot(t)
	layers := harness.Random(newSeed(t), 6)
	for _, filled := range []struct {
		when string
		left int64 // percent of the layers' bytes
		// during fills the disk when half of the layers is here: no look
		// at the room in advance can save that pull.
		during bool
	}{
		{when: "before", left: 100},
		{when: "before, for all but the last of it", left: 130},
		{when: "midway", left: 10, during: true},
		{when: "midway, to the last byte", left: 0, during: true},
	} {
		t.Run(filled.when, func(t *testing.T) {
			t.Parallel()
			device := forgetful.Loop(t, forgetful.Memory(t, 64<<20))
			mkfs(t, ext4, device)
			dir, _ := forgetful.Mount(t, device, ext4.name, "")
			reg := harness.NewRegistry(t)
			img := harness.NewImage(t, layers...)
			ref := reg.Push(img, "big")
			d := harness.Start(t, harness.Options{Root: filepath.Join(dir, "root")})

			before := free(t, dir)
			filler := filepath.Join(dir, "filler")
			leave := img.LayerBytes() * filled.left / 100
			if !filled.during {
				fill(t, filler, before-leave)
			}
			err := pullHeld(t, d, reg, ref, img.LayerBytes()/2, func() {
				if filled.during {
					fill(t, filler, free(t, dir)-leave)
				}
			})
			if err == nil {
				t.Fatalf("a pull of %d bytes and as much unpacked succeeded with %d free", img.LayerBytes(), leave)
			}
			if !strings.Contains(err.Error(), "space") && !strings.Contains(err.Error(), "room") {
				t.Errorf("the error does not speak of space: %v", err)
			}
			t.Logf("%d bytes were sent before it failed", sum(reg.Served()))
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

// pullHeld pulls, and does something when so many bytes of blobs were sent, if it comes to that.
func pullHeld(t *testing.T, d *harness.Daemon, reg *harness.Registry, ref string, after int64, do func()) error {
	t.Helper()
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

// fill makes a file of so many bytes.
func fill(t *testing.T, file string, size int64) {
	t.Helper()
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
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
