package registry_test

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestTrickle: a source that sends a byte now and then is alive and worth nothing.
func TestTrickle(t *testing.T) {
	drops := registrytest.Fault{Trickle: 10 * time.Millisecond, Piece: 1}
	opts := options()
	opts.LeastRate, opts.RateWindow = 1000, 300*time.Millisecond
	t.Run("mirror", func(t *testing.T) {
		slow, img, data := demo(t)
		good, _, _ := demo(t)
		slow.Fault("/blobs/", drops)
		opts := opts
		opts.Hosts = mirrors(slow.Host(), good.Host())
		got, host, err := read(t, session(t, opts, "registry.example", registry.Session{}), img.Layers[0], 0)
		if err != nil || !bytes.Equal(got, data) || host != good.Host() {
			t.Fatalf("%d bytes from %s, %v", len(got), host, err)
		}
		if n := good.Bytes("/blobs/"); n == 0 || n >= blobSize {
			t.Errorf("%d bytes from the registry, want all but what the mirror has sent", n)
		}
	})
	t.Run("mirror that only the last may be as slow as", func(t *testing.T) {
		slow, img, data := demo(t)
		good, _, _ := demo(t)
		slow.Fault("/blobs/", registrytest.Fault{Trickle: 10 * time.Millisecond, Piece: 50})
		opts := opts
		opts.Hosts = mirrors(slow.Host(), good.Host())
		got, host, err := read(t, session(t, opts, "registry.example", registry.Session{}), img.Layers[0], 0)
		if err != nil || !bytes.Equal(got, data) || host != good.Host() {
			t.Fatalf("%d bytes from %s, %v", len(got), host, err)
		}
	})
	t.Run("alone", func(t *testing.T) {
		slow, img, _ := demo(t)
		slow.Fault("/blobs/", drops)
		_, _, err := read(t, session(t, opts, slow.Host(), registry.Session{}), img.Layers[0], 0)
		wantError(t, err, errdefs.IsUnavailable, "less than 1000 a second", slow.Host(), "try again")
		if n := slow.Count("/blobs/"); n != 2 {
			t.Errorf("%d requests, want 2", n)
		}
	})
	t.Run("alone, and fast enough", func(t *testing.T) {
		slow, img, _ := demo(t)
		slow.Fault("/blobs/", registrytest.Fault{Trickle: 10 * time.Millisecond, Piece: 50})
		b, err := session(t, opts, slow.Host(), registry.Session{}).Fetch(t.Context(), img.Layers[0], 0)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if _, err := io.ReadFull(b, make([]byte, 4000)); err != nil {
			t.Error(err)
		}
	})
	t.Run("slow reader", func(t *testing.T) {
		srv, img, _ := demo(t)
		opts := opts
		opts.LeastRate = 1 << 20
		b, err := session(t, opts, srv.Host(), registry.Session{}).Fetch(t.Context(), img.Layers[0], 0)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		for range 3 { // far slower than what is asked of the source
			<-time.After(opts.RateWindow)
			if _, err := io.ReadFull(b, make([]byte, 64)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
