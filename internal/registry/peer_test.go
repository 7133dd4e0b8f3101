package registry_test

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestAnotherServer pulls from a registry that somebody else wrote.
func TestAnotherServer(t *testing.T) {
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	put := func(path, contentType string, data []byte) oci.Descriptor {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, srv.URL+path, bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", contentType)
		resp, err := srv.Client().Do(req)
		if err != nil || resp.StatusCode != http.StatusCreated {
			t.Fatalf("%s: %v, %v", path, resp, err)
		}
		resp.Body.Close()
		return oci.Descriptor{MediaType: contentType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	}
	data := noise(100_000)
	layer := put("/v2/demo/blobs/uploads/1?digest="+digest.FromBytes(data).String(), "application/octet-stream", data)
	manifest := put("/v2/demo/manifests/latest", ociManifest, []byte(`{"schemaVersion":2,"layers":[]}`))

	repo := session(t, options(), host, registry.Session{})
	desc, err := repo.Resolve(t.Context())
	if err != nil || desc.Digest != manifest.Digest || desc.MediaType != ociManifest {
		t.Errorf("%+v, %v", desc, err)
	}
	for _, offset := range []int64{0, 70_000} {
		if got, _, err := read(t, repo, layer, offset); err != nil || !bytes.Equal(got, data[offset:]) {
			t.Errorf("from %d: %d bytes, %v", offset, len(got), err)
		}
	}
}

func TestHooks(t *testing.T) {
	srv, img, _ := demo(t)
	layer := img.Layers[0]
	srv.Fault("/blobs/", registrytest.Fault{Truncate: true, At: 1 << 20, Times: 1})
	srv.Fault("/blobs/", registrytest.Fault{Status: 503, Times: 1})
	var mu sync.Mutex
	var requests, retries, total int
	var resumed int64
	opts := options()
	opts.Hosts = mirrors(srv.Host())
	opts.Hooks = registry.Hooks{
		Request: func(host, method, path string, status int, d time.Duration, err error) {
			mu.Lock()
			defer mu.Unlock()
			requests++
			if host != srv.Host() || method != "GET" || !strings.HasSuffix(path, layer.Digest.String()) || status == 0 || d <= 0 || err != nil {
				t.Errorf("%s %s %s %d %s %v", host, method, path, status, d, err)
			}
		},
		Retry: func(host, path string, attempt int, wait time.Duration, err error) {
			retries++
			if attempt != 1 || wait <= 0 || err == nil || !strings.Contains(err.Error(), "503") {
				t.Errorf("%s %s %d %s %v", host, path, attempt, wait, err)
			}
		},
		Resume: func(host string, dgst digest.Digest, offset int64, err error) {
			resumed = offset
			if dgst != layer.Digest || err == nil {
				t.Errorf("%s %s %v", host, dgst, err)
			}
		},
		Bytes: func(_ string, _ digest.Digest, n int) { total += n },
	}
	if _, _, err := read(t, session(t, opts, srv.Host(), registry.Session{}), layer, 0); err != nil {
		t.Fatal(err)
	}
	if requests != 3 || retries != 1 || resumed != 1<<20 || total != blobSize {
		t.Errorf("%d requests, %d retries, resumed at %d, %d bytes", requests, retries, resumed, total)
	}
}

func TestConnectionsAreKept(t *testing.T) {
	srv, img, _ := demo(t)
	var mu sync.Mutex
	ports := map[string]bool{}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		ports[r.RemoteAddr] = true
		mu.Unlock()
		http.Redirect(w, r, srv.URL()+r.URL.Path, http.StatusFound)
	}))
	defer front.Close()
	client := registry.New(options())
	for range 5 {
		repo := open(t, client, strings.TrimPrefix(front.URL, "http://"))
		if _, err := repo.Resolve(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, _, err := read(t, repo, img.Layers[0], 0); err != nil {
			t.Fatal(err)
		}
	}
	if len(ports) > 2 {
		t.Errorf("%d connections for 10 requests, one after another", len(ports))
	}
	client.CloseIdle()
}
