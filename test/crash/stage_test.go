package crash

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/test/crash/forgetful"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// stage is what a pull is at. Several may be under way at once.
//
// They are told from outside, by what the kernel knows of the daemon and by what lies on
// disk: a test that asked the daemon would believe it, and come too late, since
// a commit is over in a few milliseconds.
type stage string

const (
	fetching   stage = "fetch"  // of a blob a part is here
	emitting   stage = "emit"   // of a layer's tree a part is here
	syncing    stage = "sync"   // a layer is here, and a thread waits for the disk to have it
	committing stage = "commit" // a layer is here, and a thread writes or syncs a database, or syncs the names of blobs
)

var stages = []stage{fetching, emitting, syncing, committing}

// calls returns which stages threads of a process are in by the system calls
// that they are in: syncing and committing.
func calls(pid int) map[stage]bool {
	in := make(map[stage]bool)
	for _, task := range tasks(pid) {
		call, err := os.ReadFile(filepath.Join(task, "syscall"))
		if err != nil {
			continue // the thread is gone
		}
		words := strings.Fields(string(call))
		if len(words) < 2 {
			continue // it is in none
		}
		nr, err := strconv.Atoi(words[0])
		if err != nil {
			continue
		}
		switch nr {
		case unix.SYS_SYNCFS:
			in[syncing] = true
		case unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_PWRITE64:
			fd, _ := strconv.ParseUint(words[1], 0, 64)
			name, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
			if s := stageOf(name); s != "" && (s == committing || nr != unix.SYS_PWRITE64) {
				in[s] = true
			}
		}
	}
	return in
}

// stageOf returns what it means to sync a file, "" if that is nothing of a layer's.
func stageOf(name string) stage {
	switch {
	case strings.HasSuffix(name, ".db"), strings.Contains(name, harness.BlobsDir):
		return committing
	case strings.Contains(name, harness.IngestDir), strings.Contains(name, harness.OverlayDir):
		return syncing
	}
	return ""
}

func tasks(pid int) []string {
	names, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	return names
}

// sight is how often a stage was seen to begin, and how long it lasted in all.
type sight struct {
	times   int
	lasting time.Duration
}

// pulling is a pull under way.
type pulling struct {
	victim   *victim
	registry *harness.Registry
	daemon   *harness.Daemon
	root     string
	ref      string
	start    time.Time
	over     chan struct{} // closed when err is set
	err      error
}

// begin starts a pull onto a new disk.
func (v *victim) begin(t *testing.T) *pulling {
	t.Helper()
	device := forgetful.Loop(t, forgetful.Memory(t, v.diskSize))
	mkfs(t, ext4, device)
	dir, _ := forgetful.Mount(t, device, ext4.name, "")
	p := &pulling{victim: v, registry: harness.NewRegistry(t), root: filepath.Join(dir, "root"), over: make(chan struct{})}
	p.ref = p.registry.Push(v.img, "victim")
	p.daemon = harness.Start(t, harness.Options{Root: p.root})
	p.start = time.Now()
	go func() {
		defer close(p.over)
		p.err = p.daemon.Pull(p.ref)
	}()
	return p
}

// reach returns at a moment of the pull, or when it is over.
func (p *pulling) reach(m moment) {
	since := p.start
	if m.in != "" {
		p.watch(m.in, m.nth)
		since = time.Now()
	}
	select {
	case <-time.After(time.Until(since.Add(m.after))):
	case <-p.over:
	}
}

// pollEvery is short against a sync of a small file.
const pollEvery = 100 * time.Microsecond

// watch sees which stages come and go, until one begins for the nth time or the pull is over.
func (p *pulling) watch(in stage, nth int) map[stage]sight {
	seen := make(map[stage]sight)
	before, last := map[stage]bool{}, time.Now()
	for {
		select {
		case <-p.over:
			return seen
		case <-time.After(pollEvery):
		}
		under := calls(p.daemon.PID())
		now := time.Now()
		if len(under) > 0 && !p.arrived() {
			clear(under)
		}
		for s := range under {
			sight := seen[s]
			if !before[s] {
				sight.times++
			}
			sight.lasting += now.Sub(last)
			seen[s] = sight
			if s == in && !before[s] && sight.times == nth {
				return seen
			}
		}
		before, last = under, now
	}
}

// arrived reports whether all of a layer's blob is here.
func (p *pulling) arrived() bool {
	ingests, _ := filepath.Glob(filepath.Join(p.root, harness.IngestDir, "*", "data"))
	for _, layer := range p.victim.img.Layers {
		blob := filepath.Join(p.root, harness.BlobsDir, layer.Digest.Algorithm().String(), layer.Digest.Encoded())
		for _, name := range append(ingests, blob) {
			if info, err := os.Stat(name); err == nil && info.Size() == layer.Size {
				return true
			}
		}
	}
	return false
}

// freeze stops the daemon at once and returns what was under way. A thread that the disk
// keeps waiting stops when it is through, and is found in its call by then.
func (p *pulling) freeze(t *testing.T) map[stage]bool {
	t.Helper()
	pid := p.daemon.PID()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	under := calls(pid)
	for deadline := time.Now().Add(time.Minute); !stopped(pid); time.Sleep(pollEvery) {
		maps.Copy(under, calls(pid))
		if time.Now().After(deadline) {
			t.Fatal("the daemon does not stop")
		}
	}
	maps.Copy(under, calls(pid))
	if !p.arrived() {
		clear(under)
	}
	kept := keptBytes(t, p.root, p.victim.img)
	for _, layer := range p.victim.img.Layers {
		if n := kept[layer.Digest]; n > 0 && n < layer.Size {
			under[fetching] = true
		}
	}
	for _, size := range treeSizes(t, p.root) {
		if size.entries > 1 && !p.victim.trees[size] {
			under[emitting] = true
		}
	}
	return under
}

func stopped(pid int) bool {
	for _, task := range tasks(pid) {
		stat, err := os.ReadFile(filepath.Join(task, "stat"))
		if err != nil {
			continue
		}
		if _, rest, ok := strings.Cut(string(stat), ") "); ok && !strings.ContainsAny(rest[:1], "TZX") {
			return false
		}
	}
	return true
}

// treeSize tells the trees of different layers apart, and whole ones from those in the making.
type treeSize struct {
	entries int
	bytes   int64
}

// treeSizes measures each layer's tree below a root.
func treeSizes(t *testing.T, root string) (sizes []treeSize) {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(root, harness.OverlayDir, "*", "fs"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		var size treeSize
		err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			size.entries++
			if entry.Type().IsRegular() {
				info, err := entry.Info()
				if err != nil {
					return err
				}
				size.bytes += info.Size()
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, size)
	}
	return sizes
}
