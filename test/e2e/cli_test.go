package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/test/harness"
)

// treeRow is what `store tree --json` prints of one thing.
type treeRow struct {
	Depth   int
	Kind    string
	Name    string
	Path    string
	Size    int64
	Note    string
	Holders []string
}

func storeTree(t *testing.T, d *harness.Daemon, flags ...string) (rows []treeRow) {
	t.Helper()
	res := holdfast(t, d.Socket, append([]string{"store", "tree", "--json"}, flags...)...)
	res.wants(t, 0)
	if err := json.Unmarshal([]byte(res.out), &rows); err != nil {
		t.Fatalf("%v in\n%s", err, res.out)
	}
	return rows
}

// TestPullInAPipe: where there is no terminal a pull prints a line for each stage of a layer.
func TestPullInAPipe(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(1, 3)...)
	ref := reg.Push(img, "app")
	d := harness.Start(t, harness.Options{})
	res := holdfast(t, d.Socket, "pull", "--plain-http", ref)
	res.wants(t, 0, ref+": "+img.Target.Digest.String()+"\n", "complete", "pulled in", ": 3 new layers, ")
	for _, l := range img.Layers {
		if !strings.Contains(res.out, l.Digest.String()[:len("sha256:")+12]) {
			t.Errorf("layer %s isn't told of in\n%s", l.Digest, res.out)
		}
	}
	if strings.ContainsAny(res.out, "\x1b\r") || res.err != "" {
		t.Errorf("output for a pipe holds terminal control, or errors: %q %q", res.out, res.err)
	}
	holdfast(t, d.Socket, "pull", "--plain-http", ref).wants(t, 0, "is up to date")
	d.Stop(t)
}

// TestPullOnATerminal: there a pull draws bars, and leaves the terminal in order.
func TestPullOnATerminal(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(1, 2)...)
	ref := reg.Push(img, "app")
	reg.Limit(2 << 20) // so that the bars are drawn more than once
	d := harness.Start(t, harness.Options{})
	out := onTerminal(t, exec.Command(harness.Build(t).CLI, "--address", d.Socket, "pull", "--plain-http", ref))
	for _, want := range []string{"\x1b[", "complete", img.Layers[0].Digest.String()[:12], img.Layers[1].Digest.String()[:12], "2 new layers, "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	if strings.HasSuffix(out, "\x1b[?25l") {
		t.Error("the cursor stays hidden")
	}
	d.Stop(t)
}

// onTerminal runs a command on a pseudo-terminal of 80 columns and returns what it wrote.
func onTerminal(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	defer ptmx.Close()
	fd := int(ptmx.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 25, Col: 80})
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	text := make(chan string)
	go func() {
		all, _ := io.ReadAll(ptmx) // ends with EIO when the last of the other side is closed
		text <- string(all)
	}()
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %v", cmd.Args, err)
	}
	return <-text
}

// TestImages lists and removes images.
func TestImages(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(1, 2)...)
	d := harness.Start(t, harness.Options{})
	first, second := reg.Push(img, "team/first"), reg.Push(img, "second")
	holdfast(t, d.Socket, "images").wants(t, 0, "IMAGE", "DIGEST")
	for _, ref := range []string{first, second} {
		if err := d.Pull(ref); err != nil {
			t.Fatal(err)
		}
	}
	res := holdfast(t, d.Socket, "images")
	res.wants(t, 0, first, second, img.Target.Digest.String()[:19], "MiB", "ago")
	if lines := strings.Split(strings.TrimSpace(res.out), "\n"); len(lines) != 3 || !strings.HasPrefix(lines[0], "IMAGE ") {
		t.Errorf("a table of two images is\n%s", res.out)
	}
	var rows []struct {
		Name, Digest, MediaType string
		Size                    int64
	}
	res = holdfast(t, d.Socket, "images", "--json")
	if err := json.Unmarshal([]byte(res.out), &rows); err != nil || len(rows) != 2 {
		t.Fatalf("%v in %s", err, res.out)
	}
	for _, r := range rows {
		if r.Digest != img.Target.Digest.String() || r.MediaType != img.Target.MediaType || r.Size < img.LayerBytes() {
			t.Errorf("row %+v", r)
		}
	}
	holdfast(t, d.Socket, "-n", "other", "images", "--json").wants(t, 0, "[]")

	holdfast(t, d.Socket, "rmi", "absent").wants(t, 1, "there is no image", "absent", "`holdfast -n default images`")
	holdfast(t, d.Socket, "rmi", first).wants(t, 0, "removed "+first)
	// A name without a tag is short for :latest.
	holdfast(t, d.Socket, "rmi", strings.TrimSuffix(second, ":latest")).wants(t, 0, "removed "+second)
	for _, row := range storeTree(t, d) {
		switch row.Kind {
		case "blob", "snapshot", "image", "lease", "ingest":
			t.Errorf("after the last image is removed there is %s %s", row.Kind, row.Name)
		}
	}
	for _, dir := range []string{filepath.Join(harness.BlobsDir, "sha256"), harness.OverlayDir, harness.TrashDir} {
		if entries, err := os.ReadDir(filepath.Join(d.Root, dir)); err == nil && len(entries) > 0 {
			t.Errorf("%s still has %d entries", dir, len(entries))
		}
	}
	d.Stop(t)
}

// TestShortNames: docker's short names are completed, for rmi as for pull.
func TestShortNames(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(1, 1)...)
	reg.Push(img, "library/tiny")
	certs := harness.TempDir(t)
	write(t, filepath.Join(certs, "docker.io", "hosts.toml"), fmt.Sprintf("server = 'http://%s'\n", reg.Host))
	d := harness.Start(t, harness.Options{Config: hostsConfig(certs)})
	holdfast(t, d.Socket, "pull", "tiny").wants(t, 0, "docker.io/library/tiny:latest")
	holdfast(t, d.Socket, "images").wants(t, 0, "docker.io/library/tiny:latest")
	holdfast(t, d.Socket, "rmi", "tiny").wants(t, 0, "removed docker.io/library/tiny:latest")
	d.Stop(t)
}

// TestStoreTree: each thing of the store stands there once, at its path, with a word on what it is and what keeps it;
// the ingests of a running pull, too.
func TestStoreTree(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	d := harness.Start(t, harness.Options{})
	img := harness.NewImage(t, harness.Random(1, 2)...)
	ref := reg.Push(img, "app")
	reached := reg.Hold(img.LayerBytes() * 3 / 4)
	pulled := make(chan error, 1)
	go func() { pulled <- d.Pull(ref) }()
	select {
	case <-reached:
	case err := <-pulled:
		t.Fatalf("the pull ended early: %v", err)
	}
	kinds := map[string]int{}
	for _, row := range storeTree(t, d) {
		kinds[row.Kind]++
		if row.Kind == "ingest" && (len(row.Holders) == 0 || !strings.HasPrefix(row.Holders[0], "lease pull-")) {
			t.Errorf("ingest %s is held by %v", row.Name, row.Holders)
		}
	}
	if kinds["ingest"] < 3 || kinds["lease"] != 1 || kinds["image"] != 0 || kinds["snapshot"] != 2 {
		t.Errorf("while a pull runs the tree holds %v", kinds)
	}
	reg.Release()
	if err := <-pulled; err != nil {
		t.Fatal(err)
	}

	kinds = map[string]int{}
	for _, row := range storeTree(t, d) {
		kinds[row.Kind]++
		if row.Note == "" {
			t.Errorf("%s %s has no word", row.Kind, row.Name)
		}
		if row.Path != "" {
			if _, err := os.Stat(row.Path); err != nil {
				t.Errorf("%s %s: %v", row.Kind, row.Name, err)
			}
		}
		if (row.Kind == "blob" || row.Kind == "snapshot") && (len(row.Holders) == 0 || row.Size <= 0) {
			t.Errorf("%s %s of size %d is kept by %v", row.Kind, row.Name, row.Size, row.Holders)
		}
	}
	if kinds["blob"] != 4 || kinds["snapshot"] != 2 || kinds["image"] != 1 || kinds["ingest"] != 0 || kinds["lease"] != 0 {
		t.Errorf("after the pull the tree holds %v", kinds)
	}
	holdfast(t, d.Socket, "store", "tree").wants(t, 0,
		"└── ", "│   ├── ", "io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs",
		ref, "(manifest)", "(config)", "(layer 1 of 2)", "(layer 2 of 2, unpacked)", "kept by image "+ref)
	if rows := storeTree(t, d); rows[0].Path != d.Root || rows[0].Depth != 0 {
		t.Errorf("the tree begins with %+v", rows[0])
	}
	d.Stop(t)
}

// TestStoreCheck: damage is found, named and told by the exit code.
func TestStoreCheck(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(1, 1)...)
	d := harness.Start(t, harness.Options{})
	if err := d.Pull(reg.Push(img, "app")); err != nil {
		t.Fatal(err)
	}
	holdfast(t, d.Socket, "store", "check").wants(t, 0, "1 image, 3 blobs", "1 snapshot: records and files agree")
	layer := filepath.Join(d.Root, harness.BlobsDir, "sha256", img.Layers[0].Digest.Encoded())
	damage(t, layer)
	holdfast(t, d.Socket, "store", "check").wants(t, 0) // the size is right
	res := holdfast(t, d.Socket, "store", "check", "--deep", "--json")
	var report struct {
		Findings []struct{ Class, Subject, Advice string }
		Blobs    int
	}
	if err := json.Unmarshal([]byte(res.out), &report); err != nil {
		t.Fatal(err)
	}
	if res.code != 1 || len(report.Findings) != 1 || report.Findings[0].Class != "blob-digest" ||
		report.Findings[0].Subject != img.Layers[0].Digest.String() || report.Findings[0].Advice == "" || report.Blobs != 3 {
		t.Errorf("code %d, %s", res.code, res.out)
	}
	if err := os.Remove(layer); err != nil {
		t.Fatal(err)
	}
	res = holdfast(t, d.Socket, "store", "check")
	if res.code != 1 || !strings.Contains(res.out, "blob-missing: "+img.Layers[0].Digest.String()+" in namespace default") {
		t.Errorf("code %d\n%s", res.code, res.out)
	}
	d.Stop(t)
}

// damage changes a byte of a blob.
func damage(t *testing.T, path string) {
	t.Helper()
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	body[len(body)/2] ^= 1
	if err := os.WriteFile(path, body, 0o444); err != nil {
		t.Fatal(err)
	}
}

// TestVersion: both versions, also by containerd's call.
func TestVersion(t *testing.T) {
	harness.NeedRoot(t)
	d := harness.Start(t, harness.Options{})
	holdfast(t, d.Socket, "version").wants(t, 0, "client: ", "server: ")
	var v map[string]string
	res := holdfast(t, d.Socket, "version", "--json")
	if err := json.Unmarshal([]byte(res.out), &v); err != nil || v["client"] == "" || v["server"] == "" {
		t.Errorf("%v in %s", err, res.out)
	}
	holdfastd(t, "--version").wants(t, 0, "holdfastd version ")
	d.Stop(t)
}

// TestCompletion: scripts for the shells need no daemon.
func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		holdfast(t, "/nonexistent", "completion", shell).wants(t, 0, "holdfast")
	}
	holdfast(t, "/nonexistent", "__complete", "store", "").wants(t, 0, "check", "tree")
}

// TestUsageErrors: words that are off end with code 2 and the way to help.
func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{"pull"}, {"pull", "a", "b"}, {"rmi"}, {"images", "extra"}, {"store", "tree", "extra"}, {"store", "nonsense"},
		{"nonsense"}, {"--nonsense"}, {"pull", "--nonsense", "x"}, {"version", "extra"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			holdfast(t, "/nonexistent", args...).wants(t, 2, "holdfast: ", "--help")
		})
	}
	holdfast(t, "/nonexistent").wants(t, 0, "Usage:")
	holdfast(t, "/nonexistent", "--help").wants(t, 0, "pull", "images", "rmi", "store", "version")
}

// TestNoDaemon: without a daemon the error says so and what to do.
func TestNoDaemon(t *testing.T) {
	for _, args := range [][]string{{"pull", "x"}, {"images"}, {"rmi", "x"}, {"store", "tree"}, {"store", "check"}, {"version"}} {
		holdfast(t, "/nonexistent/d.sock", args...).wants(t, 1, "no daemon at /nonexistent/d.sock: start holdfastd, or name its socket with --address")
	}
	stale := filepath.Join(harness.TempDir(t), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	holdfast(t, stale, "images").wants(t, 1, stale)
}

// TestBadReferences: what is no image's name is refused with the reason.
func TestBadReferences(t *testing.T) {
	harness.NeedRoot(t)
	d := harness.Start(t, harness.Options{})
	for _, ref := range []string{"a b", "127.0.0.1:1/x:", "http://127.0.0.1:1/x", "127.0.0.1:1/x@sha256:123", "127.0.0.1:1/../../etc/passwd"} {
		res := holdfast(t, d.Socket, "pull", ref)
		if res.code == 0 || !strings.Contains(res.err, ref) {
			t.Errorf("pull %q: code %d, %s", ref, res.code, res.err)
		}
	}
	holdfast(t, d.Socket, "-n", "not a name", "images").wants(t, 1, `namespace "not a name"`)
	holdfast(t, d.Socket, "pull", "--snapshotter", "nonsense", "--plain-http", "127.0.0.1:1/x").wants(t, 1, "nonsense")
	holdfast(t, d.Socket, "pull", "--platform", "not-a/plat/form/at/all", "127.0.0.1:1/x").wants(t, 1, "not-a/plat/form/at/all")
	whole(t, d)
	d.Stop(t)
}

// TestInterrupt: a pull that gets SIGINT ends at once and says that what was fetched is kept; the next goes on.
func TestInterrupt(t *testing.T) {
	harness.NeedRoot(t)
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(1, 1)...)
	ref := reg.Push(img, "app")
	d := harness.Start(t, harness.Options{})
	reached := reg.Hold(img.LayerBytes() / 2)
	cmd := exec.Command(harness.Build(t).CLI, "--address", d.Socket, "pull", "--plain-http", ref)
	wait := start(t, cmd)
	<-reached
	kept(t, d, img)
	cmd.Process.Signal(syscall.SIGINT)
	res := wait()
	res.wants(t, 1, "interrupted; what was fetched is kept for a day, and the same command goes on from there")
	soon(t, "the daemon lets go of the pull", func() bool {
		st := d.Ingests(t)
		return len(st) > 0 && len(d.Leases(t)) == 1
	})
	reg.Release()
	reg.Served()
	holdfast(t, d.Socket, "pull", "--plain-http", ref).wants(t, 0, ref)
	if n := reg.Served()[img.Layers[0].Digest]; n > img.Layers[0].Size*6/10 {
		t.Errorf("%d bytes of a layer of %d were fetched again", n, img.Layers[0].Size)
	}
	whole(t, d)
	d.Stop(t)
}
