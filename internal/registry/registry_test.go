package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// blobSize is enough for several of the kernel's buffers, so that a cut in the middle is one.
const blobSize = 3<<20 + 17

// noise is size bytes that look like a compressed layer, the same each time.
func noise(size int) []byte {
	data := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	return data
}

// options are those of a client that is in a hurry.
func options() registry.Options {
	return registry.Options{Backoff: time.Millisecond, Stall: 10 * time.Second}
}

// mirrors yields endpoints without TLS in the given order; the last is the registry itself.
func mirrors(addrs ...string) func(context.Context, string) ([]hosts.Host, error) {
	return func(context.Context, string) (list []hosts.Host, _ error) {
		for _, addr := range addrs {
			list = append(list, hosts.Host{Scheme: "http", Host: addr, Path: "/v2", Capabilities: hosts.Everything})
		}
		return list, nil
	}
}

// session opens the repository "demo" of host, and wants "latest".
func session(t *testing.T, opts registry.Options, host string, s registry.Session) *registry.Repository {
	t.Helper()
	return begin(t, registry.New(opts), host, s)
}

func open(t *testing.T, c *registry.Client, host string) *registry.Repository {
	t.Helper()
	return begin(t, c, host, registry.Session{})
}

func begin(t *testing.T, c *registry.Client, host string, s registry.Session) *registry.Repository {
	t.Helper()
	repo, err := c.Repository(ref.Reference{Host: host, Path: "demo", Tag: "latest"}, s)
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

// demo is a server with an image of one layer.
func demo(t *testing.T) (*registrytest.Server, registrytest.Image, []byte) {
	t.Helper()
	srv, data := registrytest.New(t), noise(blobSize)
	return srv, srv.Push("demo", "latest", registrytest.Layer{Data: data, MediaType: "application/vnd.oci.image.layer.v1.tar+gzip"}), data
}

func read(t *testing.T, repo *registry.Repository, desc oci.Descriptor, offset int64) ([]byte, string, error) {
	t.Helper()
	b, err := repo.Fetch(t.Context(), desc, offset)
	if err != nil {
		return nil, "", err
	}
	defer b.Close()
	data, err := io.ReadAll(b)
	return data, b.Host(), err
}

// wantError checks that err is an *Error of the given kind that names everything in words.
func wantError(t *testing.T, err error, is func(error) bool, words ...string) *registry.Error {
	t.Helper()
	e, ok := errors.AsType[*registry.Error](err)
	if !ok || !is(err) {
		t.Fatalf("error %T %v is not of the kind", err, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
	return e
}

func TestPullByTagAndDigest(t *testing.T) {
	for _, docker := range []bool{false, true} {
		srv, data := registrytest.New(t), noise(1000)
		img := srv.PushFormat("demo", "latest", registrytest.Format{Docker: docker}, registrytest.Layer{Data: data})
		index := srv.PushIndex("demo", "all", img)
		client := registry.New(options())
		for _, tc := range []struct {
			ref  ref.Reference
			want oci.Descriptor
		}{
			{ref.Reference{Tag: "latest"}, img.Descriptor},
			{ref.Reference{Digest: img.Descriptor.Digest}, img.Descriptor},
			{ref.Reference{Tag: "other", Digest: img.Descriptor.Digest}, img.Descriptor},
			{ref.Reference{Tag: "all"}, index},
		} {
			tc.ref.Host, tc.ref.Path = srv.Host(), "demo"
			repo, err := client.Repository(tc.ref, registry.Session{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := repo.Resolve(t.Context())
			if err != nil || got.Digest != tc.want.Digest || got.Size != tc.want.Size || got.MediaType != tc.want.MediaType {
				t.Errorf("%v: %+v, %v; want %+v", tc.ref, got, err, tc.want)
			}
			for _, desc := range []oci.Descriptor{got, img.Config, img.Layers[0]} {
				body, host, err := read(t, repo, desc, 0)
				if err != nil || digest.FromBytes(body) != desc.Digest || host != srv.Host() {
					t.Errorf("%s: %d bytes from %q, %v", desc.MediaType, len(body), host, err)
				}
			}
		}
		if n := srv.Count("GET /v2/demo/manifests/latest"); n != 0 {
			t.Errorf("%d GETs of a manifest that a HEAD describes", n)
		}
	}
}

func TestEveryRequest(t *testing.T) {
	srv, img, _ := demo(t)
	opts := options()
	opts.UserAgent = "holdfast/1.2"
	opts.Header = http.Header{"X-Everywhere": {"e"}}
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "http", Host: srv.Host(), Path: "/v2", Capabilities: hosts.Everything, Header: http.Header{"X-Here": {"a", "b"}}}}, nil
	}
	repo := session(t, opts, "registry.example", registry.Session{})
	if _, err := repo.Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := read(t, repo, img.Layers[0], 5); err != nil {
		t.Fatal(err)
	}
	for _, r := range srv.Requests() {
		h := r.Header
		if h.Get("User-Agent") != "holdfast/1.2" || h.Get("Accept-Encoding") != "identity" || h.Get("X-Everywhere") != "e" ||
			len(h.Values("X-Here")) != 2 || r.Query != "ns=registry.example" {
			t.Errorf("%+v", r)
		}
	}
	if accept := srv.Requests()[0].Header.Get("Accept"); !strings.HasSuffix(accept, "*/*") || strings.Count(accept, ",") != 4 {
		t.Errorf("Accept %q", accept)
	}
}

// The scripted registry of the issue, row by row: what goes wrong with the layer, and how that must end.
func TestTroubleWithALayer(t *testing.T) {
	half := int64(blobSize / 2)
	for name, tc := range map[string]struct {
		faults []registrytest.Fault // later ones go first
		kind   func(error) bool     // nil: all ends well
		words  string
		resume bool // and the bytes are not sent twice
	}{
		"truncated once":            {faults: []registrytest.Fault{{Truncate: true, At: half, Times: 1}}, resume: true},
		"truncated at the first":    {faults: []registrytest.Fault{{Truncate: true, At: 0, Times: 1}}, resume: true},
		"truncated without length":  {faults: []registrytest.Fault{{Truncate: true, NoLength: true, At: half, Times: 1}}, resume: true},
		"truncated again and again": {faults: []registrytest.Fault{{Truncate: true, At: 1000}}, kind: isPlain, words: "broken off"},
		"reset once":                {faults: []registrytest.Fault{{Reset: true, At: half, Times: 1}}, resume: true},
		"reset thrice":              {faults: []registrytest.Fault{{Reset: true, At: 1 << 19, Times: 3}}, resume: true},
		"reset before the answer":   {faults: []registrytest.Fault{{Reset: true, At: 0, Times: 2}}, resume: true},
		"dropped twice":             {faults: []registrytest.Fault{{Drop: true, Times: 2}}, resume: true},
		"always dropped":            {faults: []registrytest.Fault{{Drop: true}}, kind: isPlain, words: "fetch"},
		"always reset":              {faults: []registrytest.Fault{{Reset: true, At: 100}}, kind: isPlain, words: "broken off"},
		"reset and no ranges":       {faults: []registrytest.Fault{{IgnoreRange: true}, {Reset: true, At: half, Times: 1}}},
		"reset and ranges refused":  {faults: []registrytest.Fault{{RefuseRange: true}, {Reset: true, At: half, Times: 1}}},
		"reset while reading past":  {faults: []registrytest.Fault{{IgnoreRange: true}, {IgnoreRange: true, Reset: true, At: 1000, Skip: 1, Times: 1}, {Reset: true, At: half, Times: 1}}},
		"reset and another range":   {faults: []registrytest.Fault{{WrongRange: true}, {Reset: true, At: half, Times: 1}}, kind: errdefs.IsDataLoss, words: "was asked for"},
		"429 with Retry-After":      {faults: []registrytest.Fault{{Status: 429, RetryAfter: "0", Times: 3}}, resume: true},
		"429 for an hour":           {faults: []registrytest.Fault{{Status: 429, RetryAfter: "3600"}}, kind: errdefs.IsResourceExhausted, words: "try again in 1h0m0s"},
		"429 for good":              {faults: []registrytest.Fault{{Status: 429}}, kind: errdefs.IsResourceExhausted, words: "try again later"},
		"408":                       {faults: []registrytest.Fault{{Status: 408, Times: 1}}, resume: true},
		"503 four times":            {faults: []registrytest.Fault{{Status: 503, Times: 4}}, resume: true},
		"500 for good":              {faults: []registrytest.Fault{{Status: 500}}, kind: errdefs.IsUnavailable, words: "500 Internal Server Error"},
		"403 with a reason":         {faults: []registrytest.Fault{{Status: 403, Body: `{"errors":[{"code":"DENIED","message":"pay\u001b first"}]}`}}, kind: errdefs.IsPermissionDenied, words: "(pay  first)"},
		"404":                       {faults: []registrytest.Fault{{Status: 404}}, kind: errdefs.IsNotFound, words: "push it again"},
		"416":                       {faults: []registrytest.Fault{{Status: 416}}, kind: errdefs.IsDataLoss, words: "fewer bytes"},
		"418":                       {faults: []registrytest.Fault{{Status: 418}}, kind: errdefs.IsUnknown, words: "418"},
		"shorter than promised":     {faults: []registrytest.Fault{{Replace: noise(blobSize - 1)}}, kind: errdefs.IsDataLoss, words: "has 3145744 bytes where the manifest says 3145745"},
		"longer than promised":      {faults: []registrytest.Fault{{Excess: []byte("x")}}, kind: errdefs.IsDataLoss, words: "has 3145746 bytes"},
		"longer without length":     {faults: []registrytest.Fault{{Excess: []byte("x"), NoLength: true}}, kind: errdefs.IsDataLoss, words: "more bytes than"},
		"shorter without length":    {faults: []registrytest.Fault{{Replace: noise(blobSize - 1), NoLength: true}}, kind: errdefs.IsDataLoss, words: "fewer bytes"},
		"a lie about the length":    {faults: []registrytest.Fault{{Declare: blobSize + 5}}, kind: errdefs.IsDataLoss, words: "where the manifest says"},
		"encoded":                   {faults: []registrytest.Fault{{Encoding: "gzip", NoLength: true}}, kind: errdefs.IsDataLoss, words: `encoding "gzip"`},
		"encoded as it is stored":   {faults: []registrytest.Fault{{Encoding: "gzip"}}, resume: true},
		"trickling":                 {faults: []registrytest.Fault{{Trickle: time.Millisecond, Piece: blobSize / 16}}, resume: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv, img, data := demo(t)
			repo := session(t, options(), srv.Host(), registry.Session{})
			if _, err := repo.Resolve(t.Context()); err != nil {
				t.Fatal(err)
			}
			layer := img.Layers[0]
			for _, f := range tc.faults {
				srv.Fault("/blobs/"+layer.Digest.String(), f)
			}
			got, _, err := read(t, repo, layer, 0)
			if tc.kind != nil {
				e := wantError(t, err, tc.kind, tc.words, srv.Host(), layer.Digest.String())
				if e.Host != srv.Host() || e.Digest != layer.Digest || e.Op != "fetch" {
					t.Errorf("%+v", e)
				}
				if !bytes.HasPrefix(data, got[:min(len(got), blobSize-1)]) {
					t.Error("wrong bytes before the error")
				}
				srv.Heal()
				if _, _, err = read(t, repo, layer, int64(len(got)&^1023)); err != nil {
					t.Errorf("once all is well: %v", err)
				}
				return
			}
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			// A reset throws away what the kernel holds, so more is sent than arrives.
			lost := int64(0)
			for _, f := range tc.faults {
				if f.Reset {
					lost += int64(f.Times) * f.At
				}
			}
			if sent := srv.Bytes("/blobs/"); tc.resume && sent > blobSize+lost+1<<10 {
				t.Errorf("%d bytes sent for a layer of %d", sent, blobSize)
			}
			if last := srv.Requests()[len(srv.Requests())-1]; tc.resume && lost > 0 && last.Header.Get("Range") == "" {
				t.Error("resumed without a Range")
			}
		})
	}
}

// isPlain accepts a failure that has none of the kinds that would mislead.
func isPlain(err error) bool {
	return !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) && !errdefs.IsUnauthorized(err)
}

func TestWrongBytesAreTheCallersToSeeAndDistrust(t *testing.T) {
	good, img, data := demo(t)
	liar, _, _ := demo(t)
	layer := img.Layers[0]
	liar.Fault("/blobs/", registrytest.Fault{Corrupt: true, At: 7})
	opts := options()
	opts.Hosts = mirrors(liar.Host(), good.Host())
	repo := session(t, opts, "registry.example", registry.Session{})
	got, host, err := read(t, repo, layer, 0)
	if err != nil || bytes.Equal(got, data) || host != liar.Host() {
		t.Fatalf("from %s: %v", host, err)
	}
	repo.Distrust(host)
	got, host, err = read(t, repo, layer, 0)
	if err != nil || !bytes.Equal(got, data) || host != good.Host() {
		t.Fatalf("from %s: %v", host, err)
	}
	if n := liar.Count("/blobs/"); n != 1 {
		t.Errorf("the liar was asked %d times", n)
	}
	repo.Distrust(host)
	_, _, err = read(t, repo, layer, 0)
	wantError(t, err, errdefs.IsDataLoss, "sent wrong bytes before")
}

func TestResumeFromKeptBytes(t *testing.T) {
	srv, img, data := demo(t)
	repo := session(t, options(), srv.Host(), registry.Session{})
	layer := img.Layers[0]
	for _, offset := range []int64{0, 1, 1 << 20, blobSize - 1, blobSize} {
		srv.Forget()
		got, _, err := read(t, repo, layer, offset)
		if err != nil || !bytes.Equal(got, data[offset:]) {
			t.Errorf("from %d: %d bytes, %v", offset, len(got), err)
		}
		if sent := srv.Bytes("/blobs/"); sent != blobSize-offset {
			t.Errorf("from %d: %d bytes sent", offset, sent)
		}
	}
	_, _, err := read(t, repo, layer, blobSize+1)
	wantError(t, err, errdefs.IsOutOfRange)
	_, _, err = read(t, repo, layer, -1)
	wantError(t, err, errdefs.IsOutOfRange)
	_, _, err = read(t, repo, oci.Descriptor{Digest: layer.Digest}, 0)
	wantError(t, err, errdefs.IsInvalidArgument, "0 bytes")
	_, _, err = read(t, repo, oci.Descriptor{Digest: "sha256:../../x", Size: 1}, 0)
	wantError(t, err, errdefs.IsInvalidArgument)
}

func TestBytesInTheDescriptor(t *testing.T) {
	data := []byte("{}")
	repo := session(t, options(), registrytest.Refused(t), registry.Session{})
	got, host, err := read(t, repo, oci.Descriptor{Digest: digest.FromBytes(data), Size: 2, Data: data}, 1)
	if err != nil || string(got) != "}" || host != "" {
		t.Errorf("%q from %q, %v", got, host, err)
	}
}

func TestStall(t *testing.T) {
	const short = 300 * time.Millisecond
	t.Run("moves to the next host and resumes there", func(t *testing.T) {
		slow, img, data := demo(t)
		good, _, _ := demo(t)
		slow.Fault("/blobs/", registrytest.Fault{Stall: true, At: 1 << 20})
		opts := options()
		opts.Stall, opts.Hosts = short, mirrors(slow.Host(), good.Host())
		repo := session(t, opts, "registry.example", registry.Session{})
		got, host, err := read(t, repo, img.Layers[0], 0)
		if err != nil || !bytes.Equal(got, data) || host != good.Host() {
			t.Fatalf("%d bytes from %s, %v", len(got), host, err)
		}
		if sent := good.Bytes("/blobs/"); sent != blobSize-1<<20 {
			t.Errorf("%d bytes from the second host", sent)
		}
		if read(t, repo, img.Config, 0); slow.Count(img.Config.Digest.String()) != 0 {
			t.Error("a host that stalled is asked again")
		}
	})
	t.Run("ends in an error after one more try", func(t *testing.T) {
		srv, img, _ := demo(t)
		layer := img.Layers[0]
		srv.Fault("/blobs/", registrytest.Fault{Stall: true, At: 1000})
		opts := options()
		opts.Stall = short
		start := time.Now()
		_, _, err := read(t, session(t, opts, srv.Host(), registry.Session{}), layer, 0)
		wantError(t, err, errdefs.IsUnavailable, "no byte arrived for 300ms", srv.Host(), layer.Digest.String(), "after 2000 of")
		if d := time.Since(start); d > 20*short || d < 2*short {
			t.Errorf("after %s", d)
		}
	})
	t.Run("a consumer may be slow", func(t *testing.T) {
		srv, img, data := demo(t)
		opts := options()
		opts.Stall = short
		b, err := session(t, opts, srv.Host(), registry.Session{}).Fetch(t.Context(), img.Layers[0], 0)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		<-time.After(3 * short) // the disk is busy
		if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if n := srv.Count("/blobs/"); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

func TestGoneMirrorCostsOnce(t *testing.T) {
	for name, dead := range map[string]string{"refused": registrytest.Refused(t), "black hole": registrytest.BlackHole(t)} {
		t.Run(name, func(t *testing.T) {
			srv, img, data := demo(t)
			var mu sync.Mutex
			var dials, downs int
			opts := options()
			opts.MirrorDial = 150 * time.Millisecond
			opts.Hosts = mirrors(dead, srv.Host())
			opts.Hooks.Request = func(host, _, _ string, _ int, _ time.Duration, _ error) {
				mu.Lock()
				defer mu.Unlock()
				if host == dead {
					dials++
				}
			}
			opts.Hooks.MirrorDown = func(host string, err error) {
				mu.Lock()
				defer mu.Unlock()
				if downs++; host != dead || err == nil {
					t.Errorf("%s: %v", host, err)
				}
			}
			client := registry.New(opts)
			for range 2 {
				repo := open(t, client, "registry.example")
				if _, err := repo.Resolve(t.Context()); err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				for range 8 {
					wg.Go(func() {
						if got, _, err := read(t, repo, img.Layers[0], 0); err != nil || !bytes.Equal(got, data) {
							t.Errorf("%d bytes, %v", len(got), err)
						}
					})
				}
				wg.Wait()
			}
			if dials != 1 || downs != 1 {
				t.Errorf("%d dials of a dead mirror, %d reports", dials, downs)
			}
		})
	}
}

func TestDefaultPatience(t *testing.T) {
	// The promise is a second for a dead mirror, with nothing configured.
	srv, _, _ := demo(t)
	opts := registry.Options{Hosts: mirrors(registrytest.BlackHole(t), srv.Host())}
	start := time.Now()
	if _, err := session(t, opts, "registry.example", registry.Session{}).Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > 3*time.Second { // thirty is what it would cost otherwise
		t.Errorf("a dead mirror costs %s", d)
	}
}

func TestGoneRegistry(t *testing.T) {
	dead := registrytest.Refused(t)
	_, err := session(t, options(), dead, registry.Session{}).Resolve(t.Context())
	wantError(t, err, errdefs.IsUnavailable, "connection refused", dead, "check the name, the network")

	hole := registrytest.BlackHole(t)
	opts := options()
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "http", Host: hole, Path: "/v2", Capabilities: hosts.Everything, DialTimeout: 50 * time.Millisecond}}, nil
	}
	_, err = session(t, opts, hole, registry.Session{}).Resolve(t.Context())
	wantError(t, err, errdefs.IsUnavailable, "no connection within 50ms")
}

func TestCapabilitiesDecideWhichIsLast(t *testing.T) {
	// The endpoint after it may not be pulled from, so that it is the last and gets its patience.
	srv, _, _ := demo(t)
	opts := options()
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{
			{Scheme: "http", Host: srv.Host(), Path: "/v2", Capabilities: hosts.Everything},
			{Scheme: "http", Host: registrytest.Refused(t), Path: "/v2", Capabilities: hosts.Push},
		}, nil
	}
	srv.Fault("HEAD", registrytest.Fault{Status: 503, Times: 1})
	repo := session(t, opts, "registry.example", registry.Session{})
	if _, err := repo.Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestCancel(t *testing.T) {
	srv, img, _ := demo(t)
	srv.Fault("/blobs/", registrytest.Fault{Stall: true, At: 1000})
	ctx, cancel := context.WithCancelCause(t.Context())
	b, err := session(t, options(), srv.Host(), registry.Session{}).Fetch(ctx, img.Layers[0], 0)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := io.ReadFull(b, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	cancel(stop)
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, stop) {
		t.Errorf("%v", err)
	}
	if n := srv.Count("/blobs/"); n != 1 {
		t.Errorf("%d requests: a cancelled fetch goes on", n)
	}
}

func TestClosedBlob(t *testing.T) {
	srv, img, _ := demo(t)
	b, err := session(t, options(), srv.Host(), registry.Session{}).Fetch(t.Context(), img.Layers[0], 0)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	if n, err := b.Read(make([]byte, 8)); n != 0 || err == nil || err == io.EOF {
		t.Errorf("%d, %v", n, err)
	}
	b.Close()
}

func TestNames(t *testing.T) {
	for _, r := range []ref.Reference{
		{Host: "x", Path: "../y"}, {Host: "x", Path: "a//b"}, {Host: "x", Path: "a/./b"}, {Host: "x", Path: "a?b"}, {Host: "x", Path: "a%2fb"},
		{Host: "x", Path: ""}, {Host: "x", Path: "a", Tag: "../b"}, {Host: "x", Path: "a", Tag: strings.Repeat("a", 129)},
		{Host: "x", Path: "a", Digest: "sha256:abc"}, {Host: "x", Path: strings.Repeat("a", 256)},
	} {
		if _, err := registry.New(options()).Repository(r, registry.Session{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", r, err)
		}
	}
	repo, err := registry.New(options()).Repository(ref.Reference{Host: "x", Path: "a"}, registry.Session{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = repo.Resolve(t.Context())
	wantError(t, err, errdefs.IsInvalidArgument, "neither tag nor digest")
}

func TestWarnings(t *testing.T) {
	srv, _, _ := demo(t)
	srv.Fault("HEAD", registrytest.Fault{Warning: `299 - "moving to \"new.example\" soon"`})
	var said []string
	opts := options()
	opts.Hooks.Warning = func(host, text string) { said = append(said, host+" "+text) }
	if _, err := session(t, opts, srv.Host(), registry.Session{}).Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(said) != 1 || said[0] != srv.Host()+` moving to "new.example" soon` {
		t.Errorf("%q", said)
	}
}
