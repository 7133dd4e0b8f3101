// Package registry speaks the OCI distribution protocol.
//
// A Client holds what outlives one pull: connections, tokens, and the memory of mirrors that did not answer. A
// Repository is one pull's view of one repository: the endpoints that hosts.toml lists for it, in order, and what was
// learned about them since. Each request goes to the first endpoint that may serve it and then to the next, so a
// failure is told only when none is left:
//
//	Resolve, Fetch   which endpoints, in which order, and whose failure is told (resolve.go, fetch.go)
//	  ask            repeats a request to one endpoint: logins, rate limits, passing failures (ask.go)
//	    exchange     one request and its redirects, under a watchdog (exchange.go)
package registry

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
)

// Options configures a Client. The zero value works.
type Options struct {
	Hosts       func(ctx context.Context, host string) ([]hosts.Host, error) // endpoints of a registry; default: hosts.Dirs{}.Lookup
	Credentials auth.Credentials                                             // default: anonymous
	UserAgent   string                                                       // default: "holdfast"
	Header      http.Header                                                  // sent to every endpoint beside its own headers, keys as they are written
	Proxy       func(*http.Request) (*url.URL, error)                        // default: as HTTP_PROXY, HTTPS_PROXY and NO_PROXY say
	Hooks       Hooks
	Stall       time.Duration // a response that brings no byte for so long has ended; default 30 s
	LeastRate   int64         // bytes a second: a response that brings fewer on average over RateWindow counts as stalled; default 1024, which a telephone line does for three layers at once. An endpoint that isn't the last must be 16 times as fast
	RateWindow  time.Duration // counts only while a reader waits; default 60 s
	Ranges      Ranges        // of a large blob that are fetched at once
	Dial        time.Duration // longest wait for a connection to the last endpoint; default 30 s
	MirrorDial  time.Duration // the same for any endpoint before the last; default 1 s. A host's own dial_timeout goes before both
	Backoff     time.Duration // wait before the first repetition, doubled for each further one; default 200 ms
}

// Hooks are told what a Client does. Any may be nil; they run on the goroutine of the request and must be quick.
type Hooks struct {
	// Request ends one HTTP exchange, without its body. Status is 0 if err says why there is none. Path has no query.
	Request func(host, method, path string, status int, d time.Duration, err error)
	// Exchange ends one HTTP exchange, too, and says what its time went to.
	Exchange func(Exchange)
	// Retry announces that the request is repeated at the same endpoint after wait. Attempt counts from 1.
	Retry func(host, path string, attempt int, wait time.Duration, err error)
	// MirrorDown tells of an endpoint that will not be asked again for a while.
	MirrorDown func(host string, err error)
	// Resume tells that a blob is asked for again from offset on.
	Resume func(host string, dgst digest.Digest, offset int64, err error)
	// Bytes counts what was read of a blob.
	Bytes func(host string, dgst digest.Digest, n int)
	// Warning passes on what a registry has to tell to people (header Warning: 299).
	Warning func(host, text string)
}

// Client talks to registries. It may be used by many at once.
type Client struct {
	opts Options
	auth *auth.Authorizer

	mu         sync.Mutex
	transports map[string]*transport // by TLS settings
	plain      map[string]bool       // hosts that turned out not to speak TLS
	down       map[string]time.Time  // endpoints that did not answer, and until when they are passed over

	pool *pool
}

// Limits of what a Client remembers. Beyond them it forgets.
const (
	maxTransports = 64
	maxRemembered = 1024
	downFor       = 30 * time.Second
)

// New makes a Client.
func New(opts Options) *Client {
	if opts.Hosts == nil {
		opts.Hosts = hosts.Dirs{}.Lookup
	}
	if opts.UserAgent == "" {
		opts.UserAgent = "holdfast"
	}
	if opts.Proxy == nil {
		opts.Proxy = http.ProxyFromEnvironment
	}
	for field, value := range map[*time.Duration]time.Duration{
		&opts.Stall: 30 * time.Second, &opts.RateWindow: time.Minute, &opts.Dial: 30 * time.Second, &opts.MirrorDial: time.Second, &opts.Backoff: 200 * time.Millisecond,
	} {
		if *field <= 0 {
			*field = value
		}
	}
	if opts.LeastRate <= 0 {
		opts.LeastRate = 1024
	}
	return &Client{
		opts:       opts,
		auth:       auth.New(opts.Credentials),
		transports: map[string]*transport{},
		plain:      map[string]bool{},
		down:       map[string]time.Time{},
		pool:       newPool(opts.Ranges),
	}
}

// CloseIdle drops the connections that no request uses.
func (c *Client) CloseIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.transports {
		t.closeIdle()
	}
}

var (
	pathForm = regexp.MustCompile(`^[A-Za-z0-9_.~-]+(/[A-Za-z0-9_.~-]+)*$`)
	tagForm  = regexp.MustCompile(`^\w[\w.-]{0,127}$`)
)

// maxPath bounds a repository's name, in bytes.
const maxPath = 255

// validate refuses what would leave the repository's part of the URL space.
func validate(n ref.Reference) error {
	switch {
	case len(n.Path) > maxPath || !pathForm.MatchString(n.Path) || path.Clean("/"+n.Path) != "/"+n.Path:
		return fmt.Errorf("%q is no repository name: %w", n.Path, errdefs.ErrInvalidArgument)
	case n.Tag != "" && !tagForm.MatchString(n.Tag):
		return fmt.Errorf("%q is no tag: %w", n.Tag, errdefs.ErrInvalidArgument)
	case n.Digest != "" && n.Digest.Validate() != nil:
		return fmt.Errorf("%q is no digest: %w", n.Digest, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Session is what one pull or push brings along. The zero value is an anonymous pull by the settings of the Client.
type Session struct {
	Credentials auth.Credentials // for this session; where it knows nothing, the Client's are asked. See auth.For
	PlainHTTP   bool             // reach the registry itself by HTTP, unless a hosts.toml says how
	SkipVerify  bool             // do not verify certificates, of no endpoint
	Push        bool             // ask for the right to push, too
	Header      http.Header      // sent to every endpoint, after its own headers, keys as they are written

	// Hooks are told of this session what the Client's are told of all.
	Hooks Hooks

	// Hosts lists the endpoints of the registry; default: the Client's.
	Hosts func(ctx context.Context, host string) ([]hosts.Host, error)
}

// Repository is one session's view of one repository. It remembers which endpoints are dead, so that one costs at most
// a dial's time-out per session and not per blob. It may be used by many goroutines at once and needs no closing.
type Repository struct {
	client  *Client
	name    ref.Reference
	session Session
	scope   string
	auth    *auth.Authorizer

	mu         sync.Mutex
	loaded     []*endpoint
	down       map[string]error // by endpoint.key
	distrusted map[string]bool
	single     map[string]bool // hosts that failed when they were asked for several ranges at once
}

// Repository begins a session on the repository of n; n.Digest, or else n.Tag, is what Resolve asks for. Nothing is
// read or asked yet.
func (c *Client) Repository(n ref.Reference, s Session) (*Repository, error) {
	if err := validate(n); err != nil {
		return nil, fmt.Errorf("repository %s/%s: %w", n.Host, n.Path, err)
	}
	r := &Repository{
		client: c, name: n, session: s, auth: c.auth,
		scope:      "repository:" + n.Path + ":pull",
		down:       map[string]error{},
		distrusted: map[string]bool{},
		single:     map[string]bool{},
	}
	if s.Push {
		r.scope += ",push"
	}
	if s.Credentials != nil {
		// Tokens that another's credentials bought are not shared, so this session has its own authorizer.
		r.auth = auth.New(auth.Chain{s.Credentials, c.opts.Credentials})
	}
	return r, nil
}

// endpoints yields the hosts of the session in order. The settings are read once, so they hold for all of a pull.
func (r *Repository) endpoints(ctx context.Context) ([]*endpoint, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.loaded != nil {
		return r.loaded, nil
	}
	lookup := r.client.opts.Hosts
	if r.session.Hosts != nil {
		lookup = r.session.Hosts
	}
	found, err := lookup(ctx, r.name.Host)
	if err != nil {
		return nil, err
	}
	for i, h := range found {
		r.loaded = append(r.loaded, r.client.endpoint(r.session.adjust(h), r.name.Host, i < len(found)-1))
	}
	return r.loaded, nil
}

// adjust applies what the request says about the transport.
func (s Session) adjust(h hosts.Host) hosts.Host {
	if len(s.Header) > 0 {
		own := h.Header
		h.Header = make(http.Header, len(own)+len(s.Header))
		for _, from := range []http.Header{own, s.Header} {
			for key, values := range from {
				h.Header[key] = append(h.Header[key], values...)
			}
		}
	}
	if s.PlainHTTP && h.Implied {
		h.Scheme = "http"
		if h.Origin == "" {
			h.SkipVerify = nil // set for a loopback host, and would have HTTPS tried first
		}
	}
	if s.SkipVerify {
		h.SkipVerify = new(bool)
		*h.SkipVerify = true
	}
	return h
}

// Distrust names a host that sent bytes of another digest: this session does not ask it again.
func (r *Repository) Distrust(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.distrusted[host] = true
}
