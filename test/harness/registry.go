package harness

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"
)

// Registry is a registry on loopback, over plain HTTP. It can be slow, and
// stop in the middle of a layer. For one that lies see internal/registry/registrytest.
type Registry struct {
	Host string // host:port

	mu     sync.Mutex
	tags   map[string]ocispec.Descriptor // "name:tag"
	blobs  map[digest.Digest][]byte
	served map[digest.Digest]int64
	total  int64
	speed  *rate.Limiter
	hold   *hold
}

// hold stops all blobs once so many bytes are out.
type hold struct {
	after   int64
	reached chan struct{}
	release chan struct{}
}

// NewRegistry starts an empty registry that goes with the test.
func NewRegistry(t testing.TB) *Registry {
	r := &Registry{
		tags:   make(map[string]ocispec.Descriptor),
		blobs:  make(map[digest.Digest][]byte),
		served: make(map[digest.Digest]int64),
		speed:  rate.NewLimiter(rate.Inf, chunk),
	}
	server := httptest.NewServer(r)
	t.Cleanup(func() {
		r.Release()
		server.CloseClientConnections()
		server.Close()
	})
	r.Host = strings.TrimPrefix(server.URL, "http://")
	return r
}

// Push adds an image and returns its reference, as 127.0.0.1:5000/name:latest.
func (r *Registry) Push(img *Image, name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.Copy(r.blobs, img.Blobs)
	r.tags[name+":latest"] = img.Target
	return r.Host + "/" + name + ":latest"
}

// Limit slows all blobs together to so many bytes per second; 0 is no limit.
func (r *Registry) Limit(bytesPerSecond int) {
	if bytesPerSecond == 0 {
		r.speed.SetLimit(rate.Inf)
		return
	}
	r.speed.SetLimit(rate.Limit(bytesPerSecond))
}

// Hold stops every blob once n more bytes of blobs are out. The channel is
// closed when that is so; Release lets them go on.
func (r *Registry) Hold(n int64) (reached <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hold = &hold{after: r.total + n, reached: make(chan struct{}), release: make(chan struct{})}
	return r.hold.reached
}

// Release ends a Hold.
func (r *Registry) Release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.hold != nil {
		close(r.hold.release)
		r.hold = nil
	}
}

// Served returns how many bytes of each blob were sent since the last call.
func (r *Registry) Served() map[digest.Digest]int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	served := r.served
	r.served = make(map[digest.Digest]int64)
	return served
}

// ServeHTTP answers the reading half of the distribution protocol.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	path := strings.TrimPrefix(req.URL.Path, "/v2/")
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		w.WriteHeader(http.StatusMethodNotAllowed)
	} else if path == "" {
		w.WriteHeader(http.StatusOK)
	} else if name, tag, ok := strings.Cut(path, "/manifests/"); ok {
		r.serveManifest(w, req, name, tag)
	} else if _, dgst, ok := strings.Cut(path, "/blobs/"); ok {
		r.serveBlob(w, req, digest.Digest(dgst))
	} else {
		http.NotFound(w, req)
	}
}

func (r *Registry) serveManifest(w http.ResponseWriter, req *http.Request, name, tag string) {
	r.mu.Lock()
	desc, ok := r.tags[name+":"+tag]
	for _, d := range r.tags {
		if d.Digest.String() == tag {
			desc, ok = d, true
		}
	}
	blob := r.blobs[desc.Digest]
	r.mu.Unlock()
	if !ok {
		http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", desc.MediaType)
	w.Header().Set("Docker-Content-Digest", desc.Digest.String())
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(blob))
}

func (r *Registry) serveBlob(w http.ResponseWriter, req *http.Request, dgst digest.Digest) {
	r.mu.Lock()
	blob, ok := r.blobs[dgst]
	r.mu.Unlock()
	if !ok {
		http.Error(w, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`, http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Docker-Content-Digest", dgst.String())
	http.ServeContent(&blobWriter{w, req.Context(), r, dgst}, req, "", time.Time{}, bytes.NewReader(blob))
}

// chunk is how much of a blob goes out at once, in bytes.
const chunk = 16 << 10

// blobWriter counts and delays what goes out.
type blobWriter struct {
	http.ResponseWriter
	ctx  context.Context
	r    *Registry
	dgst digest.Digest
}

func (w *blobWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		part := p[:min(len(p), chunk)]
		if err := w.r.admit(w.ctx, w.dgst, len(part)); err != nil {
			return n, err
		}
		m, err := w.ResponseWriter.Write(part)
		n += m
		if err != nil {
			return n, err
		}
		w.ResponseWriter.(http.Flusher).Flush()
		p = p[len(part):]
	}
	return n, nil
}

// admit waits until n bytes of a blob may go out, and counts them.
func (r *Registry) admit(ctx context.Context, dgst digest.Digest, n int) error {
	if err := r.speed.WaitN(ctx, n); err != nil {
		return err
	}
	for {
		r.mu.Lock()
		h := r.hold
		if h == nil || r.total < h.after {
			r.served[dgst] += int64(n)
			r.total += int64(n)
			if h != nil && r.total >= h.after {
				close(h.reached)
			}
			r.mu.Unlock()
			return nil
		}
		r.mu.Unlock()
		select {
		case <-h.release:
		case <-ctx.Done():
			return fmt.Errorf("client gone: %w", ctx.Err())
		}
	}
}
