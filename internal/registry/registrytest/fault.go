package registrytest

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Fault is one way to misbehave. Fields combine where that makes sense. Positions count the bytes of the response's
// body, not those of the blob.
type Fault struct {
	Times int // how many requests it hits; 0: all
	Skip  int // how many matching requests go well before

	Status     int    // answer with this status instead
	RetryAfter string // the header of that name
	Body       string // of that answer

	At       int64 // where Truncate, Reset, Stall and Corrupt happen
	Truncate bool  // close the connection in order, with less sent than announced
	Reset    bool  // reset the connection
	Stall    bool  // send no more until the client goes away
	Corrupt  bool  // flip the bits of the byte there

	Drop        bool          // reset the connection before any answer
	Silent      bool          // never answer
	Trickle     time.Duration // wait so long between pieces
	Piece       int           // bytes of a piece; default 1024
	IgnoreRange bool          // answer a Range request with all there is
	RefuseRange bool          // answer a Range request with 416
	WrongRange  bool          // answer a Range request with the part one byte further on
	Declare     int64         // the Content-Length to lie; 0: the truth
	NoLength    bool          // send in chunks, without a Content-Length
	Excess      []byte        // bytes sent after the last one
	ContentType string        // instead of the right one
	Encoding    string        // the Content-Encoding to claim
	NoDigest    bool          // leave out Docker-Content-Digest
	Digest      string        // claim this Docker-Content-Digest
	Replace     []byte        // send this instead of what was asked for
	Redirect    string        // send the client to this base URL plus the path, or to the URL as it is if it has a path
	Warning     string        // a Warning header
}

type fault struct {
	Fault
	match string
	hits  int
}

// Fault has requests whose "METHOD path" contains match meet f. The latest fault that matches and is not used up wins.
func (s *Server) Fault(match string, f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &fault{Fault: f, match: match})
}

// Heal takes all faults back.
func (s *Server) Heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// hit finds the fault that r meets. The caller holds s.mu.
func (s *Server) hit(r *http.Request) Fault {
	line := r.Method + " " + r.URL.Path
	for i := len(s.faults) - 1; i >= 0; i-- {
		f := s.faults[i]
		if !strings.Contains(line, f.match) {
			continue
		}
		f.hits++
		if f.hits > f.Skip && (f.Times == 0 || f.hits <= f.Skip+f.Times) {
			return f.Fault
		}
	}
	return Fault{}
}

var discardLog = log.New(io.Discard, "", 0)

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, tokenPath) {
		s.serveToken(w, r)
		return
	}
	s.mu.Lock()
	f := s.hit(r)
	at := len(s.requests)
	s.requests = append(s.requests, Request{Method: r.Method, Path: r.URL.Path, Query: r.URL.RawQuery, Header: r.Header.Clone()})
	auth := s.auth
	s.mu.Unlock()
	count := &counter{ResponseWriter: w, server: s, at: at}
	switch {
	case f.Drop:
		hangUp(w, true)
	case f.Silent:
		<-r.Context().Done()
	case f.RefuseRange && r.Header.Get("Range") != "":
		count.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
	case f.Status != 0:
		if f.RetryAfter != "" {
			w.Header().Set("Retry-After", f.RetryAfter)
		}
		count.WriteHeader(f.Status)
		io.WriteString(count, f.Body)
	case f.Redirect != "":
		to := f.Redirect
		if _, rest, _ := strings.Cut(to, "://"); !strings.Contains(rest, "/") {
			to += r.URL.Path
		}
		w.Header().Set("Location", to)
		count.WriteHeader(http.StatusTemporaryRedirect)
	case auth != nil && !auth.admits(s, r):
		auth.challenge(s, w.Header(), r)
		refuse(count, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	default:
		s.answer(count, r, f)
	}
}

// counter notes what is sent of one response.
type counter struct {
	http.ResponseWriter
	server *Server
	at     int
}

func (c *counter) note(f func(*Request)) {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if c.at < len(c.server.requests) {
		f(&c.server.requests[c.at])
	}
}

func (c *counter) WriteHeader(status int) {
	c.note(func(r *Request) { r.Status = status })
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(p []byte) (int, error) {
	c.note(func(r *Request) { r.Bytes += int64(len(p)) }) // before, so that no client has bytes that are not counted
	n, err := c.ResponseWriter.Write(p)
	c.note(func(r *Request) { r.Bytes -= int64(len(p) - n) })
	return n, err
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(encode(map[string]any{"errors": []map[string]string{{"code": code, "message": message}}}))
}

// answer serves a manifest or a blob, with f done to it.
func (s *Server) answer(w *counter, r *http.Request, f Fault) {
	doc, dgst, ok := s.find(r.URL.Path)
	switch {
	case strings.TrimSuffix(r.URL.Path, "/") == "/v2":
		w.WriteHeader(http.StatusOK)
		return
	case !ok:
		refuse(w, http.StatusNotFound, "UNKNOWN", "not here")
		return
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "read only")
		return
	}
	data := doc.data
	if f.Replace != nil {
		data = f.Replace
	}
	h := w.Header()
	h.Set("Content-Type", doc.mediaType)
	h.Set("Docker-Content-Digest", dgst)
	status := http.StatusOK
	if start, end, given := wanted(r.Header.Get("Range"), int64(len(data))); given && !f.IgnoreRange {
		if f.WrongRange {
			start++
		}
		if start >= int64(len(data)) {
			h.Set("Content-Range", fmt.Sprintf("bytes */%d", len(data)))
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, end-1, len(data)))
		data, status = data[start:max(start, end)], http.StatusPartialContent
	}
	f.header(h, len(data))
	w.WriteHeader(status)
	if r.Method == http.MethodGet {
		f.send(w, r, data)
	}
}

func (f Fault) header(h http.Header, length int) {
	if !f.NoLength {
		h.Set("Content-Length", strconv.Itoa(length+len(f.Excess)))
	}
	if f.Declare != 0 {
		h.Set("Content-Length", strconv.FormatInt(f.Declare, 10))
	}
	if f.NoDigest {
		h.Del("Docker-Content-Digest")
	}
	for key, value := range map[string]string{
		"Docker-Content-Digest": f.Digest, "Content-Type": f.ContentType, "Content-Encoding": f.Encoding, "Warning": f.Warning,
	} {
		if value != "" {
			h.Set(key, value)
		}
	}
}

// send writes data as f would have it.
func (f Fault) send(w *counter, r *http.Request, data []byte) {
	if f.Corrupt && f.At < int64(len(data)) {
		data = append([]byte(nil), data...)
		data[f.At] ^= 0xff
	}
	cut := (f.Truncate || f.Reset || f.Stall) && f.At < int64(len(data))
	if cut {
		data = data[:f.At]
	}
	f.write(w, r, data)
	flush := http.NewResponseController(w.ResponseWriter)
	switch {
	case cut && f.Stall:
		flush.Flush()
		<-r.Context().Done()
	case cut:
		flush.Flush()
		hangUp(w.ResponseWriter, f.Reset)
	default:
		w.Write(f.Excess)
	}
}

func (f Fault) write(w *counter, r *http.Request, data []byte) {
	if f.Trickle == 0 {
		w.Write(data)
		return
	}
	piece := f.Piece
	if piece == 0 {
		piece = 1024
	}
	for len(data) > 0 && r.Context().Err() == nil {
		n := min(piece, len(data))
		w.Write(data[:n])
		data = data[n:]
		http.NewResponseController(w.ResponseWriter).Flush()
		select {
		case <-time.After(f.Trickle):
		case <-r.Context().Done():
		}
	}
}

// hangUp ends the connection below HTTP, in order or by a reset.
func hangUp(w http.ResponseWriter, reset bool) {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // ends the connection too
	}
	buf.Flush()
	if under, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = under.NetConn()
	}
	if tcp, ok := conn.(*net.TCPConn); ok && reset {
		tcp.SetLinger(0)
	}
	conn.Close()
}

// wanted reads a Range header for a body of size bytes.
func wanted(value string, size int64) (start, end int64, ok bool) {
	span, ok := strings.CutPrefix(value, "bytes=")
	if !ok {
		return 0, 0, false
	}
	first, last, _ := strings.Cut(span, "-")
	start, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, 0, false
	}
	if end, err = strconv.ParseInt(last, 10, 64); err != nil {
		return start, size, true
	}
	return start, min(end+1, size), true
}

// find yields what path names: "/v2/<repo>/(manifests|blobs)/<tag or digest>", below any prefix.
func (s *Server) find(path string) (document, string, bool) {
	_, path, ok := strings.Cut(path, "/v2/")
	if !ok {
		return document{}, "", false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, repo := range s.repos {
		if object, ok := strings.CutPrefix(path, name+"/manifests/"); ok {
			return repo.manifest(object)
		}
		if object, ok := strings.CutPrefix(path, name+"/blobs/"); ok {
			return repo.blob(object)
		}
	}
	return document{}, "", false
}

func (r *repository) manifest(object string) (document, string, bool) {
	dgst, ok := r.tags[object]
	if !ok {
		for known := range r.manifests {
			if known.String() == object {
				dgst = known
			}
		}
	}
	doc, ok := r.manifests[dgst]
	return doc, dgst.String(), ok
}

func (r *repository) blob(object string) (document, string, bool) {
	for dgst, data := range r.blobs {
		if dgst.String() == object {
			return document{"application/octet-stream", data}, object, true
		}
	}
	return document{}, "", false
}
