package registry_test

import (
	"bytes"
	"net"
	"testing"

	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestMirrorIsBack: a mirror that did not answer another session a moment ago is asked when nobody else is left.
func TestMirrorIsBack(t *testing.T) {
	srv, img, data := demo(t)
	address := registrytest.Refused(t)
	opts := options()
	opts.Hosts = mirrors(address, srv.Host())
	client := registry.New(opts)
	if _, err := open(t, client, "registry.example").Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	mirror := registrytest.Serve(l)
	t.Cleanup(mirror.Close)
	mirror.Push("demo", "latest", registrytest.Layer{Data: data, MediaType: "application/vnd.oci.image.layer.v1.tar+gzip"})
	repo := open(t, client, "registry.example")
	if _, host, err := read(t, repo, img.Layers[0], 0); err != nil || host != srv.Host() {
		t.Errorf("while it may be down, %q has sent the blob (%v), and not %s", host, err, srv.Host())
	}
	srv.Kill()
	repo = open(t, client, "registry.example")
	if _, err := repo.Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, host, err := read(t, repo, img.Layers[0], 0); err != nil || host != address || !bytes.Equal(got, data) {
		t.Errorf("%d bytes from %q, %v", len(got), host, err)
	}
}
