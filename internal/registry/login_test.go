package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

const secret = "s3cr3t-of-joe"

var joe = auth.Credential{Username: "joe", Password: secret}

func TestLogin(t *testing.T) {
	for name, tc := range map[string]struct {
		want   registrytest.Auth
		cred   auth.Credential
		kind   func(error) bool
		words  string
		tokens string // methods of the token requests
	}{
		"tokens for everybody":      {tokens: "GET"},
		"tokens by POST":            {want: registrytest.Auth{User: "joe", Password: secret}, cred: joe, tokens: "POST"},
		"tokens by GET, 405":        {want: registrytest.Auth{User: "joe", Password: secret, NoPOST: 405}, cred: joe, tokens: "POST GET"},
		"tokens by GET, 404":        {want: registrytest.Auth{User: "joe", Password: secret, NoPOST: 404}, cred: joe, tokens: "POST GET"},
		"tokens by GET, 400":        {want: registrytest.Auth{User: "joe", Password: secret, NoPOST: 400}, cred: joe, tokens: "POST GET"},
		"identity token":            {want: registrytest.Auth{User: "x", RefreshToken: secret}, cred: auth.Credential{IdentityToken: secret}, tokens: "POST"},
		"token server busy at once": {want: registrytest.Auth{Fail: 2}, tokens: "GET GET GET"},
		"basic":                     {want: registrytest.Auth{Basic: true, User: "joe", Password: secret}, cred: joe},
		"basic, nobody known":       {want: registrytest.Auth{Basic: true, User: "joe", Password: secret}, kind: errdefs.IsUnauthorized, words: "none is known"},
		"basic, wrong password":     {want: registrytest.Auth{Basic: true, User: "joe", Password: "other"}, cred: joe, kind: errdefs.IsUnauthorized, words: "does not accept the password of user joe"},
		"tokens, wrong password":    {want: registrytest.Auth{User: "joe", Password: "other"}, cred: joe, kind: errdefs.IsUnauthorized, words: "the token server answered 401", tokens: "POST GET"},
		"tokens, nobody known":      {want: registrytest.Auth{User: "joe", Password: secret}, kind: errdefs.IsUnauthorized, words: "401 Unauthorized", tokens: "GET"},
		"digest":                    {want: registrytest.Auth{Challenge: `Digest realm="x", nonce="y"`}, cred: joe, kind: errdefs.IsNotImplemented, words: `"digest"`},
		"no challenge that is one":  {want: registrytest.Auth{Challenge: `???`}, cred: joe, kind: errdefs.IsUnauthorized, words: "names no way"},
		"no realm":                  {want: registrytest.Auth{Challenge: `Bearer service="x"`}, cred: joe, kind: errdefs.IsUnauthorized, words: "no token server"},
		"a realm that is a file":    {want: registrytest.Auth{Challenge: `Bearer realm="file:///etc/shadow"`}, cred: joe, kind: errdefs.IsUnauthorized, words: "no token server"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv, img, data := demo(t)
			srv.Require(tc.want)
			s := registry.Session{Credentials: auth.For(srv.Host(), tc.cred)}
			repo := session(t, options(), srv.Host(), s)
			_, err := repo.Resolve(t.Context())
			if tc.kind != nil {
				wantError(t, err, tc.kind, tc.words)
				if errdefs.IsUnauthorized(err) {
					wantError(t, err, tc.kind, ": pull access denied, ", "; log in, or check the credentials for "+srv.Host())
				}
			} else {
				if err != nil {
					t.Fatal(err)
				}
				if got, _, err := read(t, repo, img.Layers[0], 0); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				if n := srv.Count("HEAD"); n > 4 {
					t.Errorf("%d HEADs", n)
				}
			}
			var methods []string
			for _, r := range srv.TokenRequests() {
				methods = append(methods, r.Method)
				if r.Scope != "repository:demo:pull" {
					t.Errorf("scope %q", r.Scope)
				}
			}
			if got := strings.Join(methods, " "); got != tc.tokens {
				t.Errorf("token requests %q, want %q", got, tc.tokens)
			}
			if err != nil && (strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), base64.StdEncoding.EncodeToString([]byte("joe:"+secret)))) {
				t.Errorf("the error tells the secret: %v", err)
			}
		})
	}
}

func TestTokensAreShared(t *testing.T) {
	srv, img, _ := demo(t)
	srv.Require(registrytest.Auth{Slow: 50 * time.Millisecond, Expires: time.Hour})
	client := registry.New(options())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			repo, err := client.Repository(ref.Reference{Host: srv.Host(), Path: "demo", Tag: "latest"}, registry.Session{})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := repo.Resolve(t.Context()); err != nil {
				t.Error(err)
			}
			if _, _, err := read(t, repo, img.Config, 0); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(srv.TokenRequests()); n != 1 {
		t.Errorf("%d token requests of 8 pulls", n)
	}
}

func TestTokenThatIsNoLongerGood(t *testing.T) {
	srv, img, _ := demo(t)
	srv.Require(registrytest.Auth{Expires: time.Hour})
	repo := session(t, options(), srv.Host(), registry.Session{})
	if _, err := repo.Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	srv.RevokeTokens()
	if _, _, err := read(t, repo, img.Config, 0); err != nil {
		t.Fatal(err)
	}
	if n := len(srv.TokenRequests()); n != 2 {
		t.Errorf("%d token requests", n)
	}
	// A token server whose tokens the registry never takes is left after one more try.
	other := registrytest.New(t)
	other.Require(registrytest.Auth{})
	srv.Require(registrytest.Auth{Realm: other.URL() + "/token"})
	_, _, err := read(t, repo, img.Config, 0)
	wantError(t, err, errdefs.IsUnauthorized, "does not accept the token")
	if n := len(other.TokenRequests()); n != 1 {
		t.Errorf("%d token requests after the one token that was known", n)
	}
	// And nothing of the failure stays.
	srv.Require(registrytest.Auth{})
	if _, _, err := read(t, repo, img.Config, 0); err != nil {
		t.Error(err)
	}
}

// leaks reports what of ours srv got to see.
func leaks(srv *registrytest.Server) (found []string) {
	for _, r := range srv.Requests() {
		for _, key := range []string{"Authorization", "X-Key", "Cookie"} {
			if v := r.Header.Get(key); v != "" {
				found = append(found, key+": "+v)
			}
		}
		if r.Query != "" {
			found = append(found, r.Query)
		}
	}
	return found
}

func TestNothingOfOursGoesToAnotherHost(t *testing.T) {
	for name, want := range map[string]registrytest.Auth{
		"basic":  {Basic: true, User: "joe", Password: secret},
		"bearer": {User: "joe", Password: secret},
	} {
		t.Run(name, func(t *testing.T) {
			srv, img, data := demo(t)
			storage, _, _ := demo(t)
			greedy := registrytest.New(t)
			srv.Require(want)
			greedy.Require(registrytest.Auth{Basic: true, User: "joe", Password: secret})
			opts := options()
			opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
				return []hosts.Host{{Scheme: "http", Host: srv.Host(), Path: "/v2", Capabilities: hosts.Everything, Header: http.Header{"X-Key": {"k"}, "cookie": {"c"}}}}, nil
			}
			repo := session(t, opts, srv.Host(), registry.Session{Credentials: auth.For(srv.Host(), joe)})
			if _, err := repo.Resolve(t.Context()); err != nil {
				t.Fatal(err)
			}
			srv.Fault("/blobs/", registrytest.Fault{Redirect: storage.URL()})
			storage.Fault("/blobs/", registrytest.Fault{Reset: true, At: 1 << 20, Times: 1})
			got, host, err := read(t, repo, img.Layers[0], 0)
			if err != nil || !bytes.Equal(got, data) || host != srv.Host() {
				t.Errorf("%d bytes from %s, %v", len(got), host, err)
			}
			if found := leaks(storage); found != nil {
				t.Errorf("the storage saw %q", found)
			}
			for _, r := range srv.Requests() {
				if r.Header.Get("X-Key") != "k" {
					t.Errorf("no header of ours in %+v", r)
				}
			}
			// A redirect to a host that asks for a login gets none, and is not learned from.
			srv.Fault("/blobs/", registrytest.Fault{Redirect: greedy.URL()})
			_, _, err = read(t, repo, img.Layers[0], 0)
			wantError(t, err, errdefs.IsUnauthorized, greedy.Host()+" wants a login and is not the registry")
			if found := leaks(greedy); found != nil {
				t.Errorf("the greedy host saw %q", found)
			}
			// Neither does the host of a foreign layer.
			foreign := img.Layers[0]
			foreign.URLs = []string{"ftp://x/y", "http://joe:pw@" + greedy.Host() + "/v2/x", storage.URL() + "/v2/demo/blobs/" + string(foreign.Digest)}
			storage.Forget()
			greedy.Forget()
			got, host, err = read(t, repo, foreign, 9)
			if err != nil || !bytes.Equal(got, data[9:]) || host != storage.Host() {
				t.Errorf("%d bytes from %s, %v", len(got), host, err)
			}
			if found := append(leaks(storage), leaks(greedy)...); found != nil {
				t.Errorf("foreign hosts saw %q", found)
			}
			// Nor the registry itself, when a manifest names it as if it were foreign.
			srv.Forget()
			foreign.URLs = []string{srv.URL() + "/v2/other/blobs/x"}
			read(t, repo, foreign, 0)
			if r := srv.Requests()[0]; r.Header.Get("Authorization") != "" || r.Header.Get("X-Key") != "" {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestForeignLayerFallsBackToTheRegistry(t *testing.T) {
	srv, img, data := demo(t)
	foreign := img.Layers[0]
	foreign.URLs = []string{"http://" + registrytest.Refused(t) + "/x", srv.URL() + "/nothing"}
	repo := session(t, options(), srv.Host(), registry.Session{})
	if got, host, err := read(t, repo, foreign, 0); err != nil || !bytes.Equal(got, data) || host != srv.Host() {
		t.Errorf("%d bytes from %s, %v", len(got), host, err)
	}
}

func TestCredentialsOfOneHost(t *testing.T) {
	srv, _, _ := demo(t)
	mirror, _, _ := demo(t)
	for _, s := range []*registrytest.Server{srv, mirror} {
		s.Require(registrytest.Auth{Basic: true, User: "joe", Password: secret})
	}
	opts := options()
	opts.Hosts = mirrors(mirror.Host(), srv.Host())
	repo := session(t, opts, srv.Host(), registry.Session{Credentials: auth.For(srv.Host(), joe)})
	if _, err := repo.Resolve(t.Context()); err != nil {
		t.Fatal(err)
	}
	if found := strings.Join(leaks(mirror), ""); strings.Contains(found, "Basic") {
		t.Errorf("the mirror saw %q", found)
	}
}

func TestPasswordDoesNotTravelInClear(t *testing.T) {
	srv := registrytest.NewTLS(t)
	srv.Push("demo", "latest", registrytest.Layer{Data: []byte("x")})
	plain := registrytest.New(t)
	plain.Require(registrytest.Auth{User: "joe", Password: secret})
	srv.Require(registrytest.Auth{Realm: plain.URL() + "/token"})
	opts := options()
	skip := true
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "https", Host: srv.Host(), Path: "/v2", Capabilities: hosts.Everything, SkipVerify: &skip}}, nil
	}
	_, err := session(t, opts, srv.Host(), registry.Session{Credentials: auth.For(srv.Host(), joe)}).Resolve(t.Context())
	wantError(t, err, errdefs.IsUnauthorized, "in clear")
	if n := len(plain.TokenRequests()); n != 0 {
		t.Errorf("%d token requests", n)
	}
}

func TestRedirects(t *testing.T) {
	srv, img, data := demo(t)
	repo := session(t, options(), srv.Host(), registry.Session{})
	layer := img.Layers[0]
	srv.Fault("/blobs/", registrytest.Fault{Redirect: srv.URL(), Times: 10})
	if got, _, err := read(t, repo, layer, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("10 redirects: %v", err)
	}
	for want, f := range map[string]registrytest.Fault{
		"more than 10 redirects":    {Redirect: srv.URL()},
		`redirects to a "file" URL`: {Redirect: "file://host/etc/passwd"},
		"not found":                 {Redirect: "http://u:p@" + srv.Host() + "/elsewhere?signature=abc", Times: 1},
	} {
		srv.Heal()
		srv.Fault("/blobs/", f)
		_, _, err := read(t, repo, layer, 0)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "abc") {
			t.Errorf("%v; want %q", err, want)
		}
	}
	dead := registrytest.Refused(t)
	srv.Heal()
	srv.Fault("/blobs/", registrytest.Fault{Redirect: "http://" + dead + "/x?signature=abc"})
	if _, _, err := read(t, repo, layer, 0); err == nil || strings.Contains(err.Error(), "abc") {
		t.Errorf("%v", err)
	}
}

func tlsHost(srv *registrytest.Server, change func(*hosts.Host)) func(context.Context, string) ([]hosts.Host, error) {
	return func(context.Context, string) ([]hosts.Host, error) {
		h := hosts.Host{Scheme: "https", Host: srv.Host(), Path: "/v2", Capabilities: hosts.Everything, Origin: "/etc/hosts.toml"}
		change(&h)
		return []hosts.Host{h}, nil
	}
}

func TestTLS(t *testing.T) {
	srv := registrytest.NewTLS(t)
	srv.Push("demo", "latest", registrytest.Layer{Data: []byte("x")})
	plain, _, _ := demo(t)
	dir := t.TempDir()
	ca := srv.CA(t, dir)
	yes := true
	for name, tc := range map[string]struct {
		srv     *registrytest.Server
		change  func(*hosts.Host)
		session registry.Session
		words   string // of the error; empty: none
	}{
		"unknown authority":     {srv: srv, change: func(*hosts.Host) {}, words: "name its certificate authority as ca in the hosts.toml"},
		"authority":             {srv: srv, change: func(h *hosts.Host) { h.CA = []string{ca} }},
		"no verification":       {srv: srv, change: func(h *hosts.Host) { h.SkipVerify = &yes }},
		"none asked":            {srv: srv, change: func(*hosts.Host) {}, session: registry.Session{SkipVerify: true}},
		"missing file":          {srv: srv, change: func(h *hosts.Host) { h.CA = []string{dir + "/gone"} }, words: dir + "/gone: no such file or directory; mend that file"},
		"http means https":      {srv: srv, change: func(h *hosts.Host) { h.Scheme, h.CA = "http", []string{ca} }},
		"http means http":       {srv: plain, change: func(h *hosts.Host) { h.Scheme, h.CA = "http", []string{ca} }},
		"https to a plain port": {srv: plain, change: func(*hosts.Host) {}, words: "it speaks plain HTTP: if that is meant, name it http://" + plain.Host()},
		"plain HTTP asked":      {srv: plain, change: func(h *hosts.Host) { h.Implied = true }, session: registry.Session{PlainHTTP: true}},
		"configured otherwise":  {srv: plain, change: func(*hosts.Host) {}, session: registry.Session{PlainHTTP: true}, words: "plain HTTP"},
	} {
		t.Run(name, func(t *testing.T) {
			opts := options()
			opts.Hosts = tlsHost(tc.srv, tc.change)
			repo := session(t, opts, tc.srv.Host(), tc.session)
			_, err := repo.Resolve(t.Context())
			if tc.words != "" {
				wantError(t, err, errdefs.IsUnavailable, tc.words)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDefaultsForLocalhost(t *testing.T) {
	plain, _, _ := demo(t)
	secure := registrytest.NewTLS(t)
	secure.Push("demo", "latest", registrytest.Layer{Data: []byte("x")})
	for _, srv := range []*registrytest.Server{plain, secure} {
		client := registry.New(options())
		for range 2 {
			repo := open(t, client, srv.Host())
			if _, err := repo.Resolve(t.Context()); err != nil {
				t.Errorf("%s: %v", srv.URL(), err)
			}
		}
	}
}

func TestTagIsNotResolvedPastTLS(t *testing.T) {
	srv := registrytest.NewTLS(t)
	img := srv.Push("demo", "latest", registrytest.Layer{Data: []byte("x")})
	plain := registrytest.New(t)
	plain.Push("demo", "latest", registrytest.Layer{Data: []byte("y")})
	plain.PushBlob("demo", []byte("x"))
	ca := srv.CA(t, t.TempDir())
	srv.Fault("/v2/", registrytest.Fault{Redirect: plain.URL()})
	opts := options()
	opts.Hosts = tlsHost(srv, func(h *hosts.Host) { h.CA = []string{ca} })
	repo := session(t, opts, srv.Host(), registry.Session{})
	if _, err := repo.Resolve(t.Context()); err == nil || !strings.Contains(err.Error(), "without TLS") {
		t.Errorf("%v", err)
	}
	if got, _, err := read(t, repo, img.Layers[0], 0); err != nil || string(got) != "x" {
		t.Errorf("a blob has its digest: %q, %v", got, err)
	}
}

func TestClientCertificateStaysAtHome(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]int{}
	serve := func(name string, redirect *string) *httptest.Server {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			seen[name] += len(r.TLS.PeerCertificates)
			mu.Unlock()
			if redirect != nil {
				http.Redirect(w, r, *redirect, http.StatusTemporaryRedirect)
				return
			}
			w.Write([]byte("x"))
		}))
		s.TLS = askForCertificate()
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	storage := serve("storage", nil)
	home := serve("home", &storage.URL)
	dir := t.TempDir()
	cert, key := keyPair(t, home)
	pair := hosts.KeyPair{Cert: filepath.Join(dir, "c"), Key: filepath.Join(dir, "k")}
	for file, data := range map[string][]byte{pair.Cert: cert, pair.Key: key} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	yes := true
	opts := options()
	addr := home.Listener.Addr().String()
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{{Scheme: "https", Host: addr, Path: "/v2", Capabilities: hosts.Everything, SkipVerify: &yes, Client: []hosts.KeyPair{pair}}}, nil
	}
	got, _, err := read(t, session(t, opts, addr, registry.Session{}), blobOf("x"), 0)
	if err != nil || string(got) != "x" || seen["home"] != 1 || seen["storage"] != 0 {
		t.Errorf("%q, %v, certificates seen %v", got, err, seen)
	}
}

// TestProxy runs itself in a process with a proxy in its environment, which net/http reads only once.
func TestProxy(t *testing.T) {
	if os.Getenv("HOLDFAST_TEST_PROXIED") != "" {
		opts := options()
		opts.Hosts = mirrors("registry.invalid")
		_, err := session(t, opts, "registry.invalid", registry.Session{}).Resolve(t.Context())
		fmt.Println("resolved:", err)
		return
	}
	srv, _, _ := demo(t)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Host != "registry.invalid" {
			t.Errorf("the proxy was asked for %s", r.URL)
		}
		u := *r.URL
		u.Host = srv.Host()
		out, _ := http.NewRequest(r.Method, u.String(), nil)
		resp, err := http.DefaultTransport.RoundTrip(out)
		if err != nil {
			t.Error(err)
			return
		}
		resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
	}))
	defer proxy.Close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestProxy$")
	cmd.Env = append(os.Environ(), "HOLDFAST_TEST_PROXIED=1", "HTTP_PROXY="+proxy.URL, "http_proxy="+proxy.URL, "NO_PROXY=", "no_proxy=")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "resolved: <nil>") {
		t.Errorf("%v: %s", err, out)
	}
}
