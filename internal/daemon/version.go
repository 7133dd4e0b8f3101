package daemon

import (
	"cmp"
	"strings"
)

// containerdRelease is the release of containerd whose API and layout on disk
// are ours. Clients compare it.
const containerdRelease = "2.4.2"

// own is this program's version without the `v` of its tag, in characters that
// may stand in a semantic version's build metadata and in an HTTP token.
func (b Build) own() string {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= '0' && r <= '9', r >= 'A' && r <= 'Z', r >= 'a' && r <= 'z', r == '-', r == '.':
			return r
		}
		return '-'
	}, strings.TrimPrefix(b.Version, "v"))
	parts := strings.FieldsFunc(clean, func(r rune) bool { return r == '.' }) // none may be empty
	return cmp.Or(strings.Join(parts, "."), "dev")
}

// api is the version that clients get: a semantic version that compares as
// containerd's, with our own after the plus sign.
func (b Build) api() string { return "v" + containerdRelease + "+holdfast." + b.own() }
