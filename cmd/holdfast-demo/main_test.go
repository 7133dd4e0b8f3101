package main

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestServes waits for the ready file, as the quickstart does, and reads the
// image that it names.
func TestServes(t *testing.T) {
	ready := filepath.Join(t.TempDir(), "image")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served := make(chan error, 1)
	go func() { served <- run(ctx, "127.0.0.1:0", "/bin/busybox", ready) }()
	var reference string
	for poll := time.NewTicker(5 * time.Millisecond); reference == ""; {
		select {
		case err := <-served:
			t.Fatalf("ended early: %v", err)
		case <-poll.C:
			text, _ := os.ReadFile(ready)
			reference = strings.TrimSpace(string(text))
		}
	}
	ref, err := name.ParseReference(reference, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	got, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	want, err := buildImage("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	gotDigest, _ := got.Digest()
	wantDigest, _ := want.Digest()
	if gotDigest != wantDigest {
		t.Errorf("serves %s, want %s", gotDigest, wantDigest)
	}
	stop()
	if err := <-served; err != nil {
		t.Errorf("told to stop: %v", err)
	}
	if resp, err := http.Get("http://" + ref.Context().RegistryStr() + "/v2/"); err == nil {
		resp.Body.Close()
		t.Error("it serves after its end")
	}
}

func TestRefusals(t *testing.T) {
	for _, test := range []struct{ listen, busybox, want string }{
		{"0.0.0.0:0", "/bin/busybox", "is not a loopback address"},
		{"127.0.0.1:0", "/nonexistent", "install it with `apt-get install busybox-static`"},
		{"127.0.0.1:0", "/bin/false", "ask /bin/false for its applets"},
		{"nowhere", "/bin/busybox", "missing port"},
	} {
		if err := run(t.Context(), test.listen, test.busybox, ""); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s, %s: error %v, want %q", test.listen, test.busybox, err, test.want)
		}
	}
}
