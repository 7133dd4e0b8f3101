package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report collects samples; its exported fields are the JSON file.
type report struct {
	Started  time.Time `json:"started"`
	Machine  machine   `json:"machine"`
	Versions []string  `json:"versions"`
	Images   []*image  `json:"images"`
	Samples  []sample  `json:"samples"`
	Medians  []sample  `json:"medians"` // Run is the number of runs
	Verdicts []verdict `json:"verdicts"`
}

type machine struct {
	CPU    string  `json:"cpu"`
	Cores  int     `json:"cores"`
	Memory uint64  `json:"memory_bytes"`
	Kernel string  `json:"kernel"`
	Load   float64 `json:"load_average"` // before the first run
}

// verdict is one aim and what was reached.
type verdict struct {
	Aim     string  `json:"aim"`
	Reached float64 `json:"reached"`
	Limit   float64 `json:"limit"`
	Met     bool    `json:"met"`
}

func newReport(b *bench) *report {
	r := &report{Started: time.Now(), Images: b.library.Images, Machine: thisMachine()}
	for _, binary := range []string{b.ourBinary, b.peerBinary} {
		out, err := exec.Command(binary, "--version").Output()
		if err != nil {
			out = []byte(err.Error())
		}
		r.Versions = append(r.Versions, strings.TrimSpace(string(out)))
	}
	m := r.Machine
	fmt.Printf("%s, %d cores, %d GiB, Linux %s\n%s\n", m.CPU, m.Cores, m.Memory>>30, m.Kernel, strings.Join(r.Versions, "\n"))
	if load := r.Machine.Load; load > busyLoad {
		fmt.Printf("the machine is busy (load average %.2f): wall times will say little\n", load)
	}
	for _, scenario := range b.only {
		var packed, unpacked, files int64
		layers := b.library.layersOf(scenario)
		for _, made := range layers {
			packed, unpacked, files = packed+made.Desc.Size, unpacked+made.Bytes, files+made.Files
		}
		fmt.Printf("%s: images %d, layers %d, compressed %.1f MB, unpacked %.1f MB, files %d\n",
			scenario, len(b.library.of(scenario)), len(layers), float64(packed)/1e6, float64(unpacked)/1e6, files)
	}
	return r
}

// busyLoad is the load average from which on a run isn't alone on the machine.
const busyLoad = 0.5

// loadAverage is that of the last minute.
func loadAverage() (load float64) {
	body, err := os.ReadFile("/proc/loadavg")
	if err == nil {
		fmt.Sscan(string(body), &load)
	}
	return load
}

func thisMachine() machine {
	m := machine{CPU: runtime.GOARCH, Cores: runtime.NumCPU(), Load: loadAverage()}
	if body, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(body)) {
			if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.Memory = uint64(info.Totalram) * uint64(info.Unit)
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	return m
}

func (r *report) add(s sample) {
	r.Samples = append(r.Samples, s)
	fmt.Printf("  %s %-5s %-12s run %d: wall %6.2f s, cpu %6.2f s, anon %4d MB, peak %5d MB\n",
		s.Scenario, s.Root, s.Daemon, s.Run, s.Wall, s.CPU, s.Anon>>20, s.Peak>>20)
}

func (r *report) of(scenario, root, daemon string) (found []sample) {
	for _, s := range r.Samples {
		if s.Scenario == scenario && s.Root == root && s.Daemon == daemon {
			found = append(found, s)
		}
	}
	return found
}

// median is the median of each figure on its own; ok is false where nothing was measured.
func (r *report) median(scenario, root, daemon string) (m sample, ok bool) {
	found := r.of(scenario, root, daemon)
	if len(found) == 0 {
		return m, false
	}
	middle := func(figure func(sample) float64) float64 {
		values := make([]float64, len(found))
		for i, s := range found {
			values[i] = figure(s)
		}
		slices.Sort(values)
		n := len(values)
		return (values[(n-1)/2] + values[n/2]) / 2
	}
	return sample{
		Scenario: scenario, Root: root, Daemon: daemon, Run: len(found),
		Wall:   middle(func(s sample) float64 { return s.Wall }),
		CPU:    middle(func(s sample) float64 { return s.CPU }),
		User:   middle(func(s sample) float64 { return s.User }),
		System: middle(func(s sample) float64 { return s.System }),
		Anon:   int64(middle(func(s sample) float64 { return float64(s.Anon) })),
		Peak:   int64(middle(func(s sample) float64 { return float64(s.Peak) })),
	}, true
}

// printTable prints the medians of a scenario, and ours as a share of each other's.
func (r *report) printTable(scenario, root string) {
	ours, haveOurs := r.median(scenario, root, "ours")
	fmt.Printf("\n%s on %s      wall    (from - to)       cpu   anon MB  peak MB   ours/it: wall   cpu  anon  peak\n", scenario, root)
	for _, v := range variants {
		m, ok := r.median(scenario, root, v.name)
		if !ok {
			continue
		}
		r.Medians = append(r.Medians, m)
		runs := r.of(scenario, root, v.name)
		byWall := func(a, b sample) int { return int(1e6 * (a.Wall - b.Wall)) }
		fmt.Printf("%-12s %7.2f (%6.2f -%7.2f) %8.2f %9d %8d", v.name, m.Wall,
			slices.MinFunc(runs, byWall).Wall, slices.MaxFunc(runs, byWall).Wall, m.CPU, m.Anon>>20, m.Peak>>20)
		if haveOurs && !v.ours {
			fmt.Printf("           %9.2f %5.2f %5.2f %5.2f", ours.Wall/m.Wall, ours.CPU/m.CPU, ratio(ours.Anon, m.Anon), ratio(ours.Peak, m.Peak))
		}
		fmt.Println()
	}
	fmt.Println()
}

func ratio(a, b int64) float64 { return float64(a) / float64(b) }

// judge makes the verdicts for which there are figures.
func (r *report) judge() {
	share := func(scenario, daemon, what string, figure func(sample) float64, limit float64) {
		ours, ok1 := r.median(scenario, tmpfs, "ours")
		theirs, ok2 := r.median(scenario, tmpfs, daemon)
		if !ok1 || !ok2 {
			return
		}
		v := verdict{Aim: fmt.Sprintf("%s on tmpfs: %s of containerd %s", scenario, what, daemon), Reached: figure(ours) / figure(theirs), Limit: limit}
		v.Met = v.Reached <= v.Limit
		r.Verdicts = append(r.Verdicts, v)
	}
	wall := func(s sample) float64 { return s.Wall }
	anon := func(s sample) float64 { return float64(s.Anon) }
	peak := func(s sample) float64 { return float64(s.Peak) }
	share("b", "default", "wall", wall, 0.3)
	share("b", "tuned", "wall", wall, 0.5)
	share("b", "default", "anonymous memory", anon, 1)
	share("b", "tuned", "anonymous memory", anon, 1)
	share("b", "default", "peak memory with the store", peak, 1)
	share("b", "tuned", "peak memory with the store", peak, 1)
	share("a", "default", "wall", wall, 0.5)
	share("d", "default", "wall", wall, 0.5)
	for _, root := range []string{tmpfs, ext4} {
		e, ok1 := r.median("e", root, "ours")
		b, ok2 := r.median("b", root, "ours")
		if ok1 && ok2 {
			v := verdict{Aim: "e on " + root + ": our anonymous memory, of that in b", Reached: ratio(e.Anon, b.Anon), Limit: 1.1}
			v.Met = v.Reached <= v.Limit
			r.Verdicts = append(r.Verdicts, v)
		}
	}
}

func (r *report) printVerdicts() {
	r.judge()
	for _, v := range r.Verdicts {
		word := "missed"
		if v.Met {
			word = "met"
		}
		fmt.Printf("%-6s  %.2f (aim: at most %.2f)  %s\n", word, v.Reached, v.Limit, v.Aim)
	}
}

func (r *report) write(file string) error {
	body, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(body, '\n'), 0o644)
}
