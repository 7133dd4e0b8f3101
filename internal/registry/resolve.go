package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
)

// MaxManifest is the longest manifest or index that is accepted, in bytes.
const MaxManifest = 4 << 20

// Media types of manifests and indexes, OCI's and docker's.
const (
	dockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	dockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1      = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSchema1JWS   = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

// manifestTypes is what Resolve accepts, the types it knows first.
var manifestTypes = strings.Join([]string{
	dockerManifest, dockerManifestList, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, "*/*",
}, ", ")

func isManifestType(mediaType string) bool {
	switch mediaType {
	case dockerManifest, dockerManifestList, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex:
		return true
	}
	return isSchema1(mediaType)
}

func isSchema1(mediaType string) bool {
	return mediaType == dockerSchema1 || mediaType == dockerSchema1JWS
}

// errSchema1 refuses docker's first manifest format.
var errSchema1 = fmt.Errorf("this is a schema 1 image, a format that is no longer supported; build or push it again with a current tool: %w", errdefs.ErrNotImplemented)

// Resolve asks what the session's tag or digest stands for: media type, digest and size of a manifest or an index. A
// tag is asked of endpoints that may resolve, a digest of all that may be pulled from. The error is an *Error: the first
// of the most telling kind (a refusal, then not found, then no answer), with the others in Also.
func (r *Repository) Resolve(ctx context.Context) (oci.Descriptor, error) {
	tag, want := r.name.Tag, r.name.Digest
	need, object := hosts.Pull|hosts.Resolve, tag
	if want != "" {
		need, object = hosts.Pull, want.String()
	}
	if object == "" {
		return oci.Descriptor{}, &Error{Op: "resolve", Name: r.name.String(), Err: fmt.Errorf("the reference has neither tag nor digest: %w", errdefs.ErrInvalidArgument)}
	}
	failed, desc, err := r.resolveBelow(ctx, "manifests/"+object, want, need)
	if err == nil && desc == nil && want != "" && failed.worst().class() == 2 {
		// Only where every endpoint denies the manifest may the digest be a plain blob's: that path knows no media types.
		var more failures
		more, desc, err = r.resolveBelow(ctx, "blobs/"+object, want, need)
		failed = append(failed, more...)
	}
	switch {
	case err != nil:
		return oci.Descriptor{}, err
	case desc != nil:
		return *desc, nil
	}
	return oci.Descriptor{}, failed.worst()
}

// resolveBelow tries each endpoint until one knows. Its error is final; failures leave hope.
func (r *Repository) resolveBelow(ctx context.Context, below string, want digest.Digest, need hosts.Capability) (failed failures, _ *oci.Descriptor, _ error) {
	candidates, err := r.candidates(ctx, need)
	if err != nil {
		return nil, nil, &Error{Op: "resolve", Name: r.name.String(), Err: err}
	}
	for i := range candidates {
		ep, more, use := r.choose(candidates, i)
		if !use {
			failed = append(failed, r.failure("resolve", "", ep.Host.Host, r.whyNot(ep)))
			continue
		}
		desc, err := r.resolveAt(ctx, ep, r.name.Path+"/"+below, want, more)
		switch {
		case ctx.Err() != nil:
			return nil, nil, &Error{Op: "resolve", Name: r.name.String(), Host: ep.Host.Host, Err: context.Cause(ctx)}
		case err == nil && isSchema1(desc.MediaType):
			return nil, nil, r.failure("resolve", "", ep.Host.Host, errSchema1)
		case err == nil:
			return nil, &desc, nil
		}
		e, ok := errors.AsType[*Error](err)
		if !ok {
			e = r.failure("resolve", "", ep.Host.Host, err)
		}
		failed = append(failed, e)
	}
	return failed, nil, nil
}

// resolveAt asks one endpoint: by HEAD where its answer says everything, else by GET.
func (r *Repository) resolveAt(ctx context.Context, ep *endpoint, path string, want digest.Digest, more bool) (oci.Descriptor, error) {
	q := query{method: http.MethodHead, path: path, object: path[strings.LastIndexByte(path, '/')+1:], accept: manifestTypes, tag: want == ""}
	a, err := r.ask(ctx, ep, q, more)
	if err != nil {
		return oci.Descriptor{}, err
	}
	switch {
	case a.StatusCode == http.StatusOK:
		desc, whole := describe(a, want)
		a.Close()
		if whole {
			return desc, checkSize(desc.Size)
		}
	case a.StatusCode == http.StatusMethodNotAllowed, a.StatusCode == http.StatusForbidden:
		a.Close() // a HEAD has no body that could say why
	default:
		return oci.Descriptor{}, r.refusal("resolve", "", ep.Host.Host, a)
	}
	q.method = http.MethodGet
	a, err = r.ask(ctx, ep, q, more)
	if err != nil {
		return oci.Descriptor{}, err
	}
	if a.StatusCode != http.StatusOK {
		return oci.Descriptor{}, r.refusal("resolve", "", ep.Host.Host, a)
	}
	defer a.Close()
	return readManifest(a, want)
}

// describe reads a descriptor from the headers of a. Whole is false if they leave something open.
func describe(a *answer, want digest.Digest) (desc oci.Descriptor, whole bool) {
	desc = oci.Descriptor{MediaType: mediaType(a.Header), Digest: want, Size: a.ContentLength}
	if want == "" {
		desc.Digest = digest.Digest(a.Header.Get("Docker-Content-Digest"))
	}
	return desc, desc.Size > 0 && desc.Digest.Validate() == nil && isManifestType(desc.MediaType)
}

// mediaType reads the Content-Type header. Red Hat's registry long sent its schema 1 manifests as plain text.
func mediaType(h http.Header) string {
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		t, _, _ = strings.Cut(h.Get("Content-Type"), ";")
	}
	if t == "text/plain" {
		return dockerSchema1
	}
	return strings.TrimSpace(t)
}

func checkSize(size int64) error {
	if size > MaxManifest {
		return fmt.Errorf("a manifest of %d bytes, more than the %d accepted: %w", size, MaxManifest, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// readManifest makes a descriptor from the document itself, which must have the digest that was asked for or promised.
func readManifest(a *answer, want digest.Digest) (oci.Descriptor, error) {
	if err := checkSize(a.ContentLength); err != nil {
		return oci.Descriptor{}, err
	}
	data, err := io.ReadAll(io.LimitReader(a.body, MaxManifest+1))
	if err != nil {
		return oci.Descriptor{}, fmt.Errorf("manifest: %w", err)
	}
	if err := checkSize(int64(len(data))); err != nil {
		return oci.Descriptor{}, err
	}
	if want == "" {
		want = digest.Digest(a.Header.Get("Docker-Content-Digest"))
	}
	desc := oci.Descriptor{MediaType: mediaType(a.Header), Digest: digest.FromBytes(data), Size: int64(len(data))}
	if want.Validate() == nil {
		if got := want.Algorithm().FromBytes(data); got != want {
			return oci.Descriptor{}, fmt.Errorf("the manifest has digest %s where %s was promised: %w", got, want, errdefs.ErrDataLoss)
		}
		desc.Digest = want
	}
	if guess := documentType(data); !isManifestType(desc.MediaType) && guess != "" || guess == dockerSchema1 {
		desc.MediaType = guess
	}
	return desc, nil
}

// documentType looks into a document for what the headers do not tell; "" if it does not tell either.
func documentType(data []byte) string {
	var doc struct {
		MediaType string          `json:"mediaType"`
		FSLayers  json.RawMessage `json:"fsLayers"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
	}
	if json.NewDecoder(bytes.NewReader(data)).Decode(&doc) != nil {
		return ""
	}
	switch {
	case doc.FSLayers != nil:
		return dockerSchema1
	case isManifestType(doc.MediaType):
		return doc.MediaType
	case doc.Manifests != nil && doc.Layers == nil:
		return ocispec.MediaTypeImageIndex
	case doc.Layers != nil && doc.Manifests == nil:
		return ocispec.MediaTypeImageManifest
	}
	return ""
}

// candidates lists the endpoints that may do what is needed, at least one. Those that did not answer another session a
// moment ago come last: none but they may be left, and they may be back.
func (r *Repository) candidates(ctx context.Context, need hosts.Capability) (eps []*endpoint, err error) {
	all, err := r.endpoints(ctx)
	if err != nil {
		return nil, err
	}
	for _, ep := range all {
		if ep.Capabilities.Has(need) {
			eps = append(eps, ep)
		}
	}
	if len(eps) == 0 {
		return nil, fmt.Errorf("no endpoint of %s has the capability %q: check its hosts.toml: %w", r.name.Host, need, errdefs.ErrNotFound)
	}
	slices.SortStableFunc(eps, func(a, b *endpoint) int { return r.isRemembered(a) - r.isRemembered(b) })
	return eps, nil
}

// isRemembered is 1 for an endpoint that is down as far as other sessions know, and else 0.
func (r *Repository) isRemembered(ep *endpoint) int {
	if !r.isDown(ep) {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down[ep.key()] == errRemembered {
		return 1
	}
	return 0
}

// choose says whether the i-th candidate is to be used, and whether one comes after it. A dead one is passed over only
// while there is another; a liar always.
func (r *Repository) choose(candidates []*endpoint, i int) (ep *endpoint, more, use bool) {
	ep = candidates[i]
	for _, later := range candidates[i+1:] {
		if !r.isDistrusted(later.Host.Host) && !r.isDown(later) {
			more = true
		}
	}
	return ep, more, !r.isDistrusted(ep.Host.Host) && (!r.isDown(ep) || !more)
}

// whyNot says why choose passed ep over.
func (r *Repository) whyNot(ep *endpoint) error {
	if r.isDistrusted(ep.Host.Host) {
		return fmt.Errorf("not asked, as it sent wrong bytes before: %w", errdefs.ErrDataLoss)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return fmt.Errorf("not asked again: %w", r.down[ep.key()])
}
