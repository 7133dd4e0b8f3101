package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// variant is one of the daemons that are compared.
type variant struct {
	name string
	ours bool
	// sync has it make pulls durable; containerd pulls by another of its ways then.
	sync bool
	// tuned gives containerd what makes it fastest.
	tuned bool
	// asked is for what runs only when -daemons names it.
	asked bool
}

var variants = []variant{
	{name: "ours", ours: true},
	{name: "default"},
	{name: "tuned", tuned: true},
	{name: "default-sync", sync: true},
	{name: "tuned-sync", sync: true, tuned: true, asked: true},
}

func variantNames() (names []string) {
	for _, v := range variants {
		names = append(names, v.name)
	}
	return names
}

// config is the daemon's config file. It keeps the daemon from touching the
// machine outside of its directories; the rest is default, if v is not tuned.
func (v variant) config(state, hosts string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `version = 4
[plugins."io.containerd.internal.v1.opt"]
  path = %[1]q
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = [%[2]q]
  conf_dir = %[3]q
[plugins."io.containerd.cri.v1.images".registry]
  config_path = %[4]q
`, filepath.Join(state, "opt"), filepath.Join(state, "cni/bin"), filepath.Join(state, "cni/net.d"), hosts)
	if v.sync {
		b.WriteString("[plugins.\"io.containerd.cri.v1.images\"]\n  image_pull_with_sync_fs = true\n")
	}
	fmt.Fprintf(&b, "[plugins.\"io.containerd.transfer.v1.local\"]\n  config_path = %q\n", hosts)
	if v.tuned {
		b.WriteString("  max_concurrent_unpacks = 5\n  max_concurrent_downloads = 5\n  concurrent_layer_fetch_buffer = 8388608\n")
	}
	return b.String()
}

// env is the daemon's environment.
func (v variant) env() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if !v.tuned { // as if they weren't installed, which is the default
		env = append(env, "CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1")
	}
	return env
}

// process is a child that ends with this program.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // how it ended; read after done
}

func start(argv, env []string, output io.Writer) (*process, error) {
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Env = env
	p.cmd.Stdout, p.cmd.Stderr = output, output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true} // Ctrl-C is for us alone
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Deadlines of what a healthy process does soon.
const (
	startTimeout = time.Minute
	stopTimeout  = time.Minute
	pullTimeout  = 10 * time.Minute
)

// stop ends the process in order, or by force when that takes too long.
func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
		p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("%s did not stop within %s", filepath.Base(p.cmd.Path), stopTimeout)
	}
}

// daemon is one that serves, in a cgroup of its own.
type daemon struct {
	*process
	group *group
	conn  *grpc.ClientConn
	log   string // its file
}

// startDaemon starts v on root and waits until it serves CRI and is idle.
func (b *bench) startDaemon(ctx context.Context, v variant, root, state string, env ...string) (d *daemon, err error) {
	d = &daemon{log: filepath.Join(b.dir, v.name+".log")}
	if d.group, err = b.groups.group(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start %s: %w (its log is %s)", v.name, err, d.log), d.stop())
		}
	}()
	config := filepath.Join(state, "config.toml")
	if err := os.WriteFile(config, []byte(v.config(state, b.hosts)), 0o644); err != nil {
		return d, err
	}
	log, err := os.Create(d.log)
	if err != nil {
		return d, err
	}
	defer log.Close()
	binary := b.peerBinary
	if v.ours {
		binary = b.ourBinary
	}
	socket := filepath.Join(state, "d.sock")
	argv := []string{binary, "--config", config, "--root", root, "--state", filepath.Join(state, "run"), "--address", socket}
	if d.process, err = start(d.group.argv(argv...), append(v.env(), env...), log); err != nil {
		return d, err
	}
	d.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 100 * time.Millisecond},
	}))
	if err != nil {
		return d, err
	}
	if err := d.ready(ctx); err != nil {
		return d, err
	}
	return d, d.settle(ctx)
}

// ready waits until the daemon answers CRI.
func (d *daemon) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	client := cri.NewImageServiceClient(d.conn)
	for {
		_, err := client.ListImages(ctx, new(cri.ListImagesRequest))
		if err == nil {
			return nil
		}
		select {
		case <-d.done:
			return fmt.Errorf("it ended: %w", d.err)
		case <-ctx.Done():
			return fmt.Errorf("it doesn't answer CRI: %w", err)
		case <-time.After(20 * time.Millisecond): // containerd refuses calls until its CRI part is ready
		}
	}
}

// The daemon is idle when its cgroup uses less than idleShare of a core for idlePeriod.
const (
	idlePeriod  = 200 * time.Millisecond
	idleShare   = 0.02
	idleTimeout = 10 * time.Second
)

// settle waits until the daemon is idle; one that isn't in idleTimeout is measured as it is.
func (d *daemon) settle(ctx context.Context) error {
	deadline := time.Now().Add(idleTimeout)
	user, system, err := d.group.cpuTime()
	for err == nil && time.Now().Before(deadline) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(idlePeriod):
		}
		last := user + system
		if user, system, err = d.group.cpuTime(); (user + system - last).Seconds() < idleShare*idlePeriod.Seconds() {
			return err
		}
	}
	return err
}

// pull has the daemon pull all refs at once.
func (d *daemon) pull(ctx context.Context, refs []string) error {
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	client := cri.NewImageServiceClient(d.conn)
	results := make(chan error, len(refs))
	for _, ref := range refs {
		go func() {
			_, err := client.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
			if err != nil {
				err = fmt.Errorf("pull %s: %w", ref, err)
			}
			results <- err
		}()
	}
	var errs []error
	for range refs {
		errs = append(errs, <-results)
	}
	return errors.Join(errs...)
}

// stop ends the daemon and removes its cgroup.
func (d *daemon) stop() error {
	var errs []error
	if d.conn != nil {
		errs = append(errs, d.conn.Close())
	}
	if d.process != nil {
		errs = append(errs, d.process.stop())
	}
	return errors.Join(append(errs, d.group.remove())...)
}

// startRegistry starts the registry's process and writes the hosts.toml that leads to it.
func (b *bench) startRegistry(ctx context.Context) error {
	ready, notify, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	p, err := start([]string{"/proc/self/exe", "serve", b.dir, "127.0.0.1:0"}, os.Environ(), notify)
	notify.Close()
	if err != nil {
		return fmt.Errorf("start the registry: %w", err)
	}
	ready.SetReadDeadline(time.Now().Add(startTimeout))
	line := make([]byte, 128)
	n, err := ready.Read(line)
	if err != nil || !bytes.HasPrefix(line, []byte("127.0.0.1:")) {
		return errors.Join(fmt.Errorf("start the registry: %s%w", line[:n], err), p.stop())
	}
	b.registry, b.address = p, strings.TrimSpace(string(line[:n]))
	b.hosts = filepath.Join(b.dir, "hosts")
	if err := os.RemoveAll(b.hosts); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(b.hosts, b.address), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.hosts, b.address, "hosts.toml"), fmt.Appendf(nil, "server = \"http://%s\"\n", b.address), 0o644)
}

// build builds holdfastd and finds the peer and what it needs.
func (b *bench) build(ctx context.Context) error {
	b.ourBinary = filepath.Join(b.dir, "holdfastd")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", b.ourBinary, "github.com/holdfast-dev/holdfast/cmd/holdfastd")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build holdfastd: %w\n%s", err, out)
	}
	peer, err := filepath.Abs(filepath.Join(b.peer, "containerd"))
	if err != nil {
		return err
	}
	b.peerBinary = peer
	needed := []string{peer, "mkfs.ext4"}
	if slices.ContainsFunc(variants, func(v variant) bool { return v.tuned && b.wants(v, tmpfs) || v.tuned && b.wants(v, ext4) }) {
		needed = append(needed, "igzip")
	}
	for _, name := range needed {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%w: run `scripts/setup bench`", err)
		}
	}
	return nil
}
