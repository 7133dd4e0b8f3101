// Package compat runs containerd 2.4.2 and Holdfast on the same roots, images
// and command lines, and compares what comes of it.
//
// containerd's binaries are those that `make setup` builds. Every daemon has a
// root, a state directory and a socket of its own, and the mounts of a test
// are in the mount namespace of the test process.
package compat

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/holdfast-dev/holdfast/test/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Run(m)) }

// Deadlines of a daemon and of one command.
const (
	startTimeout   = 30 * time.Second
	stopTimeout    = 30 * time.Second
	commandTimeout = 2 * time.Minute
)

// kind is which of the two daemons.
type kind string

const (
	theirs kind = "containerd"
	ours   kind = "holdfastd"
)

// daemon is one that runs, on a root that outlives it.
type daemon struct {
	kind
	root, socket string
	client       *containerd.Client
	stop         func() // in order; it must end well
	holdfast     *harness.Daemon
}

// root is a store that daemons run on, one after the other.
type root struct{ dir, state string }

func newRoot(t testing.TB) root {
	harness.NeedRoot(t)
	return root{dir: harness.TempDir(t), state: harness.TempDir(t)}
}

// start starts a daemon on r and waits until it serves. It is killed when the
// test ends.
func (r root) start(t testing.TB, which kind) *daemon {
	t.Helper()
	d := &daemon{kind: which, root: r.dir}
	if which == ours {
		d.holdfast = harness.Start(t, harness.Options{Root: r.dir, State: r.state, Config: r.config("4")})
		d.socket, d.stop = d.holdfast.Socket, func() { d.holdfast.Stop(t) }
	} else {
		p := r.startPeer(t)
		d.socket, d.stop = p.socket, func() { p.stop(t) }
	}
	client, err := containerd.New(d.socket, containerd.WithTimeout(startTimeout))
	if err != nil {
		t.Fatalf("connect to %s: %v", which, err)
	}
	t.Cleanup(func() { client.Close() })
	d.client = client
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if serving, err := client.IsServing(ctx); err != nil || !serving {
		t.Fatalf("%s does not serve within %s: %v", which, startTimeout, err)
	}
	return d
}

// config is what both daemons are given. What would touch the machine outside
// of the root is off, and collections come when a test asks for one, and else
// minutes apart.
func (r root) config(version string) string {
	return fmt.Sprintf(`version = %s
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
  "io.containerd.nri.v1.nri", "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.monitor.task.v1.cgroups",
]
[plugins."io.containerd.internal.v1.opt"]
  path = %q
[plugins."io.containerd.gc.v1.scheduler"]
  startup_delay = "0s"
  pause_threshold = 0.00001
`, version, filepath.Join(r.state, "opt"))
}

// peer is a running containerd.
type peer struct {
	socket string
	cmd    *exec.Cmd
	done   chan struct{}
	err    error // how it ended; read after done
	log    string
}

func (r root) startPeer(t testing.TB) *peer {
	t.Helper()
	config := filepath.Join(r.state, "containerd.toml")
	if err := os.WriteFile(config, []byte(r.config("4")), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &peer{socket: filepath.Join(r.state, "c.sock"), done: make(chan struct{}), log: filepath.Join(r.state, "containerd.log")}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p.cmd = exec.Command(peerBinary(t, "containerd"), "--config", config, "--root", r.dir, "--state", filepath.Join(r.state, "c"), "--address", p.socket)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// Pdeathsig comes when the thread that started the process ends, so that thread is kept.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			log, _ := os.ReadFile(p.log)
			t.Logf("containerd on %s:\n%s", r.dir, warnings(log))
		}
	})
	return p
}

// warnings is the part of containerd's log that is worth a look.
func warnings(log []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(log)) {
		if !strings.Contains(line, "level=info") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func (p *peer) stop(t testing.TB) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		if p.err != nil {
			t.Errorf("containerd was asked to stop and ended with %v", p.err)
		}
	case <-time.After(stopTimeout):
		t.Fatalf("containerd was asked to stop and still runs after %s", stopTimeout)
	}
}

// peerBinary is a program that `make setup` builds.
func peerBinary(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("HOLDFAST_PEER_DIR")
	if dir == "" {
		dir = filepath.Join(source(t), ".tools", "bin")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run `make setup`", err)
	}
	return path
}

var source = func() func(t testing.TB) string {
	find := sync.OnceValues(harness.Source)
	return func(t testing.TB) string {
		t.Helper()
		dir, err := find()
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
}()

// output is what a command printed.
type output struct {
	stdout, stderr string
	code           int
}

// ctr runs containerd's own command line against the daemon, in the namespace
// `default` unless the arguments begin with another. What must not fail goes
// through mustCtr.
func (d *daemon) ctr(t testing.TB, args ...string) output {
	t.Helper()
	return d.ctrInput(t, "", args...)
}

// ctrInput is ctr with something to read.
func (d *daemon) ctrInput(t testing.TB, stdin string, args ...string) output {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, peerBinary(t, "ctr"), append([]string{"--address", d.socket}, args...)...)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "CONTAINERD_") }),
		"CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1")
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	out := output{stdout: stdout.String(), stderr: stderr.String(), code: cmd.ProcessState.ExitCode()}
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || !exit.Exited()) {
		t.Fatalf("ctr %q against %s: %v\n%s%s", args, d.kind, err, out.stdout, out.stderr)
	}
	return out
}

// mustCtr runs ctr, which must succeed, and returns what it printed.
func (d *daemon) mustCtr(t testing.TB, args ...string) string {
	t.Helper()
	out := d.ctr(t, args...)
	if out.code != 0 {
		t.Fatalf("ctr %q against %s: exit %d\n%s%s", args, d.kind, out.code, out.stdout, out.stderr)
	}
	return out.stdout
}

// in is a context for the client, in a namespace.
func in(t testing.TB, ns string) context.Context {
	return namespaces.WithNamespace(t.Context(), ns)
}
