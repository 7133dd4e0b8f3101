// Package auth obtains and refreshes registry credentials.
//
// A registry names what it wants in a challenge (RFC 9110, section 11; the Bearer scheme as in distribution's token
// specification). An Authorizer answers challenges: it trades a Credential for tokens, keeps them until they expire,
// and puts them on requests. Credentials come from whoever knows them: the request, docker's config.json, a helper program.
package auth

import (
	"context"
	"log/slog"
	"strings"
)

// Credential is what one registry host accepts as proof of identity. The zero value is anonymous.
type Credential struct {
	Username      string
	Password      string
	IdentityToken string // an OAuth refresh token; used instead of Password
	RegistryToken string // a bearer token that goes to the registry as it is
}

// Credentials finds the credential for a registry host (name with optional port). It returns the zero value, and no
// error, for a host it knows nothing of.
type Credentials interface {
	Credential(ctx context.Context, host string) (Credential, error)
}

// IsAnonymous reports whether c proves nothing.
func (c Credential) IsAnonymous() bool { return c == Credential{} }

// String names the user and never the secret, so that no log or error can.
func (c Credential) String() string {
	switch {
	case c.IsAnonymous():
		return "anonymous"
	case c.Username != "":
		return "user " + c.Username
	default:
		return "a token"
	}
}

// GoString is String, for %#v.
func (c Credential) GoString() string { return c.String() }

// LogValue is String, for log/slog.
func (c Credential) LogValue() slog.Value { return slog.StringValue(c.String()) }

// For yields cred for the registry host and nothing for any other.
func For(host string, cred Credential) Credentials {
	return single{canonical(host), cred}
}

type single struct {
	host string
	cred Credential
}

func (s single) Credential(_ context.Context, host string) (Credential, error) {
	if canonical(host) != s.host {
		return Credential{}, nil
	}
	return s.cred, nil
}

// Chain asks each of its members in turn; the first that knows something answers.
type Chain []Credentials

// Credential implements Credentials.
func (c Chain) Credential(ctx context.Context, host string) (Credential, error) {
	for _, member := range c {
		if member == nil {
			continue
		}
		cred, err := member.Credential(ctx, host)
		if err != nil || !cred.IsAnonymous() {
			return cred, err
		}
	}
	return Credential{}, nil
}

// hub is docker's own registry, which goes by several names.
const hub = "docker.io"

// canonical yields the one name under which the credentials of a registry are known, from a host or a URL.
func canonical(server string) string {
	if _, rest, ok := strings.Cut(server, "://"); ok {
		server = rest
	}
	host, _, _ := strings.Cut(server, "/")
	host = strings.TrimSuffix(strings.ToLower(host), ":443")
	switch host {
	case "index.docker.io", "registry-1.docker.io", "registry.docker.io":
		return hub
	}
	return host
}
