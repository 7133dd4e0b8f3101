package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Origin says where an effective value was set. The zero Origin is
// Holdfast's built-in default.
type Origin struct {
	File string // the config file, or ""
	Line int    // the line in File, from 1
	Key  string // the key as File writes it, which differs from today's name in documents of older versions
	Flag string // the command-line flag, such as "--root", or ""
}

// String is "default", "--root" or "/etc/containerd/config.toml:12".
func (o Origin) String() string {
	switch {
	case o.Flag != "":
		return o.Flag
	case o.File != "":
		return fmt.Sprintf("%s:%d", o.File, o.Line)
	}
	return "default"
}

// dotted writes a path as a TOML key, quoting the parts that need it.
func dotted(path []string) string {
	quoted := make([]string, len(path))
	for i, part := range path {
		quoted[i] = quoteKey(part)
	}
	return strings.Join(quoted, ".")
}

func quoteKey(part string) string {
	bare := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-'
	}
	if part != "" && strings.TrimFunc(part, bare) == "" {
		return part
	}
	return quoteString(part)
}

// quoteString writes a TOML string: literal where that is possible.
func quoteString(s string) string {
	for _, r := range s {
		if r == '\'' || r < ' ' || r == 0x7f || r == '\uFFFD' {
			return escapeString(s)
		}
	}
	return "'" + s + "'"
}

func escapeString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// literal writes a leaf as TOML on one line.
func literal(leaf any) string {
	switch leaf := leaf.(type) {
	case string:
		return quoteString(leaf)
	case []any:
		items := make([]string, len(leaf))
		for i, item := range leaf {
			items[i] = literal(item)
		}
		return "[" + strings.Join(items, ", ") + "]"
	case map[string]any:
		var items []string
		for _, key := range slices.Sorted(maps.Keys(leaf)) {
			items = append(items, quoteKey(key)+" = "+literal(leaf[key]))
		}
		return "{ " + strings.Join(items, ", ") + " }"
	}
	return marshalled(leaf)
}

// marshalled leaves the writing of a single scalar to the TOML library.
func marshalled(leaf any) string {
	data, err := toml.Marshal(map[string]any{"k": leaf})
	if err != nil {
		return quoteString(fmt.Sprint(leaf))
	}
	return strings.TrimSpace(strings.TrimPrefix(string(data), "k = "))
}
