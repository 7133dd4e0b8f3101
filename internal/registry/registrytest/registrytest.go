// Package registrytest serves a registry that misbehaves to a script.
//
// A Server is a small read-only registry in memory on a loopback port. Push puts images in; Fault says what goes wrong,
// where and how often; Requests tells afterwards what was asked for and what went over the wire:
//
//	srv := registrytest.New(t)
//	img := srv.Push("demo", "latest", layer)
//	srv.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Reset: true, At: 1000, Times: 1})
package registrytest

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Server is a scripted registry. Its methods may be called while it serves.
type Server struct {
	http *httptest.Server

	mu       sync.Mutex
	conns    map[net.Conn]struct{}
	repos    map[string]*repository
	faults   []*fault
	requests []Request
	auth     *authority
}

type repository struct {
	tags      map[string]digest.Digest
	manifests map[digest.Digest]document
	blobs     map[digest.Digest][]byte
}

type document struct {
	mediaType string
	data      []byte
}

// Request is one request that a Server has answered, or is answering.
type Request struct {
	Method string
	Path   string
	Query  string
	Header http.Header
	Status int   // as sent; 0 if the connection ended first
	Bytes  int64 // of the body, as sent
}

// New starts a server for the duration of a test.
func New(t testing.TB) *Server {
	s := Start()
	t.Cleanup(s.Close)
	return s
}

// NewTLS starts a server that speaks HTTPS with a certificate that nobody trusts. See CA.
func NewTLS(t testing.TB) *Server {
	s := newServer()
	s.http.TLS = &tls.Config{}
	s.http.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// Start starts a server that speaks HTTP. The caller closes it.
func Start() *Server {
	s := newServer()
	s.http.Start()
	return s
}

// Serve starts a server that speaks HTTP on l, for those who want it elsewhere
// than on loopback. The caller closes it.
func Serve(l net.Listener) *Server {
	s := newServer()
	s.http.Listener.Close()
	s.http.Listener = l
	s.http.Start()
	return s
}

func newServer() *Server {
	s := &Server{repos: map[string]*repository{}, conns: map[net.Conn]struct{}{}}
	s.http = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.http.Config.ErrorLog = discardLog
	s.http.Config.ConnState = s.track
	return s
}

func (s *Server) track(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.conns[c] = struct{}{}
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, c)
	}
}

// Kill ends the server as the death of its process would: every connection is
// reset, whatever is under way on it, and new ones are refused.
func (s *Server) Kill() {
	s.http.Listener.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetLinger(0)
		}
		c.Close()
	}
}

// Close ends the server and every connection to it.
func (s *Server) Close() {
	s.http.CloseClientConnections()
	s.http.Close()
}

// Host is the address, "127.0.0.1:<port>", as it stands in a reference.
func (s *Server) Host() string { return s.http.Listener.Addr().String() }

// URL is the address with its scheme.
func (s *Server) URL() string { return s.http.URL }

// CA writes the certificate of a NewTLS server into a PEM file below dir and yields its path.
func (s *Server) CA(t testing.TB, dir string) string {
	t.Helper()
	file := filepath.Join(dir, "registrytest.crt")
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw})
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// Image is what Push has put in.
type Image struct {
	Descriptor ocispec.Descriptor // of the manifest
	Manifest   ocispec.Manifest
	Config     ocispec.Descriptor
	Layers     []ocispec.Descriptor
}

// Layer is the compressed archive of a layer as it is served, with what the manifest and config say of it.
type Layer struct {
	Data      []byte
	MediaType string        // default: OCI's for gzip, or for an uncompressed tar if Data is not gzip
	DiffID    digest.Digest // of the uncompressed archive; default: the digest of Data
	URLs      []string      // of a foreign layer
	Absent    bool          // the registry does not have it
}

// Format is what Push makes of an image beyond its layers. The zero value is an OCI image for linux/amd64.
type Format struct {
	Docker   bool // docker's media types
	Platform ocispec.Platform
	Config   []byte // the config document; default: one made from platform and diffIDs
}

// Push makes an OCI image from layers and puts it into repo under tag, which may be empty.
func (s *Server) Push(repo, tag string, layers ...Layer) Image {
	return s.PushFormat(repo, tag, Format{}, layers...)
}

// PushFormat is Push with a say in the format.
func (s *Server) PushFormat(repo, tag string, f Format, layers ...Layer) Image {
	if f.Platform.OS == "" {
		f.Platform = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	}
	manifestType, configType := ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
	if f.Docker {
		manifestType = "application/vnd.docker.distribution.manifest.v2+json"
		configType = "application/vnd.docker.container.image.v1+json"
	}
	img := Image{Manifest: ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifestType}}
	config := ocispec.Image{Platform: f.Platform, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range layers {
		desc := ocispec.Descriptor{MediaType: l.mediaType(f.Docker), Digest: digest.FromBytes(l.Data), Size: int64(len(l.Data)), URLs: l.URLs}
		if !l.Absent {
			s.PushBlob(repo, l.Data)
		}
		img.Layers = append(img.Layers, desc)
		if l.DiffID == "" {
			l.DiffID = desc.Digest
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
	}
	if f.Config == nil {
		f.Config = encode(config)
	}
	img.Config = s.PushBlob(repo, f.Config)
	img.Config.MediaType = configType
	img.Manifest.Config, img.Manifest.Layers = img.Config, img.Layers
	img.Descriptor = s.PushManifest(repo, tag, manifestType, encode(img.Manifest))
	img.Descriptor.Platform = &f.Platform
	return img
}

func (l Layer) mediaType(docker bool) string {
	gzipped := len(l.Data) > 2 && l.Data[0] == 0x1f && l.Data[1] == 0x8b
	switch {
	case l.MediaType != "":
		return l.MediaType
	case docker && gzipped:
		return "application/vnd.docker.image.rootfs.diff.tar.gzip"
	case docker:
		return "application/vnd.docker.image.rootfs.diff.tar"
	case gzipped:
		return ocispec.MediaTypeImageLayerGzip
	}
	return ocispec.MediaTypeImageLayer
}

// PushIndex puts an OCI index of images into repo under tag.
func (s *Server) PushIndex(repo, tag string, images ...Image) ocispec.Descriptor {
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, img := range images {
		index.Manifests = append(index.Manifests, img.Descriptor)
	}
	return s.PushManifest(repo, tag, index.MediaType, encode(index))
}

// PushManifest puts any document into repo under its digest and, unless empty, tag.
func (s *Server) PushManifest(repo, tag, mediaType string, data []byte) ocispec.Descriptor {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.repo(repo)
	dgst := digest.FromBytes(data)
	r.manifests[dgst] = document{mediaType, data}
	if tag != "" {
		r.tags[tag] = dgst
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: dgst, Size: int64(len(data))}
}

// PushBlob puts data into repo.
func (s *Server) PushBlob(repo string, data []byte) ocispec.Descriptor {
	s.mu.Lock()
	defer s.mu.Unlock()
	dgst := digest.FromBytes(data)
	s.repo(repo).blobs[dgst] = data
	return ocispec.Descriptor{MediaType: "application/octet-stream", Digest: dgst, Size: int64(len(data))}
}

func (s *Server) repo(name string) *repository {
	r := s.repos[name]
	if r == nil {
		r = &repository{tags: map[string]digest.Digest{}, manifests: map[digest.Digest]document{}, blobs: map[digest.Digest][]byte{}}
		s.repos[name] = r
	}
	return r
}

func encode(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // our own literals
	}
	return data
}

// Requests lists what was asked so far, token requests apart, in order of arrival.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// Count is the number of requests whose "METHOD path" contains match.
func (s *Server) Count(match string) (n int) {
	for _, r := range s.Requests() {
		if strings.Contains(r.Method+" "+r.Path, match) {
			n++
		}
	}
	return n
}

// Bytes is the number of body bytes sent for requests whose "METHOD path" contains match.
func (s *Server) Bytes(match string) (n int64) {
	for _, r := range s.Requests() {
		if strings.Contains(r.Method+" "+r.Path, match) {
			n += r.Bytes
		}
	}
	return n
}

// Forget drops the list of requests.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = nil
}

// Refused yields an address at which nothing listens, so that connections are refused.
func Refused(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// BlackHole yields an address at which connections are neither made nor refused, as behind a firewall that drops. It is
// a listener whose queue is full.
func BlackHole(t testing.TB) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	const more = 16 // than any kernel queues for a backlog of 0
	for range more {
		c, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue of a listener does not fill up")
	return ""
}
