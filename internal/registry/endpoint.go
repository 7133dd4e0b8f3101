package registry

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
)

// endpoint is one host of a session, ready to be asked.
type endpoint struct {
	hosts.Host
	namespace string        // the registry that this host stands in for; sent as ?ns= and empty if it is the registry
	mirror    bool          // something else can be asked instead
	dial      time.Duration // longest wait for a connection
	header    http.Header   // of the host and of the client; sent to this host alone
	transport *transport
	broken    error    // why there is no transport
	foreign   *url.URL // of a blob outside the registry: this is all that the endpoint answers for
}

// transport is a pool of connections with one set of TLS settings.
type transport struct {
	home *http.Transport // to the host that the settings are for
	away *http.Transport // to where it redirects: the same without client certificates
}

func (t *transport) closeIdle() {
	t.home.CloseIdleConnections()
	t.away.CloseIdleConnections()
}

func (c *Client) endpoint(h hosts.Host, registry string, mirror bool) *endpoint {
	ep := &endpoint{Host: h, mirror: mirror, dial: h.DialTimeout, header: http.Header{}}
	if h.IsMirror(registry) {
		ep.namespace = registry
	}
	if ep.dial == 0 {
		ep.dial = c.opts.Dial
		if mirror {
			ep.dial = min(c.opts.Dial, c.opts.MirrorDial)
		}
	}
	for _, from := range []http.Header{h.Header, c.opts.Header} {
		for key, values := range from {
			ep.header[key] = append(ep.header[key], values...)
		}
	}
	ep.transport, ep.broken = c.transport(h)
	return ep
}

// url yields where the endpoint answers for p, which lies below the registry's API root.
func (ep *endpoint) url(p string, plain bool) *url.URL {
	if ep.foreign != nil {
		u := *ep.foreign
		return &u
	}
	u := &url.URL{Scheme: ep.Scheme, Host: ep.Host.Host, Path: strings.TrimSuffix(ep.Path, "/") + "/" + p}
	if ep.TriesTLSFirst() && !plain {
		u.Scheme = "https"
	}
	if ep.namespace != "" {
		u.RawQuery = url.Values{"ns": {ep.namespace}}.Encode()
	}
	return u
}

// transport finds or makes the connection pool for h's TLS settings. Changed certificate files make a new one.
func (c *Client) transport(h hosts.Host) (*transport, error) {
	key := fingerprint(h)
	c.mu.Lock()
	t := c.transports[key]
	c.mu.Unlock()
	if t != nil {
		return t, nil
	}
	config, err := h.TLSConfig()
	if err != nil {
		return nil, err
	}
	t = &transport{home: c.newTransport(config)}
	t.away = t.home
	if len(config.Certificates) > 0 {
		bare := config.Clone()
		bare.Certificates = nil
		t.away = c.newTransport(bare)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if other := c.transports[key]; other != nil {
		return other, nil
	}
	if len(c.transports) >= maxTransports {
		for _, old := range c.transports {
			old.closeIdle()
		}
		clear(c.transports)
	}
	c.transports[key] = t
	return t, nil
}

// fingerprint differs for settings that lead to different TLS configurations.
func fingerprint(h hosts.Host) string {
	var b strings.Builder
	fmt.Fprintf(&b, "verify %v", h.SkipVerify == nil || !*h.SkipVerify)
	stamp := func(kind, file string) {
		var when, size int64
		if fi, err := os.Stat(file); err == nil {
			when, size = fi.ModTime().UnixNano(), fi.Size()
		}
		fmt.Fprintf(&b, "|%s %q %d %d", kind, file, when, size)
	}
	for _, file := range h.CA {
		stamp("ca", file)
	}
	for _, pair := range h.Client {
		stamp("cert", pair.Cert)
		stamp("key", pair.Key)
	}
	return b.String()
}

func (c *Client) newTransport(config *tls.Config) *http.Transport {
	return &http.Transport{
		Proxy: c.opts.Proxy,
		// The wait for a connection as a whole, name look-up and handshake included, is bounded in exchange.
		// This bounds what goes on in the background after that.
		DialContext:            (&net.Dialer{Timeout: 2 * time.Minute, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    time.Minute,
		TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{}, // HTTP/1.1: layers side by side want connections side by side
		DisableCompression:     true,
		MaxIdleConns:           128,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 256 << 10,
	}
}

// isPlainHTTP reports whether err, of a try to reach ep by TLS, means that HTTP is worth trying: the server answered the
// handshake without TLS, or nobody answers at HTTPS's own port while ep names none. A bad certificate does not.
func (ep *endpoint) isPlainHTTP(err error) bool {
	if isSchemeMismatch(err) {
		return true
	}
	if _, port, _ := net.SplitHostPort(ep.Host.Host); port != "" {
		return false
	}
	_, silent := errors.AsType[dialTimeout](err)
	return errors.Is(err, syscall.ECONNREFUSED) || silent && !ep.mirror // a mirror has had its second
}

// isSchemeMismatch reports whether err is plain HTTP where TLS was expected.
func isSchemeMismatch(err error) bool {
	record, ok := errors.AsType[tls.RecordHeaderError](err)
	return ok && string(record.RecordHeader[:]) == "HTTP/"
}

func (c *Client) isPlain(host string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.plain[host]
}

func (c *Client) setPlain(host string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.plain) >= maxRemembered {
		clear(c.plain)
	}
	c.plain[host] = true
}

// markDown has ep passed over: by this session for good, by others for a while.
func (r *Repository) markDown(ep *endpoint, err error) {
	r.mu.Lock()
	_, known := r.down[ep.key()]
	r.down[ep.key()] = err
	r.mu.Unlock()
	c := r.client
	c.mu.Lock()
	if len(c.down) >= maxRemembered {
		clear(c.down)
	}
	c.down[ep.key()] = time.Now().Add(downFor)
	c.mu.Unlock()
	if known {
		return
	}
	r.tell(func(h Hooks) {
		if h.MirrorDown != nil {
			h.MirrorDown(ep.Host.Host, err)
		}
	})
}

// isDown reports whether ep is to be passed over while there is another. What a new session inherits from others it
// keeps, so that the endpoint does not cost it a dial halfway through.
func (r *Repository) isDown(ep *endpoint) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.down[ep.key()]; ok {
		return true
	}
	c := r.client
	c.mu.Lock()
	defer c.mu.Unlock()
	until, ok := c.down[ep.key()]
	if ok && time.Now().After(until) {
		delete(c.down, ep.key())
		ok = false
	}
	if ok {
		r.down[ep.key()] = errRemembered
	}
	return ok
}

func (r *Repository) isDistrusted(host string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.distrusted[host]
}

// key names ep in what is remembered. A manifest may name any URL, so those are kept apart from the registry's hosts.
func (ep *endpoint) key() string {
	if ep.foreign != nil {
		return "foreign " + ep.Host.Host
	}
	return ep.Scheme + "://" + ep.Host.Host
}

var errRemembered = errors.New("did not answer a moment ago")
