package auth

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// Limits of what an Authorizer remembers. Beyond them it forgets, and asks again.
const (
	maxHosts  = 256
	maxTokens = 1024 // of one host
)

// Authorizer answers the challenges of registries for one set of credentials. It may be used by many at once.
type Authorizer struct {
	credentials Credentials

	mu    sync.Mutex
	hosts map[string]*answer // by scheme and host
}

// New makes an Authorizer. Nil credentials are anonymous.
func New(credentials Credentials) *Authorizer {
	if credentials == nil {
		credentials = Chain(nil)
	}
	return &Authorizer{credentials: credentials, hosts: map[string]*answer{}}
}

// answer is how one host wants to be spoken to. Everything but tokens is fixed.
type answer struct {
	cred      Credential
	basic     bool
	realm     *url.URL // of Bearer
	service   string
	secure    bool // the registry itself is reached by https
	transport http.RoundTripper
	userAgent string
	header    http.Header // nil if the realm is another host's

	mu     sync.Mutex
	scopes map[string]string // scope of a request -> scopes to ask for
	tokens map[string]*fetch // by scopes to ask for
}

// Refusal is a 401 response, with what it takes to do better.
type Refusal struct {
	Response  *http.Response    // its Request is the refused one; the body is not touched
	Scope     string            // what the request needs, as "repository:<name>:pull"; several are joined by spaces
	Again     bool              // this request was refused before although Refused had returned nil for it
	Transport http.RoundTripper // carries token requests
	UserAgent string            // sent with token requests
	Header    http.Header       // the host's own; sent with token requests that go to the same host
}

// Authorize puts on req what its host is known to want. Before the first Refused for a host that is nothing.
func (a *Authorizer) Authorize(ctx context.Context, req *http.Request, scope string) error {
	a.mu.Lock()
	ans := a.hosts[hostKey(req.URL)]
	a.mu.Unlock()
	if ans == nil {
		return nil
	}
	value, err := ans.value(ctx, scope)
	if err != nil {
		return err
	}
	maps.DeleteFunc(req.Header, func(key string, _ []string) bool { return strings.EqualFold(key, "Authorization") })
	req.Header.Set("Authorization", value)
	return nil
}

// Refused learns from a 401 response. Nil means that the request is worth repeating after another Authorize; the
// error is ErrUnauthenticated if credentials are missing or wrong, and ErrNotImplemented if no scheme is known.
func (a *Authorizer) Refused(ctx context.Context, r Refusal) error {
	req := r.Response.Request
	key, sent := hostKey(req.URL), req.Header.Get("Authorization")
	a.mu.Lock()
	known := a.hosts[key]
	a.mu.Unlock()
	if known != nil && known.forget(r.Scope, sent) && r.Again {
		return fmt.Errorf("%s does not accept the token that it asked for: %w", req.URL.Host, errdefs.ErrUnauthenticated)
	}
	var problems error
	for _, c := range Challenges(r.Response.Header) {
		ans, err := a.answer(ctx, c, r)
		if err == nil && ans.basic && sent == basic(ans.cred) {
			err = fmt.Errorf("%s does not accept the password of %s: %w", req.URL.Host, ans.cred, errdefs.ErrUnauthenticated)
		}
		if err != nil {
			problems = errors.Join(problems, err)
			continue
		}
		if known.sameAs(ans) {
			known.widen(r.Scope, c.Params["scope"])
			return nil
		}
		ans.widen(r.Scope, c.Params["scope"])
		a.mu.Lock()
		if len(a.hosts) >= maxHosts {
			clear(a.hosts)
		}
		a.hosts[key] = ans
		a.mu.Unlock()
		return nil
	}
	if problems == nil {
		problems = fmt.Errorf("%s asks for a login but names no way: %w", req.URL.Host, errdefs.ErrUnauthenticated)
	}
	return problems
}

// answer turns a challenge into a way to meet it.
func (a *Authorizer) answer(ctx context.Context, c Challenge, r Refusal) (*answer, error) {
	from := r.Response.Request.URL
	if c.Scheme != "bearer" && c.Scheme != "basic" {
		return nil, fmt.Errorf("%s wants %q authorization: %w", from.Host, clip(c.Scheme), errdefs.ErrNotImplemented)
	}
	cred, err := a.credentials.Credential(ctx, from.Host)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", from.Host, err)
	}
	ans := &answer{cred: cred, basic: c.Scheme == "basic", secure: from.Scheme == "https", transport: r.Transport,
		userAgent: r.UserAgent, scopes: map[string]string{}, tokens: map[string]*fetch{}}
	if ans.basic {
		if cred.Username == "" || cred.Password == "" {
			return nil, fmt.Errorf("%s asks for a user and password and none is known: %w", from.Host, errdefs.ErrUnauthenticated)
		}
		return ans, nil
	}
	ans.service = c.Params["service"]
	ans.realm, err = url.Parse(c.Params["realm"])
	if err != nil || ans.realm.Host == "" || ans.realm.Scheme != "https" && ans.realm.Scheme != "http" {
		return nil, fmt.Errorf("%s names no token server that could be asked: %w", from.Host, errdefs.ErrUnauthenticated)
	}
	ans.realm.User, ans.realm.Fragment = nil, ""
	if hostKey(ans.realm) == hostKey(from) {
		ans.header = r.Header
	}
	if ans.secure && ans.realm.Scheme == "http" && !cred.IsAnonymous() && cred.RegistryToken == "" {
		return nil, fmt.Errorf("%s would have its credentials sent in clear to %s: %w", from.Host, ans.realm.Host, errdefs.ErrUnauthenticated)
	}
	return ans, nil
}

// sameAs reports whether two answers lead to the same tokens.
func (ans *answer) sameAs(other *answer) bool {
	return ans != nil && ans.cred == other.cred && ans.basic == other.basic && ans.service == other.service &&
		(ans.basic || ans.realm.String() == other.realm.String())
}

// widen has requests of scope ask for what the challenge names, too.
func (ans *answer) widen(scope, challenged string) {
	all := strings.Fields(scope + " " + challenged)
	slices.Sort(all)
	ans.mu.Lock()
	defer ans.mu.Unlock()
	if len(ans.scopes) >= maxTokens {
		clear(ans.scopes)
	}
	ans.scopes[scope] = strings.Join(slices.Compact(all), " ")
}

func (ans *answer) scopesFor(scope string) string {
	if wide, ok := ans.scopes[scope]; ok {
		return wide
	}
	return scope
}

// forget drops the token of scope if it is the one that was sent. It reports whether any bearer token was sent.
func (ans *answer) forget(scope, sent string) bool {
	ans.mu.Lock()
	defer ans.mu.Unlock()
	wide := ans.scopesFor(scope)
	if f := ans.tokens[wide]; f != nil && f.finished() && "Bearer "+f.token == sent {
		delete(ans.tokens, wide)
	}
	return strings.HasPrefix(sent, "Bearer ")
}

// value yields the Authorization header for a request of scope.
func (ans *answer) value(ctx context.Context, scope string) (string, error) {
	switch {
	case ans.basic:
		return basic(ans.cred), nil
	case ans.cred.RegistryToken != "":
		return "Bearer " + ans.cred.RegistryToken, nil
	}
	f := ans.join(scope)
	select {
	case <-f.done:
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	if f.err != nil {
		return "", f.err
	}
	return "Bearer " + f.token, nil
}

// join finds a token of scope, or the fetch that will bring one, or starts it. The fetch belongs to all who wait for
// it, so it outlives the one who came first; its own deadline ends it.
func (ans *answer) join(scope string) *fetch {
	ans.mu.Lock()
	defer ans.mu.Unlock()
	wide := ans.scopesFor(scope)
	if f := ans.tokens[wide]; f != nil && (!f.finished() || time.Now().Before(f.expires)) {
		return f
	}
	if len(ans.tokens) >= maxTokens {
		clear(ans.tokens)
	}
	f := &fetch{done: make(chan struct{})}
	ans.tokens[wide] = f
	go func() {
		f.token, f.expires, f.err = ans.fetchToken(wide)
		ans.mu.Lock()
		if f.err != nil && ans.tokens[wide] == f {
			delete(ans.tokens, wide) // a failure is told to those who waited and remembered by nobody
		}
		ans.mu.Unlock()
		close(f.done)
	}()
	return f
}

// fetch is a token, now or soon. The fields are set before done is closed.
type fetch struct {
	done    chan struct{}
	token   string
	expires time.Time
	err     error
}

func (f *fetch) finished() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

func basic(c Credential) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+c.Password))
}

func hostKey(u *url.URL) string { return u.Scheme + "://" + strings.ToLower(u.Host) }

// clip shortens a word of a server for an error message.
func clip(s string) string { return s[:min(len(s), 64)] }
