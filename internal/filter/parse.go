package filter

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// parser reads one filter from left to right, without looking back.
type parser struct {
	in  string
	pos int
}

// parse reads one filter. An empty one has no selectors. It counts regular
// expressions into expressions.
func parse(s string, expressions *int) ([]selector, error) {
	if s == "" {
		return nil, nil
	}
	p := &parser{in: s}
	for i, r := range s {
		if r == 0 || r == utf8.RuneError {
			return nil, p.errorAt(i, "a filter is UTF-8 text without zero bytes")
		}
	}
	var all []selector
	for {
		sel, err := p.selector()
		if err != nil {
			return nil, err
		}
		if sel.op == matches {
			if *expressions++; *expressions > MaxExpressions || len(sel.value) > MaxExpression {
				return nil, p.errorAt(p.pos, "at most %d regular expressions of %d bytes are allowed", MaxExpressions, MaxExpression)
			}
			sel.re, _ = regexp.Compile(sel.value) // nil matches nothing, as documented
		}
		all = append(all, sel)
		if p.pos == len(s) {
			return all, nil
		}
		if r := p.peek(); r != ',' {
			return nil, p.errorAt(p.pos, "unexpected %q; selectors are separated by commas, and odd values are quoted", r)
		}
		p.pos++
	}
}

// errorAt says what is wrong with the byte at pos.
func (p *parser) errorAt(pos int, format string, args ...any) error {
	const most = 200 // bytes of the filter that an error repeats
	in := p.in
	if len(in) > most {
		in = in[:most] + "..."
	}
	return fmt.Errorf("filter %q, byte %d: %s: %w", in, pos+1, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// end is what peek returns behind the last character.
const end rune = -1

func (p *parser) peek() rune {
	if p.pos == len(p.in) {
		return end
	}
	r, _ := utf8.DecodeRuneInString(p.in[p.pos:])
	return r
}

// take returns the longest run of characters that are ok.
func (p *parser) take(ok func(rune) bool) string {
	start := p.pos
	for _, r := range p.in[start:] {
		if !ok(r) {
			break
		}
		p.pos += utf8.RuneLen(r)
	}
	return p.in[start:p.pos]
}

func (p *parser) selector() (selector, error) {
	var s selector
	for {
		field, err := p.field()
		if err != nil {
			return selector{}, err
		}
		s.path = append(s.path, field)
		if p.peek() != '.' {
			break
		}
		p.pos++
	}
	if r := p.peek(); r == ',' || r == end {
		return s, nil
	}
	p.take(unicode.IsSpace)
	start := p.pos
	switch op := p.take(isOperator); op {
	case "==":
		s.op = equal
	case "!=":
		s.op = unequal
	case "~=":
		s.op = matches
	default:
		return selector{}, p.errorAt(start, "expected ==, != or ~= after a field; other characters in a field need double quotes")
	}
	var err error
	s.value, err = p.value(s.op)
	return s, err
}

func (p *parser) field() (string, error) {
	p.take(unicode.IsSpace)
	switch r := p.peek(); {
	case r == '"':
		return p.quoted(r)
	case isWord(r):
		return p.take(isWord), nil
	}
	return "", p.errorAt(p.pos, "expected a field: letters, digits and _, or anything in double quotes")
}

func (p *parser) value(op operator) (string, error) {
	p.take(unicode.IsSpace)
	switch r := p.peek(); {
	case r == '"', op == matches && (r == '/' || r == '|'):
		return p.quoted(r)
	case r == '/', r == '|':
		return "", p.errorAt(p.pos, "a value that begins with %c needs double quotes", r)
	case r == end, r == '.', isOperator(r), !isValue(r):
		return "", p.errorAt(p.pos, "expected a value; put it in double quotes if it is empty or has other characters")
	}
	return p.take(isValue), nil
}

func isOperator(r rune) bool { return r == '=' || r == '!' || r == '~' }

func isWord(r rune) bool {
	return r == '_' || r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' || r >= 'a' && r <= 'z'
}

func isValue(r rune) bool {
	return r != ',' && !unicode.IsSpace(r) && unicode.IsGraphic(r)
}

// quoted reads up to the quote that ends it, and resolves escapes.
func (p *parser) quoted(quote rune) (string, error) {
	start := p.pos
	p.pos++
	var b strings.Builder
	for {
		switch r := p.peek(); r {
		case end, '\n':
			return "", p.errorAt(start, "the quoted part has no end")
		case quote:
			p.pos++
			return b.String(), nil
		case '\\':
			if err := p.escape(quote, &b); err != nil {
				return "", err
			}
		default:
			b.WriteRune(r)
			p.pos += utf8.RuneLen(r)
		}
	}
}

// plain are the escapes of one letter.
var plain = map[byte]byte{
	'a': '\a', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t', 'v': '\v', '\\': '\\',
}

// escape resolves one escape of Go's, in which \x and octal digits make a byte
// and \u and \U a character.
func (p *parser) escape(quote rune, b *strings.Builder) error {
	start := p.pos
	if p.pos++; p.pos == len(p.in) {
		return p.errorAt(start, "the quoted part has no end")
	}
	c := p.in[p.pos]
	if to, ok := plain[c]; ok || rune(c) == quote {
		if !ok {
			to = c
		}
		p.pos++
		return b.WriteByte(to)
	}
	base, digits := 16, 0
	switch {
	case c >= '0' && c <= '7':
		base, digits = 8, 3
	case c == 'x':
		digits = 2
	case c == 'u':
		digits = 4
	case c == 'U':
		digits = 8
	}
	if base == 16 {
		p.pos++
	}
	v := 0
	for range digits {
		d := 16
		if p.pos < len(p.in) {
			d = digit(p.in[p.pos])
		}
		if d >= base {
			return p.errorAt(start, "an escape has too few digits")
		}
		v = v*base + d
		p.pos++
	}
	switch {
	case digits == 0, digits <= 3 && v > 0xff, v > unicode.MaxRune:
		return p.errorAt(start, "no such escape")
	case digits <= 3:
		return b.WriteByte(byte(v))
	}
	b.WriteRune(rune(v))
	return nil
}

// digit returns the value of a hexadecimal digit, or 16.
func digit(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return 16
}
