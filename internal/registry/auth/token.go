package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Limits of one token request.
const (
	tokenTimeout   = 30 * time.Second
	maxTokenBody   = 1 << 20        // bytes
	maxToken       = 64 << 10       // bytes; it travels in a header
	defaultExpiry  = time.Minute    // what the token specification says of a response that names none
	longestExpiry  = 24 * time.Hour // a server may promise more
	maxRedirects   = 10
	clientID       = "holdfast"
	formType       = "application/x-www-form-urlencoded; charset=utf-8"
	expiryMargin   = 10 * time.Second // a token is given up so long before its end, but never in the first half of its life
	oauthGrantUser = "password"
	oauthGrantID   = "refresh_token"
)

// fetchToken asks the token server. With a credential it tries OAuth's POST first, and the older GET where the server
// shows that it knows no POST. Secrets stay out of the errors: neither forms, queries nor bodies are quoted.
func (ans *answer) fetchToken(scopes string) (string, time.Time, error) {
	ctx, cancel := context.WithTimeout(context.Background(), tokenTimeout)
	defer cancel()
	start := time.Now()
	reply, err := ans.exchange(ctx, scopes)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("token from %s: %w", ans.realm.Host, err)
	}
	life := defaultExpiry
	if reply.ExpiresIn > 0 {
		life = time.Duration(reply.ExpiresIn) * time.Second
	}
	return reply.token(), start.Add(life - min(expiryMargin, life/2)), nil
}

func (ans *answer) exchange(ctx context.Context, scopes string) (tokenReply, error) {
	if ans.cred.Password == "" && ans.cred.IdentityToken == "" {
		return ans.get(ctx, scopes)
	}
	reply, err := ans.post(ctx, scopes)
	status, ok := errors.AsType[*statusError](err)
	if !ok {
		return reply, err
	}
	switch status.code {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusNotFound: // ACR, Artifactory and GCR for an unknown POST
		return ans.get(ctx, scopes)
	case http.StatusMethodNotAllowed:
		if ans.cred.Username != "" {
			return ans.get(ctx, scopes)
		}
	}
	return reply, err
}

// secret yields what stands for a password.
func (c Credential) secret() string {
	if c.IdentityToken != "" {
		return c.IdentityToken
	}
	return c.Password
}

// post is distribution's OAuth 2 token request.
func (ans *answer) post(ctx context.Context, scopes string) (tokenReply, error) {
	form := url.Values{"service": {ans.service}, "client_id": {clientID}}
	if scopes != "" {
		form.Set("scope", scopes)
	}
	if ans.cred.IdentityToken != "" || ans.cred.Username == "" {
		form.Set("grant_type", oauthGrantID)
		form.Set("refresh_token", ans.cred.secret())
	} else {
		form.Set("grant_type", oauthGrantUser)
		form.Set("username", ans.cred.Username)
		form.Set("password", ans.cred.Password)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, ans.realm.String(), strings.NewReader(form.Encode()))
	if err != nil {
		return tokenReply{}, err
	}
	ans.setHeader(req)
	req.Header.Set("Content-Type", formType)
	return ans.do(req)
}

// get is distribution's original token request.
func (ans *answer) get(ctx context.Context, scopes string) (tokenReply, error) {
	u := *ans.realm
	q := u.Query()
	if ans.service != "" {
		q.Set("service", ans.service)
	}
	for _, s := range strings.Fields(scopes) {
		q.Add("scope", s)
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return tokenReply{}, err
	}
	ans.setHeader(req)
	if secret := ans.cred.secret(); secret != "" {
		req.SetBasicAuth(ans.cred.Username, secret)
	}
	return ans.do(req)
}

func (ans *answer) setHeader(req *http.Request) {
	req.Header.Set("User-Agent", ans.userAgent)
	maps.Copy(req.Header, ans.header)
}

type tokenReply struct {
	Token       string `json:"token"`
	AccessToken string `json:"access_token"` // the same by OAuth's name; wins where both are given
	ExpiresIn   number `json:"expires_in"`   // seconds
}

// number is an integer that some servers write as a string or a fraction.
type number int64

func (n *number) UnmarshalJSON(data []byte) error {
	f, err := strconv.ParseFloat(strings.Trim(string(data), `"`), 64)
	if err == nil && f > 0 {
		*n = number(min(f, longestExpiry.Seconds()))
	}
	return nil // what can't be read is as good as absent
}

func (r tokenReply) token() string {
	if r.AccessToken != "" {
		return r.AccessToken
	}
	return r.Token
}

// statusError is a token server's refusal.
type statusError struct{ code int }

func (e *statusError) Error() string {
	return fmt.Sprintf("the token server answered %d %s", e.code, http.StatusText(e.code))
}

func (e *statusError) Unwrap() error {
	switch {
	case e.code == http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case e.code == http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	case e.code >= 500:
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrUnauthenticated
}

func (ans *answer) do(req *http.Request) (reply tokenReply, err error) {
	client := http.Client{Transport: ans.transport, CheckRedirect: ans.redirect}
	resp, err := client.Do(req)
	if err != nil {
		if err = withoutURL(err); !errdefs.IsUnauthorized(err) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		return reply, err
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return reply, &statusError{resp.StatusCode}
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxTokenBody+1))
	switch {
	case err != nil:
		return reply, err
	case len(data) > maxTokenBody:
		return reply, fmt.Errorf("the reply has more than %d bytes: %w", maxTokenBody, errdefs.ErrUnauthenticated)
	case json.Unmarshal(data, &reply) != nil:
		return tokenReply{}, fmt.Errorf("the reply is not the JSON of a token: %w", errdefs.ErrUnauthenticated)
	}
	if t := reply.token(); t == "" || len(t) > maxToken || strings.ContainsFunc(t, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return reply, fmt.Errorf("the reply holds no usable token: %w", errdefs.ErrUnauthenticated)
	}
	return reply, nil
}

// redirect lets a token request go elsewhere on its own host, and anonymous ones anywhere.
func (ans *answer) redirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if hostKey(req.URL) != hostKey(ans.realm) && !ans.cred.IsAnonymous() {
		return fmt.Errorf("the token server would send the credentials on to %s: %w", req.URL.Host, errdefs.ErrUnauthenticated)
	}
	if hostKey(req.URL) != hostKey(ans.realm) {
		maps.DeleteFunc(req.Header, func(key string, _ []string) bool { _, own := ans.header[key]; return own })
	}
	return nil
}

// withoutURL drops the query that net/http quotes in its errors.
func withoutURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}
