package registry

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Error says where a request to a registry broke, why, and what to do. Its kind is one of errdefs'.
type Error struct {
	Op         string        // "resolve" or "fetch"
	Name       string        // the image's reference
	Digest     digest.Digest // what was fetched; empty for resolve
	Host       string        // the endpoint that failed
	Status     int           // of the HTTP response that ended it; 0 if there was none
	RetryAfter time.Duration // how long the registry asks to wait; 0 if it doesn't say
	Err        error
	Also       []error // what other endpoints said before
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Digest != "" {
		fmt.Fprintf(&b, " %s of", e.Digest)
	}
	fmt.Fprintf(&b, " %s", e.Name)
	if e.Host != "" {
		fmt.Fprintf(&b, " from %s", e.Host)
	}
	fmt.Fprintf(&b, ": %v", e.Err)
	if advice := e.Advice(); advice != "" {
		fmt.Fprintf(&b, "; %s", advice)
	}
	const most = 3
	for i, other := range e.Also {
		if i == most {
			fmt.Fprintf(&b, " (and %d more)", len(e.Also)-most)
			break
		}
		if inner, ok := errors.AsType[*Error](other); ok {
			other = fmt.Errorf("%s: %w", inner.Host, inner.Err)
		}
		fmt.Fprintf(&b, " (also %v)", other)
	}
	return b.String()
}

// Unwrap yields the cause.
func (e *Error) Unwrap() error { return e.Err }

// Advice says what the user may do next, or nothing.
func (e *Error) Advice() string {
	_, login := errors.AsType[*loginError](e.Err)
	_, settings := errors.AsType[*settingsError](e.Err)
	_, authority := errors.AsType[x509.UnknownAuthorityError](e.Err)
	_, hostname := errors.AsType[x509.HostnameError](e.Err)
	_, expired := errors.AsType[x509.CertificateInvalidError](e.Err)
	switch {
	case isSchemeMismatch(e.Err):
		return fmt.Sprintf("it speaks plain HTTP: if that is meant, name it http://%s in its hosts.toml, or ask for plain HTTP", e.Host)
	case authority || hostname || expired:
		return fmt.Sprintf("if the server is the right one, name its certificate authority as ca in the hosts.toml of %s", e.Host)
	case login && errdefs.IsUnauthorized(e.Err), e.Status == http.StatusForbidden:
		return fmt.Sprintf("log in, or check the credentials for %s", e.Host)
	case e.Status == http.StatusNotFound && e.Op == "resolve":
		return "check the name and the tag"
	case e.Status == http.StatusNotFound:
		return "the registry has lost a part of the image: push it again"
	case e.Status == http.StatusTooManyRequests && e.RetryAfter > 0:
		return fmt.Sprintf("try again in %s", e.RetryAfter)
	case e.Status == http.StatusTooManyRequests:
		return "try again later, or log in for a higher limit"
	case settings:
		return "mend that file, or what names it"
	case errors.Is(e.Err, errUnreachable):
		return "check the name, the network and the proxy settings"
	case errors.Is(e.Err, errStalled), e.Status >= 500:
		return "try again"
	}
	return ""
}

// class ranks failures for the question which one is told: an answer of a registry says more than silence.
func (e *Error) class() int {
	switch {
	case errdefs.IsDataLoss(e.Err) || errdefs.IsFailedPrecondition(e.Err):
		return 4 // it has the thing, and the thing is bad
	case e.Status == http.StatusNotFound:
		return 2
	case e.Status != 0 && e.Status != http.StatusUnauthorized:
		return 3
	}
	return 1
}

// failures gathers what the endpoints of one operation said.
type failures []*Error

// worst yields the first failure of the highest class, with the others beside it; nil if there is none.
func (f failures) worst() *Error {
	var first *Error
	for _, e := range f {
		if first == nil || e.class() > first.class() {
			first = e
		}
	}
	if first == nil {
		return nil
	}
	told := *first
	for _, e := range f {
		if e.Host != first.Host || e.Err.Error() != first.Err.Error() {
			told.Also = append(told.Also, e)
		}
	}
	return &told
}

// failure begins the Error of what r did at host.
func (r *Repository) failure(op string, dgst digest.Digest, host string, err error) *Error {
	e := &Error{Op: op, Name: r.name.String(), Digest: dgst, Host: host, Err: err}
	if _, ok := errors.AsType[*loginError](err); ok {
		if errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err) {
			e.Status = http.StatusUnauthorized
			e.Err = fmt.Errorf("pull access denied, repository does not exist or may require authorization: %w", err)
		}
		return e
	}
	if errors.Is(err, errUnreachable) || errors.Is(err, errStalled) {
		e.Err = kind{err, errdefs.ErrUnavailable}
	}
	return e
}

// kind gives an error one of errdefs' kinds without changing its words.
type kind struct {
	error
	kind error
}

func (k kind) Unwrap() []error { return []error{k.error, k.kind} }

// refusal turns a response that is no success into an Error. It reads the body and closes a.
func (r *Repository) refusal(op string, dgst digest.Digest, ep string, a *answer) *Error {
	defer a.discard()
	e := &Error{Op: op, Name: r.name.String(), Digest: dgst, Host: ep, Status: a.StatusCode, RetryAfter: retryAfter(a.Header, time.Now())}
	text := fmt.Sprintf("%d %s", a.StatusCode, http.StatusText(a.StatusCode))
	if a.StatusCode == http.StatusNotFound {
		text = "not found"
	}
	if a.served != ep {
		text = a.served + " answers " + text
	}
	if said := complaint(a); said != "" {
		text += " (" + said + ")"
	}
	e.Err = kind{errors.New(text), statusKind(a.StatusCode)}
	return e
}

func statusKind(status int) error {
	switch {
	case status == http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case status == http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case status == http.StatusNotFound:
		return errdefs.ErrNotFound
	case status == http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	case status == http.StatusRequestedRangeNotSatisfiable:
		return errdefs.ErrOutOfRange
	case status == http.StatusRequestTimeout, status >= 500:
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrUnknown
}

// Limits of what is kept of a registry's words.
const (
	maxComplaint = 16 << 10 // bytes of a body that are looked at
	maxQuoted    = 256      // bytes that are repeated
)

// complaint reads the distribution specification's error document.
func complaint(a *answer) string {
	if a.Request.Method == http.MethodHead {
		return ""
	}
	data, _ := io.ReadAll(io.LimitReader(a.body, maxComplaint))
	var doc struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(data, &doc) != nil || len(doc.Errors) == 0 {
		return ""
	}
	first := doc.Errors[0]
	if first.Message == "" {
		return printable(first.Code)
	}
	return printable(first.Message)
}

// printable makes a registry's words fit for a terminal and a log.
func printable(s string) string {
	if len(s) > maxQuoted {
		s = s[:maxQuoted] + "..."
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
}
