package crash

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/test/crash/forgetful"
	"github.com/holdfast-dev/holdfast/test/harness"
)

const (
	cutCount = 200

	// pullSpeed makes the pull outlast a few commits of ext4's journal, each
	// of which may publish names before the bytes behind them.
	pullSpeed = 1 << 20
)

// fileSystem is one on which the power is cut.
type fileSystem struct {
	name    string
	size    int64 // of its disk, in bytes
	mkfs    []string
	options string // of its mount
	cuts    int    // tried when not thorough
}

var ext4 = fileSystem{
	name: "ext4", size: 128 << 20,
	mkfs: []string{"mkfs.ext4", "-q", "-E", "nodiscard"},
	// Those that forget the most: a commit every second, and no help for who
	// renames without fsync.
	options: "noauto_da_alloc,commit=1",
	cuts:    cutCount,
}

var xfs = fileSystem{
	name: "xfs", size: 320 << 20, // mkfs.xfs takes no less than 300 MiB
	mkfs:    []string{"mkfs.xfs", "-q", "-K"},
	options: "nouuid", // several cuts of one disk are mounted at a time
	cuts:    cutCount / 2,
}

// recording is a pull onto a disk that knows its history.
type recording struct {
	fsys  fileSystem
	disk  *forgetful.Disk
	start int // before the daemon's first start on an empty disk
	done  int // after the pull succeeded
	end   int // everything is written back

	img *harness.Image
	ref string
}

// TestPowerCut cuts the power while a daemon starts for the first time and pulls an
// image. Whatever moment it is: the daemon starts, what it lists is whole, a
// pull that had succeeded is still there, and the same pull succeeds now.
func TestPowerCut(t *testing.T) {
	harness.NeedRoot(t)
	seed := newSeed(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(seed, 3)...)
	ref := reg.Push(img, "cut")
	for _, fsys := range []fileSystem{ext4, xfs} {
		t.Run(fsys.name, func(t *testing.T) {
			rec := record(t, fsys, reg, img, ref)
			n := fsys.cuts
			if *thorough {
				n = cutCount
			}
			cuts := chooseCuts(rec.disk.Log(t), rec.start, rec.end, n, seed)
			t.Logf("%d records, pull done after %d; %d cuts", rec.end-rec.start, rec.done-rec.start, len(cuts))
			for _, cut := range cuts {
				name := fmt.Sprint(cut.At)
				if cut.Torn {
					name = fmt.Sprintf("%d torn %d", cut.At, cut.Seed)
				}
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					rec.check(t, cut)
				})
			}
		})
	}
}

func record(t *testing.T, fsys fileSystem, reg *harness.Registry, img *harness.Image, ref string) *recording {
	t.Helper()
	rec := &recording{fsys: fsys, disk: forgetful.Open(t, fsys.size), img: img, ref: ref}
	mkfs(t, fsys, rec.disk.Device())
	dir, unmount := forgetful.Mount(t, rec.disk.Device(), fsys.name, fsys.options)
	defer unmount()
	sync(t, dir)
	rec.start = rec.disk.Mark(t)

	d := harness.Start(t, harness.Options{Root: filepath.Join(dir, "root")})
	reg.Limit(pullSpeed)
	if err := d.Pull(ref); err != nil {
		t.Fatal(err)
	}
	rec.done = rec.disk.Mark(t)
	reg.Limit(0)
	sync(t, dir)
	rec.end = rec.disk.Mark(t)
	checkImage(t, d, img, ref)
	d.Kill()
	return rec
}

// sync writes everything back that a file system holds in memory.
func sync(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
}

// chooseCuts chooses up to n cuts between two records, in ascending order: both sides of
// the flushes first, then others evenly spread, and a quarter torn ones.
func chooseCuts(log []forgetful.Record, start, end, n int, seed uint64) []forgetful.Cut {
	rnd := rand.New(rand.NewPCG(seed, 2))
	var borders, others []int
	for at := start; at <= end; at++ {
		before, after := at > 0 && log[at-1].Kind == forgetful.Flush, at < len(log) && log[at].Kind == forgetful.Flush
		if before || after {
			borders = append(borders, at)
		} else {
			others = append(others, at)
		}
	}
	var cuts []forgetful.Cut
	plain := n - n/4
	for _, at := range spread(borders, plain*2/3) {
		cuts = append(cuts, forgetful.Cut{At: at})
	}
	for _, at := range spread(others, plain-len(cuts)) {
		cuts = append(cuts, forgetful.Cut{At: at})
	}
	for range n / 4 {
		cuts = append(cuts, forgetful.Cut{At: start + rnd.IntN(end-start+1), Torn: true, Seed: rnd.Uint64()})
	}
	slices.SortStableFunc(cuts, func(a, b forgetful.Cut) int { return cmp.Compare(a.At, b.At) })
	return cuts
}

// spread picks n of all, evenly.
func spread(all []int, n int) []int {
	if n >= len(all) {
		return all
	}
	picked := make([]int, n)
	for i := range picked {
		picked[i] = all[i*len(all)/n]
	}
	return picked
}

func (rec *recording) check(t *testing.T, cut forgetful.Cut) {
	device := forgetful.Loop(t, rec.disk.Materialize(t, cut))
	dir, _ := forgetful.Mount(t, device, rec.fsys.name, rec.fsys.options)
	d := harness.Start(t, harness.Options{Root: filepath.Join(dir, "root")})

	names := d.Images(t)
	if _, ok := names[rec.ref]; !ok && cut.At >= rec.done {
		t.Error("the pull had succeeded before the cut, and the image is gone")
	}
	for name := range names {
		checkImage(t, d, rec.img, name)
	}
	checkStore(t, d)
	checkHeld(t, d)

	pull(t, d, rec.img, rec.ref)
	d.Stop(t)
}
