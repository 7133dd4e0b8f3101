package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// Options say how a daemon is started. The zero value is a daemon on a root of its own.
type Options struct {
	Root   string // its root directory; default: a new one that goes with the test
	State  string // its state directory, which also holds the socket; default: as for Root
	Config string // the text of its config file; default: none
	Fault  string // what to inject (package fault's Env); not "": the daemon is built with the tag `fault`
	Env    []string
	Enter  func() error // called on the thread that starts the daemon, to change what it inherits: a network namespace
}

// Deadlines of what a healthy daemon does at once.
const (
	startTimeout = 30 * time.Second
	stopTimeout  = 30 * time.Second
	ctlTimeout   = 2 * time.Minute
	deathGrace   = 5 * time.Second // for a command to notice that the daemon is dead
)

// Daemon is one running holdfastd.
type Daemon struct {
	Root, State string
	Socket      string
	Conn        *grpc.ClientConn // to Socket

	bin  Binaries
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{} // closed when the process has ended
	err  error         // how it ended; read after done
}

// Start starts a daemon and waits until it serves. It is killed when the
// test ends, and its log shown if the test failed.
func Start(t testing.TB, opts Options) *Daemon {
	t.Helper()
	d, err := TryStart(t, opts)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TryStart is Start for a daemon that may not come up. The error holds its log.
func TryStart(t testing.TB, opts Options) (*Daemon, error) {
	t.Helper()
	NeedRoot(t)
	d := &Daemon{Root: opts.Root, State: opts.State, log: new(logBuffer), done: make(chan struct{})}
	if d.Root == "" {
		d.Root = TempDir(t)
	}
	if d.State == "" {
		d.State = TempDir(t)
	}
	d.Socket = filepath.Join(d.State, "d.sock")
	text := opts.Config
	if text == "" {
		// The default of opt.path lies outside of root and state.
		text = fmt.Sprintf("version = 4\n[plugins.'io.containerd.internal.v1.opt']\npath = %q\n", d.Root)
	}
	config := filepath.Join(TempDir(t), "config.toml")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.bin = Build(t)
	if opts.Fault != "" {
		d.bin = Build(t, "fault")
	}
	d.cmd = exec.Command(d.bin.Daemon, "--config", config, "--root", d.Root, "--state", d.State, "--address", d.Socket)
	d.cmd.Env = append(os.Environ(), opts.Env...)
	if opts.Fault != "" {
		d.cmd.Env = append(d.cmd.Env, "HOLDFAST_FAULT="+opts.Fault)
	}
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// Pdeathsig comes when the thread that started the process ends, so that thread is kept.
		runtime.LockOSThread()
		var err error
		if opts.Enter == nil {
			defer runtime.UnlockOSThread()
		} else {
			err = opts.Enter() // nobody else gets the thread afterwards: it ends with this goroutine
		}
		if err == nil {
			err = d.cmd.Start()
		}
		started <- err
		if err == nil {
			d.err = d.cmd.Wait()
			close(d.done)
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.cleanup(t) })
	return d, d.dial()
}

// TempDir is t.TempDir with a short path, since a socket's may have at most 104 bytes.
func TempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return dir
}

func (d *Daemon) cleanup(t testing.TB) {
	d.Kill()
	if d.Conn != nil {
		d.Conn.Close()
	}
	if t.Failed() {
		t.Logf("daemon on %s:\n%s", d.Root, d.Log())
	}
}

// dial waits until the health service says that the daemon serves.
func (d *Daemon) dial() error {
	conn, err := grpc.NewClient("unix://"+d.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: 50 * time.Millisecond},
			// Else a connection must be ready within the backoff, which a busy machine doesn't always manage.
			MinConnectTimeout: startTimeout,
		}))
	if err != nil {
		return err
	}
	d.Conn = conn
	ctx, cancel := d.alive(startTimeout, 0)
	defer cancel()
	reply, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, new(grpc_health_v1.HealthCheckRequest), grpc.WaitForReady(true))
	switch {
	case d.Dead():
		return fmt.Errorf("the daemon ended while it started: %w\n%s", d.err, d.Log())
	case err != nil:
		return fmt.Errorf("the daemon is not ready: %w\n%s", err, d.Log())
	case reply.Status != grpc_health_v1.HealthCheckResponse_SERVING:
		return fmt.Errorf("the daemon is not ready: health is %s\n%s", reply.Status, d.Log())
	}
	return nil
}

// alive returns a context that ends with the daemon, or grace later.
func (d *Daemon) alive(timeout, grace time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	go func() {
		select {
		case <-d.done:
			time.AfterFunc(grace, cancel)
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// Ctl runs the command line against the daemon. It returns what it printed;
// an exit code other than 0 is an error that holds the output. A command that doesn't
// notice the daemon's death in time is killed.
func (d *Daemon) Ctl(args ...string) (string, error) {
	ctx, cancel := d.alive(ctlTimeout, deathGrace)
	defer cancel()
	var out bytes.Buffer
	all := new(logBuffer)
	cmd := exec.CommandContext(ctx, d.bin.CLI, append([]string{"--address", d.Socket}, args...)...)
	cmd.Stdout = io.MultiWriter(&out, all)
	cmd.Stderr = all
	err := cmd.Run()
	if err != nil && ctx.Err() != nil {
		return out.String(), fmt.Errorf("holdfast %q hangs (daemon dead: %t): %w\n%s", args, d.Dead(), err, all)
	} else if err != nil {
		return out.String(), fmt.Errorf("holdfast %q: %w\n%s", args, err, all)
	}
	return out.String(), nil
}

// PID returns the process's id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Kill ends the daemon by SIGKILL and waits until it is gone.
func (d *Daemon) Kill() {
	d.cmd.Process.Kill()
	<-d.done
}

// Stop ends the daemon in order; it must exit with 0.
func (d *Daemon) Stop(t testing.TB) {
	t.Helper()
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
		if d.err != nil {
			t.Errorf("the daemon was asked to stop and ended with %v\n%s", d.err, d.Log())
		}
	case <-time.After(stopTimeout):
		t.Errorf("the daemon was asked to stop and still runs after %s\n%s", stopTimeout, d.Log())
		d.Kill()
	}
}

// Done is closed when the process has ended, however that came.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Dead reports whether the process has ended.
func (d *Daemon) Dead() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// KilledBy returns the signal that ended the process, or 0 if it runs or ended otherwise.
func (d *Daemon) KilledBy() syscall.Signal {
	if !d.Dead() {
		return 0
	}
	exit, ok := errors.AsType[*exec.ExitError](d.err)
	if !ok {
		return 0
	}
	status, _ := exit.Sys().(syscall.WaitStatus)
	if !status.Signaled() {
		return 0
	}
	return status.Signal()
}

// Log returns what the daemon has printed, its end if that was much.
func (d *Daemon) Log() string { return d.log.String() }

// logLimit bounds the part of a process's output that is kept, in bytes.
const logLimit = 64 << 10

type logBuffer struct {
	mu  sync.Mutex
	buf []byte
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	if over := len(b.buf) - logLimit; over > 0 {
		b.buf = b.buf[over:]
	}
	return len(p), nil
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.buf)
}
