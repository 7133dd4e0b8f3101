package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var scenarios = []string{"a", "b", "c", "d", "e"}

// The file systems a root can be on.
const (
	tmpfs = "tmpfs"
	ext4  = "ext4"
)

// Sizes of fresh file systems; neither takes more than what is written.
const (
	tmpfsSize = "16g"
	loopSize  = 16 << 30 // bytes
)

// memoryRuns bounds the runs of scenario e, of which only the memory matters.
const memoryRuns = 2

// bench is what all runs share.
type bench struct {
	options
	library               *library
	groups                *groups
	registry              *process
	address               string // of the registry
	hosts                 string // the directory of hosts.toml files
	ourBinary, peerBinary string
}

// sample is the figures of one run.
type sample struct {
	Scenario  string  `json:"scenario"`
	Root      string  `json:"root"`
	Daemon    string  `json:"daemon"`
	Run       int     `json:"run"`
	Wall      float64 `json:"wall_s"`
	CPU       float64 `json:"cpu_s"`
	User      float64 `json:"user_s"`
	System    float64 `json:"system_s"`
	Anon      int64   `json:"anon_bytes"`
	Peak      int64   `json:"peak_bytes"`
	Processes int     `json:"processes"` // the most that were seen at once
}

// wants reports whether v is measured on a root.
func (b *bench) wants(v variant, root string) bool {
	if len(b.daemons) > 0 {
		return slices.Contains(b.daemons, v.name)
	}
	return !v.asked && (root == ext4 || !v.sync)
}

// measure does all runs, prints the tables and writes the JSON file.
func (b *bench) measure(ctx context.Context) error {
	r := newReport(b)
	start := time.Now()
	for _, root := range b.roots {
		for _, scenario := range b.only {
			if err := b.compare(ctx, r, scenario, root); err != nil {
				return errors.Join(fmt.Errorf("scenario %s on %s: %w", scenario, root, err), r.write(b.json))
			}
			r.printTable(scenario, root)
		}
	}
	r.printVerdicts()
	fmt.Printf("\n%s in all; every run is in %s\n", time.Since(start).Round(time.Second), b.json)
	return r.write(b.json)
}

// compare has the daemons take turns; each round starts with another one.
func (b *bench) compare(ctx context.Context, r *report, scenario, root string) error {
	if err := b.library.warm(scenario); err != nil {
		return err
	}
	var turns []variant
	for _, v := range variants {
		if b.wants(v, root) {
			turns = append(turns, v)
		}
	}
	rounds := b.runs
	if scenario == "e" {
		rounds = min(rounds, memoryRuns)
	}
	for round := range rounds {
		for i := range turns {
			v := turns[(round+i)%len(turns)]
			s, err := b.once(ctx, v, scenario, root)
			if err != nil {
				return fmt.Errorf("%s, run %d: %w", v.name, round+1, err)
			}
			s.Run = round + 1
			r.add(s)
		}
	}
	return nil
}

// once is one run of one daemon on an empty root.
func (b *bench) once(ctx context.Context, v variant, scenario, root string, env ...string) (s sample, err error) {
	dir, state, discard, err := b.freshRoot(ctx, root)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, discard()) }()
	d, err := b.startDaemon(ctx, v, dir, state, env...)
	if err != nil {
		return s, err
	}
	running := true
	defer func() {
		if running {
			err = errors.Join(err, d.stop())
		}
	}()
	if s, err = b.timedPull(ctx, d, scenario); err != nil {
		return s, fmt.Errorf("%w (its log is %s)", err, d.log)
	}
	s.Scenario, s.Root, s.Daemon = scenario, root, v.name
	if v.tuned && scenario == "b" && s.Processes < 2 {
		return s, errors.New("no helper was seen at work: is igzip used?")
	}
	running = false
	if err := d.stop(); err != nil {
		return s, err
	}
	return s, b.verify(dir, scenario)
}

// timedPull pulls all images of a scenario at once.
func (b *bench) timedPull(ctx context.Context, d *daemon, scenario string) (s sample, err error) {
	var refs []string
	for _, img := range b.library.of(scenario) {
		refs = append(refs, b.address+"/"+img.Name+":latest")
	}
	user, system, err := d.group.cpuTime()
	if err != nil {
		return s, err
	}
	unwatch := d.group.watch()
	start := time.Now()
	err = d.pull(ctx, refs)
	s.Wall = time.Since(start).Seconds()
	if err == nil {
		err = d.settle(ctx)
	}
	seen, watchErr := unwatch()
	if err := errors.Join(err, watchErr); err != nil {
		return s, err
	}
	userEnd, systemEnd, err := d.group.cpuTime()
	if err != nil {
		return s, err
	}
	s.User, s.System = (userEnd - user).Seconds(), (systemEnd - system).Seconds()
	s.CPU = s.User + s.System
	s.Anon, s.Processes = seen.anon, seen.processes
	s.Peak, err = d.group.peak()
	return s, err
}

// freshRoot makes directories for a daemon's root, on a new file system, and for its state.
func (b *bench) freshRoot(ctx context.Context, kind string) (root, state string, discard func() error, err error) {
	root, state = filepath.Join(b.dir, "root"), filepath.Join(b.dir, "state")
	loop := filepath.Join(b.dir, "loop.img")
	discard = func() error {
		return errors.Join(unmount(root), unmount(state), os.RemoveAll(loop))
	}
	if err := discard(); err != nil {
		return "", "", nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, discard())
		}
	}()
	for _, dir := range []string{root, state} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", "", nil, err
		}
	}
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "mode=755"); err != nil {
		return "", "", nil, fmt.Errorf("mount tmpfs: %w", err)
	}
	if kind == tmpfs {
		if err := unix.Mount("tmpfs", root, "tmpfs", 0, "mode=755,size="+tmpfsSize); err != nil {
			return "", "", nil, fmt.Errorf("mount tmpfs: %w", err)
		}
		return root, state, discard, nil
	}
	if err := os.WriteFile(loop, nil, 0o600); err != nil {
		return "", "", nil, err
	}
	if err := os.Truncate(loop, loopSize); err != nil {
		return "", "", nil, err
	}
	// Without lazy initialisation: the kernel would write in the background of the pull.
	if err := command(ctx, b.dir, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", loop); err != nil {
		return "", "", nil, err
	}
	if err := command(ctx, b.dir, "mount", "-o", "loop", loop, root); err != nil {
		return "", "", nil, err
	}
	unix.Sync()
	return root, state, discard, nil
}

// unmount unmounts what is mounted on dir and removes it; a process that has just ended may be in its way for a moment.
func unmount(dir string) error {
	for tries := 0; ; tries++ {
		switch err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); {
		case err == nil:
			tries = 0 // there may be another below
		case errors.Is(err, unix.EBUSY) && tries < 100:
			time.Sleep(20 * time.Millisecond)
		case errors.Is(err, unix.EINVAL): // nothing is mounted on it
			return os.RemoveAll(dir)
		case errors.Is(err, unix.ENOENT):
			return nil
		default:
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
}

// Where both daemons keep things below their roots.
const (
	blobsDir     = "io.containerd.content.v1.content/blobs/sha256"
	snapshotsDir = "io.containerd.snapshotter.v1.overlayfs/snapshots"
)

// verify compares what is in a root with what was pulled: a daemon that does less than the others is not faster.
func (b *bench) verify(root, scenario string) error {
	var files, bytes int64
	for _, made := range b.library.layersOf(scenario) {
		info, err := os.Stat(filepath.Join(root, blobsDir, made.Desc.Digest.Encoded()))
		if err != nil {
			return fmt.Errorf("after the pull: %w", err)
		}
		if info.Size() != made.Desc.Size {
			return fmt.Errorf("after the pull: blob %s has %d bytes of %d", made.Desc.Digest, info.Size(), made.Desc.Size)
		}
		files += made.Files
		bytes += made.Bytes
	}
	inodes := make(map[uint64]bool)
	err := filepath.WalkDir(filepath.Join(root, snapshotsDir), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		files--
		if !inodes[stat.Ino] {
			bytes -= info.Size()
		}
		if stat.Nlink > 1 {
			inodes[stat.Ino] = true
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("after the pull: %w", err)
	}
	if files != 0 || bytes != 0 {
		return fmt.Errorf("after the pull: %d files and %d bytes are missing among the unpacked ones", files, bytes)
	}
	return nil
}

// takeProfile pulls once by holdfastd with its CPU profile on, and prints where the time went.
func (b *bench) takeProfile(ctx context.Context) error {
	profile := filepath.Join(b.dir, "holdfastd.pprof")
	if err := b.library.warm(b.only[0]); err != nil {
		return err
	}
	s, err := b.once(ctx, variants[0], b.only[0], b.roots[0], "HOLDFAST_CPUPROFILE="+profile)
	if err != nil {
		return err
	}
	fmt.Printf("%s on %s: wall %.2f s, cpu %.2f s (%.2f user, %.2f system)\n", s.Scenario, s.Root, s.Wall, s.CPU, s.User, s.System)
	for _, order := range []string{"-flat", "-cum"} {
		out, err := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", order, "-nodecount=45", b.ourBinary, profile).CombinedOutput()
		if err != nil {
			return fmt.Errorf("read the profile: %w\n%s", err, out)
		}
		fmt.Println(strings.TrimSpace(string(out)) + "\n")
	}
	fmt.Printf("`go tool pprof %s %s` shows more\n", b.ourBinary, profile)
	return nil
}
