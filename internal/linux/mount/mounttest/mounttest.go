// Package mounttest runs a package's tests in a mount namespace of their own.
package mounttest

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"testing"
)

// inside marks the process that already has its own namespace.
const inside = "HOLDFAST_TEST_MOUNT_NAMESPACE"

// Main runs the tests of m in a process with a private mount namespace, so
// that nothing they mount outlives them. Call it from TestMain:
//
//	func TestMain(m *testing.M) { mounttest.Main(m) }
//
// Who is not root gets no namespace; Root skips the tests that need one.
func Main(m *testing.M) {
	if os.Getuid() != 0 || os.Getenv(inside) != "" {
		os.Exit(m.Run())
	}
	code, err := again()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mount namespace for tests:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

// again runs this very program in a new mount namespace. Go makes all mounts
// in it private before it starts the program.
func again() (int, error) {
	runtime.LockOSThread() // Pdeathsig speaks of the thread that starts the process
	defer runtime.UnlockOSThread()
	p, err := os.StartProcess("/proc/self/exe", os.Args, &os.ProcAttr{
		Env:   append(os.Environ(), inside+"=1"),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return 0, err
	}
	state, err := p.Wait()
	if err != nil {
		return 0, err
	}
	return state.ExitCode(), nil
}

// Root skips a test that mounts when nobody may.
func Root(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root; run make test as root")
	}
}
