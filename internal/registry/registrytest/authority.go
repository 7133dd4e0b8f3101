package registrytest

import (
	"fmt"
	"net/http"
	"strings"
	"time"
)

// tokenPath is where a server's own token server answers.
const tokenPath = "/token"

// Auth is how a server wants to be logged in to.
type Auth struct {
	Basic        bool          // by user and password with each request; default: by tokens
	User         string        // who may; empty: tokens are for everybody
	Password     string        //
	RefreshToken string        // an identity token that is accepted instead
	NoPOST       int           // the status by which the token server refuses OAuth's POST; 0: it takes it
	Expires      time.Duration // of tokens; default: the field is left out
	Realm        string        // the token server to name; default: this server
	Challenge    string        // the whole WWW-Authenticate header, to lie
	Fail         int           // how many token requests get a 503 first
	Slow         time.Duration // how long a token request takes
}

// authority is an Auth at work.
type authority struct {
	Auth
	valid   map[string]bool // tokens
	fetched []TokenRequest
}

// TokenRequest is one request to the token server.
type TokenRequest struct {
	Method string
	Scope  string
	User   string
	Header http.Header
	Status int
}

// Require has the server want a login for everything from now on. Tokens given out before are void.
func (s *Server) Require(a Auth) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.auth = &authority{Auth: a, valid: map[string]bool{}}
}

// RevokeTokens makes all tokens given out so far void.
func (s *Server) RevokeTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.auth.valid)
}

// TokenRequests lists what was asked of the token server.
func (s *Server) TokenRequests() []TokenRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.auth == nil {
		return nil
	}
	return append([]TokenRequest(nil), s.auth.fetched...)
}

func (a *authority) admits(s *Server, r *http.Request) bool {
	if a.Basic {
		user, password, ok := r.BasicAuth()
		return ok && user == a.User && password == a.Password
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.mu.Lock()
	defer s.mu.Unlock()
	return ok && a.valid[token]
}

func (a *authority) challenge(s *Server, h http.Header, r *http.Request) {
	realm := a.Realm
	if realm == "" {
		realm = s.URL() + tokenPath
	}
	value := fmt.Sprintf(`Bearer realm="%s",service="registrytest"`, realm)
	if rest, ok := strings.CutPrefix(r.URL.Path, "/v2/"); ok {
		name, _, _ := strings.Cut(strings.Replace(rest, "/manifests/", "/blobs/", 1), "/blobs/")
		value += fmt.Sprintf(`,scope="repository:%s:pull"`, name)
	}
	if r.Header.Get("Authorization") != "" {
		value += `,error="invalid_token"`
	}
	if a.Basic {
		value = `Basic realm="registrytest"`
	}
	if a.Challenge != "" {
		value = a.Challenge
	}
	h.Set("WWW-Authenticate", value)
}

func (s *Server) serveToken(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	a := s.auth
	s.mu.Unlock()
	if a == nil {
		http.NotFound(w, r)
		return
	}
	select {
	case <-time.After(a.Slow):
	case <-r.Context().Done():
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	req := TokenRequest{Method: r.Method, Scope: strings.Join(r.URL.Query()["scope"], " "), Header: r.Header.Clone()}
	allowed := false
	switch r.Method {
	case http.MethodPost:
		r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
		req.Scope, req.User = r.FormValue("scope"), r.FormValue("username")
		switch r.PostFormValue("grant_type") {
		case "password":
			allowed = req.User == a.User && r.PostFormValue("password") == a.Password
		case "refresh_token":
			allowed = a.RefreshToken != "" && r.PostFormValue("refresh_token") == a.RefreshToken
		}
	case http.MethodGet:
		user, password, ok := r.BasicAuth()
		req.User = user
		allowed = a.User == "" || ok && user == a.User && password == a.Password
	}
	req.Status = a.grant(w, r, allowed)
	a.fetched = append(a.fetched, req)
}

// grant answers a token request. The caller holds the server's lock.
func (a *authority) grant(w http.ResponseWriter, r *http.Request, allowed bool) int {
	status := http.StatusOK
	switch {
	case a.Fail > 0:
		a.Fail--
		status = http.StatusServiceUnavailable
	case r.Method == http.MethodPost && a.NoPOST != 0:
		status = a.NoPOST
	case !allowed:
		status = http.StatusUnauthorized
	}
	if status != http.StatusOK {
		w.WriteHeader(status)
		return status
	}
	token := fmt.Sprintf("token-%d", len(a.fetched))
	a.valid[token] = true
	reply := map[string]any{"token": token}
	if a.Expires > 0 {
		reply["expires_in"] = int(a.Expires.Seconds())
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(encode(reply))
	return status
}
