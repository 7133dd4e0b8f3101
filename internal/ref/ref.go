// Package ref parses and normalises image references.
//
// A reference names a registry, a repository in it and an object in that:
//
//	docker.io/library/alpine:3.20.1@sha256:b89d...
//	host      path           tag    digest
//
// There are two ways of reading one, and both must be kept. Parse takes it at
// its word, as containerd's resolver and ctr do. Normalize completes what
// people type to docker, nerdctl and Kubernetes.
package ref

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Bounds on the parts of a reference, in bytes (inv 10). Those on the
// repository and the tag are the distribution specification's.
const (
	MaxLength = 1024 // of the whole
	maxHost   = 255
	maxPath   = 255
	maxTag    = 128
)

// Reference is a parsed image reference. Host and Path are never empty in what
// Parse and Normalize return; Tag and Digest may be, both at once only from
// Parse.
type Reference struct {
	Host   string // name or address, with the port if one is given
	Path   string // the repository
	Tag    string
	Digest digest.Digest
}

// Parse reads a complete reference and adds nothing: host and path, then a tag
// and a digest if there are any. ErrInvalidArgument says what is missing.
func Parse(s string) (Reference, error) {
	r, err := split(s)
	if err != nil {
		return Reference{}, invalid(s, err)
	}
	return r, nil
}

func invalid(s string, err error) error {
	const most = 200 // bytes of the reference that an error repeats
	if len(s) > most {
		s = s[:most] + "..."
	}
	return fmt.Errorf("image reference %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
}

func split(s string) (r Reference, err error) {
	switch {
	case s == "":
		return r, fmt.Errorf("it is empty; write one like docker.io/library/alpine:latest")
	case len(s) > MaxLength:
		return r, fmt.Errorf("it is longer than %d bytes", MaxLength)
	case strings.Contains(s, "://"):
		return r, fmt.Errorf("leave out the scheme before ://")
	}
	host, rest, ok := strings.Cut(s, "/")
	if !ok {
		return r, fmt.Errorf("it names no registry; write it in full, as in docker.io/library/%s", s)
	}
	if err := checkHost(host); err != nil {
		return r, err
	}
	r.Host = host
	if i := strings.IndexAny(rest, ":@"); i < 0 {
		r.Path = rest
	} else if r.Path = rest[:i]; rest[i] == '@' {
		r.Digest = digest.Digest(rest[i+1:])
		err = checkDigest(r.Digest)
	} else {
		tag, dgst, hasDigest := strings.Cut(rest[i+1:], "@")
		if err = checkTag(tag); err == nil && hasDigest {
			err = checkDigest(digest.Digest(dgst))
		}
		r.Tag, r.Digest = tag, digest.Digest(dgst)
	}
	if err == nil {
		err = checkPath(r.Path)
	}
	return r, err
}

// checkHost allows what can stand between "//" and "/" in a URL without
// credentials: names, IPv4 addresses, IPv6 addresses in brackets, and a port.
func checkHost(host string) error {
	name, port, hasPort := host, "", false
	if i := strings.LastIndexByte(host, ':'); i > strings.LastIndexByte(host, ']') {
		name, port, hasPort = host[:i], host[i+1:], true
	}
	switch {
	case name == "":
		return fmt.Errorf("it names no registry before the first /")
	case len(host) > maxHost:
		return fmt.Errorf("the registry's name is longer than %d bytes", maxHost)
	}
	if hasPort {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("the registry's port %q is no number from 1 to 65535", port)
		}
	}
	allowed := func(c byte) bool { return isAlphanumeric(c) || c == '.' || c == '-' || c == '_' }
	if len(name) > 2 && name[0] == '[' && name[len(name)-1] == ']' {
		name = name[1 : len(name)-1]
		allowed = func(c byte) bool { return isHex(c) || c == ':' || c == '.' }
	}
	for i := range len(name) {
		if !allowed(name[i]) {
			return fmt.Errorf("%q can't stand in the name of a registry", name[i])
		}
	}
	return nil
}

// checkPath allows more than the distribution specification, which wants lower
// case; the registry has the last word on that. It allows nothing that could
// mean another place in the registry's URLs.
func checkPath(path string) error {
	if path == "" {
		return fmt.Errorf("it names no repository after the registry")
	}
	if len(path) > maxPath {
		return fmt.Errorf("the repository's name is longer than %d bytes", maxPath)
	}
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." || part == ".." {
			return fmt.Errorf("%q can't stand between slashes in the repository's name", part)
		}
		for i := range len(part) {
			if c := part[i]; !isAlphanumeric(c) && c != '.' && c != '_' && c != '-' {
				return fmt.Errorf("%q can't stand in the repository's name", c)
			}
		}
	}
	return nil
}

func checkTag(tag string) error {
	if tag == "" || len(tag) > maxTag {
		return fmt.Errorf("a tag has 1 to %d characters, not %d", maxTag, len(tag))
	}
	for i := range len(tag) {
		if c := tag[i]; !isAlphanumeric(c) && c != '_' && (i == 0 || c != '.' && c != '-') {
			return fmt.Errorf("%q can't stand at byte %d of the tag", c, i+1)
		}
	}
	return nil
}

// digits is the length of a digest after the colon, in hexadecimal digits.
var digits = map[string]int{"sha256": 64, "sha384": 96, "sha512": 128}

func checkDigest(dgst digest.Digest) error {
	alg, sum, _ := strings.Cut(string(dgst), ":")
	whole := len(sum) > 0 && len(sum) == digits[alg]
	for i := range len(sum) {
		whole = whole && isHex(sum[i]) && (sum[i] < 'A' || sum[i] > 'F')
	}
	if !whole {
		return fmt.Errorf("after @ comes a whole digest: sha256: and 64 digits from 0 to f, or sha384 or sha512")
	}
	return nil
}

func isAlphanumeric(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

// Normalize reads a reference as docker, nerdctl and Kubernetes do: `alpine`
// is docker.io/library/alpine:latest, and a tag beside a digest is dropped,
// as the digest says it all. ErrInvalidArgument says what is wrong.
func Normalize(s string) (Reference, error) {
	if len(s) > MaxLength {
		return Reference{}, invalid(s, fmt.Errorf("it is longer than %d bytes", MaxLength))
	}
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return Reference{}, invalid(s, err)
	}
	return Parse(named.String())
}

// String is the reference in full, as it is parsed and as images are named.
func (r Reference) String() string {
	s := r.Locator()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}

// Locator is the host and the path: where the image's parts are.
func (r Reference) Locator() string { return r.Host + "/" + r.Path }

// Object is what to ask the repository for: the tag, the digest, or
// tag@digest; "" if the reference names none and thus can't be resolved.
func (r Reference) Object() string {
	switch {
	case r.Digest == "":
		return r.Tag
	case r.Tag == "":
		return r.Digest.String()
	}
	return r.Tag + "@" + r.Digest.String()
}
