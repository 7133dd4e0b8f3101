package hosts

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// A hosts.toml, all keys optional (containerd's docs/hosts.md):
//
//	server = "https://registry.example"      # the registry itself; any key of [host] may stand beside it
//	[host."https://mirror.example/prefix"]   # tried before, in the order of the file
//	  capabilities = ["pull", "resolve"]     # also "push", "referrers"; default: all
//	  ca = "ca.pem"                          # or a list; relative to the folder of the file
//	  client = [["a.cert", "a.key"]]         # or one file, or a list of files, that hold both
//	  skip_verify = true
//	  override_path = true                   # the URL's path stands for itself: "/v2" is not appended
//	  dial_timeout = "1s"
//	  [host."https://mirror.example/prefix".header]
//	    x-custom = ["a", "b"]                # or one string; the key is sent as written
type document struct {
	section
	Server string             `toml:"server"`
	Hosts  map[string]section `toml:"host"`
}

type section struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// parse reads the hosts.toml data that lies in dir. The error unknown names keys that nobody will honour; what is
// found is good nevertheless. The last entry has no Host if the file names no server.
func parse(dir string, data []byte) (found []Host, unknown, err error) {
	var doc document
	err = toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&doc)
	if missing, ok := errors.AsType[*toml.StrictMissingError](err); ok {
		unknown = unknownKeys(missing)
	} else if err != nil {
		return nil, nil, err
	}
	order, err := hostOrder(data)
	if err != nil {
		return nil, nil, err
	}
	origin := filepath.Join(dir, "hosts.toml")
	for _, server := range order {
		h, err := doc.Hosts[server].host(dir)
		if err == nil {
			err = h.locate(server, doc.Hosts[server].OverridePath)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("host %q: %w", server, err)
		}
		h.Origin = origin
		found = append(found, h)
	}
	last, err := doc.host(dir)
	if err == nil && doc.Server != "" {
		err = last.locate(doc.Server, doc.OverridePath)
	}
	if err != nil {
		return nil, nil, err
	}
	last.Origin = origin
	return append(found, last), unknown, nil
}

func unknownKeys(missing *toml.StrictMissingError) error {
	keys := make([]string, 0, len(missing.Errors))
	for _, e := range missing.Errors {
		row, _ := e.Position()
		keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(e.Key(), "."), row))
	}
	return fmt.Errorf("keys not known and ignored: %s", strings.Join(keys, ", "))
}

// hostOrder lists the keys below "host" in the order in which the document first mentions them. Decoding into a map
// loses that order, and a mirror list is nothing without it.
func hostOrder(data []byte) ([]string, error) {
	var (
		p      unstable.Parser
		order  []string
		seen   = map[string]bool{}
		within []string
	)
	note := func(key []string) {
		if len(key) >= 2 && key[0] == "host" && !seen[key[1]] {
			seen[key[1]] = true
			order = append(order, key[1])
		}
	}
	p.Reset(data)
	for p.NextExpression() {
		e := p.Expression()
		key := keyParts(e.Key())
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			within = key
			note(key)
		case unstable.KeyValue:
			full := append(within[:len(within):len(within)], key...)
			note(full)
			if len(full) == 1 && e.Value().Kind == unstable.InlineTable {
				for it := e.Value().Children(); it.Next(); {
					note(append(full[:1:1], keyParts(it.Node().Key())...))
				}
			}
		}
	}
	return order, p.Error()
}

func keyParts(it unstable.Iterator) (parts []string) {
	for it.Next() {
		parts = append(parts, string(it.Node().Data))
	}
	return parts
}

// locate fills in where h is. A server without a scheme is reached by https.
func (h *Host) locate(server string, overridePath bool) error {
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	switch {
	case err != nil:
		return err
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("scheme %q is neither http nor https", u.Scheme)
	case u.Host == "":
		return errors.New("no host name in the URL")
	case u.User != nil:
		return errors.New("a user in the URL: keep credentials in docker's config.json, or send them by a header")
	case u.RawQuery != "" || u.Fragment != "":
		return errors.New("a query or fragment in the URL")
	}
	h.Scheme, h.Host, h.Path = u.Scheme, u.Host, u.Path
	if h.Path != "" {
		h.Path = path.Clean(h.Path)
	}
	if !overridePath && !strings.HasSuffix(h.Path, "/v2") {
		h.Path = path.Join("/", h.Path, "v2")
	}
	return nil
}

// host turns what the file says into a Host without a place.
func (s section) host(dir string) (h Host, err error) {
	h.SkipVerify = s.SkipVerify
	if h.Capabilities, err = capabilities(s.Capabilities); err != nil {
		return h, err
	}
	if s.CA != nil {
		if h.CA, err = stringList("ca", s.CA); err != nil {
			return h, err
		}
		for i := range h.CA {
			h.CA[i] = absolute(dir, h.CA[i])
		}
	}
	if h.Client, err = keyPairs(dir, s.Client); err != nil {
		return h, err
	}
	for key, value := range s.Header {
		list, err := stringList("header "+key, value)
		if err != nil {
			return h, err
		}
		if err := checkHeader(key, list); err != nil {
			return h, err
		}
		if h.Header == nil {
			h.Header = http.Header{}
		}
		h.Header[key] = list
	}
	if s.DialTimeout != "" {
		if h.DialTimeout, err = time.ParseDuration(s.DialTimeout); err != nil {
			return h, fmt.Errorf("dial_timeout: %w", err)
		}
		if h.DialTimeout < 0 {
			return h, fmt.Errorf("dial_timeout: %s is negative", s.DialTimeout)
		}
	}
	return h, nil
}

func capabilities(names []string) (c Capability, err error) {
	if len(names) == 0 {
		return Everything, nil
	}
next:
	for _, name := range names {
		for _, n := range capabilityNames {
			if strings.EqualFold(n.name, name) {
				c |= n.bit
				continue next
			}
		}
		return 0, fmt.Errorf("unknown capability %q", name)
	}
	return c, nil
}

func stringList(key string, value any) ([]string, error) {
	switch v := value.(type) {
	case string:
		return []string{v}, nil
	case []any:
		list := make([]string, len(v))
		for i := range v {
			s, ok := v[i].(string)
			if !ok {
				return nil, fmt.Errorf("%s: %v is not a string", key, v[i])
			}
			list[i] = s
		}
		return list, nil
	}
	return nil, fmt.Errorf("%s: %v is neither a string nor a list of strings", key, value)
}

func keyPairs(dir string, value any) (pairs []KeyPair, err error) {
	list, ok := value.([]any)
	switch {
	case value == nil:
		return nil, nil
	case !ok:
		list = []any{value}
	}
	for _, entry := range list {
		files, err := stringList("client", entry)
		if err != nil {
			return nil, err
		}
		_, single := entry.(string)
		switch {
		case single:
			pairs = append(pairs, KeyPair{Cert: absolute(dir, files[0])})
		case len(files) == 2:
			pairs = append(pairs, KeyPair{Cert: absolute(dir, files[0]), Key: absolute(dir, files[1])})
		default:
			return nil, fmt.Errorf("client: %v is not a pair of certificate and key", entry)
		}
	}
	return pairs, nil
}

// checkHeader refuses what would break the request apart on the wire.
func checkHeader(key string, values []string) error {
	if key == "" || strings.ContainsFunc(key, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`()<>@,;:\"/[]?={}`, r)
	}) {
		return fmt.Errorf("header %q: not a header name", key)
	}
	for _, v := range values {
		if strings.ContainsAny(v, "\r\n\x00") {
			return fmt.Errorf("header %s: a line break in the value", key)
		}
	}
	return nil
}

func absolute(dir, file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(dir, file)
}
