// Package forgetful serves a disk that logs its writes and flushes, so that what a power cut may leave can be mounted.
//
// A file system on Disk.Device works as on any disk. What it does is kept as a
// log; Materialize makes from the first n records of it the disk that a
// power cut at that moment would have left.
package forgetful

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Disk is a block device whose history is known.
type Disk struct {
	device string
	size   int64

	mu  sync.Mutex
	log reader

	// base holds the first done records. It only ever goes forward, so that
	// cuts in ascending order cost the records between them.
	base *os.File
	done int
}

// Open starts a disk of size bytes, all zeros. It goes with the test.
func Open(t testing.TB, size int64) *Disk {
	t.Helper()
	image, log := Memory(t, size), Memory(t, 0)
	dir := t.TempDir()
	startServer(t, dir, image, log)

	file, err := os.OpenFile(filepath.Join(dir, diskName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close() // the loop device has its own reference
	return &Disk{
		device: Loop(t, file),
		size:   size,
		log:    reader{file: log},
		base:   Memory(t, size),
	}
}

// startServer runs this test binary once more, as the server of one disk (Main).
func startServer(t testing.TB, dir string, image, log *os.File) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ready, readyW := pipe(t)
	stopR, stop := pipe(t)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), serveEnv+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{image, log, readyW, stopR}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	readyW.Close()
	stopR.Close()
	t.Cleanup(func() {
		stop.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("server of the forgetful disk: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	ready.Read(make([]byte, 1)) // its end: mounted, or dead
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.FUSE_SUPER_MAGIC {
		t.Fatalf("the forgetful disk is not mounted on %s; is /dev/fuse there, and are we root? (%v)", dir, err)
	}
}

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// Device returns the path of the block device, as /dev/loop3.
func (d *Disk) Device() string { return d.device }

// Mark returns how many records the log has. What a file system had been told
// was done before the call is among them.
func (d *Disk) Mark(t testing.TB) int {
	t.Helper()
	return len(d.Log(t))
}

// Log returns the records so far.
func (d *Disk) Log(t testing.TB) []Record {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.log.catchUp(); err != nil {
		t.Fatalf("read the disk's log: %v", err)
	}
	return d.log.records
}

// Cut says when the power fails, and what the disk had in its cache.
type Cut struct {
	At int // how many records of the log happened

	// Torn: of what was written after the last flush only a random choice
	// of pages reached the platter, in whatever order; Seed chooses. Otherwise
	// every write did.
	Torn bool
	Seed uint64
}

// Materialize returns the disk as a power cut left it: a memory file of the
// disk's size, to be put under a Loop. It is fastest for cuts in ascending order.
func (d *Disk) Materialize(t testing.TB, cut Cut) *os.File {
	t.Helper()
	image := Memory(t, d.size)
	records := d.Log(t)
	if cut.At > len(records) {
		t.Fatalf("cut at record %d of %d", cut.At, len(records))
	}
	whole := cut.At
	if cut.Torn {
		for whole > 0 && records[whole-1].Kind != Flush {
			whole--
		}
	}
	err := d.copyAt(image, whole)
	if err == nil {
		err = d.tear(image, records[whole:cut.At], cut.Seed)
	}
	if err != nil {
		t.Fatalf("materialize %+v: %v", cut, err)
	}
	return image
}

// copyAt brings base to the first n records and copies it to image.
func (d *Disk) copyAt(image *os.File, n int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n < d.done {
		if err := errors.Join(d.base.Truncate(0), d.base.Truncate(d.size)); err != nil {
			return err
		}
		d.done = 0
	}
	for ; d.done < n; d.done++ {
		if rec := d.log.records[d.done]; rec.Kind == Write {
			if err := d.log.replay(d.base, rec, 0, rec.Length); err != nil {
				return err
			}
		}
	}
	return copySparse(image, d.base)
}

// pageSize is what a torn write keeps or loses as one.
const pageSize = 4096

func (d *Disk) tear(image *os.File, records []Record, seed uint64) error {
	rnd := rand.New(rand.NewPCG(seed, 0))
	keep := rnd.Float64() // some disks lose almost all, others almost nothing
	for _, rec := range records {
		for from := int64(0); from < rec.Length; from += pageSize {
			if rnd.Float64() >= keep {
				continue
			}
			if err := d.log.replay(image, rec, from, min(from+pageSize, rec.Length)); err != nil {
				return err
			}
		}
	}
	return nil
}

// copySparse copies what is not a hole.
func copySparse(dst, src *os.File) error {
	for off := int64(0); ; {
		data, err := unix.Seek(int(src.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		} else if err != nil {
			return err
		}
		hole, err := unix.Seek(int(src.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.CopyBuffer(onlyWriter{io.NewOffsetWriter(dst, data)}, onlyReader{io.NewSectionReader(src, data, hole-data)}, make([]byte, 1<<20)); err != nil {
			return err
		}
		off = hole
	}
}

// onlyReader and onlyWriter keep io.CopyBuffer from finding ways around its buffer.
type onlyReader struct{ io.Reader }
type onlyWriter struct{ io.Writer }
