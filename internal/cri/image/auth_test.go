package image

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/registry/auth"
)

// TestCredentials is the order of the forms, and for which host they are.
func TestCredentials(t *testing.T) {
	all := Auth{Username: "u", Password: "p", IdentityToken: "i", Auth: "YTpi", RegistryToken: "r"}
	withServer := func(server string) Auth { return Auth{Username: "u", Password: "p", Server: server} }
	up := auth.Credential{Username: "u", Password: "p"}
	for _, test := range []struct {
		auth Auth
		host string
		want auth.Credential
	}{
		{all, "h", up},
		{Auth{IdentityToken: "i", Auth: "YTpi", RegistryToken: "r"}, "h", auth.Credential{IdentityToken: "i"}},
		{Auth{Auth: "YTpi", RegistryToken: "r"}, "h", auth.Credential{Username: "a", Password: "b"}},
		{Auth{RegistryToken: "r"}, "h", auth.Credential{RegistryToken: "r"}},
		{Auth{}, "h", auth.Credential{}},
		{withServer("h"), "h", up},
		{withServer("https://h"), "h", up},
		{withServer("https://h/v2/"), "h", up},
		{withServer("h:5000"), "h:5000", up},
		{withServer("h"), "h:5000", auth.Credential{}},
		{withServer("other"), "h", auth.Credential{}},
		{withServer("https://index.docker.io/v1/"), "docker.io", up},
		{withServer("https://index.docker.io/v1/"), "h", auth.Credential{}},
	} {
		creds, err := test.auth.credentials(t.Context(), test.host)
		if err != nil {
			t.Fatal(err)
		}
		if creds == nil {
			creds = auth.Chain{}
		}
		got, err := creds.Credential(t.Context(), test.host)
		if err != nil || got != test.want {
			t.Errorf("%#v for %s: got %+v, %v", test.auth, test.host, got, err)
		}
		if got, _ := creds.Credential(t.Context(), "mirror.example"); !got.IsAnonymous() {
			t.Errorf("%#v for %s: the mirror gets %v", test.auth, test.host, got)
		}
	}
}

// TestAuthTells: no way of printing it tells a secret.
func TestAuthTells(t *testing.T) {
	a := Auth{Username: "hush", Password: "hush", IdentityToken: "hush", Auth: "hush", RegistryToken: "hush", Server: "h"}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("pull", "auth", a)
	for _, text := range []string{fmt.Sprint(a), fmt.Sprintf("%v %+v %#v %s", a, a, a, a), log.String()} {
		if strings.Contains(text, "hush") {
			t.Errorf("it tells: %s", text)
		}
	}
}

func FuzzDecodeAuth(f *testing.F) {
	for _, seed := range []string{"", "YTpi", "YTpiAAA=", "Og==", "!", strings.Repeat("A", maxAuth+4)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := decodeAuth(text)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) || len(text) > 40 && strings.Contains(err.Error(), text) {
				t.Error(err)
			}
			return
		}
		again, err := decodeAuth(base64.StdEncoding.EncodeToString([]byte(got.Username + ":" + got.Password)))
		if err != nil || again != got {
			t.Errorf("%q: %v, %v", text, again, err)
		}
	})
}
