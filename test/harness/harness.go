// Package harness builds and runs the daemon for tests.
//
// It knows the daemon from outside only: its flags, its socket, containerd's
// API and the files it leaves. A test package that uses it has
//
//	func TestMain(m *testing.M) { os.Exit(harness.Run(m)) }
package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// privateEnv is set in the copy of the test process that has its own mounts.
const privateEnv = "HOLDFAST_TEST_PRIVATE"

// scratch holds what all tests of a run share; Run makes and removes it.
var scratch string

// Run runs the tests in a mount namespace of their own: whatever a daemon or a test mounts is
// gone with the last of their processes, even after a SIGKILL. It returns the exit code.
func Run(m *testing.M) int {
	if os.Geteuid() == 0 && os.Getenv(privateEnv) == "" {
		return runPrivately()
	}
	dir, err := os.MkdirTemp("", "holdfast-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	scratch = dir
	return m.Run()
}

func runPrivately() int {
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), privateEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests in their own mount namespace:", err)
		return 1
	}
	return 0
}

// NeedRoot skips a test that mounts or runs the daemon when that can't work.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the daemon and its mounts need root")
	}
}

// module is the one whose commands are built, also from a test that lives in another.
const module = "github.com/holdfast-dev/holdfast"

// BinEnv names a directory with built commands, to test those instead of building.
const BinEnv = "HOLDFAST_TEST_BIN"

// Binaries are the paths of the commands.
type Binaries struct {
	Daemon string // holdfastd
	CLI    string // holdfast
}

var (
	buildMu sync.Mutex
	built   = make(map[string]Binaries)
)

// Build builds the commands, once per test run and set of build tags ("fault", or none).
func Build(t testing.TB, tags ...string) Binaries {
	t.Helper()
	buildMu.Lock()
	defer buildMu.Unlock()
	key := strings.Join(tags, ",")
	if b, ok := built[key]; ok {
		return b
	}
	if scratch == "" {
		t.Fatal("TestMain of this package does not call harness.Run")
	}
	dir := filepath.Join(os.Getenv(BinEnv), key)
	if os.Getenv(BinEnv) == "" {
		dir = filepath.Join(scratch, "bin", key)
		build(t, dir, key)
	}
	b := Binaries{Daemon: filepath.Join(dir, "holdfastd"), CLI: filepath.Join(dir, "holdfast")}
	built[key] = b
	return b
}

func build(t testing.TB, dir, tags string) {
	t.Helper()
	source, err := Source()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-tags", tags, "-o", dir, "./cmd/holdfastd", "./cmd/holdfast")
	cmd.Dir = source
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the commands: %v\n%s", err, out)
	}
}

// Source returns the directory of the project's module.
func Source() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return "", fmt.Errorf("find the source of %s: %w", module, err)
	}
	return strings.TrimSpace(string(out)), nil
}
