package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// Limits of one exchange.
const (
	maxRedirects = 10
	eagerness    = 16       // times the least speed is asked of an endpoint that isn't the last
	maxDrain     = 64 << 10 // bytes of an unwanted body that are read so that its connection can be used again
)

// query is what is asked of an endpoint.
type query struct {
	method string
	path   string // below the API root, unescaped: "<name>/blobs/<digest>"
	object string // the tag or digest that it is about
	accept string
	offset int64         // where the bytes wanted begin; a Range header if not 0
	end    int64         // where they end; some servers refuse a Range that leaves it open
	part   bool          // more follows, so that even from 0 on a Range is asked for
	tag    bool          // the answer is believed without a digest, so TLS must not be lost on the way to it
	stall  time.Duration // instead of the Client's, if that is longer; and of the endpoint's wait for a connection, if that is shorter
	eager  bool          // somebody else can be asked: more speed is asked of the answer
}

var (
	errStalled     = errors.New("no byte arrived")
	errUnreachable = errors.New("no connection")
)

// trickle is an errStalled: bytes arrive, and too few to get anywhere.
type trickle struct {
	bytes  int64
	within time.Duration
	least  int64 // bytes a second
}

func (t *trickle) Error() string {
	return fmt.Sprintf("only %d bytes arrived in %s, less than %d a second", t.bytes, t.within.Round(time.Millisecond), t.least)
}

func (t *trickle) Unwrap() error { return errStalled }

// dialTimeout is an errUnreachable: how long nobody answered.
type dialTimeout time.Duration

func (d dialTimeout) Error() string { return fmt.Sprintf("no connection within %s", time.Duration(d)) }

func (d dialTimeout) Unwrap() error { return errUnreachable }

// settingsError is an errUnreachable that lies in our own files.
type settingsError struct{ error }

func (e *settingsError) Unwrap() []error { return []error{e.error, errUnreachable} }

// answer is a response whose body is watched. Close it.
type answer struct {
	*http.Response
	served string // the host that sent it, after redirects
	body   *watchedBody
}

// exchange sends q to ep once and follows redirects. The error is errUnreachable if there was no connection, and
// errStalled if there was one and nothing came. Nothing that is for ep alone (logins, headers, client certificates)
// goes to another host.
func (r *Repository) exchange(ctx context.Context, ep *endpoint, q query) (*answer, error) {
	if ep.broken != nil {
		return nil, &settingsError{ep.broken}
	}
	c := r.client
	u := ep.url(q.path, c.isPlain(ep.Host.Host))
	home := *u
	for hop := 0; ; hop++ {
		atHome := u.Scheme == home.Scheme && strings.EqualFold(u.Host, home.Host)
		start := time.Now()
		req, err := r.request(ctx, ep, q, u, atHome)
		if err != nil {
			return nil, err
		}
		pool := ep.transport.home
		if !atHome {
			pool = ep.transport.away
		}
		// Who has just sent a part is there: a further connection to it is slow because the line is full.
		dial := max(ep.dial, min(q.stall, c.opts.Dial))
		a, err := r.timedTrip(req, pool, dial, r.patience(q), Exchange{Host: u.Host, Object: q.object, Start: start, Login: time.Since(start)})
		if err != nil && atHome && u.Scheme == "https" && ep.TriesTLSFirst() && ep.isPlainHTTP(err) {
			c.setPlain(ep.Host.Host)
			u = ep.url(q.path, true)
			home = *u
			continue
		}
		if err != nil {
			return nil, err
		}
		r.warnings(a)
		next, err := redirectTarget(a)
		switch {
		case err != nil:
			a.discard()
			return nil, err
		case next == nil:
			if q.eager {
				a.body.least *= eagerness
			}
			return a, nil
		}
		a.discard()
		if hop == maxRedirects {
			return nil, fmt.Errorf("more than %d redirects", maxRedirects)
		}
		if q.tag && u.Scheme == "https" && next.Scheme != "https" {
			return nil, fmt.Errorf("redirects to %s without TLS, which could name any image", next.Host)
		}
		u = next
	}
}

// patience is how long no byte may come of the answer to q.
func (r *Repository) patience(q query) time.Duration {
	if q.stall > 0 {
		return min(q.stall, r.client.opts.Stall)
	}
	return r.client.opts.Stall
}

// timedTrip is roundTrip, and tells what its time went to.
func (r *Repository) timedTrip(req *http.Request, pool *http.Transport, dial, stall time.Duration, e Exchange) (*answer, error) {
	if !r.timed() {
		return r.roundTrip(req, pool, dial, stall)
	}
	var w stopwatch
	a, err := r.roundTrip(req.WithContext(httptrace.WithClientTrace(req.Context(), w.trace())), pool, dial, stall)
	w.stop(&e)
	if e.Err = err; err == nil {
		e.Status = a.StatusCode
	}
	r.exchanged(e)
	return a, err
}

// request builds q for u.
func (r *Repository) request(ctx context.Context, ep *endpoint, q query, u *url.URL, atHome bool) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, q.method, u.String(), nil)
	if err != nil {
		return nil, withoutURL(err)
	}
	req.Header.Set("User-Agent", r.client.opts.UserAgent)
	if atHome {
		for key, values := range ep.header {
			if strings.EqualFold(key, "Host") && len(values) > 0 {
				req.Host = values[0] // net/http takes it from nowhere else
				continue
			}
			if canonical := http.CanonicalHeaderKey(key); canonical == "User-Agent" {
				req.Header.Del(canonical)
			}
			req.Header[key] = append([]string(nil), values...)
		}
	}
	if atHome && ep.foreign == nil {
		if err := r.auth.Authorize(ctx, req, r.scope); err != nil {
			return nil, &loginError{err}
		}
	}
	if q.accept != "" {
		req.Header.Set("Accept", q.accept)
	}
	// Another encoding would make offsets and sizes mean something else.
	req.Header.Set("Accept-Encoding", "identity")
	if q.offset > 0 || q.part {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", q.offset, q.end-1))
	}
	return req, nil
}

// loginError is a failure to obtain what the endpoint wants to see.
type loginError struct{ error }

func (e *loginError) Unwrap() error { return e.error }

// roundTrip sends one request under a watchdog: the connection must stand within dial, and afterwards no Stall may
// pass without a sign of life.
func (r *Repository) roundTrip(req *http.Request, pool *http.Transport, dial, stall time.Duration) (*answer, error) {
	parent := req.Context()
	ctx, cancel := context.WithCancelCause(parent)
	dog := &watchdog{cancel: cancel}
	dog.timer = time.AfterFunc(dial, func() { dog.bite(dial) })
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) {
		dog.connected.Store(true)
		dog.timer.Reset(stall)
	}})
	start := time.Now()
	resp, err := pool.RoundTrip(req.WithContext(ctx))
	dog.timer.Stop()
	status := 0
	if err != nil {
		err = dog.explain(parent, ctx, withoutURL(err), stall)
		cancel(nil)
	} else {
		status = resp.StatusCode
	}
	took := time.Since(start)
	r.tell(func(h Hooks) {
		if h.Request != nil {
			h.Request(req.URL.Host, req.Method, req.URL.Path, status, took, err)
		}
	})
	if err != nil {
		return nil, err
	}
	body := &watchedBody{from: resp.Body, dog: dog, stall: stall, least: r.client.opts.LeastRate, window: r.client.opts.RateWindow, parent: parent, ctx: ctx}
	return &answer{Response: resp, served: req.URL.Host, body: body}, nil
}

// watchdog ends a request that shows no sign of life.
type watchdog struct {
	cancel    context.CancelCauseFunc
	timer     *time.Timer
	connected atomic.Bool
}

func (d *watchdog) bite(dial time.Duration) {
	if d.connected.Load() {
		d.cancel(errStalled)
	} else {
		d.cancel(dialTimeout(dial))
	}
}

// explain yields why a request really ended: the caller's wish, the dog, or else what the transport says.
func (d *watchdog) explain(parent, ctx context.Context, err error, stall time.Duration) error {
	switch cause := context.Cause(ctx); {
	case parent.Err() != nil:
		return context.Cause(parent)
	case errors.Is(cause, errStalled):
		return fmt.Errorf("%w for %s", errStalled, stall)
	case errors.Is(cause, errUnreachable):
		return cause
	case !d.connected.Load():
		return fmt.Errorf("%w: %w", errUnreachable, err)
	}
	return err
}

// watchedBody reads a response body. The watchdog is awake only while a Read waits: a consumer may take its time. So
// is the measure of its speed: a sender that sends a byte now and then is alive, and would hold the reader for ever.
type watchedBody struct {
	from   io.ReadCloser
	dog    *watchdog
	stall  time.Duration
	least  int64         // bytes a second, on average over
	window time.Duration // time spent in Read
	parent context.Context
	ctx    context.Context

	waited time.Duration // of the window
	came   int64         // bytes in it
}

func (b *watchedBody) Read(p []byte) (int, error) {
	begun := time.Now()
	b.dog.timer.Reset(b.stall)
	n, err := b.from.Read(p)
	b.dog.timer.Stop()
	b.waited += time.Since(begun)
	b.came += int64(n)
	if err != nil && err != io.EOF {
		err = b.dog.explain(b.parent, b.ctx, err, b.stall)
	}
	if b.waited >= b.window {
		if err == nil && float64(b.came) < float64(b.least)*b.waited.Seconds() {
			err = &trickle{b.came, b.waited, b.least}
		}
		b.waited, b.came = 0, 0
	}
	return n, err
}

// discard ends an exchange whose body nobody wants. A short one is read up, so that the connection lives on.
func (a *answer) discard() {
	if a.Request.Method != http.MethodHead && a.ContentLength >= 0 && a.ContentLength <= maxDrain {
		a.body.stall = min(a.body.stall, time.Second)
		io.Copy(io.Discard, io.LimitReader(a.body, maxDrain))
	}
	a.Close()
}

// Close ends the exchange.
func (a *answer) Close() error {
	err := a.body.from.Close()
	a.body.dog.timer.Stop()
	a.body.dog.cancel(nil)
	return err
}

// redirectTarget yields where a says to go instead, or nil.
func redirectTarget(a *answer) (*url.URL, error) {
	switch a.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil, nil
	}
	u, err := a.Location()
	if err != nil {
		return nil, fmt.Errorf("redirects nowhere: %w", errdefs.ErrUnknown)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("redirects to a %q URL: %w", u.Scheme, errdefs.ErrInvalidArgument)
	}
	u.User = nil
	return u, nil
}

// warnings passes on what the registry has to say to people (the distribution specification's Warning header).
func (r *Repository) warnings(a *answer) {
	const most = 8
	for i, w := range a.Header.Values("Warning") {
		if rest, ok := strings.CutPrefix(w, `299 - "`); ok && i < most {
			text := printable(strings.ReplaceAll(strings.TrimSuffix(rest, `"`), `\"`, `"`))
			r.tell(func(h Hooks) {
				if h.Warning != nil {
					h.Warning(a.served, text)
				}
			})
		}
	}
}

// withoutURL drops the URL that net/http quotes in errors: after a redirect its query may hold a signature.
func withoutURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}
