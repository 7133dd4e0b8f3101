package compat

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// refusalTimeout is how soon a second daemon must say that it is one.
const refusalTimeout = 5 * time.Second

// TestSecondDaemonIsRefused: on a root or a socket that is in use ours says by
// whom, and harms nothing.
func TestSecondDaemonIsRefused(t *testing.T) {
	t.Parallel()
	for _, first := range []kind{theirs, ours} {
		t.Run(string(first), func(t *testing.T) {
			srv, r := registrytest.New(t), newRoot(t)
			d := r.start(t, first)
			reference := push(srv, "one", baseLayer)
			if err := d.pull(t, "default", overlay, reference); err != nil {
				t.Fatal(err)
			}
			before := d.records(t)
			other := newRoot(t)
			for _, c := range []struct{ what, root, socket string }{
				{"root", r.dir, filepath.Join(other.state, "d.sock")},
				{"address", other.dir, d.socket},
			} {
				complaint := refusal(t, c.root, other.state, c.socket)
				who := fmt.Sprintf("pid %d (%s)", pidOf(t, d.socket), first)
				if !strings.Contains(complaint, who) || !strings.Contains(complaint, c.what+" ") {
					t.Errorf("a second daemon on the same %s says %q; want it to name %s", c.what, complaint, who)
				}
			}
			if after := d.records(t); after != before {
				t.Errorf("a daemon that was refused has changed something:%s", lineDifferences(before, after))
			}
			d.stop()
			r.start(t, ours).mustBeSound(t)
		})
	}
}

// pidOf is the process that listens on a socket.
func pidOf(t *testing.T, socket string) int {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	f, err := conn.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cred, err := unix.GetsockoptUcred(int(f.Fd()), unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		t.Fatal(err)
	}
	return int(cred.Pid)
}

// refusal starts holdfastd, which must end at once, and returns what it says.
func refusal(t *testing.T, root, state, socket string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), refusalTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Build(t).Daemon, "--config", "/dev/null", "--root", root, "--state", state, "--address", socket)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("a second daemon still runs after %s:\n%s", refusalTimeout, out)
	} else if err == nil {
		t.Fatalf("a second daemon ended well:\n%s", out)
	}
	return string(out)
}

// TestContainerdWaitsForOurs: a containerd that is started on our root waits
// at bolt's lock, and goes on when we have stopped.
func TestContainerdWaitsForOurs(t *testing.T) {
	t.Parallel()
	srv, r := registrytest.New(t), newRoot(t)
	d := r.start(t, ours)
	reference := push(srv, "one", baseLayer)
	if err := d.holdfast.Pull(reference); err != nil {
		t.Fatal(err)
	}
	before := d.records(t)
	p := r.startPeer(t)
	client, err := containerd.New(p.socket, containerd.WithTimeout(startTimeout))
	if err == nil {
		defer client.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if serving, _ := client.IsServing(ctx); serving {
			t.Fatal("containerd serves a root that ours has open")
		}
	}
	if after := d.records(t); after != before {
		t.Errorf("a containerd that waits has changed something:%s", lineDifferences(before, after))
	}
	d.stop()
	if client, err = containerd.New(p.socket, containerd.WithTimeout(startTimeout)); err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	if serving, err := client.IsServing(ctx); err != nil || !serving {
		t.Fatalf("containerd does not serve when ours has stopped: %v", err)
	}
	took := &daemon{kind: theirs, root: r.dir, socket: p.socket, client: client}
	if after := took.records(t); after != before {
		t.Errorf("containerd finds other records:%s", lineDifferences(before, after))
	}
	p.stop(t)
}
