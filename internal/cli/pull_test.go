package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func resolved() *holdfastv1.PullEvent {
	return &holdfastv1.PullEvent{Event: &holdfastv1.PullEvent_Resolved{Resolved: &holdfastv1.PullResolved{
		Reference: "docker.io/library/demo:1", Target: &holdfastv1.Descriptor{Digest: "sha256:" + strings.Repeat("1", 64)}}}}
}

// on is a word on layer n, which has n MiB.
func on(n int, stage holdfastv1.PullLayer_Stage, offset int64) *holdfastv1.PullEvent {
	return &holdfastv1.PullEvent{Event: &holdfastv1.PullEvent_Layer{Layer: &holdfastv1.PullLayer{
		Descriptor_: &holdfastv1.Descriptor{Digest: "sha256:" + strings.Repeat(fmt.Sprint(n), 64), Size: int64(n) << 20},
		Stage:       stage, Offset: offset,
	}}}
}

func done() *holdfastv1.PullEvent {
	return &holdfastv1.PullEvent{Event: &holdfastv1.PullEvent_Done{Done: &holdfastv1.Image{Name: "docker.io/library/demo:1"}}}
}

// story is a pull of three layers, one of which is there.
func story() []*holdfastv1.PullEvent {
	const waiting, exists, fetching, unpacking, committing, complete = holdfastv1.PullLayer_WAITING, holdfastv1.PullLayer_EXISTS,
		holdfastv1.PullLayer_FETCHING, holdfastv1.PullLayer_UNPACKING, holdfastv1.PullLayer_COMMITTING, holdfastv1.PullLayer_COMPLETE
	return []*holdfastv1.PullEvent{
		resolved(), on(2, waiting, 0), on(3, waiting, 0), on(4, exists, 4<<20),
		on(2, fetching, 0), on(2, fetching, 1<<20), on(3, fetching, 10), on(2, fetching, 2<<20), on(2, unpacking, 2<<20),
		on(3, fetching, 3<<20), on(3, unpacking, 3<<20), on(2, committing, 2<<20), on(3, committing, 3<<20),
		on(2, complete, 2<<20), on(3, complete, 3<<20), done(),
	}
}

func TestPullLines(t *testing.T) {
	f := serve(t, &fake{events: story()})
	golden(t, "pull.txt", f.run(t, "pull", "demo:1").ok(t))
}

func TestPullUpToDate(t *testing.T) {
	f := serve(t, &fake{events: []*holdfastv1.PullEvent{resolved(), on(2, holdfastv1.PullLayer_EXISTS, 2<<20), done()}})
	if got, want := f.run(t, "pull", "demo:1").ok(t), "\ndocker.io/library/demo:1 is up to date: all of it is here\n"; !strings.HasSuffix(got, want) {
		t.Errorf("ends %q, want %q", got, want)
	}
}

func TestPullRequest(t *testing.T) {
	f := serve(t, &fake{events: []*holdfastv1.PullEvent{done()}})
	f.run(t, "pull", "--snapshotter", "native", "--platform", "linux/arm64", "--plain-http", "--skip-verify", "--no-unpack", "-u", "me:se:cret", "-n", "k8s.io", "demo").ok(t)
	want := &holdfastv1.PullRequest{
		Reference: "demo", Snapshotter: "native", Platform: "linux/arm64", PlainHttp: true, SkipVerify: true, NoUnpack: true,
		Credential: &holdfastv1.Credential{Username: "me", Password: "se:cret"},
	}
	if !proto.Equal(f.pulled, want) || len(f.namespaces) != 1 || f.namespaces[0] != "k8s.io" {
		t.Errorf("asked for %v in %q, want %v", f.pulled, f.namespaces, want)
	}
	f.run(t, "pull", "demo").ok(t)
	if !proto.Equal(f.pulled, &holdfastv1.PullRequest{Reference: "demo"}) {
		t.Errorf("asked for %v", f.pulled)
	}
}

// TestPullInterrupted ends the command while the daemon is at it: the call is
// cancelled, and the user is told what that means.
func TestPullInterrupted(t *testing.T) {
	f := serve(t, &fake{events: []*holdfastv1.PullEvent{resolved(), on(2, holdfastv1.PullLayer_FETCHING, 7)}, hang: make(chan struct{})})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { <-f.hang; cancel() }()
	var out, errw bytes.Buffer
	code := Run(ctx, []string{"-a", f.socket, "pull", "demo"}, &out, &errw, "dev")
	if want := "holdfast: interrupted; what was fetched is kept for a day, and the same command goes on from there\n"; code != ExitFailure || errw.String() != want {
		t.Errorf("exit code %d, %q; want %q", code, errw.String(), want)
	}
}

// terminal is the two ends of a new pseudo terminal of 100 columns.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	raw, err := master.SyscallConn()
	fatal(err)
	var number int
	fatal(raw.Control(func(fd uintptr) {
		if err = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); err == nil {
			number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
		if err == nil {
			err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: 100})
		}
	}))
	fatal(err)
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	fatal(err)
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// onTerminal runs a command whose output is a terminal, and yields what it showed.
func onTerminal(t *testing.T, args ...string) (code int, shown, complaint string) {
	t.Helper()
	master, slave := terminal(t)
	all := make(chan string)
	go func() {
		text, _ := io.ReadAll(master) // ends in EIO when the slave is closed
		all <- string(text)
	}()
	var errw bytes.Buffer
	code = Run(t.Context(), args, slave, &errw, "dev")
	slave.Close()
	return code, <-all, errw.String()
}

func TestPullBars(t *testing.T) {
	f := serve(t, &fake{events: story()})
	code, shown, complaint := onTerminal(t, "-a", f.socket, "pull", "demo:1")
	if code != ExitOK || complaint != "" {
		t.Errorf("exit code %d, %q", code, complaint)
	}
	// What stays on the screen: a complete bar for each layer, then the summary.
	last := shown[strings.LastIndex(shown, "sha256:222222222222"):]
	for _, want := range []string{"sha256:222222222222", "complete", "2.0 MiB / 2.0 MiB", "sha256:333333333333", "3.0 MiB / 3.0 MiB",
		"sha256:444444444444", "already unpacked", "4.0 MiB / 4.0 MiB", "2 new layers, 5MiB; 1 layer already unpacked"} {
		if !strings.Contains(last, want) {
			t.Errorf("the last picture lacks %q:\n%q", want, last)
		}
	}
	if !strings.HasPrefix(shown, "docker.io/library/demo:1: sha256:111111") {
		t.Errorf("begins %.80q", shown)
	}
}

// TestBrokenBars fails while a layer is half here: the terminal is given back,
// and the error comes after the bars.
func TestBrokenBars(t *testing.T) {
	f := serve(t, &fake{
		events: []*holdfastv1.PullEvent{resolved(), on(2, holdfastv1.PullLayer_FETCHING, 1<<20)},
		err:    status.Error(codes.DataLoss, "layer sha256:2: wrong bytes"),
	})
	code, shown, complaint := onTerminal(t, "-a", f.socket, "pull", "demo:1")
	if code != ExitFailure || complaint != "holdfast: layer sha256:2: wrong bytes\n" {
		t.Errorf("exit code %d, %q", code, complaint)
	}
	if !strings.HasSuffix(shown, "\n") || strings.Contains(shown, "complete") {
		t.Errorf("the terminal shows %q", shown)
	}
}
