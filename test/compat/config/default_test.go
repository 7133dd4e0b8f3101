// Package config tests that containerd reads the config files that Holdfast writes.
package config

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestContainerdReadsOurs gives containerd 2.4.2 the output of `holdfastd
// config default` and `config dump`. It must have nothing to say about them,
// and dump what it dumps without a config file.
func TestContainerdReadsOurs(t *testing.T) {
	dir := t.TempDir()
	holdfastd := filepath.Join(dir, "holdfastd")
	build := exec.Command("go", "build", "-o", holdfastd, "./cmd/holdfastd")
	build.Dir = "../../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build holdfastd: %v\n%s", err, out)
	}
	empty := filepath.Join(dir, "empty.toml")
	if err := os.WriteFile(empty, []byte("version = 4\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := withoutImports(run(t, peer(t), "-c", empty, "config", "dump"))
	for _, command := range []string{"default", "dump"} {
		t.Run(command, func(t *testing.T) {
			ours := filepath.Join(dir, command+".toml")
			text := run(t, holdfastd, "-c", empty, "config", command)
			if err := os.WriteFile(ours, []byte(withoutImports(text)), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := withoutImports(run(t, peer(t), "-c", ours, "config", "dump")); got != want {
				t.Errorf("given `holdfastd config %s`, containerd dumps\n%s\nand without\n%s", command, got, want)
			}
		})
	}
}

// withoutImports drops the line that would bring in the machine's own files.
func withoutImports(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "imports = ") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// run returns what a command prints, and fails on any complaint.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	var out, complaints strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &complaints
	if err := cmd.Run(); err != nil || complaints.Len() > 0 {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, complaints.String())
	}
	return out.String()
}

// peer is the containerd that `make setup` builds.
func peer(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("HOLDFAST_PEER_DIR")
	if dir == "" {
		dir = "../../../.tools/bin"
	}
	path, err := filepath.Abs(filepath.Join(dir, "containerd"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run `make setup`", err)
	}
	return path
}
