// Command bench measures pulls by Holdfast and by containerd, side by side.
//
//	make bench                              everything; about half an hour
//	make bench BENCH='-only b -roots tmpfs -runs 3'
//	make bench BENCH=-profile               where holdfastd's CPU time goes in scenario b
//
// The scenarios are
//
//	a  one image of one small layer, about 3 MB compressed
//	b  five layers, about 500 MB: two of Debian packages, one of node modules, one Go tree, one blob that does not compress
//	c  one layer of about 400 MB, with the files of b's first four
//	d  thirty small images at once, which share one layer
//	e  four layers that unpack to 1 GiB each, mostly zeros; for the memory that a pull takes
//
// and the daemons
//
//	ours          holdfastd, built from this tree, with its defaults
//	default       containerd with its defaults and no decompressor on its PATH
//	default-sync  the same with image_pull_with_sync_fs; on ext4 only
//	tuned         containerd with five unpacks at once, blobs fetched in chunks, and igzip
//	tuned-sync    the same with image_pull_with_sync_fs; only when asked for by -daemons
//
// # How the figures are measured
//
// The images are made once, of real files, and kept in the work directory. A
// registry in a process of its own serves them over loopback from the page
// cache, to all daemons alike. Each run mounts an empty tmpfs or makes a new ext4 file system in a
// loop file, starts one daemon on it, waits until it answers and is idle, and
// asks it by CRI's PullImage. The daemons take turns within each round of runs.
// Afterwards the blobs and the number of unpacked files and bytes are compared with the
// image, and everything is thrown away. All mounts are in a mount namespace that ends with the program.
//
// Every daemon has a cgroup of its own, in which its helpers are too, and the registry is not:
//
//	wall  from the first request to the last reply, in seconds
//	cpu   what the cgroup used from the first request until it is idle again, in seconds of one core. What the kernel
//	      does on its own behalf, such as writing dirty pages back, is not in it.
//	anon  the most anonymous memory that the cgroup had, sampled every 10 ms: heaps, stacks and buffers
//	peak  the kernel's high-water mark of the cgroup's memory; it also counts page cache and, on tmpfs, the store itself
//
// Tables show medians. The JSON file has every run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// options are the flags.
type options struct {
	dir     string   // the work directory
	peer    string   // holds containerd
	json    string   // where the figures go
	only    []string // scenarios
	roots   []string
	daemons []string // empty: those that fit the root
	runs    int
	profile bool
	prepare bool
}

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] { // the program starts itself for these
		case "serve":
			exit(serve(os.Args[2], os.Args[3]))
		case "enter":
			exit(enter(os.Args[2], os.Args[3:]))
		}
	}
	opts, err := parseFlags(os.Args[1:])
	if err != nil {
		exit(err)
	}
	if err := unshareMounts(); err != nil {
		exit(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer stop()
	exit(run(ctx, opts))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func parseFlags(args []string) (options, error) {
	var o options
	var only, roots, daemons string
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	flags.StringVar(&o.dir, "dir", "/tmp/holdfast-bench", "work directory; the images stay in it for the next time")
	flags.StringVar(&o.peer, "peer", os.Getenv("HOLDFAST_PEER_DIR"), "directory of containerd's binary (default $HOLDFAST_PEER_DIR, else .tools/bin)")
	flags.StringVar(&o.json, "json", "", "file for all figures (default figures.json in the work directory)")
	flags.StringVar(&only, "only", "a,b,c,d,e", "scenarios")
	flags.StringVar(&roots, "roots", "tmpfs,ext4", "file systems of the root")
	flags.StringVar(&daemons, "daemons", "", "some of ours,default,default-sync,tuned,tuned-sync (default all that fit the root, without tuned-sync)")
	flags.IntVar(&o.runs, "runs", 5, "runs of each daemon in each scenario; e has at most 2")
	flags.BoolVar(&o.profile, "profile", false, "take a CPU profile of holdfastd in the first of -only and print its top, instead of measuring")
	flags.BoolVar(&o.prepare, "prepare", false, "only make the images")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	o.only, o.roots = strings.Split(only, ","), strings.Split(roots, ",")
	if daemons != "" {
		o.daemons = strings.Split(daemons, ",")
	}
	if o.profile && only == flags.Lookup("only").DefValue {
		o.only = []string{"b"}
	}
	if o.peer == "" {
		o.peer = ".tools/bin"
	}
	var err error
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return o, err
	}
	if o.json == "" {
		o.json = filepath.Join(o.dir, "figures.json")
	}
	return o, o.check(flags.Args())
}

func (o options) check(rest []string) error {
	if len(rest) > 0 {
		return fmt.Errorf("unknown arguments %q; `bench -h` lists the flags", rest)
	}
	for _, list := range []struct {
		flag       string
		got, known []string
	}{
		{"only", o.only, scenarios},
		{"roots", o.roots, []string{tmpfs, ext4}},
		{"daemons", o.daemons, variantNames()},
	} {
		for _, word := range list.got {
			if !slices.Contains(list.known, word) {
				return fmt.Errorf("-%s: %q is not one of %s", list.flag, word, strings.Join(list.known, ","))
			}
		}
	}
	if o.runs < 1 {
		return errors.New("-runs: at least 1 is needed")
	}
	if os.Geteuid() != 0 {
		return errors.New("mounts and cgroups need root; run it with sudo")
	}
	return nil
}

// privateEnv is set once the program has a mount namespace of its own.
const privateEnv = "HOLDFAST_BENCH_PRIVATE"

// unshareMounts starts the program again in a mount namespace of its own, so that no mount outlives it.
func unshareMounts() error {
	if os.Getenv(privateEnv) != "" {
		return nil
	}
	runtime.LockOSThread() // exec keeps the namespace of the thread that calls it
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	return syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), privateEnv+"=1"))
}

// run is the whole benchmark.
func run(ctx context.Context, opts options) (err error) {
	unlock, err := lockDir(opts.dir)
	if err != nil {
		return err
	}
	defer unlock()
	lib, err := prepare(ctx, opts.dir)
	if err != nil || opts.prepare {
		return err
	}
	groups, err := newGroups()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, groups.remove()) }()
	b := &bench{options: opts, library: lib, groups: groups}
	if err := b.build(ctx); err != nil {
		return err
	}
	if err := b.startRegistry(ctx); err != nil {
		return err
	}
	defer b.registry.stop()
	if opts.profile {
		return b.takeProfile(ctx)
	}
	return b.measure(ctx)
}

// lockDir makes the work directory and keeps a second benchmark out of it.
func lockDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("another benchmark works in %s: wait for it, or choose another directory by -dir", dir)
	}
	return func() { lock.Close() }, nil
}
