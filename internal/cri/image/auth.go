package image

import (
	"context"
	"encoding/base64"
	"fmt"
	"log/slog"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/registry/auth"
)

// Auth is what the kubelet knows of a registry's credentials. Of several forms the
// first in this order counts: a user's name and password, an identity token,
// `user:password` in base64, a registry token.
type Auth struct {
	Username, Password string
	IdentityToken      string // trusted by the token server
	Auth               string // base64 of `user:password`
	RegistryToken      string // a bearer token for the registry itself

	// Server is the registry that all this is for: a host or a URL. Empty:
	// whichever the image is on.
	Server string
}

// String tells nothing of it.
func (a Auth) String() string { return "credentials for " + a.Server }

// GoString is String, for %#v.
func (a Auth) GoString() string { return a.String() }

// LogValue is String, for log/slog.
func (a Auth) LogValue() slog.Value { return slog.StringValue(a.String()) }

// credentials are those of a for the registry on host, and for no mirror and
// no host that a layer lies on. nil means that a has none: the daemon's own
// settings count then.
func (a Auth) credentials(ctx context.Context, host string) (auth.Credentials, error) {
	cred, err := a.credential()
	if err != nil {
		return nil, err
	}
	if a.Server != "" {
		if cred, err = auth.For(a.Server, cred).Credential(ctx, host); err != nil {
			return nil, err
		}
	}
	if cred.IsAnonymous() {
		return nil, nil
	}
	return auth.For(host, cred), nil
}

func (a Auth) credential() (auth.Credential, error) {
	switch {
	case a.Username != "":
		return auth.Credential{Username: a.Username, Password: a.Password}, nil
	case a.IdentityToken != "":
		return auth.Credential{IdentityToken: a.IdentityToken}, nil
	case a.Auth != "":
		return decodeAuth(a.Auth)
	}
	return auth.Credential{RegistryToken: a.RegistryToken}, nil
}

// maxAuth bounds the base64 form, in bytes.
const maxAuth = 64 << 10

// decodeAuth reads what docker keeps as `auth` in its config.json. Old
// versions of it pad the password with zero bytes. No error repeats any of it.
func decodeAuth(text string) (auth.Credential, error) {
	bad := func(why string) (auth.Credential, error) {
		return auth.Credential{}, fmt.Errorf("the request's auth %s: make the pull secret anew: %w", why, errdefs.ErrInvalidArgument)
	}
	if len(text) > maxAuth {
		return bad("is too long")
	}
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return bad("is not base64")
	}
	user, password, ok := strings.Cut(string(data), ":")
	if !ok {
		return bad("is not user:password in base64")
	}
	return auth.Credential{Username: user, Password: strings.Trim(password, "\x00")}, nil
}
