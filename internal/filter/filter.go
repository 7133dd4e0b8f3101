// Package filter parses and evaluates the list-filter language.
//
// The language is containerd's, as its clients type it:
//
//	filter    = selector { "," selector }        all must match
//	selector  = field { "." field } [ op value ] without op: the field is present
//	op        = "==" | "!=" | "~="               the last is a regular expression (RE2)
//	field     = word | quoted                    word: letters, digits, "_"
//	value     = quoted | any visible characters but "," and white space
//	quoted    = "..." with Go's escapes; for ~= also /.../ and |...|
//
// White space may stand before a field, an operator or a value. Several
// filters match what any one of them matches; no filter, or an empty one,
// matches everything.
package filter

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

// Bounds on what a request may ask for (inv 10).
const (
	MaxBytes       = 1 << 20 // in all filters of one request together
	MaxExpressions = 64      // regular expressions in one request
	MaxExpression  = 1 << 10 // bytes of one regular expression
)

// Adaptor shows an object's fields to a Filter. An absent field has the value
// "", which is what != and ~= compare with.
type Adaptor interface {
	Field(path []string) (value string, present bool)
}

// AdaptorFunc is an Adaptor made of a function.
type AdaptorFunc func(path []string) (value string, present bool)

// Field calls f.
func (f AdaptorFunc) Field(path []string) (value string, present bool) { return f(path) }

// Label finds the field of a map, such as labels, that path names below it.
// Keys hold dots, so the parts of path are joined again by them.
func Label(labels map[string]string, path []string) (value string, present bool) {
	value, present = labels[strings.Join(path, ".")]
	return value, present
}

// Filter decides which objects are listed. The zero Filter matches all.
type Filter struct {
	any [][]selector // one of them, and in it each
}

type operator int

const (
	present operator = iota
	equal
	unequal
	matches
)

type selector struct {
	path  []string
	op    operator
	value string
	re    *regexp.Regexp // of matches; nil for one that can't be compiled, which matches nothing
}

// Parse reads the filters of one request. ErrInvalidArgument, with the place
// and the reason, for what is not in the language or goes beyond its bounds.
// A regular expression that can't be compiled is no error but matches
// nothing, as clients know it.
func Parse(filters ...string) (Filter, error) {
	var f Filter
	size, expressions := 0, 0
	for _, s := range filters {
		if size += len(s); size > MaxBytes {
			return Filter{}, fmt.Errorf("filters are longer than %d bytes: %w", MaxBytes, errdefs.ErrInvalidArgument)
		}
		all, err := parse(s, &expressions)
		if err != nil {
			return Filter{}, err
		}
		f.any = append(f.any, all)
	}
	return f, nil
}

// Match reports whether the object passes.
func (f Filter) Match(a Adaptor) bool {
	for _, all := range f.any {
		if matchAll(all, a) {
			return true
		}
	}
	return len(f.any) == 0
}

func matchAll(all []selector, a Adaptor) bool {
	for _, s := range all {
		if !s.match(a) {
			return false
		}
	}
	return true
}

func (s selector) match(a Adaptor) bool {
	value, there := a.Field(s.path)
	switch s.op {
	case equal:
		return there && value == s.value
	case unequal:
		return value != s.value
	case matches:
		return s.re != nil && s.re.MatchString(value)
	default:
		return there
	}
}
