package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Dump is the whole effective configuration as one version-4 document: the
// defaults, what the documents and their imports say, and the flags. It has the keys that
// Holdfast doesn't honour too, so that containerd can go on from it. A
// comment follows each value that is not a default and says where it was set.
func (c *Config) Dump() string {
	var b strings.Builder
	for _, file := range c.Documents {
		fmt.Fprintf(&b, "# read: %s\n", strings.ToValidUTF8(strings.ReplaceAll(file, "\n", " "), "?"))
	}
	fmt.Fprintf(&b, "version = %d\n", currentVersion)
	c.tree.dump(&b, nil)
	return b.String()
}

// dump writes the leaves of a table and then its tables.
func (v *value) dump(b *strings.Builder, path []string) {
	keys := slices.Sorted(maps.Keys(v.table))
	for _, key := range keys {
		item := v.table[key]
		if item.table != nil || len(path) == 0 && key == "imports" {
			continue // what was imported is in here
		}
		fmt.Fprintf(b, "%s = %s", quoteKey(key), literal(item.leaf))
		if item.from != (Origin{}) {
			fmt.Fprintf(b, " # %s", strings.ToValidUTF8(strings.ReplaceAll(item.from.String(), "\n", " "), "?"))
		}
		b.WriteByte('\n')
	}
	for _, key := range keys {
		item := v.table[key]
		if item.table == nil {
			continue
		}
		at := append(slices.Clip(path), key)
		if item.hasLeaf() {
			fmt.Fprintf(b, "\n[%s]\n", dotted(at))
		}
		item.dump(b, at)
	}
}

// hasLeaf says whether a table needs a header of its own: it has a leaf, or
// nothing at all.
func (v *value) hasLeaf() bool {
	for _, item := range v.table {
		if item.table == nil {
			return true
		}
	}
	return len(v.table) == 0
}
