package daemon

import (
	"bytes"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/internal/config"
	"github.com/holdfast-dev/holdfast/internal/gc"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// semver is the grammar of https://semver.org with the `v` that Go and containerd's clients put before it.
var semver = regexp.MustCompile(`^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$`)

func TestVersion(t *testing.T) {
	for version, want := range map[string]string{
		"v0.1.0":                   "0.1.0",
		"0.1.0":                    "0.1.0",
		"v0.1.0-3-gabcdef0-dirty":  "0.1.0-3-gabcdef0-dirty",
		"v0.1.0+deb12u1":           "0.1.0-deb12u1",
		"abcdef0":                  "abcdef0",
		"dev":                      "dev",
		"":                         "dev",
		"...":                      "dev",
		".1..2.":                   "1.2",
		"a b/c\n\x00~ü":            "a-b-c----",
		"v0.1.0\r\nX-Injected: me": "0.1.0--X-Injected--me",
	} {
		b := Build{Version: version}
		if got := b.own(); got != want {
			t.Errorf("%q is %q, want %q", version, got, want)
		}
		if got := b.api(); got != "v2.4.2+holdfast."+want || !semver.MatchString(got) {
			t.Errorf("%q is %q to clients", version, got)
		}
	}
}

// TestGCOptions translates containerd's zeros, which are no defaults.
func TestGCOptions(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for _, test := range []struct {
		in   config.GC
		want gc.Options
	}{
		{config.GC{PauseThreshold: 0.02, MutationThreshold: 100, StartupDelay: 100 * time.Millisecond},
			gc.Options{PauseThreshold: 0.02, MutationThreshold: 100, StartupDelay: 100 * time.Millisecond}},
		{config.GC{}, gc.Options{PauseThreshold: -1, MutationThreshold: 1, StartupDelay: -1}},
		{config.GC{PauseThreshold: 0.5, DeletionThreshold: 3, MutationThreshold: 7, ScheduleDelay: time.Second, StartupDelay: time.Minute},
			gc.Options{PauseThreshold: 0.5, DeletionThreshold: 3, MutationThreshold: 7, ScheduleDelay: time.Second, StartupDelay: time.Minute}},
	} {
		got := gcOptions(&config.Config{GC: test.in}, log)
		if got.Log != log || got.Collected == nil {
			t.Error("collections are not logged")
		}
		got.Log, got.Collected = nil, nil
		if got.PauseThreshold != test.want.PauseThreshold || got.DeletionThreshold != test.want.DeletionThreshold || got.MutationThreshold != test.want.MutationThreshold ||
			got.ScheduleDelay != test.want.ScheduleDelay || got.StartupDelay != test.want.StartupDelay {
			t.Errorf("%+v is %+v, want %+v", test.in, got, test.want)
		}
	}
}

func TestDownloads(t *testing.T) {
	for n, want := range map[int]int{3: 3, 1: 1, 64: 64, 0: maxDownloads, 1000: maxDownloads} {
		if got := downloads(&config.Config{Pull: config.Pull{MaxConcurrentDownloads: n}}); got != want {
			t.Errorf("%d is %d, want %d", n, got, want)
		}
	}
}

func TestLogCollected(t *testing.T) {
	for _, test := range []struct {
		c    meta.Collected
		err  error
		want string
	}{
		{meta.Collected{Elapsed: time.Second, Pause: time.Second}, nil, ""},
		{meta.Collected{Blobs: 1}, errors.New("no"), ""},
		{meta.Collected{Leases: 1}, nil, "leases=1"},
		{meta.Collected{Bytes: 7}, nil, "bytes=7"},
	} {
		var buf bytes.Buffer
		logCollected(slog.New(slog.NewTextHandler(&buf, nil)))(test.c, test.err)
		if got := buf.String(); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%+v, %v: logs %q, want %q", test.c, test.err, got, test.want)
		}
	}
}

// TestTally counts a layer once however often it is told of, and passes
// everything on.
func TestTally(t *testing.T) {
	var tl tally
	passed := 0
	tap := tl.tap(func(pull.Event) { passed++ })
	for _, e := range []pull.Event{
		{Stage: pull.StageWaiting, Desc: oci.Descriptor{Digest: "a", Size: 5}},
		{Stage: pull.StageComplete, Desc: oci.Descriptor{Digest: "a", Size: 5}},
		{Stage: pull.StageComplete, Desc: oci.Descriptor{Digest: "a", Size: 5}},
		{Stage: pull.StageComplete, Desc: oci.Descriptor{Digest: "b", Size: 7}},
		{Stage: pull.StageExists, Desc: oci.Descriptor{Digest: "c", Size: 9}},
	} {
		tap(e)
	}
	if layers, size, present := tl.count(); layers != 2 || size != 12 || present != 1 || passed != 5 {
		t.Errorf("%d layers of %d bytes, %d present, %d events passed on", layers, size, present, passed)
	}
	(&tally{}).tap(nil)(pull.Event{Stage: pull.StageExists})
}
