// Package crash kills the daemon, cuts its power and fills its disk, and looks at what is left.
//
// `go test ./test/crash` tries 300 power cuts, and every fault point when it is
// first passed; with -thorough 400, and every point at its second and fifth pass too.
package crash

import (
	"errors"
	"flag"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	leases "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/test/crash/forgetful"
	"github.com/holdfast-dev/holdfast/test/harness"
)

var (
	thorough = flag.Bool("thorough", false, "try every fault point at its second and fifth pass too")
	seedFlag = flag.Uint64("seed", 0, "make images and choices from this seed; 0: from a new one")
)

func TestMain(m *testing.M) {
	forgetful.Main()
	os.Exit(harness.Run(m))
}

// newSeed returns the run's seed and prints it.
func newSeed(t *testing.T) uint64 {
	t.Helper()
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-seed %d repeats this run", seed)
	return seed
}

const snapshotter = "overlayfs"

// checkStore is the verdict on a daemon's store: sound by its own check, and by a
// reading of every blob that doesn't trust it.
func checkStore(t *testing.T, d *harness.Daemon) {
	t.Helper()
	if err := errors.Join(d.Check(), d.VerifyBlobs(t)); err != nil {
		t.Errorf("the store is not whole: %v", err)
	}
}

// checkImage reads an image as a container would see it.
func checkImage(t *testing.T, d *harness.Daemon, img *harness.Image, ref string) {
	t.Helper()
	if got := d.Images(t)[ref]; got != img.Target.Digest {
		t.Errorf("image %s is %q, want %s", ref, got, img.Target.Digest)
		return
	}
	tree, err := d.Tree(t, snapshotter, img.ChainID.String())
	if err != nil {
		t.Error(err)
		return
	}
	if lines := img.Tree.Differences(tree); len(lines) > 0 {
		t.Errorf("image %s is not whole:\n%s", ref, strings.Join(lines, "\n"))
	}
}

// pull pulls an image, checks it and the store.
func pull(t *testing.T, d *harness.Daemon, img *harness.Image, ref string) {
	t.Helper()
	if err := d.Pull(ref); err != nil {
		t.Errorf("pull: %v", err)
		return
	}
	checkImage(t, d, img, ref)
	checkStore(t, d)
}

// checkHeld checks that every interrupted write is held by a lease that expires (inv 3).
func checkHeld(t *testing.T, d *harness.Daemon) {
	t.Helper()
	held := make(map[string]bool)
	for _, lease := range d.Leases(t) {
		if lease.Labels["containerd.io/gc.expire"] == "" && !strings.HasPrefix(lease.ID, harness.LeasePrefix) {
			t.Errorf("lease %s has no end", lease.ID)
		}
		reply, err := leases.NewLeasesClient(d.Conn).ListResources(harness.Context(t), &leases.ListResourcesRequest{ID: lease.ID})
		if err != nil {
			t.Fatalf("list what lease %s holds: %v", lease.ID, err)
		}
		for _, resource := range reply.Resources {
			if resource.Type == "ingests" {
				held[resource.ID] = true
			}
		}
	}
	for _, ingest := range d.Ingests(t) {
		if !held[ingest.Ref] {
			t.Errorf("ingest %s is held by no lease", ingest.Ref)
		}
	}
}

// checkRecorded checks that nothing lies on disk without a record.
func checkRecorded(t *testing.T, d *harness.Daemon) {
	t.Helper()
	recorded := d.Blobs(t)
	for _, name := range entries(t, d, filepath.Join(harness.BlobsDir, "sha256")) {
		if _, ok := recorded[digest.NewDigestFromEncoded(digest.SHA256, name)]; !ok {
			t.Errorf("blob %s has no record", name)
		}
	}
	if have, want := entries(t, d, harness.IngestDir), d.Ingests(t); len(have) != len(want) {
		t.Errorf("%d ingests on disk, %d recorded", len(have), len(want))
	}
	if have, want := entries(t, d, harness.OverlayDir), d.Snapshots(t, snapshotter); len(have) != len(want) {
		t.Errorf("%d snapshots on disk, %d recorded", len(have), len(want))
	}
}

// entries returns the names in a directory below the daemon's root, none if there is no such.
func entries(t *testing.T, d *harness.Daemon, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(filepath.Join(d.Root, dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for _, entry := range list {
		names = append(names, entry.Name())
	}
	return names
}

// dropAll removes every image and lease, collects, and checks that nothing is left on disk.
func dropAll(t *testing.T, d *harness.Daemon) {
	t.Helper()
	ctx := harness.Context(t)
	for name := range d.Images(t) {
		if err := d.RemoveImage(ctx, name); err != nil {
			t.Errorf("remove image %s: %v", name, err)
		}
	}
	dropLeases(t, d)
	checkEmpty(t, d)
}

// dropLeases ends every lease, as its expiry would, and collects.
func dropLeases(t *testing.T, d *harness.Daemon) {
	t.Helper()
	ctx := harness.Context(t)
	for _, lease := range d.Leases(t) {
		if _, err := leases.NewLeasesClient(d.Conn).Delete(ctx, &leases.DeleteRequest{ID: lease.ID, Sync: true}); err != nil {
			t.Errorf("delete lease %s: %v", lease.ID, err)
		}
	}
	if err := d.Collect(ctx); err != nil {
		t.Errorf("collect: %v", err)
	}
}

// checkEmpty checks that a store without images and leases has nothing on disk, and nothing mounted.
func checkEmpty(t *testing.T, d *harness.Daemon) {
	t.Helper()
	for _, dir := range []string{harness.BlobsDir + "/sha256", harness.IngestDir, harness.OverlayDir, harness.NativeDir, harness.TrashDir, harness.TmpmountDir} {
		for _, name := range entries(t, d, dir) {
			t.Errorf("left behind: %s/%s", dir, name)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if at := strings.Fields(line)[4]; strings.HasPrefix(at, d.Root+"/") || strings.HasPrefix(at, d.State+"/") {
			t.Errorf("left mounted: %s", at)
		}
	}
}

func mkfs(t *testing.T, fsys fileSystem, device string) {
	t.Helper()
	if out, err := exec.Command(fsys.mkfs[0], append(fsys.mkfs[1:], device)...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", fsys.mkfs[0], device, err, out)
	}
}
