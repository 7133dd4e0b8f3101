package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// groups makes cgroups in which daemons are measured: in the hierarchies
// cpuacct and memory of version 1, or in version 2.
type groups struct {
	v2   bool
	cpu  string // the directory of ours below the cpuacct hierarchy
	mem  string // and below memory; the same as cpu in version 2
	next int
}

const groupPrefix = "holdfast-bench-"

func newGroups() (*groups, error) {
	cpu, mem, unified, err := hierarchies()
	if err != nil {
		return nil, err
	}
	g := &groups{v2: cpu == "" || mem == ""}
	if g.v2 {
		cpu, mem = unified, unified
	}
	if cpu == "" {
		return nil, errors.New("no cgroup hierarchy is mounted that counts CPU time and memory")
	}
	removeStale(cpu)
	removeStale(mem)
	name := groupPrefix + strconv.Itoa(os.Getpid())
	g.cpu, g.mem = filepath.Join(cpu, name), filepath.Join(mem, name)
	for _, dir := range g.dirs(g.cpu, g.mem) {
		if g.v2 {
			// Whether both are on already is seen when they are read.
			os.WriteFile(filepath.Join(filepath.Dir(dir), "cgroup.subtree_control"), []byte("+cpu +memory"), 0)
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make a cgroup: %w", err)
		}
		if g.v2 {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+cpu +memory"), 0); err != nil {
				return nil, fmt.Errorf("have cgroups count: %w", err)
			}
		}
	}
	return g, nil
}

// hierarchies are the mount points of those that matter, "" for what there isn't.
func hierarchies() (cpu, mem, unified string, err error) {
	file, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", "", "", err
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if fields[2] == "cgroup2" {
			unified = fields[1]
		}
		if fields[2] != "cgroup" {
			continue
		}
		for option := range strings.SplitSeq(fields[3], ",") {
			switch option {
			case "cpuacct":
				cpu = fields[1]
			case "memory":
				mem = fields[1]
			}
		}
	}
	return cpu, mem, unified, nil
}

// removeStale removes what a benchmark has left that was killed.
func removeStale(parent string) {
	left, _ := filepath.Glob(filepath.Join(parent, groupPrefix+"*"))
	for _, dir := range left {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), groupPrefix))
		if err != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		children, _ := filepath.Glob(filepath.Join(dir, "*", "cgroup.procs"))
		for _, child := range children {
			os.Remove(filepath.Dir(child))
		}
		os.Remove(dir)
	}
}

// dirs is both directories, or the one if they are the same.
func (g *groups) dirs(cpu, mem string) []string {
	if g.v2 {
		return []string{cpu}
	}
	return []string{cpu, mem}
}

func (g *groups) remove() error {
	var errs []error
	for _, dir := range g.dirs(g.cpu, g.mem) {
		errs = append(errs, os.Remove(dir))
	}
	return errors.Join(errs...)
}

// group is the cgroup of one run of one daemon.
type group struct {
	*groups
	cpu, mem string
}

func (g *groups) group() (*group, error) {
	g.next++
	name := strconv.Itoa(g.next)
	made := &group{groups: g, cpu: filepath.Join(g.cpu, name), mem: filepath.Join(g.mem, name)}
	for _, dir := range g.dirs(made.cpu, made.mem) {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make a cgroup: %w", err)
		}
	}
	return made, nil
}

// remove removes the cgroup, whose processes have ended or are about to.
func (g *group) remove() error {
	var errs []error
	for _, dir := range g.dirs(g.cpu, g.mem) {
		err := os.Remove(dir)
		for tries := 0; errors.Is(err, syscall.EBUSY) && tries < 100; tries++ {
			time.Sleep(20 * time.Millisecond)
			err = os.Remove(dir)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// argv is the command line that runs another one inside of the group.
func (g *group) argv(argv ...string) []string {
	var files []string
	for _, dir := range g.dirs(g.cpu, g.mem) {
		files = append(files, filepath.Join(dir, "cgroup.procs"))
	}
	return append([]string{"/proc/self/exe", "enter", strings.Join(files, ":")}, argv...)
}

// enter moves this process into cgroups and becomes the command of argv.
func enter(files string, argv []string) error {
	for file := range strings.SplitSeq(files, ":") {
		if err := os.WriteFile(file, []byte("0"), 0); err != nil {
			return fmt.Errorf("enter a cgroup: %w", err)
		}
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

// cpuTime is what the group's processes have used, those that have ended too.
func (g *group) cpuTime() (user, system time.Duration, err error) {
	if g.v2 {
		stat, err := numbers(filepath.Join(g.cpu, "cpu.stat"))
		return time.Duration(stat["user_usec"]) * time.Microsecond, time.Duration(stat["system_usec"]) * time.Microsecond, err
	}
	u, err := number(filepath.Join(g.cpu, "cpuacct.usage_user"))
	if err != nil {
		return 0, 0, err
	}
	s, err := number(filepath.Join(g.cpu, "cpuacct.usage_sys"))
	return time.Duration(u), time.Duration(s), err
}

// peak is the kernel's high-water mark of the group's memory, in bytes.
func (g *group) peak() (int64, error) {
	if g.v2 {
		return number(filepath.Join(g.mem, "memory.peak"))
	}
	return number(filepath.Join(g.mem, "memory.max_usage_in_bytes"))
}

// anonymous is the anonymous memory that the group has now, in bytes.
func (g *group) anonymous() (int64, error) {
	stat, err := numbers(filepath.Join(g.mem, "memory.stat"))
	if g.v2 {
		return stat["anon"], err
	}
	return stat["total_rss"], err
}

// processes is how many the group has now.
func (g *group) processes() (int, error) {
	body, err := os.ReadFile(filepath.Join(g.mem, "cgroup.procs"))
	return strings.Count(string(body), "\n"), err
}

// watched is what only watching shows.
type watched struct {
	anon      int64 // the highest seen, in bytes
	processes int
}

// samplePeriod is how often a group is looked at.
const samplePeriod = 10 * time.Millisecond

// watch samples the group until the returned func is called.
func (g *group) watch() (stop func() (watched, error)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	var seen watched
	go func() {
		tick := time.NewTicker(samplePeriod)
		defer tick.Stop()
		for {
			anon, err := g.anonymous()
			n, err2 := g.processes()
			if err := errors.Join(err, err2); err != nil {
				done <- err
				return
			}
			seen.anon, seen.processes = max(seen.anon, anon), max(seen.processes, n)
			select {
			case <-tick.C:
			case <-ctx.Done():
				done <- nil
				return
			}
		}
	}()
	return func() (watched, error) {
		cancel()
		err := <-done
		return seen, err
	}
}

func number(file string) (int64, error) {
	body, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(body)), 10, 64)
}

// numbers reads a file of lines that are a name and a number.
func numbers(file string) (map[string]int64, error) {
	body, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	found := make(map[string]int64)
	for line := range strings.Lines(string(body)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			if found[name], err = strconv.ParseInt(value, 10, 64); err != nil {
				return nil, fmt.Errorf("read %s: %w", file, err)
			}
		}
	}
	return found, nil
}
