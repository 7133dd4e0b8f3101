package registry_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

const (
	ociManifest = "application/vnd.oci.image.manifest.v1+json"
	ociIndex    = "application/vnd.oci.image.index.v1+json"
	schema1     = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

func TestTroubleWithAManifest(t *testing.T) {
	const manifest = `{"schemaVersion":2,"config":{},"layers":[]}`
	for name, tc := range map[string]struct {
		faults   []registrytest.Fault // on manifests; later ones go first
		document string               // default: manifest
		served   string               // its media type; default: OCI's
		kind     func(error) bool
		words    string
		want     string // media type; default: OCI's
		gets     int
	}{
		"well":                      {},
		"no digest header":          {faults: []registrytest.Fault{{NoDigest: true}}, gets: 1},
		"junk as digest":            {faults: []registrytest.Fault{{Digest: "sha256:../../etc"}}, gets: 1},
		"no length":                 {faults: []registrytest.Fault{{NoLength: true}}, gets: 1},
		"wrong digest":              {faults: []registrytest.Fault{{NoLength: true, Digest: digest.FromString("x").String()}}, kind: errdefs.IsDataLoss, words: "was promised", gets: 1},
		"HEAD not known":            {faults: []registrytest.Fault{{Status: 405, Times: 1}}, gets: 1},
		"HEAD forbidden, GET not":   {faults: []registrytest.Fault{{Status: 403, Times: 1}}, gets: 1},
		"forbidden with a reason":   {faults: []registrytest.Fault{{Status: 403, Body: `{"errors":[{"code":"DENIED","message":"vault closed"}]}`}}, kind: errdefs.IsPermissionDenied, words: "(vault closed); log in", gets: 1},
		"not found":                 {faults: []registrytest.Fault{{Status: 404}}, kind: errdefs.IsNotFound, words: "check the name and the tag"},
		"503 then well":             {faults: []registrytest.Fault{{Status: 503, Times: 2}}},
		"503 for good":              {faults: []registrytest.Fault{{Status: 503}}, kind: errdefs.IsUnavailable, words: "503 Service Unavailable; try again"},
		"dropped then well":         {faults: []registrytest.Fault{{Drop: true, Times: 2}}},
		"rate limit":                {faults: []registrytest.Fault{{Status: 429, RetryAfter: "99"}}, kind: errdefs.IsResourceExhausted, words: "try again in 1m39s"},
		"silence":                   {faults: []registrytest.Fault{{Silent: true}}, kind: errdefs.IsUnavailable, words: "no byte arrived for"},
		"charset":                   {served: ociManifest + "; charset=utf-8"},
		"octet-stream":              {served: "application/octet-stream", gets: 1},
		"octet-stream of an index":  {served: "application/octet-stream", document: `{"manifests":[]}`, want: ociIndex, gets: 1},
		"type told by the document": {served: "application/json", document: `{"mediaType":"` + ociIndex + `"}`, want: ociIndex, gets: 1},
		"both kinds, told as none":  {served: "application/json", document: `{"manifests":[],"layers":[]}`, want: "application/json", gets: 1},
		"an artifact":               {served: "application/vnd.x+json", document: `{"a":1}`, want: "application/vnd.x+json", gets: 1},
		"schema 1":                  {served: schema1, kind: errdefs.IsNotImplemented, words: "schema 1"},
		"schema 1 as plain text":    {served: "text/plain", kind: errdefs.IsNotImplemented, words: "schema 1"},
		"schema 1 by its fields":    {served: "application/json", document: `{"fsLayers":[]}`, kind: errdefs.IsNotImplemented, words: "schema 1", gets: 1},
		"too long":                  {document: strings.Repeat(" ", registry.MaxManifest+1), kind: errdefs.IsFailedPrecondition, words: "4194305 bytes"},
		"too long without length":   {faults: []registrytest.Fault{{NoLength: true}}, document: strings.Repeat(" ", registry.MaxManifest+1), kind: errdefs.IsFailedPrecondition, words: "bytes", gets: 1},
		"the longest":               {document: strings.Repeat(" ", registry.MaxManifest)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := registrytest.New(t)
			if tc.document == "" {
				tc.document = manifest
			}
			if tc.served == "" {
				tc.served = ociManifest
			}
			if tc.want == "" {
				tc.want = ociManifest
			}
			srv.PushManifest("demo", "latest", tc.served, []byte(tc.document))
			for _, f := range tc.faults {
				srv.Fault("/manifests/", f)
			}
			opts := options()
			opts.Stall = time.Second
			desc, err := session(t, opts, srv.Host(), registry.Session{}).Resolve(t.Context())
			if tc.kind != nil {
				wantError(t, err, tc.kind, tc.words, srv.Host(), "demo:latest")
			} else if err != nil || desc.MediaType != tc.want || desc.Digest != digest.FromString(tc.document) || desc.Size != int64(len(tc.document)) {
				t.Errorf("%+v, %v", desc, err)
			}
			if n := srv.Count("GET"); n != tc.gets {
				t.Errorf("%d GETs, want %d", n, tc.gets)
			}
		})
	}
}

func TestDigestOfAPlainBlob(t *testing.T) {
	srv := registrytest.New(t)
	blob := srv.PushBlob("demo", []byte(`{"layers":[]}`))
	get := func() error {
		repo, err := registry.New(options()).Repository(ref.Reference{Host: srv.Host(), Path: "demo", Digest: blob.Digest}, registry.Session{})
		if err != nil {
			t.Fatal(err)
		}
		desc, err := repo.Resolve(t.Context())
		if err == nil && (desc.MediaType != ociManifest || desc.Digest != blob.Digest || desc.Size != blob.Size) {
			t.Errorf("%+v", desc)
		}
		return err
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	srv.Forget()
	srv.Fault("/manifests/", registrytest.Fault{Status: 500})
	wantError(t, get(), errdefs.IsUnavailable)
	if srv.Count("/blobs/") != 0 {
		t.Error("a passing failure turned into a blob of no type")
	}
}

func TestManifestIsFetchedWhereManifestsAre(t *testing.T) {
	srv, img, _ := demo(t)
	repo := session(t, options(), srv.Host(), registry.Session{})
	if _, _, err := read(t, repo, img.Descriptor, 0); err != nil || srv.Count("/blobs/") != 0 {
		t.Errorf("%v, %d requests for a blob", err, srv.Count("/blobs/"))
	}
	// Some registries keep what an index names only as blobs.
	other := srv.PushBlob("demo", []byte("{}"))
	other.MediaType = ociManifest
	if got, _, err := read(t, repo, other, 0); err != nil || string(got) != "{}" {
		t.Errorf("%q, %v", got, err)
	}
	big := other
	big.Size = registry.MaxManifest + 1
	_, _, err := read(t, repo, big, 0)
	wantError(t, err, errdefs.IsFailedPrecondition)
	big.MediaType = schema1
	_, _, err = read(t, repo, big, 0)
	wantError(t, err, errdefs.IsNotImplemented, "schema 1")
}

func TestMirrorsInOrder(t *testing.T) {
	for name, tc := range map[string]struct {
		first, last registrytest.Fault // what the mirror and the registry do; zero: serve
		from        string             // who is asked in the end
		kind        func(error) bool
		words       []string
	}{
		"mirror serves":           {from: "mirror"},
		"mirror has it not":       {first: registrytest.Fault{Status: 404}, from: "registry"},
		"mirror is broken":        {first: registrytest.Fault{Status: 500}, from: "registry"},
		"mirror forbids":          {first: registrytest.Fault{Status: 403}, from: "registry"},
		"mirror drops":            {first: registrytest.Fault{Drop: true}, from: "registry"},
		"mirror is silent":        {first: registrytest.Fault{Silent: true}, from: "registry"},
		"mirror limits for long":  {first: registrytest.Fault{Status: 429, RetryAfter: "10"}, from: "registry"},
		"mirror limits for short": {first: registrytest.Fault{Status: 429, RetryAfter: "0", Times: 2}, from: "mirror"},
		"neither has it":          {first: registrytest.Fault{Status: 404}, last: registrytest.Fault{Status: 404}, kind: errdefs.IsNotFound, words: []string{"not found", "(also "}},
		"404 before silence":      {first: registrytest.Fault{Status: 404}, last: registrytest.Fault{Drop: true}, kind: errdefs.IsNotFound},
		"refusal before 404":      {first: registrytest.Fault{Status: 500}, last: registrytest.Fault{Status: 404}, kind: errdefs.IsUnavailable, words: []string{"500", "(also ", "not found"}},
		"refusal after 404":       {first: registrytest.Fault{Status: 404}, last: registrytest.Fault{Status: 418}, kind: errdefs.IsUnknown, words: []string{"418"}},
		"first of two refusals":   {first: registrytest.Fault{Status: 500}, last: registrytest.Fault{Status: 418}, kind: errdefs.IsUnavailable, words: []string{"500"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			mirror, img, _ := demo(t)
			upstream, _, _ := demo(t)
			layer := img.Layers[0]
			for srv, f := range map[*registrytest.Server]registrytest.Fault{mirror: tc.first, upstream: tc.last} {
				srv.Fault("HEAD", f)
				srv.Fault("GET", f)
			}
			opts := options()
			opts.Stall = time.Second
			opts.Hosts = mirrors(mirror.Host(), upstream.Host())
			desc, err := session(t, opts, upstream.Host(), registry.Session{}).Resolve(t.Context())
			_, host, fetchErr := read(t, session(t, opts, upstream.Host(), registry.Session{}), layer, 0)
			if tc.kind != nil {
				wantError(t, err, tc.kind, tc.words...)
				wantError(t, fetchErr, tc.kind, append(tc.words, layer.Digest.String())...)
				return
			}
			names := map[string]string{mirror.Host(): "mirror", upstream.Host(): "registry"}
			if err != nil || fetchErr != nil || desc.Digest != img.Descriptor.Digest || names[host] != tc.from {
				t.Errorf("%+v, %v; from %s, %v", desc, err, names[host], fetchErr)
			}
			if n := upstream.Count("HEAD"); tc.from == "mirror" && n != 0 {
				t.Errorf("the registry was asked %d times", n)
			}
			for srv, query := range map[*registrytest.Server]string{mirror: "ns=" + strings.ReplaceAll(upstream.Host(), ":", "%3A"), upstream: ""} {
				for _, r := range srv.Requests() {
					if r.Query != query {
						t.Errorf("%s: query %q, want %q", names[srv.Host()], r.Query, query)
					}
				}
			}
		})
	}
}

func TestCapabilities(t *testing.T) {
	puller, img, _ := demo(t)
	resolver, _, _ := demo(t)
	opts := options()
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{
			{Scheme: "http", Host: registrytest.Refused(t), Path: "/v2", Capabilities: hosts.Push},
			{Scheme: "http", Host: puller.Host(), Path: "/v2", Capabilities: hosts.Pull},
			{Scheme: "http", Host: resolver.Host(), Path: "/v2", Capabilities: hosts.Resolve | hosts.Pull},
		}, nil
	}
	repo := session(t, opts, "registry.example", registry.Session{})
	if _, err := repo.Resolve(t.Context()); err != nil || puller.Count("") != 0 {
		t.Errorf("%v; a host that may not resolve was asked %d times", err, puller.Count(""))
	}
	if _, host, err := read(t, repo, img.Layers[0], 0); err != nil || host != puller.Host() {
		t.Errorf("from %s, %v", host, err)
	}
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "http", Host: puller.Host(), Path: "/v2", Capabilities: hosts.Push}}, nil
	}
	repo = session(t, opts, "registry.example", registry.Session{})
	_, err := repo.Resolve(t.Context())
	wantError(t, err, errdefs.IsNotFound, "pull,resolve", "hosts.toml")
	_, _, err = read(t, repo, img.Layers[0], 0)
	wantError(t, err, errdefs.IsNotFound, `"pull"`)
}

func TestOverriddenPath(t *testing.T) {
	srv, img, _ := demo(t)
	opts := options()
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "http", Host: srv.Host(), Path: "/a/v2", Capabilities: hosts.Everything, Header: http.Header{"Host": {"virtual.example"}}}}, nil
	}
	desc, err := session(t, opts, srv.Host(), registry.Session{}).Resolve(t.Context())
	if err != nil || desc.Digest != img.Descriptor.Digest || srv.Requests()[0].Path != "/a/v2/demo/manifests/latest" {
		t.Errorf("%+v, %v, %+v", desc, err, srv.Requests())
	}
}
