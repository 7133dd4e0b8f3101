package pull

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestFaults: whatever a registry does to a layer, the error names host and layer, nothing is committed, and the same
// pull succeeds once the registry is well.
func TestFaults(t *testing.T) {
	const size = 100_000
	for name, test := range map[string]struct {
		fault registrytest.Fault
		kind  error
		says  string
	}{
		"truncated at once":   {registrytest.Fault{Truncate: true, At: 0}, nil, "broken off"},
		"truncated":           {registrytest.Fault{Truncate: true, At: 5000}, nil, "broken off"},
		"truncated and alone": {registrytest.Fault{Truncate: true, At: 0, IgnoreRange: true}, nil, "broken off"},
		"reset":               {registrytest.Fault{Reset: true, At: 1}, nil, "reset by peer"},
		"stalled":             {registrytest.Fault{Stall: true, At: 700}, errdefs.ErrUnavailable, "300ms"},
		"too many":            {registrytest.Fault{Status: 429, RetryAfter: "3600"}, errdefs.ErrResourceExhausted, "try again in 1h0m0s"},
		"unauthorized":        {registrytest.Fault{Status: 401}, nil, ""},
		"forbidden":           {registrytest.Fault{Status: 403}, errdefs.ErrPermissionDenied, "credentials"},
		"lost":                {registrytest.Fault{Status: 404}, errdefs.ErrNotFound, "push it again"},
		"broken":              {registrytest.Fault{Status: 500}, errdefs.ErrUnavailable, "500"},
		"corrupt first byte":  {registrytest.Fault{Corrupt: true, At: 0}, errdefs.ErrDataLoss, "damages or changes content"},
		"corrupt":             {registrytest.Fault{Corrupt: true, At: size / 2}, errdefs.ErrDataLoss, "damages or changes content"},
		"another blob":        {registrytest.Fault{Replace: simple(9, size).Data}, errdefs.ErrDataLoss, ""},
		"too short":           {registrytest.Fault{Replace: []byte("short")}, errdefs.ErrDataLoss, "5 bytes"},
		"too long":            {registrytest.Fault{Excess: []byte("x")}, errdefs.ErrDataLoss, "bytes"},
	} {
		for _, driver := range drivers {
			t.Run(name+"/"+driver, func(t *testing.T) {
				t.Parallel()
				h := newHouse(t, settings{})
				img := h.push("app", "1", simple(1, size))
				h.srv.Fault("GET /v2/app/blobs/"+img.Layers[0].Digest.String(), test.fault)
				err := h.pull("app:1", Request{Snapshotter: driver})
				wantError(t, err, h.srv.Host(), img.Layers[0].Digest.String(), "app:1", test.says)
				if test.kind != nil && !errors.Is(err, test.kind) {
					t.Errorf("error %q is no %v", err, test.kind)
				}
				h.nothing()
				h.srv.Heal()
				h.mustPull("app:1", Request{Snapshotter: driver})
				h.whole("app:1", driver)
			})
		}
	}
}

// TestDocumentFaults: the same for documents.
func TestDocumentFaults(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{
		"corrupt":   {Corrupt: true, At: 3},
		"truncated": {Truncate: true, At: 10},
		"another":   {Replace: []byte(`{"schemaVersion":2}`)},
		"too many":  {Status: 429, RetryAfter: "3600"},
		"lost":      {Status: 404},
		"longer":    {Excess: []byte(" "), NoLength: true},
	} {
		for _, what := range []string{"manifest", "config"} {
			t.Run(name+"/"+what, func(t *testing.T) {
				t.Parallel()
				h := newHouse(t, settings{})
				img := h.push("app", "1", simple(1, 100))
				dgst := img.Descriptor.Digest
				if what == "config" {
					dgst = img.Config.Digest
				}
				h.srv.Fault("GET /v2/app/blobs/"+dgst.String(), fault)
				h.srv.Fault("GET /v2/app/manifests/"+dgst.String(), fault)
				wantError(t, h.pull("app:1", Request{}), h.srv.Host(), dgst.String())
				h.nothing()
				h.collect()
				h.settled() // there is nothing worth keeping
				h.srv.Heal()
				h.mustPull("app:1", Request{})
				h.whole("app:1", "overlayfs")
			})
		}
	}
}

// TestPassingFaults: what a retry mends is mended within the pull, and no byte is fetched twice.
func TestPassingFaults(t *testing.T) {
	const size = 100_000
	for name, fault := range map[string]registrytest.Fault{
		"truncated":      {Truncate: true, At: 60_000, Times: 1},
		"reset":          {Reset: true, At: 0, Times: 2},
		"busy":           {Status: 503, Times: 1},
		"too many":       {Status: 429, Times: 1},
		"stalled":        {Stall: true, At: 50_000, Times: 1},
		"slow":           {Trickle: time.Millisecond, Piece: 5000},
		"without length": {NoLength: true},
		"excess":         {NoLength: true, Excess: []byte("more")}, // cut at the descriptor's size
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, settings{})
			img := h.push("app", "1", simple(1, size))
			h.srv.Fault("GET /v2/app/blobs/"+img.Layers[0].Digest.String(), fault)
			h.mustPull("app:1", Request{})
			h.whole("app:1", "overlayfs")
			if n := h.srv.Bytes("/blobs/" + img.Layers[0].Digest.String()); n > img.Layers[0].Size+int64(len(fault.Excess)) {
				t.Errorf("%d bytes were sent of a layer of %d", n, img.Layers[0].Size)
			}
		})
	}
}

// TestLogin: tokens are fetched, wrong passwords told, and nothing but the reading rights asked for.
func TestLogin(t *testing.T) {
	for name, login := range map[string]registrytest.Auth{
		"bearer": {User: "u", Password: "p"},
		"basic":  {Basic: true, User: "u", Password: "p"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t, settings{})
			h.push("app", "1", many(1, 3)...)
			h.srv.Require(login)
			as := func(user, password string) Request {
				return Request{Session: registry.Session{Credentials: auth.For(h.srv.Host(), auth.Credential{Username: user, Password: password})}}
			}
			for _, req := range []Request{{}, as("u", "wrong")} {
				err := h.pull("app:1", req)
				wantError(t, err, h.srv.Host(), "log in, or check the credentials")
				if strings.Contains(err.Error(), "wrong") {
					t.Errorf("the error tells the password: %v", err)
				}
			}
			h.nothing()
			h.mustPull("app:1", as("u", "p"))
			h.whole("app:1", "overlayfs")
		})
	}
}

// TestGoneMirrors: mirrors that are gone cost about a second for the whole pull, and one that lacks a layer nothing.
func TestGoneMirrors(t *testing.T) {
	lacking := registrytest.New(t)
	for name, mirror := range map[string]string{
		"refusing": registrytest.Refused(t),
		"silent":   registrytest.BlackHole(t),
		"lacking":  lacking.Host(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, settings{mirrors: []string{mirror}})
			h.push("app", "1", many(1, 8)...)
			begin := time.Now()
			h.mustPull("app:1", Request{})
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("a mirror that is %s costs %s", name, took)
			}
			h.whole("app:1", "overlayfs")
		})
	}
}

// TestLyingMirror: bytes of another digest come from a mirror; the layer is fetched from the registry instead, and the
// mirror isn't asked for anything more.
func TestLyingMirror(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			mirror := registrytest.New(t)
			h := newHouse(t, settings{mirrors: []string{mirror.Host()}, downloads: 1})
			img := h.push("app", "1", simple(1, 50_000), simple(2, 50_000), simple(3, 50_000))
			mirror.PushFormat("app", "1", registrytest.Format{Platform: host()}, simple(1, 50_000), simple(2, 50_000), simple(3, 50_000))
			mirror.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Corrupt: true, At: 40_000})
			h.mustPull("app:1", Request{Snapshotter: driver})
			h.whole("app:1", driver)
			if h.requests(img.Layers[0]) != 1 {
				t.Errorf("the registry was asked %d times for the layer that the mirror spoilt", h.requests(img.Layers[0]))
			}
			n := 0
			for _, l := range img.Layers {
				n += mirror.Count("/blobs/" + l.Digest.String())
			}
			if n != 1 && driver == "overlayfs" || n > 2 {
				t.Errorf("the lying mirror was asked %d times for layers", n)
			}
			if got := h.file(driver, h.complete(testNamespace, "app:1", driver).Layers[0].ChainID, "layer1/data"); got != noise(1, 50_000) {
				t.Error("the unpacked file has other bytes than the archive")
			}
		})
	}
}

// interrupted pulls until half of the layer is here and the registry falls silent.
func interrupted(t *testing.T, h *house, driver string, size int) registrytest.Image {
	t.Helper()
	img := h.push("app", "1", simple(1, size))
	path := "GET /v2/app/blobs/" + img.Layers[0].Digest.String()
	h.srv.Fault(path, registrytest.Fault{Status: 404})
	h.srv.Fault(path, registrytest.Fault{Truncate: true, At: int64(size / 2), Times: 1})
	if err := h.pull("app:1", Request{Snapshotter: driver}); err == nil {
		t.Fatal("a pull whose registry broke off succeeded")
	}
	h.nothing()
	h.srv.Heal()
	return img
}

// TestResume: the second attempt asks for what is missing and for nothing else, also after a restart.
func TestResume(t *testing.T) {
	const size = 200_000
	for _, driver := range drivers {
		for _, restart := range []bool{false, true} {
			t.Run(driver+map[bool]string{true: "/restart"}[restart], func(t *testing.T) {
				h := newHouse(t, settings{})
				img := interrupted(t, h, driver, size)
				st, err := h.space().Ingest(t.Context(), oci.Key(img.Layers[0]))
				if err != nil || st.Offset != size/2 {
					t.Fatalf("the ingest holds %d bytes (%v), want %d", st.Offset, err, size/2)
				}
				if restart {
					h.reopen()
				}
				h.srv.Forget()
				h.mustPull("app:1", Request{Snapshotter: driver})
				h.whole("app:1", driver)
				var ranges []string
				for _, r := range h.srv.Requests() {
					if strings.Contains(r.Path, img.Layers[0].Digest.String()) {
						ranges = append(ranges, r.Header.Get("Range"))
					}
				}
				if len(ranges) != 1 || !strings.HasPrefix(ranges[0], "bytes=100000-") {
					t.Errorf("the layer was asked for with ranges %q", ranges)
				}
				if n := h.srv.Bytes(img.Layers[0].Digest.String()); n != img.Layers[0].Size-size/2 {
					t.Errorf("%d bytes were sent, and %d were missing", n, img.Layers[0].Size-size/2)
				}
			})
		}
	}
}

// TestResumeCorrupt: kept bytes that are not the blob's are found out, thrown away and fetched once more.
func TestResumeCorrupt(t *testing.T) {
	const size = 200_000
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h := newHouse(t, settings{})
			img := interrupted(t, h, driver, size)
			name := digest.FromString(testNamespace + "/1/" + oci.Key(img.Layers[0])).Encoded()
			data := filepath.Join(h.path("content"), "ingest", name, "data")
			kept, err := os.ReadFile(data)
			if err != nil {
				t.Fatal(err)
			}
			kept[len(kept)/2] ^= 1
			if err := os.WriteFile(data, kept, 0o644); err != nil {
				t.Fatal(err)
			}
			h.srv.Forget()
			h.mustPull("app:1", Request{Snapshotter: driver})
			h.whole("app:1", driver)
			if n := h.srv.Bytes(img.Layers[0].Digest.String()); n > 2*img.Layers[0].Size {
				t.Errorf("%d bytes were sent of a layer of %d", n, img.Layers[0].Size)
			}
		})
	}
}

// TestResumeComplete: an ingest that has all its bytes and was not committed needs no request.
func TestResumeComplete(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", simple(1, 5000))
	key := oci.Key(img.Layers[0])
	w, err := h.space().OpenWriter(t.Context(), key, writerOptions(img.Layers[0]))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(simple(1, 5000).Data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	h.mustPull("app:1", Request{})
	if n := h.requests(img.Layers[0]); n > 0 {
		t.Errorf("%d requests for a layer whose bytes are all here", n)
	}
	h.whole("app:1", "overlayfs")
}

// TestDistrustNobody: a registry that lies once is asked again by the next pull.
func TestDistrustNobody(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "1", simple(1, 5000))
	h.srv.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Corrupt: true, At: 20, Times: 1})
	wantError(t, h.pull("app:1", Request{}), h.srv.Host())
	h.mustPull("app:1", Request{})
	h.whole("app:1", "overlayfs")
}
