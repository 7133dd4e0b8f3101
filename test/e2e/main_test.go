// Package e2e runs the daemon and the command line as a user would.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/test/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Run(m)) }

// stopsWithin is how long a daemon may take to stop in order, whatever it does.
const stopsWithin = 8 * time.Second

// result is what a command printed, and its exit code.
type result struct {
	out, err string
	code     int
}

// holdfast runs the command line; address may be that of no daemon.
func holdfast(t *testing.T, address string, args ...string) result {
	t.Helper()
	return run(t, exec.Command(harness.Build(t).CLI, append([]string{"--address", address}, args...)...))
}

// holdfastd runs the daemon's program for a command that ends by itself.
func holdfastd(t *testing.T, args ...string) result {
	t.Helper()
	return run(t, exec.Command(harness.Build(t).Daemon, args...))
}

func run(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	return start(t, cmd)()
}

// start starts a command; the func it returns waits for it, a minute at most.
func start(t *testing.T, cmd *exec.Cmd) (wait func() result) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	killer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	return func() (res result) {
		t.Helper()
		defer killer.Stop()
		err := cmd.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			res.code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		res.out, res.err = out.String(), errs.String()
		return res
	}
}

// wants fails unless the command ended with code and printed all of parts to standard output, or to standard error
// where code isn't 0.
func (r result) wants(t *testing.T, code int, parts ...string) {
	t.Helper()
	said := r.out
	if code != 0 {
		said = r.err
	}
	if r.code != code {
		t.Errorf("exit code %d, want %d\n%s%s", r.code, code, r.out, r.err)
	}
	for _, part := range parts {
		if !strings.Contains(said, part) {
			t.Errorf("no %q in\n%s", part, said)
		}
	}
}

// whole fails unless the daemon's store is whole, every blob read.
func whole(t *testing.T, d *harness.Daemon) {
	t.Helper()
	holdfast(t, d.Socket, "store", "check", "--deep").wants(t, 0, "every digest is right")
}

// soon waits for a condition that another process brings about.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for tick := time.NewTicker(5 * time.Millisecond); !ok(); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("never: %s", what)
		}
	}
}
