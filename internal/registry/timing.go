package registry

import (
	"crypto/tls"
	"net/http/httptrace"
	"sync"
	"time"
)

// Exchange says what one HTTP request and the wait for the head of its answer were made of. The parts follow one
// another, in the order of the fields; a part that there was no need for is 0. An Exchange with a Login alone is the
// search for credentials after a refusal.
type Exchange struct {
	Host   string // that was asked, after redirects
	Object string // the tag or digest that the request is for
	Start  time.Time

	Login   time.Duration // to obtain a token, or wait for somebody who did
	DNS     time.Duration
	Connect time.Duration // TCP
	TLS     time.Duration
	Wait    time.Duration // from a connection to the head of the answer

	Status int   // 0 if there was no answer
	Err    error // why there was none
}

// End is when the last part was over.
func (e Exchange) End() time.Time {
	return e.Start.Add(e.Login + e.DNS + e.Connect + e.TLS + e.Wait)
}

// tell calls f with the Client's hooks and with the session's.
func (r *Repository) tell(f func(Hooks)) {
	f(r.client.opts.Hooks)
	f(r.session.Hooks)
}

// timed reports whether somebody wants to hear of exchanges.
func (r *Repository) timed() bool {
	return r.client.opts.Hooks.Exchange != nil || r.session.Hooks.Exchange != nil
}

func (r *Repository) exchanged(e Exchange) {
	r.tell(func(h Hooks) {
		if h.Exchange != nil {
			h.Exchange(e)
		}
	})
}

// stopwatch times one exchange. A dial may go on in the background after the request has got another's connection, and
// two may race, so it locks, counts from the first begin to the last end, and ends with the connection.
type stopwatch struct {
	mu                      sync.Mutex
	dns, connect, tls, wait lap
}

// lap is a part under way or over.
type lap struct{ from, to time.Time }

func (l lap) took() time.Duration {
	if l.from.IsZero() || l.to.IsZero() {
		return 0
	}
	return l.to.Sub(l.from)
}

func (w *stopwatch) begin(l *lap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l.from.IsZero() && w.wait.from.IsZero() {
		l.from = time.Now()
	}
}

func (w *stopwatch) end(l *lap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.wait.from.IsZero() {
		l.to = time.Now()
	}
}

func (w *stopwatch) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		DNSStart:          func(httptrace.DNSStartInfo) { w.begin(&w.dns) },
		DNSDone:           func(httptrace.DNSDoneInfo) { w.end(&w.dns) },
		ConnectStart:      func(_, _ string) { w.begin(&w.connect) },
		ConnectDone:       func(_, _ string, _ error) { w.end(&w.connect) },
		TLSHandshakeStart: func() { w.begin(&w.tls) },
		TLSHandshakeDone:  func(tls.ConnectionState, error) { w.end(&w.tls) },
		GotConn: func(info httptrace.GotConnInfo) {
			w.begin(&w.wait)
			if info.Reused {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.dns, w.connect, w.tls = lap{}, lap{}, lap{}
			}
		},
	}
}

// stop fills in the parts. A part that never ended has lasted until now.
func (w *stopwatch) stop(e *Exchange) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.wait.to = now
	for _, l := range []*lap{&w.dns, &w.connect, &w.tls} {
		if l.to.IsZero() {
			l.to = now
		}
	}
	e.DNS, e.Connect, e.TLS, e.Wait = w.dns.took(), w.connect.took(), w.tls.took(), w.wait.took()
}
