package registry_test

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// slowServer has one blob, and a network of its own for each connection.
type slowServer struct {
	*httptest.Server
	data   []byte
	pace   time.Duration // for each piece
	answer func(w http.ResponseWriter, r *http.Request, atOnce int) (done bool)

	mu              sync.Mutex
	requests        []string // their Range headers
	atOnce, highest int
}

const piece = 8 << 10

func newSlowServer(t *testing.T, size int, pace time.Duration) *slowServer {
	s := &slowServer{data: noise(size), pace: pace}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *slowServer) desc() oci.Descriptor {
	return oci.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: digest.FromBytes(s.data), Size: int64(len(s.data))}
}

func (s *slowServer) host() string { return strings.TrimPrefix(s.URL, "http://") }

func (s *slowServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests = append(s.requests, r.Header.Get("Range"))
	s.atOnce++
	now := s.atOnce
	s.highest = max(s.highest, now)
	s.mu.Unlock()
	defer func() { s.mu.Lock(); s.atOnce--; s.mu.Unlock() }()
	if s.answer == nil || !s.answer(w, r, now) {
		http.ServeContent(paced{w, s.pace}, r, "", time.Time{}, bytes.NewReader(s.data))
	}
}

func (s *slowServer) seen() (requests []string, highest int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests, s.highest
}

// paced writes piece by piece.
type paced struct {
	http.ResponseWriter
	pace time.Duration
}

func (p paced) Write(data []byte) (n int, err error) {
	for len(data) > 0 && err == nil {
		if p.pace > 0 {
			http.NewResponseController(p.ResponseWriter).Flush()
			<-time.After(p.pace)
		}
		var m int
		m, err = p.ResponseWriter.Write(data[:min(piece, len(data))])
		n, data = n+m, data[m:]
	}
	return n, err
}

func rangeOptions(buffers int) registry.Options {
	opts := options()
	opts.Stall = 2 * time.Second
	opts.Ranges = registry.Ranges{Least: 256 << 10, First: 64 << 10, Segment: 32 << 10, Buffers: buffers}
	return opts
}

// fetchAll reads the blob of s, which must come right.
func fetchAll(t *testing.T, repo *registry.Repository, s *slowServer, offset int64) {
	t.Helper()
	got, host, err := read(t, repo, s.desc(), offset)
	if err != nil || !bytes.Equal(got, s.data[offset:]) || host != s.host() {
		t.Errorf("%d bytes of %d from %s, %v", len(got), len(s.data)-int(offset), host, err)
	}
}

const slowPace = 25 * time.Millisecond // 8 pieces of the first part take 200 ms

func TestRanges(t *testing.T) {
	const size = 1<<20 + 100
	t.Run("a slow network gets several at once", func(t *testing.T) {
		s := newSlowServer(t, size, slowPace)
		var told int
		opts := rangeOptions(4)
		opts.Hooks.Bytes = func(host string, _ digest.Digest, n int) { told += n }
		opts.Hooks.Resume = func(string, digest.Digest, int64, error) { t.Error("resumed") }
		fetchAll(t, session(t, opts, s.host(), registry.Session{}), s, 0)
		requests, highest := s.seen()
		if highest < 2 || highest > 4 || len(requests) != 1+31 {
			t.Errorf("%d requests, %d at once; want 32 and up to 4", len(requests), highest)
		}
		if requests[0] != "bytes=0-65535" {
			t.Errorf("first request is for %q", requests[0])
		}
		if told != size {
			t.Errorf("the hook was told of %d bytes of %d", told, size)
		}
	})
	t.Run("a fast one gets one", func(t *testing.T) {
		s := newSlowServer(t, size, 0)
		fetchAll(t, session(t, rangeOptions(4), s.host(), registry.Session{}), s, 10)
		if requests, _ := s.seen(); len(requests) != 2 || requests[1] != "bytes=65546-"+strconv.Itoa(size-1) {
			t.Errorf("requests for %q", requests)
		}
	})
	t.Run("a slow reader doesn't need them", func(t *testing.T) {
		s := newSlowServer(t, size, 0)
		b, err := session(t, rangeOptions(4), s.host(), registry.Session{}).Fetch(t.Context(), s.desc(), 0)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		<-time.After(300 * time.Millisecond)
		if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, s.data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if requests, _ := s.seen(); len(requests) != 2 {
			t.Errorf("requests for %q", requests)
		}
	})
	t.Run("a small blob is asked for whole", func(t *testing.T) {
		s := newSlowServer(t, 200<<10, time.Millisecond)
		fetchAll(t, session(t, rangeOptions(4), s.host(), registry.Session{}), s, 0)
		if requests, _ := s.seen(); len(requests) != 1 || requests[0] != "" {
			t.Errorf("requests for %q", requests)
		}
	})
	t.Run("switched off", func(t *testing.T) {
		s := newSlowServer(t, size, time.Millisecond)
		opts := rangeOptions(4)
		opts.Ranges.Connections = 1
		fetchAll(t, session(t, opts, s.host(), registry.Session{}), s, 0)
		if requests, _ := s.seen(); len(requests) != 1 {
			t.Errorf("requests for %q", requests)
		}
	})
	t.Run("memory is bounded for all", func(t *testing.T) {
		s := newSlowServer(t, size, slowPace)
		client := registry.New(rangeOptions(3))
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() { fetchAll(t, open(t, client, s.host()), s, 0) })
		}
		all.Wait()
		if _, highest := s.seen(); highest < 3 || highest > 3+1 {
			t.Errorf("%d requests at once for two blobs with 3 buffers", highest)
		}
	})
}

// TestRangesInTrouble: whatever goes wrong with a segment, the blob comes right, and nobody is thought badly of.
func TestRangesInTrouble(t *testing.T) {
	const size = 512 << 10
	last := "-" + strconv.Itoa(size-1)
	isSegment := func(r *http.Request) bool {
		asked := r.Header.Get("Range")
		return asked != "" && asked != "bytes=0-65535" && !strings.HasSuffix(asked, last)
	}
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request, atOnce int) bool{
		"no ranges at all": func(w http.ResponseWriter, r *http.Request, _ int) bool { r.Header.Del("Range"); return false },
		"one connection at a time": func(w http.ResponseWriter, r *http.Request, atOnce int) bool {
			if atOnce > 1 {
				http.Error(w, "busy", http.StatusServiceUnavailable)
			}
			return atOnce > 1
		},
		"a second connection hangs": func(w http.ResponseWriter, r *http.Request, atOnce int) bool {
			if atOnce > 1 {
				<-r.Context().Done()
			}
			return atOnce > 1
		},
		"too many requests": func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if isSegment(r) {
				w.WriteHeader(http.StatusTooManyRequests)
			}
			return isSegment(r)
		},
		"segments break off": func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if !isSegment(r) {
				return false
			}
			w.Header().Set("Content-Range", strings.Replace(r.Header.Get("Range"), "=", " ", 1)+"/"+strconv.Itoa(size))
			w.Header().Set("Content-Length", strconv.Itoa(32<<10))
			w.WriteHeader(http.StatusPartialContent)
			from, _, _ := strings.Cut(strings.TrimPrefix(r.Header.Get("Range"), "bytes="), "-")
			start, _ := strconv.Atoi(from)
			data := noise(size)
			w.Write(data[start : start+1000])
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		},
		"segments are others": func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if isSegment(r) {
				w.Header().Set("Content-Range", "bytes 0-32767/"+strconv.Itoa(size))
				w.Header().Set("Content-Length", strconv.Itoa(32<<10))
				w.WriteHeader(http.StatusPartialContent)
				w.Write(make([]byte, 32<<10))
			}
			return isSegment(r)
		},
		"segments are everything": func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if isSegment(r) {
				r.Header.Del("Range")
			}
			return false
		},
		"parts are refused": func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if !strings.HasSuffix(r.Header.Get("Range"), last) && r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusBadRequest)
				return true
			}
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSlowServer(t, size, slowPace)
			s.answer = answer
			opts := rangeOptions(4)
			opts.Backoff = 50 * time.Millisecond // a connection that we have left is busy until its server knows
			repo := session(t, opts, s.host(), registry.Session{})
			fetchAll(t, repo, s, 0)
			before, _ := s.seen()
			n := len(before)
			fetchAll(t, repo, s, 0)
			if after, _ := s.seen(); len(after)-n > 16 {
				t.Errorf("%d requests for the second time", len(after)-n)
			}
		})
	}
}

// TestRangesClose: a blob that is closed midway leaves no request and no buffer behind.
func TestRangesClose(t *testing.T) {
	const size = 1 << 20
	s := newSlowServer(t, size, slowPace)
	client := registry.New(rangeOptions(4))
	for range 3 {
		b, err := begin(t, client, s.host(), registry.Session{}).Fetch(t.Context(), s.desc(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(b, make([]byte, 200<<10)); err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if _, err := b.Read(make([]byte, 1)); err == nil {
			t.Error("a closed blob is read")
		}
	}
	if _, highest := s.seen(); highest < 2 {
		t.Errorf("%d requests at once", highest)
	}
	s.mu.Lock()
	s.highest = 0
	s.mu.Unlock()
	fetchAll(t, begin(t, client, s.host(), registry.Session{}), s, 0) // all buffers are there again
	if _, highest := s.seen(); highest < 2 {
		t.Errorf("%d requests at once", highest)
	}
}
