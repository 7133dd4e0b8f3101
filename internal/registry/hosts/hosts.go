// Package hosts reads the per-registry mirror, TLS and header settings.
package hosts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Capability says what a host may be asked for. Values combine by |.
type Capability uint8

// The capabilities that hosts.toml knows by the same names in lower case.
const (
	Pull      Capability = 1 << iota // blobs, and manifests by digest
	Resolve                          // manifests by tag
	Push                             // uploads
	Referrers                        // the referrers of a digest

	// Everything is what a host may do when nothing restricts it.
	Everything = Pull | Resolve | Push | Referrers
)

// Has reports whether c includes all of want.
func (c Capability) Has(want Capability) bool { return c&want == want }

// String joins the names of c's capabilities by commas.
func (c Capability) String() string {
	var names []string
	for _, n := range capabilityNames {
		if c.Has(n.bit) {
			names = append(names, n.name)
		}
	}
	return strings.Join(names, ",")
}

var capabilityNames = []struct {
	name string
	bit  Capability
}{{"pull", Pull}, {"resolve", Resolve}, {"push", Push}, {"referrers", Referrers}}

// KeyPair names the PEM files of one TLS client certificate. Key is empty when Cert holds both.
type KeyPair struct{ Cert, Key string }

// Host is one endpoint that may serve a registry's content.
type Host struct {
	Scheme       string        // "https" or "http"
	Host         string        // name or address, with the port if one is configured
	Path         string        // what precedes "/<name>/manifests/...": "/v2", or as written with override_path
	Capabilities Capability    // what this host may be asked for
	CA           []string      // PEM files of certificate authorities trusted in addition to the system's
	Client       []KeyPair     // client certificates offered to the host
	SkipVerify   *bool         // set: whether the host's certificate goes unverified
	Header       http.Header   // sent with every request; keys stand as they were written
	DialTimeout  time.Duration // longest wait for a connection; 0: the caller's default
	Implied      bool          // the scheme was chosen here and not by a file: a request may ask for plain HTTP instead
	Origin       string        // the file or directory that this entry comes from; empty: the built-in defaults
}

// Dirs looks registries up in directories laid out as /etc/containerd/certs.d or /etc/docker/certs.d.
// The zero value knows no directory and yields the defaults.
type Dirs struct {
	Paths []string                     // searched in order, see Split
	Warn  func(file string, err error) // told of a hosts.toml that can't be used; nil: nobody is
}

// Split cuts a config_path setting at its colons into roots. Empty pieces are dropped.
func Split(configPath string) []string {
	return strings.FieldsFunc(configPath, func(r rune) bool { return r == ':' })
}

// Lookup yields the endpoints for the registry host (name with optional port, as it stands in a reference), in the
// order in which they are to be tried; the registry itself, or what stands for it, is last.
//
// The first existing folder of <root>/<host>_<port>_, <root>/<host[:port]> and <root>/_default, over the roots in
// order, decides alone. It holds a hosts.toml, or certificates in docker's layout. A hosts.toml that can't be used is
// reported to Warn and then counts as missing, as containerd has it.
func (d Dirs) Lookup(ctx context.Context, host string) ([]Host, error) {
	if host == "" || host == "." || host == ".." || strings.ContainsAny(host, "/\\\x00") {
		return nil, fmt.Errorf("look up registry %q: not a host name: %w", host, errdefs.ErrInvalidArgument)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	dir, err := d.find(host)
	if err != nil {
		return nil, fmt.Errorf("look up registry %s: %w", host, err)
	}
	if dir == "" {
		return []Host{upstream(host, Host{})}, nil
	}
	found, err := d.load(dir)
	if err != nil {
		return nil, fmt.Errorf("look up registry %s: %w", host, err)
	}
	if last := &found[len(found)-1]; last.Host == "" {
		*last = upstream(host, *last)
	}
	return found, nil
}

// find yields the folder that speaks for host, or "".
func (d Dirs) find(host string) (string, error) {
	names := []string{host, "_default"}
	if i := strings.LastIndexByte(host, ':'); i > 0 {
		names = append([]string{host[:i] + "_" + host[i+1:] + "_"}, names...)
	}
	for _, root := range d.Paths {
		for _, name := range names {
			dir := filepath.Join(root, name)
			if _, err := os.Stat(dir); err == nil {
				return dir, nil
			} else if !errors.Is(err, fs.ErrNotExist) {
				return "", err
			}
		}
	}
	return "", nil
}

// load reads dir. The last entry has no Host when it stands for the registry itself.
func (d Dirs) load(dir string) ([]Host, error) {
	file := filepath.Join(dir, "hosts.toml")
	data, err := readBounded(file, maxFile)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && len(data) == 0:
		return certificates(dir)
	case errors.Is(err, errTooLarge):
		d.warn(file, err)
		return certificates(dir)
	case err != nil:
		return nil, err
	}
	found, unknown, err := parse(dir, data)
	if err != nil {
		d.warn(file, err)
		return certificates(dir)
	}
	if unknown != nil {
		d.warn(file, unknown)
	}
	return found, nil
}

func (d Dirs) warn(file string, err error) {
	if d.Warn != nil {
		d.Warn(file, err)
	}
}

// certificates reads dir as docker lays it out: *.crt are authorities, <n>.cert with <n>.key are client certificates
// (without the .key, the .cert holds both).
func certificates(dir string) ([]Host, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	h := Host{Origin: dir}
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		path := filepath.Join(dir, e.Name())
		switch filepath.Ext(e.Name()) {
		case ".crt":
			h.CA = append(h.CA, path)
		case ".cert":
			pair := KeyPair{Cert: path, Key: strings.TrimSuffix(path, ".cert") + ".key"}
			if _, err := os.Stat(pair.Key); errors.Is(err, fs.ErrNotExist) {
				pair.Key = ""
			} else if err != nil {
				return nil, err
			}
			h.Client = append(h.Client, pair)
		}
	}
	return []Host{h}, nil
}

// upstream completes h, which carries at most TLS settings, headers and a dial time-out, into the endpoint of the
// registry host itself.
func upstream(host string, h Host) Host {
	h.Scheme, h.Host, h.Path, h.Capabilities, h.Implied = "https", host, "/v2", Everything, true
	switch {
	case host == "docker.io":
		h.Host, h.Implied = "registry-1.docker.io", false
	case IsLocalhost(host):
		_, port, _ := net.SplitHostPort(host)
		if port != "" && port != "443" {
			h.Scheme = "http"
		}
		if port != "80" {
			// Replaces even what the file says: a certificate for a loopback address proves nothing.
			skip := true
			h.SkipVerify = &skip
		}
	}
	return h
}

// IsLocalhost reports whether host (with or without a port) is this machine by name or loopback address.
func IsLocalhost(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	name = strings.TrimSuffix(strings.TrimPrefix(name, "["), "]")
	return name == "localhost" || net.ParseIP(name).IsLoopback()
}

// TriesTLSFirst reports whether h is named as plain HTTP although TLS is set up for it: HTTPS is then tried first, and
// HTTP only if the server answers without TLS.
func (h Host) TriesTLSFirst() bool {
	if h.Scheme != "http" || h.CA == nil && h.Client == nil && h.SkipVerify == nil {
		return false
	}
	_, port, _ := net.SplitHostPort(h.Host)
	return port != "80"
}

// IsMirror reports whether h stands in for the registry host (as it stands in a reference) and isn't it.
func (h Host) IsMirror(host string) bool {
	return h.Host != host && (host != "docker.io" || h.Host != "registry-1.docker.io")
}
