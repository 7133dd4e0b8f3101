package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
)

// Limits of one Fetch.
const (
	maxURLs     = 4       // foreign places that are tried of those that a descriptor names
	maxResumes  = 5       // broken connections to one source in a row
	resumeReset = 1 << 20 // bytes after which a row of broken connections counts as ended

	foreignDials = 5 // a foreign place is often the only one that has the layer, and gets so many times a mirror's patience
)

// Fetch reads desc from offset on. It returns once a source answers; the sources are the URLs of a foreign layer, then
// the endpoints. Size and offset are held against what the source says; the digest is the caller's to verify, who calls
// Distrust(blob.Host()) on a lie and fetches again.
//
// What is large comes by several requests at once where the network is slow: see Ranges.
//
// The Blob resumes by itself after resets and truncations, first at the same source and then at the next, and moves on
// when a source stalls. Its errors are *Error and name host and digest. ctx covers the whole reading.
func (r *Repository) Fetch(ctx context.Context, desc oci.Descriptor, offset int64) (*Blob, error) {
	b := &Blob{repo: r, ctx: ctx, desc: desc, next: offset}
	if err := b.validate(); err != nil {
		return nil, &Error{Op: "fetch", Name: r.name.String(), Digest: desc.Digest, Err: err}
	}
	if int64(len(desc.Data)) == desc.Size {
		b.body, b.end = io.NopCloser(bytes.NewReader(desc.Data[offset:])), desc.Size
		return b, nil
	}
	if offset == desc.Size {
		b.body, b.end = http.NoBody, desc.Size
		return b, nil
	}
	eps, err := r.candidates(ctx, hosts.Pull)
	if err != nil {
		return nil, &Error{Op: "fetch", Name: r.name.String(), Digest: desc.Digest, Err: err}
	}
	b.sources = r.sources(eps, desc)
	b.part = r.client.pool.first(desc.Size - offset)
	if err := b.connect(); err != nil {
		return nil, err
	}
	return b, nil
}

// Blob is the body of one Fetch: what is left of the blob, and io.EOF exactly at the size that the descriptor gives. It
// is for one goroutine, and must be closed.
type Blob struct {
	repo *Repository
	ctx  context.Context // of this one operation, as with the body of an http.Response
	desc oci.Descriptor
	next int64 // offset of the next byte

	sources []source
	at      int // the source in use
	failed  failures
	stalls  int   // since resumed
	resumes int   // the same
	resumed int64 // offset at which the row of broken connections began
	whole   bool  // no Range is asked for, as it was refused without reason

	part   int64 // bytes to ask for at a time; 0: all that is left
	end    int64 // of what body brings
	begun  time.Time
	waited time.Duration // for bytes, since begun

	body io.ReadCloser
	host string
	err  error
}

// source is one place where a blob may be had.
type source struct {
	ep      *endpoint
	path    string // below the API root
	foreign *url.URL
	else404 bool // to be asked only if all before said not found
}

func (s source) host() string {
	if s.foreign != nil {
		return s.foreign.Host
	}
	return s.ep.Host.Host
}

func (b *Blob) validate() error {
	switch {
	case b.desc.Digest.Validate() != nil:
		return fmt.Errorf("%q is no digest: %w", b.desc.Digest, errdefs.ErrInvalidArgument)
	case b.desc.Size <= 0:
		return fmt.Errorf("a descriptor of %d bytes: %w", b.desc.Size, errdefs.ErrInvalidArgument)
	case b.next < 0 || b.next > b.desc.Size:
		return fmt.Errorf("offset %d of %d bytes: %w", b.next, b.desc.Size, errdefs.ErrOutOfRange)
	case isSchema1(b.desc.MediaType):
		return errSchema1
	case isManifestType(b.desc.MediaType):
		return checkSize(b.desc.Size)
	}
	return nil
}

// sources lists where desc may be had, in the order to try.
func (r *Repository) sources(eps []*endpoint, desc oci.Descriptor) (list []source) {
	for _, text := range desc.URLs[:min(len(desc.URLs), maxURLs)] {
		u, err := url.Parse(text)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			continue
		}
		u.User, u.Fragment = nil, ""
		list = append(list, source{ep: r.client.foreign(u), foreign: u})
	}
	if isManifestType(desc.MediaType) {
		for _, ep := range eps {
			list = append(list, source{ep: ep, path: r.name.Path + "/manifests/" + desc.Digest.String()})
		}
	}
	for _, ep := range eps {
		list = append(list, source{ep: ep, path: r.name.Path + "/blobs/" + desc.Digest.String(), else404: isManifestType(desc.MediaType)})
	}
	return list
}

// foreign makes the endpoint of a URL that a manifest names: no credentials, headers, certificates of ours.
func (c *Client) foreign(u *url.URL) *endpoint {
	ep := &endpoint{Host: hosts.Host{Scheme: u.Scheme, Host: u.Host}, mirror: true, dial: min(c.opts.Dial, foreignDials*c.opts.MirrorDial), foreign: u}
	ep.transport, ep.broken = c.transport(hosts.Host{})
	return ep
}

// Host names who sent the last bytes; empty if they came from the descriptor itself.
func (b *Blob) Host() string { return b.host }

// Offset is that of the next byte in the blob.
func (b *Blob) Offset() int64 { return b.next }

// Close implements io.Closer.
func (b *Blob) Close() error {
	if b.err == nil {
		b.err = errors.New("the blob is closed")
	}
	return b.drop()
}

func (b *Blob) drop() error {
	if b.body == nil {
		return nil
	}
	err := b.body.Close()
	b.body = nil
	return err
}

// Read implements io.Reader.
func (b *Blob) Read(p []byte) (int, error) {
	for b.err == nil && len(p) > 0 {
		left := b.end - b.next
		if left == 0 && b.end < b.desc.Size {
			b.err = b.onward()
			continue
		}
		if left == 0 {
			b.err = b.finish()
			break
		}
		asked := time.Now()
		n, err := b.body.Read(p[:min(int64(len(p)), left)])
		b.waited += time.Since(asked)
		b.next += int64(n)
		b.repo.tell(func(h Hooks) {
			if h.Bytes != nil && n > 0 {
				h.Bytes(b.host, b.desc.Digest, n)
			}
		})
		if b.next == b.end {
			err = nil
		} else if err != nil {
			b.err = b.resume(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	if len(p) == 0 && b.err == nil {
		return 0, nil
	}
	return 0, b.err
}

// finish yields io.EOF if the source, too, has come to its end.
func (b *Blob) finish() error {
	var extra [1]byte
	n, _ := io.ReadFull(b.body, extra[:])
	b.drop()
	if n > 0 {
		return b.repo.failure("fetch", b.desc.Digest, b.host, fmt.Errorf("more bytes than the %d that the manifest says: %w", b.desc.Size, errdefs.ErrDataLoss))
	}
	return io.EOF
}

// resume opens a new body at b.next after the last one broke with err. The same source is asked again, unless it
// breaks over and over or has stalled and there is another.
func (b *Blob) resume(err error) error {
	b.drop()
	b.part = 0 // from here on as carefully as possible
	if b.ctx.Err() != nil {
		return b.cancelled()
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	src := b.sources[b.at]
	if b.next-b.resumed >= resumeReset {
		b.resumes, b.stalls, b.resumed = 0, 0, b.next
	}
	b.resumes++
	failed := b.repo.failure("fetch", b.desc.Digest, src.host(), fmt.Errorf("broken off after %d of %d bytes: %w", b.next, b.desc.Size, err))
	stalled := errors.Is(err, errStalled)
	if stalled {
		b.stalls++
		if src.ep.mirror {
			b.repo.markDown(src.ep, err)
		}
		if b.stalls >= maxStalls && !b.others() {
			return append(failures{failed}, b.failed...).worst()
		}
	}
	if b.resumes >= maxResumes || stalled && b.others() {
		b.failed = append(b.failed, failed)
		b.at++
		b.resumes, b.stalls, b.resumed = 0, 0, b.next
	} else if wait := b.repo.client.opts.Backoff << (b.resumes - 1) / 2; sleep(b.ctx, wait) != nil {
		return b.cancelled()
	}
	b.repo.tell(func(h Hooks) {
		if h.Resume != nil {
			h.Resume(src.host(), b.desc.Digest, b.next, err)
		}
	})
	return b.connect()
}

func (b *Blob) cancelled() error {
	return &Error{Op: "fetch", Name: b.repo.name.String(), Digest: b.desc.Digest, Host: b.host, Err: context.Cause(b.ctx)}
}

// connect opens the blob at b.next, at the first source from b.at on that answers.
func (b *Blob) connect() error {
	for ; b.at < len(b.sources); b.at++ {
		src := b.sources[b.at]
		if src.else404 && len(b.failed) > 0 && b.failed.worst().class() != 2 {
			continue
		}
		more := b.others()
		if why := b.repo.passOver(src, more); why != nil {
			b.failed = append(b.failed, b.repo.failure("fetch", b.desc.Digest, src.host(), why))
			continue
		}
		a, failed := b.open(src, more)
		if b.ctx.Err() != nil {
			if a != nil {
				a.Close()
			}
			return b.cancelled()
		}
		if failed == nil {
			b.body, b.host = readCloser{a.body, a}, src.host()
			b.begun, b.waited = time.Now(), 0
			return nil
		}
		if errors.Is(failed, errBroken) && b.resumes < maxResumes {
			b.resumes++
			b.at--
			continue
		}
		b.failed = append(b.failed, failed)
	}
	return b.failed.worst()
}

// errBroken is a body that ended before the bytes that are wanted began.
var errBroken = errors.New("broken off")

type readCloser struct {
	io.Reader
	io.Closer
}

// others reports whether a source comes after the one in use that is worth asking.
func (b *Blob) others() bool {
	for _, src := range b.sources[b.at+1:] {
		if !src.else404 && !b.repo.isDistrusted(src.host()) && !b.repo.isDown(src.ep) {
			return true
		}
	}
	return false
}

// passOver says why src is not to be asked, or nothing.
func (r *Repository) passOver(src source, more bool) error {
	if r.isDistrusted(src.host()) || more && r.isDown(src.ep) {
		return r.whyNot(src.ep)
	}
	return nil
}

// open asks src for the blob from b.next on.
func (b *Blob) open(src source, more bool) (*answer, *Error) {
	fail := func(err error) (*answer, *Error) {
		return nil, b.repo.failure("fetch", b.desc.Digest, src.host(), err)
	}
	q := query{method: http.MethodGet, path: src.path, object: b.desc.Digest.String(), accept: b.accept(), offset: b.next, end: b.desc.Size, eager: more}
	if b.part > 0 && src.foreign == nil && !b.whole && b.next+b.part < q.end {
		q.end, q.part = b.next+b.part, true
	}
	if b.whole {
		q.offset = 0
	}
	a, err := b.repo.ask(b.ctx, src.ep, q, more)
	if err != nil {
		return fail(err)
	}
	switch a.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
	case http.StatusRequestedRangeNotSatisfiable:
		a.discard()
		if q.part {
			b.part = 0
		}
		if _, size, err := contentRange(a.Header.Get("Content-Range")); !b.whole && (err != nil || size == b.desc.Size) {
			b.whole = true // the Range is in range: it must be the server that can't do it
			return b.open(src, more)
		}
		return fail(fmt.Errorf("has fewer bytes than the %d that the manifest says: %w", b.desc.Size, errdefs.ErrDataLoss))
	default:
		if q.part && (a.StatusCode == http.StatusBadRequest || a.StatusCode == http.StatusNotImplemented) {
			a.discard()
			b.part = 0
			return b.open(src, more)
		}
		return nil, b.repo.refusal("fetch", b.desc.Digest, src.host(), a)
	}
	b.end = b.desc.Size
	if q.part && a.StatusCode == http.StatusPartialContent {
		if a.isRange(q.offset, q.end, b.desc.Size) {
			b.end = q.end
			return a, nil
		}
		a.Close() // whatever it means by that
		b.part = 0
		return b.open(src, more)
	}
	if err := b.align(a); err != nil {
		a.Close()
		return fail(err)
	}
	return a, nil
}

func (b *Blob) accept() string {
	if b.desc.MediaType != "" {
		return b.desc.MediaType + ", */*"
	}
	return "*/*"
}

// align makes sure that the next byte of a is that at b.next, and that as many follow as there must. A server that does
// not know ranges sends everything, and what is there already is read past.
func (b *Blob) align(a *answer) error {
	skip, total := b.next, a.ContentLength
	if a.StatusCode == http.StatusPartialContent {
		start, size, err := contentRange(a.Header.Get("Content-Range"))
		switch {
		case err != nil:
			return err
		case start != b.next:
			return fmt.Errorf("sent bytes from %d on where %d was asked for: %w", start, b.next, errdefs.ErrDataLoss)
		case a.ContentLength >= 0:
			total = start + a.ContentLength
		}
		if size >= 0 && size != b.desc.Size {
			total = size
		}
		skip = 0
	}
	if total >= 0 && total != b.desc.Size {
		return fmt.Errorf("has %d bytes where the manifest says %d: %w", total, b.desc.Size, errdefs.ErrDataLoss)
	}
	if coding := a.Header.Get("Content-Encoding"); total < 0 && coding != "" && !strings.EqualFold(coding, "identity") {
		// With the right length it is how the blob is stored, and not something done to it on the way.
		return fmt.Errorf("sent in encoding %q where none was asked for: %w", printable(coding), errdefs.ErrDataLoss)
	}
	if _, err := io.CopyN(io.Discard, a.body, skip); err != nil {
		return fmt.Errorf("%w while reading past the first %d bytes: %w", errBroken, skip, err)
	}
	return nil
}

// contentRange reads "bytes 5-9/10", or "bytes */10" as starting at 10. Size is -1 where it is given as "*".
func contentRange(value string) (start, size int64, err error) {
	bad := fmt.Errorf("sent a part of the blob and not which (%q): %w", printable(value), errdefs.ErrDataLoss)
	span, ok := strings.CutPrefix(value, "bytes ")
	if !ok {
		return 0, 0, bad
	}
	span, whole, _ := strings.Cut(span, "/")
	if span == "*" {
		span = whole + "-"
	}
	first, _, ok := strings.Cut(span, "-")
	start, err = strconv.ParseInt(first, 10, 64)
	if !ok || err != nil || start < 0 {
		return 0, 0, bad
	}
	if whole == "*" {
		return start, -1, nil
	}
	if size, err = strconv.ParseInt(whole, 10, 64); err != nil || size < 0 {
		return 0, 0, bad
	}
	return start, size, nil
}
