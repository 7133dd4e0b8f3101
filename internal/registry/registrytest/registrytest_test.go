package registrytest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"
)

func get(t *testing.T, url string, header ...string) (*http.Response, []byte, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

func TestServe(t *testing.T) {
	s := New(t)
	img := s.Push("a/b", "v1", Layer{Data: []byte("0123456789")})
	blob := s.URL() + "/v2/a/b/blobs/" + img.Layers[0].Digest.String()
	for _, tc := range []struct {
		url, rng string
		status   int
		body     string
	}{
		{blob, "", 200, "0123456789"},
		{blob, "bytes=4-", 206, "456789"},
		{blob, "bytes=4-5", 206, "45"},
		{blob, "bytes=10-", 416, ""},
		{s.URL() + "/v2/", "", 200, ""},
		{s.URL() + "/v2/a/manifests/v1", "", 404, ""},
		{s.URL() + "/v2/a/b/manifests/v2", "", 404, ""},
		{s.URL() + "/else", "", 404, ""},
	} {
		resp, body, err := get(t, tc.url, "Range", tc.rng)
		if err != nil || resp.StatusCode != tc.status || tc.body != "" && string(body) != tc.body {
			t.Errorf("%s %s: %v %q, %v", tc.url, tc.rng, resp, body, err)
		}
	}
	for _, object := range []string{"v1", img.Descriptor.Digest.String()} {
		resp, body, err := get(t, s.URL()+"/v2/a/b/manifests/"+object)
		if err != nil || int64(len(body)) != img.Descriptor.Size || resp.Header.Get("Content-Type") != img.Descriptor.MediaType ||
			resp.Header.Get("Docker-Content-Digest") != img.Descriptor.Digest.String() {
			t.Errorf("%s: %v, %d bytes, %v", object, resp, len(body), err)
		}
	}
	if n := s.Count("GET /v2/a/b/blobs/"); n != 4 || s.Bytes("/blobs/") != 10+6+2 {
		t.Errorf("%d requests, %d bytes", n, s.Bytes("/blobs/"))
	}
}

func TestFaultsComeInTurn(t *testing.T) {
	s := New(t)
	data := bytes.Repeat([]byte("x"), 1000)
	url := s.URL() + "/v2/r/blobs/" + s.PushBlob("r", data).Digest.String()
	s.Fault("/blobs/", Fault{Truncate: true, At: 10, Skip: 1, Times: 1})
	s.Fault("/blobs/", Fault{Status: 503, RetryAfter: "1", Times: 1})
	resp, _, err := get(t, url)
	if err != nil || resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("%v, %v", resp, err)
	}
	if _, body, err := get(t, url); err != nil || len(body) != 1000 {
		t.Errorf("%d bytes, %v", len(body), err)
	}
	if _, body, err := get(t, url); !errors.Is(err, io.ErrUnexpectedEOF) || len(body) != 10 {
		t.Errorf("%d bytes, %v", len(body), err)
	}
	s.Fault("/blobs/", Fault{Reset: true, At: 10})
	if _, _, err := get(t, url); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v", err)
	}
	s.Fault("/blobs/", Fault{Corrupt: true, At: 3, Excess: []byte("yz")})
	if _, body, err := get(t, url); err != nil || len(body) != 1002 || body[3] == 'x' {
		t.Errorf("%d bytes, %v", len(body), err)
	}
	s.Heal()
	if _, body, err := get(t, url); err != nil || !bytes.Equal(body, data) {
		t.Errorf("%d bytes, %v", len(body), err)
	}
}

func TestAddressesWhereNobodyIs(t *testing.T) {
	if _, err := net.Dial("tcp", Refused(t)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v", err)
	}
	_, err := net.DialTimeout("tcp", BlackHole(t), 300*time.Millisecond)
	if e, ok := errors.AsType[net.Error](err); !ok || !e.Timeout() {
		t.Errorf("%v", err)
	}
}

func TestKill(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l)
	t.Cleanup(s.Close)
	url := s.URL() + "/v2/r/blobs/" + s.PushBlob("r", make([]byte, 64<<20)).Digest.String()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if _, err := io.Copy(io.Discard, resp.Body); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a body under way ends with %v", err)
	}
	if _, _, err := get(t, url); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a new request ends with %v", err)
	}
}
