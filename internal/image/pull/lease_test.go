package pull

import (
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

func writerOptions(desc oci.Descriptor) meta.WriterOptions {
	return meta.WriterOptions{Total: desc.Size, Expected: desc.Digest}
}

// TestLeaseOfAFailedPull: what a failed pull has fetched outlives collections, for as long as its lease; the next pull
// of the image takes the lease away.
func TestLeaseOfAFailedPull(t *testing.T) {
	h := newHouse(t, settings{})
	img := interrupted(t, h, "overlayfs", 100_000)
	d := h.dump()
	if len(d.Leases) != 1 {
		t.Fatalf("%d leases after a failed pull, want one", len(d.Leases))
	}
	l := d.Leases[0]
	expires, err := time.Parse(time.RFC3339, l.Labels["containerd.io/gc.expire"])
	if in := time.Until(expires); err != nil || in < 23*time.Hour || in > 24*time.Hour {
		t.Errorf("the lease ends in %s (%v), want a day", in, err)
	}
	h.collect()
	if st, err := h.space().Ingest(t.Context(), oci.Key(img.Layers[0])); err != nil || st.Offset != 50_000 {
		t.Errorf("after a collection the ingest has %d bytes, %v", st.Offset, err)
	}

	// Another image's pull leaves the lease alone.
	h.push("other", "1", simple(5, 100))
	h.mustPull("other:1", Request{})
	if n := len(h.dump().Leases); n != 1 {
		t.Errorf("%d leases after the pull of another image, want one", n)
	}
	h.mustPull("app:1", Request{})
	h.whole("app:1", "overlayfs")
}

// TestExpiredLease: what an expired lease held goes with a collection.
func TestExpiredLease(t *testing.T) {
	h := newHouse(t, settings{})
	interrupted(t, h, "overlayfs", 100_000)
	for _, l := range h.dump().Leases {
		if err := h.space().DeleteLease(t.Context(), l.ID); err != nil {
			t.Fatal(err)
		}
	}
	h.collect()
	h.settled()
	h.nothing()
}

// TestNothingFetched: a pull that fails before it has fetched anything leaves no lease.
func TestNothingFetched(t *testing.T) {
	h := newHouse(t, settings{})
	h.srv.PushManifest("app", "1", "application/vnd.oci.image.manifest.v1+json", []byte(`{"schemaVersion":2}`))
	if err := h.pull("app:1", Request{}); err == nil {
		t.Fatal("a manifest without config was pulled")
	}
	wantError(t, h.pull("absent:1", Request{}), "absent", "check the name and the tag")
	if n := len(h.dump().Leases); n > 0 {
		t.Errorf("%d leases are left", n)
	}
	h.collect()
	h.settled()
	h.nothing()
}

// TestRestartDuringPull: a Puller that is closed ends its pulls, and the next one resumes them.
func TestRestartDuringPull(t *testing.T) {
	const size = 200_000
	h := newHouse(t, settings{})
	img := h.push("app", "1", simple(1, size))
	layer := img.Layers[0]
	h.srv.Fault("/blobs/"+layer.Digest.String(), registrytest.Fault{Stall: true, At: size / 2})
	half := watchFor(offset(layer.Digest, size/2))
	failed := make(chan error, 1)
	go func() { failed <- h.pull("app:1", Request{Progress: half.hear}) }()
	wait(t, half.seen, "half of the layer")
	h.puller.Close()
	wantError(t, <-failed, "the daemon is stopping")
	wantError(t, h.pull("app:1", Request{}), "the daemon is stopping")
	h.reopen()
	h.srv.Heal()
	h.srv.Forget()
	h.mustPull("app:1", Request{})
	h.whole("app:1", "overlayfs")
	if n := h.srv.Bytes(layer.Digest.String()); n != layer.Size-size/2 {
		t.Errorf("%d bytes were sent, and %d were missing", n, layer.Size-size/2)
	}
}
