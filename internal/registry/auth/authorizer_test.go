package auth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// tokenServer answers token requests without a network, so that time can be the test's.
type tokenServer struct {
	mu    sync.Mutex
	asked []*http.Request
	reply func(n int, r *http.Request) (status int, body string)
	slow  time.Duration
}

func (s *tokenServer) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	s.asked = append(s.asked, r)
	n := len(s.asked)
	s.mu.Unlock()
	select {
	case <-time.After(s.slow):
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	status, body := s.reply(n, r)
	resp := &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: r}
	if status >= 300 && status < 400 {
		resp.Header.Set("Location", body)
	}
	return resp, nil
}

func (s *tokenServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.asked)
}

func newRequest(t *testing.T, host string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+host+"/v2/x/manifests/y", nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

const scope = "repository:x:pull"

// refuse has a learn from a 401 to req.
func refuse(t *testing.T, a *Authorizer, s *tokenServer, req *http.Request, again bool, challenge string) error {
	t.Helper()
	resp := &http.Response{StatusCode: 401, Request: req, Header: http.Header{"Www-Authenticate": {challenge}}}
	return a.Refused(t.Context(), Refusal{Response: resp, Scope: scope, Again: again, Transport: s, UserAgent: "ua", Header: http.Header{"x-own": {"o"}}})
}

const challenge = `Bearer realm="https://auth.example/token?a=b",service="svc",scope="repository:x:pull"`

func numbered(life int) func(int, *http.Request) (int, string) {
	return func(n int, _ *http.Request) (int, string) {
		return 200, fmt.Sprintf(`{"token":"t%d","expires_in":%d}`, n, life)
	}
}

// authorize yields what a puts on a request.
func authorize(t *testing.T, a *Authorizer) (string, error) {
	t.Helper()
	req := newRequest(t, "r.example")
	err := a.Authorize(t.Context(), req, scope)
	return req.Header.Get("Authorization"), err
}

func TestTokensLiveAsLongAsTheyShould(t *testing.T) {
	for _, tc := range []struct {
		reply string
		life  time.Duration // until another is fetched
	}{
		{`{"token":"t","expires_in":300}`, 290 * time.Second},
		{`{"access_token":"t","token":"other","expires_in":"300"}`, 290 * time.Second},
		{`{"token":"t"}`, 50 * time.Second},
		{`{"token":"t","expires_in":-5}`, 50 * time.Second},
		{`{"token":"t","expires_in":null}`, 50 * time.Second},
		{`{"token":"t","expires_in":10}`, 5 * time.Second},
		{`{"token":"t","expires_in":1e300}`, 24*time.Hour - 10*time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &tokenServer{reply: func(int, *http.Request) (int, string) { return 200, tc.reply }}
			a := New(nil)
			if err := refuse(t, a, s, newRequest(t, "r.example"), false, challenge); err != nil {
				t.Fatal(err)
			}
			for _, step := range []struct {
				after time.Duration
				want  int
			}{{0, 1}, {tc.life - time.Millisecond, 1}, {2 * time.Millisecond, 2}} {
				time.Sleep(step.after)
				if got, err := authorize(t, a); err != nil || got != "Bearer t" || s.count() != step.want {
					t.Errorf("%s after %s: %q, %v, %d fetches", tc.reply, step.after, got, err, s.count())
				}
			}
		})
	}
}

func TestOneFetchForAllAndTheFirstMayLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &tokenServer{reply: numbered(300), slow: time.Second}
		a := New(nil)
		if err := refuse(t, a, s, newRequest(t, "r.example"), false, challenge); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan error)
		go func() { first <- a.Authorize(ctx, newRequest(t, "r.example"), scope) }()
		synctest.Wait()
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if got, err := authorize(t, a); err != nil || got != "Bearer t1" {
					t.Errorf("%q, %v", got, err)
				}
			})
		}
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the one who left: %v", err)
		}
		wg.Wait()
		if s.count() != 1 {
			t.Errorf("%d fetches", s.count())
		}
	})
}

func TestFailureIsToldAndForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &tokenServer{slow: time.Second, reply: func(n int, r *http.Request) (int, string) {
			if n == 1 {
				return 503, ""
			}
			return numbered(300)(n, r)
		}}
		a := New(nil)
		if err := refuse(t, a, s, newRequest(t, "r.example"), false, challenge); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := authorize(t, a); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "token from auth.example: the token server answered 503") {
					t.Errorf("%v", err)
				}
			})
		}
		wg.Wait()
		if got, err := authorize(t, a); err != nil || got != "Bearer t2" {
			t.Errorf("%q, %v", got, err)
		}
	})
}

func TestTokenServerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &tokenServer{reply: numbered(300), slow: time.Hour}
		a := New(nil)
		if err := refuse(t, a, s, newRequest(t, "r.example"), false, challenge); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := authorize(t, a); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != tokenTimeout {
			t.Errorf("%v after %s", err, time.Since(start))
		}
	})
}

func TestWhatIsAskedOfTheTokenServer(t *testing.T) {
	s := &tokenServer{reply: numbered(300)}
	a := New(nil)
	c := `Bearer realm="https://auth.example/token?a=b",service="svc",scope="repository:y:pull repository:x:pull"`
	if err := refuse(t, a, s, newRequest(t, "r.example"), false, c); err != nil {
		t.Fatal(err)
	}
	if _, err := authorize(t, a); err != nil {
		t.Fatal(err)
	}
	r := s.asked[0]
	if r.URL.String() != "https://auth.example/token?a=b&scope=repository%3Ax%3Apull&scope=repository%3Ay%3Apull&service=svc" {
		t.Errorf("%s", r.URL)
	}
	//lint:ignore SA1008 hosts.toml's keys are sent as they are written
	if r.Header.Get("User-Agent") != "ua" || len(r.Header["x-own"]) != 0 || r.Header.Get("Authorization") != "" {
		t.Errorf("%v", r.Header)
	}
	// At the registry's own host its headers are at home.
	if err := refuse(t, a, s, newRequest(t, "r.example"), false, `Bearer realm="https://r.example/token"`); err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1008 hosts.toml's keys are sent as they are written
	if _, err := authorize(t, a); err != nil || len(s.asked[1].Header["x-own"]) != 1 {
		t.Errorf("%v, %v", err, s.asked[1].Header)
	}
}

func TestTokenRepliesThatAreNone(t *testing.T) {
	for name, body := range map[string]string{
		"no JSON":     "<html>",
		"empty":       `{}`,
		"line break":  `{"token":"a\r\nX: y"}`,
		"long":        `{"token":"` + strings.Repeat("a", maxToken+1) + `"}`,
		"a long body": `{"token":"a"}` + strings.Repeat(" ", maxTokenBody),
	} {
		s := &tokenServer{reply: func(int, *http.Request) (int, string) { return 200, body }}
		a := New(nil)
		if err := refuse(t, a, s, newRequest(t, "r.example"), false, challenge); err != nil {
			t.Fatal(err)
		}
		if got, err := authorize(t, a); !errdefs.IsUnauthorized(err) || got != "" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestTokenRequestIsNotSentOn(t *testing.T) {
	for _, tc := range []struct {
		cred  Credential
		to    string
		fails bool
	}{
		{Credential{Username: "joe", Password: "pw"}, "https://evil.example/token", true},
		{Credential{Username: "joe", Password: "pw"}, "http://auth.example/token", true},
		{Credential{Username: "joe", Password: "pw"}, "https://auth.example/other", false},
		{Credential{}, "https://elsewhere.example/token", false},
	} {
		s := &tokenServer{reply: func(n int, r *http.Request) (int, string) {
			if n == 1 {
				return 307, tc.to
			}
			return 200, `{"token":"t"}`
		}}
		a := New(For("r.example", tc.cred))
		if err := refuse(t, a, s, newRequest(t, "r.example"), false, challenge); err != nil {
			t.Fatal(err)
		}
		_, err := authorize(t, a)
		if tc.fails != (err != nil) || tc.fails && s.count() != 1 {
			t.Errorf("to %s: %v, %d requests", tc.to, err, s.count())
		}
		if err != nil && (strings.Contains(err.Error(), "pw") || !strings.Contains(err.Error(), "send the credentials on")) {
			t.Errorf("%v", err)
		}
	}
}

func TestRegistryToken(t *testing.T) {
	s := &tokenServer{}
	a := New(For("r.example", Credential{RegistryToken: "given"}))
	if err := refuse(t, a, s, newRequest(t, "r.example"), false, challenge); err != nil {
		t.Fatal(err)
	}
	if got, err := authorize(t, a); err != nil || got != "Bearer given" || s.count() != 0 {
		t.Errorf("%q, %v", got, err)
	}
	req := newRequest(t, "r.example")
	req.Header.Set("Authorization", "Bearer given")
	if err := refuse(t, a, s, req, true, challenge); !errdefs.IsUnauthorized(err) {
		t.Errorf("%v", err)
	}
}

func TestChangedPasswordIsTried(t *testing.T) {
	s := &tokenServer{}
	creds := &changing{Credential{Username: "joe", Password: "old"}}
	a := New(creds)
	if err := refuse(t, a, s, newRequest(t, "r.example"), false, `Basic realm="x"`); err != nil {
		t.Fatal(err)
	}
	req := newRequest(t, "r.example")
	if err := a.Authorize(t.Context(), req, scope); err != nil {
		t.Fatal(err)
	}
	if err := refuse(t, a, s, req, false, `Basic realm="x"`); !errdefs.IsUnauthorized(err) {
		t.Errorf("the same password again: %v", err)
	}
	creds.cred.Password = "new"
	if err := refuse(t, a, s, req, false, `Basic realm="x"`); err != nil {
		t.Errorf("a new password: %v", err)
	}
}

type changing struct{ cred Credential }

func (c *changing) Credential(context.Context, string) (Credential, error) { return c.cred, nil }

func TestCredentialOfOneHostOnly(t *testing.T) {
	joe := Credential{Username: "joe", Password: "pw"}
	for _, tc := range []struct {
		of, host string
		want     bool
	}{
		{"docker.io", "registry-1.docker.io", true},
		{"https://index.docker.io/v1/", "docker.io", true},
		{"r.example", "r.example", true},
		{"https://R.example/v2/", "r.example:443", true},
		{"r.example", "r.example:5000", false},
		{"r.example", "evil.r.example", false},
		{"r.example", "docker.io", false},
	} {
		got, err := For(tc.of, joe).Credential(t.Context(), tc.host)
		if err != nil || (got == joe) != tc.want {
			t.Errorf("%s for %s: %v, %v", tc.of, tc.host, got, err)
		}
	}
	got, err := Chain{nil, For("a", joe), For("b", Credential{RegistryToken: "t"})}.Credential(t.Context(), "b")
	if err != nil || got.RegistryToken != "t" {
		t.Errorf("%v, %v", got, err)
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	var log bytes.Buffer
	c := Credential{Username: "joe", Password: "pw-1", IdentityToken: "pw-2", RegistryToken: "pw-3"}
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "c", c)
	text := fmt.Sprintf("%v %+v %#v %s %v", c, c, c, c, []any{c, &c}) + log.String()
	if strings.Contains(text, "pw-") || !strings.Contains(text, "user joe") {
		t.Error(text)
	}
	if (Credential{}).String() != "anonymous" || (Credential{IdentityToken: "x"}).String() != "a token" {
		t.Error("names")
	}
}

func TestMemoryIsBounded(t *testing.T) {
	s := &tokenServer{reply: numbered(300)}
	a := New(nil)
	for i := range 3 * maxHosts {
		if err := refuse(t, a, s, newRequest(t, fmt.Sprintf("r%d.example", i)), false, challenge); err != nil {
			t.Fatal(err)
		}
	}
	if len(a.hosts) > maxHosts {
		t.Errorf("%d hosts", len(a.hosts))
	}
	req := newRequest(t, fmt.Sprintf("r%d.example", 3*maxHosts-1))
	for i := range 2 * maxTokens {
		if err := a.Authorize(t.Context(), req, fmt.Sprint("repository:", i, ":pull")); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(a.hosts["https://"+req.URL.Host].tokens); n > maxTokens {
		t.Errorf("%d tokens", n)
	}
}

func FuzzTokenReply(f *testing.F) {
	f.Add([]byte(`{"token":"t","expires_in":"3"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r tokenReply
		if json.Unmarshal(data, &r) == nil && (r.ExpiresIn < 0 || time.Duration(r.ExpiresIn)*time.Second > longestExpiry) {
			t.Fatalf("%+v", r)
		}
	})
}
