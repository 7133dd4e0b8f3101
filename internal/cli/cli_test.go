package cli

import (
	"cmp"
	"encoding/json"
	"flag"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

var duration = regexp.MustCompile(`in [0-9.µm]*s:`)

// golden compares text with a file of testdata, but for how long things took.
func golden(t *testing.T, file, got string) {
	t.Helper()
	got = duration.ReplaceAllString(got, "in TIME:")
	path := filepath.Join("testdata", file)
	if *rewrite {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got (regenerate with -rewrite)\n%s\nwant\n%s", got, want)
	}
}

// ok fails unless the command succeeded without complaint, and yields its output.
func (r result) ok(t *testing.T) string {
	t.Helper()
	if r.code != ExitOK || r.err != "" {
		t.Errorf("exit code %d, complaint %q", r.code, r.err)
	}
	return r.out
}

func TestImages(t *testing.T) {
	f := serve(t, &fake{})
	f.image("docker.io/library/alpine:3.20.1", time.Now().Add(-3*time.Hour))
	f.image("docker.io/library/busybox:1", time.Now().Add(-49*time.Hour))
	f.images["docker.io/library/busybox:1"].Target.Digest = "sha256:" + strings.Repeat("0", 64)
	golden(t, "images.txt", f.run(t, "images").ok(t))
	if got, want := f.run(t, "-n", "k8s.io", "ls").ok(t), f.run(t, "images").out; got != want {
		t.Errorf("ls prints %q, images %q", got, want)
	}
	if want := []string{"default", "k8s.io", "default"}; !slices.Equal(f.namespaces, want) {
		t.Errorf("asked in namespaces %q, want %q", f.namespaces, want)
	}
}

// TestImagesJSON keeps the names that scripts read.
func TestImagesJSON(t *testing.T) {
	f := serve(t, &fake{})
	if got := f.run(t, "images", "--json").ok(t); got != "[]\n" {
		t.Errorf("no image is %q, want an empty list", got)
	}
	f.image("demo:1", time.Date(2021, 1, 2, 3, 4, 5, 6, time.UTC))
	var rows []map[string]any
	if err := json.Unmarshal([]byte(f.run(t, "images", "--json").ok(t)), &rows); err != nil {
		t.Fatal(err)
	}
	if len(rows) != 1 {
		t.Fatalf("%d rows", len(rows))
	}
	want := []string{"createdAt", "digest", "labels", "mediaType", "name", "size", "updatedAt"}
	if got := sortedKeys(rows[0]); !slices.Equal(got, want) {
		t.Errorf("fields %q, want %q", got, want)
	}
	if rows[0]["size"] != float64(2*1048576+1000+4096) || rows[0]["updatedAt"] != "2021-01-02T03:04:05.000000006Z" {
		t.Errorf("row %v", rows[0])
	}
}

func TestRemoveImages(t *testing.T) {
	for _, test := range []struct {
		args []string
		out  string
		err  string
		left []string
		sync []bool
	}{
		{[]string{"docker.io/library/alpine:3"}, "removed docker.io/library/alpine:3\n", "", []string{"alpine:3", "docker.io/library/busybox:latest"}, []bool{true}},
		{[]string{"alpine:3"}, "removed alpine:3\n", "", []string{"docker.io/library/alpine:3", "docker.io/library/busybox:latest"}, []bool{true}},
		{[]string{"busybox", "alpine:3"}, "removed docker.io/library/busybox:latest\nremoved alpine:3\n", "", []string{"docker.io/library/alpine:3"}, []bool{false, true}},
		{[]string{"gone", "busybox"}, "removed docker.io/library/busybox:latest\n",
			"holdfast: there is no image gone in namespace default: `holdfast -n default images` lists them\n", []string{"alpine:3", "docker.io/library/alpine:3"}, []bool{true}},
		{[]string{"UPPER:x"}, "", "holdfast: there is no image UPPER:x in namespace default: `holdfast -n default images` lists them\n",
			[]string{"alpine:3", "docker.io/library/alpine:3", "docker.io/library/busybox:latest"}, nil},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			f := serve(t, &fake{})
			for _, name := range []string{"docker.io/library/alpine:3", "alpine:3", "docker.io/library/busybox:latest"} {
				f.image(name, time.Now())
			}
			r := f.run(t, append([]string{"rmi"}, test.args...)...)
			if r.out != test.out || r.err != test.err || (r.code == 0) != (test.err == "") {
				t.Errorf("%+v, want %q and %q", r, test.out, test.err)
			}
			if left := sortedKeys(f.images); !slices.Equal(left, test.left) {
				t.Errorf("left %q, want %q", left, test.left)
			}
			if !slices.Equal(f.synced, test.sync) {
				t.Errorf("waited for the collection %v, want %v", f.synced, test.sync)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	f := serve(t, &fake{version: &versionapi.VersionResponse{Version: "v2.4.2+holdfast.0.1.0", Revision: "abc"}})
	if got, want := f.run(t, "version").ok(t), "client: 0.1.0\nserver: v2.4.2+holdfast.0.1.0 abc\n"; got != want {
		t.Errorf("prints %q, want %q", got, want)
	}
	want := "{\n  \"client\": \"0.1.0\",\n  \"server\": \"v2.4.2+holdfast.0.1.0\",\n  \"revision\": \"abc\"\n}\n"
	if got := f.run(t, "version", "--json").ok(t); got != want {
		t.Errorf("prints %s, want %s", got, want)
	}
}

func tree() []*holdfastv1.TreeNode {
	return []*holdfastv1.TreeNode{
		{Depth: 0, Kind: "directory", Name: "/r", Path: "/r", Size: -1, Note: "everything"},
		{Depth: 1, Kind: "directory", Name: "content", Path: "/r/content", Size: -1, Note: "documents"},
		{Depth: 2, Kind: "directory", Name: "blobs", Path: "/r/content/blobs", Size: -1, Note: "whole: 2"},
		{Depth: 3, Kind: "blob", Name: "sha256:aa", Path: "/r/content/blobs/sha256/aa", Size: 1024, Note: "manifest", Holders: []string{"image a", "lease b"}},
		{Depth: 3, Kind: "blob", Name: "sha256:bb", Path: "/r/content/blobs/sha256/bb", Size: 0, Note: "part of no image"},
		{Depth: 2, Kind: "directory", Name: "ingest", Path: "/r/content/ingest", Size: -1},
		{Depth: 3, Kind: "ingest", Name: "layer", Path: "/r/content/ingest/0a", Size: 3 << 20, Note: "begun", Holders: []string{"lease b"}},
		{Depth: 1, Kind: "directory", Name: "overlayfs", Path: "/r/overlayfs", Size: -1},
		{Depth: 2, Kind: "snapshot", Name: "sha256:cc", Path: "/r/overlayfs/snapshots/3/fs", Size: 4096, Note: "layer 1 of 1, unpacked", Holders: []string{"config"}},
		{Depth: 2, Kind: "snapshot", Name: "far", Path: "/elsewhere/snapshots/4/fs", Size: -1, Note: "being written", Holders: []string{"x"}},
		{Depth: 2, Kind: "snapshot", Name: "view", Size: -1, Note: "a read-only view"},
	}
}

func TestStoreTree(t *testing.T) {
	f := serve(t, &fake{nodes: tree()})
	golden(t, "tree.txt", f.run(t, "store", "tree").ok(t))
	if f.tree.AllNamespaces {
		t.Error("all namespaces are asked for")
	}
	golden(t, "tree.json", f.run(t, "store", "tree", "-A", "--json").ok(t))
	if !f.tree.AllNamespaces {
		t.Error("-A asks for one namespace")
	}
}

// TestBranches draws a tree in which a deep row is followed by a shallow one.
func TestBranches(t *testing.T) {
	var rows []treeRow
	for _, depth := range []uint32{0, 1, 2, 3, 1, 2, 0, 1} {
		rows = append(rows, treeRow{Depth: depth})
	}
	want := []string{"", "├── ", "│   └── ", "│       └── ", "└── ", "    └── ", "", "└── "}
	if got := branches(rows); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestStoreCheck(t *testing.T) {
	summary := &holdfastv1.CheckEvent{Event: &holdfastv1.CheckEvent_Summary{Summary: &holdfastv1.CheckSummary{Images: 1, Blobs: 3, Snapshots: 2, Bytes: 2048}}}
	finding := func(ns string) *holdfastv1.CheckEvent {
		return &holdfastv1.CheckEvent{Event: &holdfastv1.CheckEvent_Finding{Finding: &holdfastv1.CheckFinding{
			Class: "blob-missing", Namespace: ns, Subject: "sha256:aa", Problem: "the record has no file", Advice: "pull it again"}}}
	}
	f := serve(t, &fake{check: []*holdfastv1.CheckEvent{summary}})
	if got, want := f.run(t, "store", "check").ok(t), "1 image, 3 blobs (2KiB), 2 snapshots: records and files agree\n"; got != want {
		t.Errorf("prints %q, want %q", got, want)
	}
	if f.deep {
		t.Error("the check is deep unasked")
	}
	f.run(t, "store", "check", "--deep").ok(t)
	if !f.deep {
		t.Error("the check is not deep")
	}
	f.check = []*holdfastv1.CheckEvent{finding("default"), finding(""), summary}
	r := f.run(t, "store", "check")
	if r.code != ExitFailure || r.err != "" {
		t.Errorf("exit code %d, complaint %q", r.code, r.err)
	}
	golden(t, "check.txt", r.out)
	r = f.run(t, "store", "check", "--json")
	if r.code != ExitFailure {
		t.Errorf("exit code %d", r.code)
	}
	golden(t, "check.json", r.out)
}

// TestErrors has the daemon's answers that users see, as sentences.
func TestErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		err  error
		args []string
		want string
	}{
		{"as it came", status.Error(codes.NotFound, "pull x: not found"), []string{"pull", "x"}, "holdfast: pull x: not found\n"},
		{"unavailable by its own word", status.Error(codes.Unavailable, "the daemon is stopping"), []string{"pull", "x"}, "holdfast: the daemon is stopping\n"},
		{"unknown call", status.Error(codes.Unimplemented, "unknown service"), []string{"store", "tree"}, "is it a containerd, or an older holdfastd?\n"},
		{"no image service", status.Error(codes.PermissionDenied, "no"), []string{"images"}, "holdfast: no\n"},
		{"two images, one reason", status.Error(codes.Unavailable, "later"), []string{"rmi", "a", "b"}, "holdfast: later\n"},
		{"stream without end", nil, []string{"pull", "x"}, "holdfast: the daemon ended the pull without a word: look at its log\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := serve(t, &fake{err: test.err})
			r := f.run(t, test.args...)
			if r.code != ExitFailure || r.out != "" || !strings.HasSuffix(r.err, test.want) {
				t.Errorf("%+v, want %q", r, test.want)
			}
		})
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, "left")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	absent := filepath.Join(dir, "absent %zz?#") // a path that is no part of a URL
	for socket, want := range map[string]string{
		absent:                         "no daemon at " + absent + ": start holdfastd, or name its socket with --address",
		"unix://" + absent:             "no daemon at " + absent,
		left:                           "nobody listens at " + left + ": start holdfastd",
		dir + strings.Repeat("/x", 60): "name the daemon's socket with --address",
	} {
		for _, args := range [][]string{{"images"}, {"pull", "alpine"}, {"rmi", "a"}, {"store", "tree"}, {"store", "check"}} {
			if r := runAt(t, socket, args...); r.code != ExitFailure || r.out != "" || !strings.Contains(r.err, want) {
				t.Errorf("%q at %s: %+v, want %q", args, socket, r, want)
			}
		}
	}
	if r := runAt(t, absent, "version"); r.code != ExitFailure || r.out != "client: 0.1.0\n" || !strings.Contains(r.err, "no daemon at") {
		t.Errorf("version: %+v", r)
	}
	if r := runAt(t, absent, "version", "--json"); r.code != ExitFailure || r.out != "{\n  \"client\": \"0.1.0\"\n}\n" || !strings.Contains(r.err, "no daemon at") {
		t.Errorf("version --json: %+v", r)
	}
}

// TestDaemonGoesAway ends the daemon while a call is under way.
func TestDaemonGoesAway(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			buf := make([]byte, 1)
			c.Read(buf) // until there is a call
			c.Close()
		}
		l.Close()
	}()
	if r := runAt(t, socket, "images"); r.code != ExitFailure || !strings.HasPrefix(r.err, "holdfast: ") || strings.Contains(r.err, "rpc error") {
		t.Errorf("%+v", r)
	}
}

// TestWithoutDialling runs what needs no daemon, in front of a socket that counts.
func TestWithoutDialling(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var dialled atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			dialled.Add(1)
			c.Close()
		}
	}()
	for want, args := range map[string][]string{
		"bash completion V2 for holdfast":                              {"completion", "bash"},
		"#compdef holdfast":                                            {"completion", "zsh"},
		"fish completion for holdfast":                                 {"completion", "fish"},
		"pull\tFetch an image":                                         {"__complete", "pu"},
		"Usage:\n  holdfast pull IMAGE":                                {"help", "pull"},
		"Usage:\n  holdfast [flags]\n  holdfast [command]":             {},
		"Usage:\n  holdfast store [flags]\n  holdfast store [command]": {"store"},
		"Usage:\n  holdfast rmi IMAGE...":                              {"rmi", "--help"},
		"Usage:\n  holdfast store tree":                                {"store", "tree", "-h"},
		"the daemon's socket ($CONTAINERD_AD":                          {"--help"},
	} {
		if r := runAt(t, socket, args...); r.code != ExitOK || !strings.Contains(r.out, want) {
			t.Errorf("%q: %+v, want %q", args, r, want)
		}
	}
	l.Close()
	<-done
	if n := dialled.Load(); n > 0 {
		t.Errorf("the daemon was dialled %d times", n)
	}
}

func TestUsage(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"pull", "holdfast pull: accepts 1 arg(s), received 0"},
		{"pull a b", "holdfast pull: accepts 1 arg(s), received 2"},
		{"rmi", "requires at least 1 arg"},
		{"images x", `unknown command "x" for "holdfast images"`},
		{"frobnicate", `unknown command "frobnicate" for "holdfast"`},
		{"trace show a b", "accepts at most 1 arg(s), received 2"},
		{"store frobnicate", `unknown command "frobnicate" for "holdfast store"`},
		{"images --frobnicate", "unknown flag: --frobnicate"},
		{"pull --user me alpine", "--user needs NAME:PASSWORD where no terminal can be asked"},
	} {
		r := runAt(t, "/nonexistent", strings.Fields(test.args)...)
		if r.code != ExitUsage || r.out != "" || !strings.Contains(r.err, test.want) || !strings.HasSuffix(r.err, "Run `holdfast --help` for the commands and their flags.\n") {
			t.Errorf("holdfast %s: %+v, want %q", test.args, r, test.want)
		}
	}
}

// TestEnvironment takes socket and namespace from where containerd's clients do.
func TestEnvironment(t *testing.T) {
	f := serve(t, &fake{})
	t.Setenv("CONTAINERD_ADDRESS", f.socket)
	t.Setenv("CONTAINERD_NAMESPACE", "k8s.io")
	var out, errw strings.Builder
	if code := Run(t.Context(), []string{"images"}, &out, &errw, "dev"); code != ExitOK {
		t.Errorf("exit code %d: %s", code, errw.String())
	}
	if !slices.Equal(f.namespaces, []string{"k8s.io"}) {
		t.Errorf("asked in %q", f.namespaces)
	}
}
