package config

import (
	_ "embed"
	"fmt"
	"strings"
	"sync"
)

//go:embed keys.txt
var keysText string

//go:embed parts.txt
var partsText string

// knownKey is one key of keys.txt.
type knownKey struct {
	path   []string // its last part may be **
	status Status
	reason string
}

// matches says whether path is, or lies below, what pattern describes.
func matches(pattern, path []string) bool {
	for i, part := range pattern {
		if part == "**" {
			return true
		}
		if i == len(path) || part != "*" && part != path[i] {
			return false
		}
	}
	return len(pattern) == len(path)
}

// knownKeys is the content of keys.txt.
var knownKeys = sync.OnceValue(func() []knownKey {
	keys, err := parseKeys(keysText)
	if err != nil {
		panic(err) // keys.txt is compiled in, and tested
	}
	return keys
})

// parseKeys reads the format that the head of keys.txt describes.
func parseKeys(text string) ([]knownKey, error) {
	var keys []knownKey
	var table knownKey
	for n, line := range strings.Split(text, "\n") {
		if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Split(line, "|")
		for i := range fields {
			fields[i] = strings.TrimSpace(fields[i])
		}
		if !strings.HasPrefix(line, " ") {
			word, path, ok := strings.Cut(fields[0], " ")
			status, known := statusWords[word]
			if !ok || !known || len(fields) != 2 {
				return nil, fmt.Errorf("keys.txt:%d: want `<status> <table> | <reason>`", n+1)
			}
			table = knownKey{status: status, reason: fields[1]}
			if path != "." {
				table.path = strings.Split(path, "/")
			}
			continue
		}
		key := table
		switch len(fields) {
		case 1:
		case 3:
			status, known := statusWords[fields[1]]
			if !known {
				return nil, fmt.Errorf("keys.txt:%d: unknown status %q", n+1, fields[1])
			}
			key.status, key.reason = status, fields[2]
		default:
			return nil, fmt.Errorf("keys.txt:%d: want `<keys>` or `<key> | <status> | <reason>`", n+1)
		}
		for name := range strings.FieldsSeq(fields[0]) {
			key.path = append(table.path[:len(table.path):len(table.path)], strings.Split(name, "/")...)
			keys = append(keys, key)
		}
	}
	return keys, nil
}

var statusWords = map[string]Status{"later": Later, "never": Never}

// servedParts is the content of parts.txt: "fixed", "optional" or "partial" by
// URI.
var servedParts = sync.OnceValue(func() map[string]string {
	parts := make(map[string]string)
	for line := range strings.SplitSeq(partsText, "\n") {
		if fields := strings.Fields(line); len(fields) == 2 {
			parts[fields[0]] = fields[1]
		}
	}
	return parts
})
