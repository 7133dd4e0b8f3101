package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// serve is the registry's process: it serves the library in dir on address
// until it is killed. Bodies go from the page cache to the socket by sendfile.
func serve(dir, address string) error {
	lib, err := openLibrary(dir)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr()) // the parent waits for this line
	return http.Serve(listener, lib)
}

// ServeHTTP answers what a pull asks of a registry.
func (l *library) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	parts := strings.Split(strings.TrimPrefix(req.URL.Path, "/v2/"), "/")
	if req.URL.Path == "/v2/" {
		return
	}
	if len(parts) < 3 {
		http.NotFound(w, req)
		return
	}
	name, kind, what := strings.Join(parts[:len(parts)-2], "/"), parts[len(parts)-2], parts[len(parts)-1]
	dgst, mediaType := digest.Digest(what), "application/octet-stream"
	if kind == "manifests" {
		img := l.image(name)
		if img == nil {
			http.NotFound(w, req)
			return
		}
		dgst, mediaType = img.Target.Digest, img.Target.MediaType
	}
	if dgst.Validate() != nil {
		http.NotFound(w, req)
		return
	}
	file, err := os.Open(l.blob(dgst))
	if err != nil {
		http.NotFound(w, req)
		return
	}
	defer file.Close()
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", dgst.String())
	http.ServeContent(w, req, "", time.Time{}, file)
}

// openLibrary reads the list of images that prepare has left in dir.
func openLibrary(dir string) (*library, error) {
	body, err := os.ReadFile(filepath.Join(dir, listName))
	if err != nil {
		return nil, err
	}
	lib := &library{dir: dir}
	if err := json.Unmarshal(body, lib); err != nil {
		return nil, fmt.Errorf("read %s: %w", listName, err)
	}
	return lib, nil
}
