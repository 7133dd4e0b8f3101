package auth

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
)

// Limits of one response's challenges. A header as a whole is bounded by the transport.
const (
	maxChallenges = 16
	maxParams     = 32 // of one challenge
)

// Challenge is one way in which a server would have the client prove itself.
type Challenge struct {
	Scheme string            // in lower case: "bearer", "basic"
	Params map[string]string // keys in lower case
}

// Challenges reads the WWW-Authenticate headers of a response, the scheme to prefer first: Bearer, then Basic, then
// what nobody here speaks. Text that is no challenge is passed over.
func Challenges(h http.Header) []Challenge {
	var found []Challenge
	for _, line := range h.Values("WWW-Authenticate") {
		found = appendChallenges(found, line)
	}
	rank := map[string]int{"bearer": -2, "basic": -1}
	slices.SortStableFunc(found, func(a, b Challenge) int { return cmp.Compare(rank[a.Scheme], rank[b.Scheme]) })
	return found
}

// appendChallenges reads one header line. A line may hold several challenges, and both they and their parameters are
// separated by commas: a word followed by "=" is a parameter, any other word begins a challenge.
func appendChallenges(found []Challenge, line string) []Challenge {
	current := -1
	for {
		line = strings.TrimLeft(line, " \t,")
		word := token(line)
		if word == "" {
			return found
		}
		line = strings.TrimLeft(line[len(word):], " \t")
		word = strings.ToLower(word)
		if !strings.HasPrefix(line, "=") {
			if len(found) == maxChallenges {
				return found
			}
			found = append(found, Challenge{Scheme: word, Params: map[string]string{}})
			current = len(found) - 1
			continue
		}
		var value string
		value, line = paramValue(strings.TrimLeft(line[1:], " \t"))
		if current < 0 {
			return found
		}
		if params := found[current].Params; len(params) < maxParams {
			if _, repeated := params[word]; !repeated {
				params[word] = value
			}
		}
	}
}

// token yields the leading RFC 9110 token of s.
func token(s string) string {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`()<>@,;:\"/[]?={}`, c) >= 0 {
			return s[:i]
		}
	}
	return s
}

// paramValue reads a token or quoted string; rest begins behind it. An unclosed quote yields nothing.
func paramValue(s string) (value, rest string) {
	if !strings.HasPrefix(s, `"`) {
		value = token(s)
		return value, strings.TrimLeft(s[len(value):], "=") // "=" ends the padding of a token68
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:]
		case '\\':
			if i++; i == len(s) {
				return "", ""
			}
		}
		b.WriteByte(s[i])
	}
	return "", ""
}
