package config

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
)

// Status says what becomes of a key.
type Status string

// The statuses that a Finding may have.
const (
	Honoured Status = "honoured"
	Later    Status = "not yet" // containerd has it; Holdfast will
	Never    Status = "never"   // containerd has or had it; it will stay without effect
	Unknown  Status = "unknown" // neither has it
)

// Finding is what Check says about one key.
type Finding struct {
	Key    string // the version-4 key, as TOML
	Value  string // its effective value, as TOML
	Origin Origin // where the value was set
	Status Status
	Reason string // why it has no effect, or what to do about it; "" if it has its full effect
}

// Check says of every honoured key what it is set to and where, and then of
// every other key that a document has, in the order of documents and lines,
// why it has no effect. No key is left out.
func (c *Config) Check() []Finding {
	var found []Finding
	bound := make(map[string]bool, len(bindings))
	for _, b := range bindings {
		bound[joinPath(b.path)] = true
		v := c.tree.lookup(b.path...)
		found = append(found, Finding{Key: dotted(b.path), Value: literal(v.leaf), Origin: v.from, Status: Honoured})
	}
	for _, fam := range families {
		for _, path := range c.members(fam) {
			bound[joinPath(path)] = true
			v := c.tree.lookup(path...)
			found = append(found, Finding{Key: dotted(path), Value: literal(v.leaf), Origin: v.from, Status: Honoured})
		}
	}
	if v := c.tree.lookup("imports"); v != nil {
		bound["imports"] = true
		found = append(found, Finding{Key: "imports", Value: literal(v.leaf), Origin: v.from, Status: Honoured})
	}
	rest := slices.Clone(c.noted)
	rest = append(rest, c.checkParts("disabled_plugins", c.Disabled)...)
	rest = append(rest, c.checkParts("required_plugins", c.Required)...)
	for path, v := range c.tree.leaves(nil) {
		if !bound[joinPath(path)] {
			rest = append(rest, explain(path, v))
		}
	}
	slices.SortStableFunc(rest, func(a, b Finding) int {
		return cmp.Or(
			slices.Index(c.Documents, a.Origin.File)-slices.Index(c.Documents, b.Origin.File),
			a.Origin.Line-b.Origin.Line, cmp.Compare(a.Key, b.Key))
	})
	return append(found, rest...)
}

// leaves yields every leaf below v, and every empty table, with its path, in
// the order of keys.
func (v *value) leaves(path []string) iter.Seq2[[]string, *value] {
	return func(yield func([]string, *value) bool) {
		v.eachLeaf(path, yield)
	}
}

func (v *value) eachLeaf(path []string, yield func([]string, *value) bool) bool {
	if v.table == nil || len(v.table) == 0 && len(path) > 0 {
		return yield(path, v)
	}
	for _, key := range slices.Sorted(maps.Keys(v.table)) {
		if !v.table[key].eachLeaf(append(slices.Clip(path), key), yield) {
			return false
		}
	}
	return true
}

// explain says why a key that isn't honoured has no effect.
func explain(path []string, v *value) Finding {
	f := Finding{Key: dotted(path), Origin: v.from, Status: Unknown, Value: "{}"}
	if v.table == nil {
		f.Value = literal(v.leaf)
	} else if isSection(path) {
		f.Status, f.Reason = Honoured, "an empty section says nothing"
		return f
	}
	for _, known := range knownKeys() {
		if matches(known.path, path) {
			f.Status, f.Reason = known.status, known.reason
			return f
		}
	}
	f.Reason = "neither containerd 2.4 nor Holdfast has this key: check its spelling and the section that it stands in"
	if len(path) > 1 && path[0] == "plugins" && !isSection(path[:2]) {
		f.Reason = "neither containerd 2.4 nor Holdfast has a plugin of this name"
	}
	return f
}

// isSection says whether path is a table in which there are keys that
// containerd or Holdfast knows.
func isSection(path []string) bool {
	below := func(key []string) bool { return len(key) > len(path) && matches(key[:len(path)], path) }
	for _, b := range bindings {
		if below(b.path) {
			return true
		}
	}
	return slices.ContainsFunc(families, func(f family) bool { return below(f.path) }) ||
		slices.ContainsFunc(knownKeys(), func(k knownKey) bool { return below(k.path) })
}

// checkParts looks at the URIs of disabled_plugins or required_plugins.
func (c *Config) checkParts(key string, uris []string) []Finding {
	var found []Finding
	for _, uri := range uris {
		kind, served := servedParts()[uri]
		f := Finding{Key: key, Value: quoteString(uri), Origin: c.Origin(key), Status: Honoured}
		switch {
		case key == "required_plugins" && kind == "partial":
			f.Status, f.Reason = Later, "this Holdfast has only a part of it: the daemon refuses to start; take it out of the list, or stay with containerd"
		case key == "required_plugins" && served && !slices.Contains(c.Disabled, uri):
			f.Reason = "it is there"
		case key == "required_plugins" && served:
			f.Status, f.Reason = Later, "disabled_plugins takes it away: the daemon refuses to start"
		case key == "required_plugins":
			f.Status, f.Reason = Later, "this Holdfast doesn't have it: the daemon refuses to start; take it out of the list, or stay with containerd"
		case !served:
			f.Reason = "this Holdfast doesn't have it in any case"
		case kind != "fixed":
			f.Reason = "it is not offered"
		default:
			f.Status, f.Reason = Never, "it is a fixed part of Holdfast and stays"
		}
		found = append(found, f)
	}
	return found
}

// Offers says whether the part of the given plugin URI is to be offered: not
// if disabled_plugins names it. Only snapshotters and the kubelet's door can be
// left out.
func (c *Config) Offers(uri string) bool {
	return !slices.Contains(c.Disabled, uri) || servedParts()[uri] == "fixed"
}

// Refuse returns an error if the configuration says itself that the daemon
// must not start: required_plugins names what it wouldn't have.
func (c *Config) Refuse() error {
	var errs []error
	for _, f := range c.checkParts("required_plugins", c.Required) {
		if f.Status != Honoured {
			errs = append(errs, fmt.Errorf("%s: required_plugins has %s: %s", f.Origin, f.Value, f.Reason))
		}
	}
	return errors.Join(errs...)
}
