package main

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestMain is the program itself where a test asks for it.
func TestMain(m *testing.M) {
	if os.Getenv("HOLDFAST_TEST_MAIN") != "" {
		main()
	}
	os.Exit(m.Run())
}

func program(t *testing.T, args ...string) (cmd *exec.Cmd, errw *bytes.Buffer) {
	t.Helper()
	cmd = exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	errw = &bytes.Buffer{}
	cmd.Env, cmd.Stderr = append(os.Environ(), "HOLDFAST_TEST_MAIN=1"), errw
	return cmd, errw
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

func TestExitCodes(t *testing.T) {
	for _, test := range []struct {
		args []string
		want int
	}{
		{[]string{"--help"}, 0},
		{[]string{"completion", "bash"}, 0},
		{[]string{"images", "--address", "/nonexistent"}, 1},
		{[]string{"frobnicate"}, 2},
	} {
		cmd, errw := program(t, test.args...)
		if err := cmd.Run(); exitCode(err) != test.want {
			t.Errorf("%q: %v, %s", test.args, err, errw)
		}
	}
}

// TestInterrupt sends the signals that users send to a command that waits for
// a daemon which says nothing.
func TestInterrupt(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		cmd, errw := program(t, "--address", socket, "pull", "demo")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil { // it waits now
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		err = cmd.Wait()
		c.Close()
		const want = "holdfast: interrupted; what was fetched is kept for a day, and the same command goes on from there\n"
		if exitCode(err) != 1 || errw.String() != want {
			t.Errorf("%v: %v, %q", sig, err, errw)
		}
	}
}
