package forgetful

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/test/harness"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(harness.Run(m))
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// fileSystem is one that a disk is tried with.
type fileSystem struct {
	name    string
	size    int64
	mkfs    []string
	options string // those that forget the most
	check   func(t *testing.T, device string)
}

var fileSystems = []fileSystem{
	{
		name: "ext4", size: 64 << 20,
		mkfs:    []string{"mkfs.ext4", "-q", "-E", "nodiscard"},
		options: "noauto_da_alloc,commit=1",
		check:   func(t *testing.T, device string) { run(t, "e2fsck", "-f", "-n", device) },
	},
	{
		name: "xfs", size: 512 << 20,
		mkfs:  []string{"mkfs.xfs", "-q", "-K"},
		check: func(t *testing.T, device string) { run(t, "xfs_repair", "-n", device) },
	},
}

// history is what the self-test did, and where in the log.
type history struct {
	synced, unsynced []byte
	afterSync        int // A was fsynced before this record
	afterRename      int // the rename of B had returned before this record
	end              int
}

// play writes A with fsync, then B without, renames it into place, and writes
// everything back at the end.
func play(t *testing.T, disk *Disk, dir string) (h history) {
	t.Helper()
	rnd := rand.NewChaCha8([32]byte{1})
	h.synced, h.unsynced = make([]byte, 300_000), make([]byte, 300_000)
	rnd.Read(h.synced)
	rnd.Read(h.unsynced)

	a, err := os.Create(filepath.Join(dir, "A"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Write(h.synced)
	if err := errors.Join(err, a.Sync(), a.Close()); err != nil {
		t.Fatal(err)
	}
	h.afterSync = disk.Mark(t)

	if err := os.WriteFile(filepath.Join(dir, "B.tmp"), h.unsynced, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "B.tmp"), filepath.Join(dir, "B")); err != nil {
		t.Fatal(err)
	}
	h.afterRename = disk.Mark(t)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		t.Fatal(err)
	}
	h.end = disk.Mark(t)
	return h
}

// TestDiskForgets mounts what power cuts leave: what was fsynced is there at every one
// that came later, what was not is lost at some.
func TestDiskForgets(t *testing.T) {
	harness.NeedRoot(t)
	for _, fsys := range fileSystems {
		t.Run(fsys.name, func(t *testing.T) {
			disk := Open(t, fsys.size)
			run(t, fsys.mkfs[0], append(fsys.mkfs[1:], disk.Device())...)
			dir, unmount := Mount(t, disk.Device(), fsys.name, fsys.options)
			h := play(t, disk, dir)
			unmount()

			var lost, torn, whole int
			for at := h.afterSync; at <= h.end; at++ {
				for _, cut := range []Cut{{At: at}, {At: at, Torn: true, Seed: uint64(at)}} {
					t.Run(fmt.Sprintf("%+v", cut), func(t *testing.T) {
						b := h.inspect(t, disk, fsys, cut)
						switch {
						case b == nil:
							lost++
						case bytes.Equal(b, h.unsynced):
							whole++
						default:
							torn++
						}
					})
				}
			}
			t.Logf("%d records after the fsync: B lost at %d cuts, torn at %d, whole at %d", h.end-h.afterSync, lost, torn, whole)
			if lost == 0 || whole == 0 {
				t.Error("the disk forgets nothing, or everything")
			}
		})
	}
}

// inspect mounts one cut, checks that A is whole and the file system sound, and returns B, nil if it isn't there.
func (h history) inspect(t *testing.T, disk *Disk, fsys fileSystem, cut Cut) []byte {
	t.Helper()
	device := Loop(t, disk.Materialize(t, cut))
	dir, unmount := Mount(t, device, fsys.name, "")
	a, err := os.ReadFile(filepath.Join(dir, "A"))
	if err != nil || !bytes.Equal(a, h.synced) {
		t.Errorf("A was fsynced and is not whole (%d bytes, %v)", len(a), err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "B"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	unmount()
	fsys.check(t, device)
	return b
}

// TestSyncIsAFlush: an fsync in the file system reaches the log as a flush behind the data.
func TestSyncIsAFlush(t *testing.T) {
	harness.NeedRoot(t)
	disk := Open(t, 16<<20)
	dev, err := os.OpenFile(disk.Device(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	start := disk.Mark(t) // the loop device flushes when it is set up
	page := bytes.Repeat([]byte{7}, pageSize)
	if _, err := dev.WriteAt(page, 2*pageSize); err != nil {
		t.Fatal(err)
	}
	if n := disk.Mark(t) - start; n != 0 {
		t.Errorf("%d records before the sync; the page cache should hold the write", n)
	}
	if err := dev.Sync(); err != nil {
		t.Fatal(err)
	}
	var kinds []Kind
	for _, rec := range disk.Log(t)[start:] {
		kinds = append(kinds, rec.Kind)
	}
	if len(kinds) != 2 || kinds[0] != Write || kinds[1] != Flush {
		t.Fatalf("log is %v, want a write and a flush", kinds)
	}
	for at, want := range []byte{0, 7, 7} {
		got := make([]byte, 1)
		if _, err := disk.Materialize(t, Cut{At: start + at}).ReadAt(got, 2*pageSize); err != nil || got[0] != want {
			t.Errorf("after %d records the page holds %d (%v), want %d", at, got[0], err, want)
		}
	}
}
