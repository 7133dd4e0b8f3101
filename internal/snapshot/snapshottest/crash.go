//go:build fault

package snapshottest

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/linux/mount/mounttest"
)

// victim tells a process on which root it is to run until it is killed.
const victim = "HOLDFAST_SNAPSHOTTEST_VICTIM"

// points are the fault points that every driver passes while Fill runs, with
// how often at least.
var points = map[string]int{
	"snapshot.index.create.written":  1,
	"snapshot.index.committing":      5,
	"snapshot.index.committed":       5,
	"snapshot.dirs.create.made":      3,
	"snapshot.dirs.create.renamed":   3,
	"snapshot.dirs.create.synced":    3,
	"snapshot.dirs.commit.finished":  2,
	"snapshot.dirs.remove.unindexed": 1,
	"snapshot.dirs.remove.renamed":   1,
}

// Crash kills a process at every fault point, each time that it comes by, and
// lets it fail there too. Afterwards one Cleanup makes keys and directories
// agree, and the same work succeeds once what was done is removed. Its test must be
// called TestCrash.
func Crash(t *testing.T, s Subject) {
	mounttest.Root(t)
	if root := os.Getenv(victim); root != "" {
		d, err := s.Open(root)
		if err == nil {
			err = Fill(t.Context(), d)
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	for point, times := range points {
		for n := range times {
			for _, action := range []string{"kill", "error"} {
				at := point + "#" + string(rune('1'+n))
				t.Run(at+" "+action, func(t *testing.T) { crashAt(t, s, at+"="+action, action == "kill") })
			}
		}
	}
}

func crashAt(t *testing.T, s Subject, rule string, killed bool) {
	root := filepath.Join(t.TempDir(), "driver")
	p, err := os.StartProcess("/proc/self/exe", []string{"victim", "-test.run=^TestCrash$"}, &os.ProcAttr{
		Env: append(os.Environ(), victim+"="+root, fault.Env+"="+rule),
	})
	if err != nil {
		t.Fatal(err)
	}
	state, err := p.Wait()
	if err != nil {
		t.Fatal(err)
	}
	status := state.Sys().(syscall.WaitStatus)
	if killed != status.Signaled() || status.Signaled() && status.Signal() != syscall.SIGKILL || state.Success() {
		t.Fatalf("the victim of %s ended with %v", rule, state)
	}
	d, err := s.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	Check(t, root, s.Bare)
	if d, err = s.Open(root); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"gone", "bottom", "view", "active", "top", "b", "base", "a"} {
		if err := d.Remove(t.Context(), key); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("remove %s: %v", key, err)
		}
	}
	if err := Fill(t.Context(), d); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	Check(t, root, s.Bare)
}
