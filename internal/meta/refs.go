package meta

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// Which record needs which is said by the records' own fields (graph.go) and
// by labels. This file is the one place that knows the labels
// (COMPATIBILITY §3.1). A label names a record of the bearer's own namespace.

const (
	labelPrefix  = "containerd.io/gc."
	labelExpire  = labelPrefix + "expire"
	labelFlat    = labelPrefix + "flat"
	labelRoot    = labelPrefix + "root" // a prefix: containerd takes gc.rootfoo for a root too
	labelUsedAt  = labelPrefix + "cond.value-usedat"
	refSnapshot  = keySnapshots + "/"
	refContainer = keyContainers
)

// Direction says which end of a Reference needs the other.
type Direction uint8

const (
	// Forward: while the bearer of the label lives, the target does.
	Forward Direction = iota
	// Back: while the target lives, the bearer does.
	Back
	// Conditional: as Forward, while the target was used at a time that the
	// label asks for.
	Conditional
)

// Reference is what one label says about the record that bears it.
type Reference struct {
	Label     string // its key
	Direction Direction
	Type      string // of the target: content, images, containers, snapshots/<driver>
	ID        string // of the target, in the bearer's namespace

	used []usedAt
}

// references maps the prefixes of labels to references. After a prefix comes
// nothing, or `.` or `/` and any name. When the type ends in a slash, the
// driver's name follows the prefix, up to a slash.
var references = []struct {
	prefix    string
	direction Direction
	typ       string
}{
	{labelPrefix + "ref.content", Forward, keyContent},
	{labelPrefix + "ref.image", Forward, keyImages},
	{labelPrefix + "ref.snapshot.", Forward, refSnapshot},
	{labelPrefix + "bref.container", Back, refContainer},
	{labelPrefix + "bref.content", Back, keyContent},
	{labelPrefix + "bref.image", Back, keyImages},
	{labelPrefix + "bref.snapshot.", Back, refSnapshot},
	{labelPrefix + "cond.snapshot", Conditional, refSnapshot},
}

// References lists what labels refer to, in the order of their keys. Labels
// that refer to what we don't collect (streams, mounts) aren't listed.
func References(labels map[string]string) (all []Reference) {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		if r, ok := parseReference(k, labels[k]); ok {
			all = append(all, r)
		}
	}
	return all
}

func parseReference(key, value string) (Reference, bool) {
	if !strings.HasPrefix(key, labelPrefix) {
		return Reference{}, false
	}
	for _, rule := range references {
		rest, ok := strings.CutPrefix(key, rule.prefix)
		if !ok {
			continue
		}
		r := Reference{Label: key, Direction: rule.direction, Type: rule.typ, ID: value}
		switch {
		case rule.direction == Conditional:
			return r.conditional(rest)
		case rule.typ == refSnapshot:
			driver, _, _ := strings.Cut(rest, "/")
			r.Type += driver
			return r, driver != ""
		default:
			return r, rest == "" || rest[0] == '.' || rest[0] == '/'
		}
	}
	return Reference{}, false
}

// conditional reads `<condition>[,<condition>...]|<key>`; any condition will
// do. There is only usedat, with < or > and a duration; others never hold.
func (r Reference) conditional(rest string) (Reference, bool) {
	driver, _, _ := strings.Cut(strings.TrimLeft(rest, "./"), "/")
	conditions, key, ok := strings.Cut(r.ID, "|")
	if !ok || driver == "" {
		return Reference{}, false
	}
	r.Type, r.ID = r.Type+driver, key
	for c := range strings.SplitSeq(conditions, ",") {
		if u, ok := parseUsedAt(c); ok {
			r.used = append(r.used, u)
		}
	}
	return r, len(r.used) > 0
}

// usedAt is the condition that something was used less, or more, than a
// duration ago.
type usedAt struct {
	ago  time.Duration
	more bool
}

func parseUsedAt(s string) (u usedAt, ok bool) {
	rest, ok := strings.CutPrefix(s, "usedat")
	if !ok || len(rest) < 2 || rest[0] != '<' && rest[0] != '>' {
		return u, false
	}
	d, err := time.ParseDuration(rest[1:])
	return usedAt{ago: d, more: rest[0] == '>'}, err == nil
}

// holds reports whether the condition of a Conditional reference is true of a
// target that was used at that time.
func (r Reference) holds(used, now time.Time) bool {
	return slices.ContainsFunc(r.used, func(u usedAt) bool {
		if u.more {
			return now.Sub(used) > u.ago
		}
		return now.Sub(used) < u.ago
	})
}

// isRoot reports whether a label makes the blob or snapshot that bears it a
// root.
func isRoot(key string) bool { return strings.HasPrefix(key, labelRoot) }

// expired reports whether the time in gc.expire has passed. What isn't a time
// is taken as never, as containerd does.
func expired(labels bucket, now time.Time) bool {
	t, err := time.Parse(time.RFC3339, labels.text(labelExpire))
	return err == nil && now.After(t)
}
