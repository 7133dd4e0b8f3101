package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/registry/auth"
)

// Limits of the patience with one endpoint.
const (
	maxAttempts    = 5                // exchanges for one ask
	maxDisconnects = 3                // of them that may end without a response
	maxStalls      = 2                // of these that may have stalled
	maxWait        = 30 * time.Second // longest wait before a repetition at the last endpoint, whatever Retry-After says
	maxMirrorWait  = 2 * time.Second  // the same where another endpoint can be asked instead
)

// ask has q answered by ep: it logs in where that is wanted, waits out rate limits, and repeats what may pass. The
// answer may still be a refusal: any status but 401 comes back. With more set, another endpoint comes after ep, and
// failures of ep itself are left to it.
func (r *Repository) ask(ctx context.Context, ep *endpoint, q query, more bool) (*answer, error) {
	tally := attempts{more: more}
	for n := 1; ; n++ {
		a, err := r.exchange(ctx, ep, q)
		if ctx.Err() != nil {
			if err == nil {
				a.Close()
			}
			return nil, context.Cause(ctx)
		}
		if err == nil && a.StatusCode == http.StatusUnauthorized {
			if err := r.login(ctx, ep, q, a, &tally); err != nil {
				return nil, err
			}
			if n < maxAttempts {
				continue
			}
			return nil, &loginError{fmt.Errorf("asks for a login again and again: %w", errdefs.ErrUnauthenticated)}
		}
		if err != nil && ep.mirror && (errors.Is(err, errUnreachable) || errors.Is(err, errStalled)) {
			r.markDown(ep, err)
		}
		wait, again := tally.judge(r.client.opts.Backoff<<(n-1), a, err)
		if !again || n == maxAttempts {
			return a, err
		}
		r.tell(func(h Hooks) {
			if h.Retry != nil {
				h.Retry(ep.Host.Host, "/"+q.path, n, wait, cause(a, err))
			}
		})
		if err == nil {
			a.discard()
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// login answers a 401.
func (r *Repository) login(ctx context.Context, ep *endpoint, q query, a *answer, tally *attempts) error {
	defer a.discard()
	if ep.foreign != nil || !strings.EqualFold(a.served, ep.Host.Host) {
		return &loginError{fmt.Errorf("%s wants a login and is not the registry: %w", a.served, errdefs.ErrUnauthenticated)}
	}
	start := time.Now()
	err := r.auth.Refused(ctx, auth.Refusal{
		Response:  a.Response,
		Scope:     r.scope,
		Again:     tally.refused,
		Transport: ep.transport.home,
		UserAgent: r.client.opts.UserAgent,
		Header:    ep.header,
	})
	r.exchanged(Exchange{Host: ep.Host.Host, Object: q.object, Start: start, Login: time.Since(start), Err: err})
	if err != nil {
		return &loginError{err}
	}
	tally.refused = a.Request.Header.Get("Authorization") != ""
	return nil
}

// attempts counts what one ask has seen.
type attempts struct {
	more        bool
	refused     bool // with a login of ours on it
	disconnects int
	stalls      int
}

// judge decides whether an exchange that came out as a or err is worth repeating, and after how long.
func (t *attempts) judge(backoff time.Duration, a *answer, err error) (wait time.Duration, again bool) {
	backoff += time.Duration(rand.Int64N(int64(backoff)/2 + 1)) // so that many pulls don't come back together
	limit := maxWait
	if t.more {
		limit = maxMirrorWait
	}
	if err != nil {
		return min(backoff, limit), !t.more && t.mayPass(err)
	}
	switch a.StatusCode {
	case http.StatusTooManyRequests, http.StatusRequestTimeout:
	case http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		if t.more {
			return 0, false
		}
	default:
		return 0, false
	}
	wait = max(retryAfter(a.Header, time.Now()), backoff)
	return wait, wait <= limit
}

// mayPass reports whether a failure without a response may be gone the next time.
func (t *attempts) mayPass(err error) bool {
	if _, ok := errors.AsType[*loginError](err); ok && (!errdefs.IsUnavailable(err) || errors.Is(err, context.DeadlineExceeded)) {
		return false
	}
	if errors.Is(err, errUnreachable) {
		return false
	}
	if errors.Is(err, errStalled) {
		if t.stalls++; t.stalls >= maxStalls {
			return false
		}
	}
	t.disconnects++
	return t.disconnects < maxDisconnects
}

// cause yields what a hook is told of a failed attempt.
func cause(a *answer, err error) error {
	if err != nil {
		return err
	}
	return fmt.Errorf("status %d %s", a.StatusCode, http.StatusText(a.StatusCode))
}

// retryAfter reads the Retry-After header: seconds, or a date. 0 if there is none.
func retryAfter(h http.Header, now time.Time) time.Duration {
	const longest = 24 * time.Hour
	value := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return min(time.Duration(seconds)*time.Second, longest)
	}
	if when, err := http.ParseTime(value); err == nil {
		return min(max(when.Sub(now), 0), longest)
	}
	return 0
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
