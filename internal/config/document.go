package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxFileSize bounds one config file, in bytes: the largest that we have
// seen, a node with hundreds of inline registry mirrors, has 200 kB. The
// depth of nested arrays is bounded by the TOML parser itself.
const maxFileSize = 1 << 20

// value is one key's value in a document: a table, or a leaf.
type value struct {
	table map[string]*value // nil for a leaf
	leaf  any               // string, int64, float64, bool, a TOML date or time, []any; map[string]any inside a []any
	from  Origin
}

func newTable(from Origin) *value {
	return &value{table: make(map[string]*value), from: from}
}

// lookup finds the value at path, or nil.
func (v *value) lookup(path ...string) *value {
	for _, part := range path {
		if v == nil {
			return nil
		}
		v = v.table[part] // of a leaf: a nil map
	}
	return v
}

// isTaken says whether there is a value at path, or a leaf above it.
func (v *value) isTaken(path ...string) bool {
	for _, part := range path {
		if v.table == nil {
			return true
		}
		if v = v.table[part]; v == nil {
			return false
		}
	}
	return true
}

// put sets the value at path and makes the tables that it lies in.
func (v *value) put(to *value, path ...string) {
	for _, part := range path[:len(path)-1] {
		next := v.table[part]
		if next == nil || next.table == nil {
			next = newTable(to.from)
			v.table[part] = next
		}
		v = next
	}
	v.table[path[len(path)-1]] = to
}

// take removes the value at path and returns it, or nil.
func (v *value) take(path ...string) *value {
	parent := v.lookup(path[:len(path)-1]...)
	last := path[len(path)-1]
	found := parent.lookup(last)
	if found != nil {
		delete(parent.table, last)
	}
	return found
}

// isZero says whether v is what Go's zero value of its type would be.
func (v *value) isZero() bool {
	switch leaf := v.leaf.(type) {
	case string:
		return leaf == ""
	case int64:
		return leaf == 0
	case float64:
		return leaf == 0
	case bool:
		return !leaf
	}
	return false
}

// readDocument reads one TOML file whole. Its errors name the file, and the
// row and column where the syntax is wrong.
func readDocument(file string) (*value, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileSize {
		return nil, fmt.Errorf("%s is larger than %d bytes, the most that a config file may have", file, maxFileSize)
	}
	return parseDocument(data, file)
}

// parseDocument turns TOML into values that know the lines they stand on.
func parseDocument(data []byte, file string) (*value, error) {
	var tree map[string]any
	if err := toml.Unmarshal(data, &tree); err != nil {
		if bad, ok := errors.AsType[*toml.DecodeError](err); ok {
			row, column := bad.Position()
			return nil, fmt.Errorf("%s: row %d, column %d: %w", file, row, column, err)
		}
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	lines := keyLines(data)
	return plant(tree, nil, Origin{File: file, Line: 1}, lines), nil
}

// plant builds the value of the table that stands at path. A key whose line
// is not known gets that of its table.
func plant(tree map[string]any, path []string, from Origin, lines map[string]int) *value {
	v := newTable(from)
	for key, item := range tree {
		at := append(slices.Clip(path), key)
		itemFrom := Origin{File: from.File, Line: from.Line, Key: dotted(at)}
		if line, ok := lines[joinPath(at)]; ok {
			itemFrom.Line = line
		}
		if table, ok := item.(map[string]any); ok {
			v.table[key] = plant(table, at, itemFrom, lines)
		} else {
			v.table[key] = &value{leaf: item, from: itemFrom}
		}
	}
	return v
}

// joinPath makes a map key of a path. TOML keys may hold any character but
// NUL.
func joinPath(path []string) string { return strings.Join(path, "\x00") }

// keyLines finds the line of every table and key of a document that is known
// to be well formed.
func keyLines(data []byte) map[string]int {
	s := lineScanner{data: data, line: 1, lines: make(map[string]int)}
	s.parser.Reset(data)
	var table []string
	for s.parser.NextExpression() {
		switch node := s.parser.Expression(); node.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = s.key(nil, node.Key())
		case unstable.KeyValue:
			s.keyValue(table, node)
		}
	}
	return s.lines
}

// lineScanner counts lines forward only, so that the whole document is
// counted once.
type lineScanner struct {
	parser unstable.Parser
	data   []byte
	offset int
	line   int
	lines  map[string]int
}

func (s *lineScanner) keyValue(table []string, node *unstable.Node) {
	at := s.key(table, node.Key())
	if item := node.Value(); item.Kind == unstable.InlineTable {
		for children := item.Children(); children.Next(); {
			s.keyValue(at, children.Node())
		}
	}
}

// key reads a dotted key, notes the line of each of its parts that is new,
// and returns its path.
func (s *lineScanner) key(table []string, parts unstable.Iterator) []string {
	path := slices.Clip(table)
	for parts.Next() {
		part := parts.Node()
		path = append(path, string(part.Data))
		if to := int(part.Raw.Offset); to > s.offset {
			s.line += bytes.Count(s.data[s.offset:to], []byte{'\n'})
			s.offset = to
		}
		if _, known := s.lines[joinPath(path)]; !known {
			s.lines[joinPath(path)] = s.line
		}
	}
	return path
}
