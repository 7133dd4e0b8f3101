package image

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func id(hex string) digest.Digest {
	return digest.Digest("sha256:" + hex + strings.Repeat("0", 64-len(hex)))
}

// TestFind is the order in which names are read: a whole id, a reference, the
// beginning of an id.
func TestFind(t *testing.T) {
	a, b, c := id("abcd"), id("abce"), id("f00d")
	manifest := digest.FromString("manifest")
	all := []Image{
		{Names: []string{string(id("dead")), "broken:1"}}, // its documents can't be read
		{ID: a, Names: []string{"docker.io/library/app:1", "docker.io/library/app@" + manifest.String(), string(a)}},
		{ID: b, Names: []string{"app:1", "odd name", string(b)}},
		{ID: c, Names: []string{"docker.io/library/abcd:latest", "other"}},
	}
	for _, test := range []struct {
		name string
		want digest.Digest
		kind func(error) bool
	}{
		{string(a), a, nil},
		{"abcd", c, nil}, // a reference goes before an id
		{"abcd0", a, nil},
		{"sha256:abcd0", a, nil},
		{"sha256:abce", b, nil},
		{"f", c, nil},
		{"app:1", a, nil}, // what it is short for goes before what it says
		{"odd name", b, nil},
		{"app@" + manifest.String(), a, nil},
		{"app:7@" + manifest.String(), a, nil},
		{"docker.io/library/other", c, nil},
		{"broken:1", "", nil},
		{string(id("dead")), "", nil},
		{"dea", "", errdefs.IsNotFound},
		{"abc", "", errdefs.IsInvalidArgument},
		{"sha256:abc", "", errdefs.IsInvalidArgument},
		{"sha256:", "", errdefs.IsNotFound},
		{"sha512:abcd", "", errdefs.IsNotFound},
		{":abcd", "", errdefs.IsNotFound},
		{"ABCE", "", errdefs.IsNotFound},
		{manifest.String(), "", errdefs.IsNotFound},
		{"", "", errdefs.IsInvalidArgument},
	} {
		got, err := find(all, test.name)
		if test.kind != nil {
			if !test.kind(err) {
				t.Errorf("%q: %v", test.name, err)
			}
		} else if err != nil || got.ID != test.want || got.Names == nil {
			t.Errorf("%q: got %s, %v; want %s", test.name, got.ID, err, test.want)
		}
	}
}

// TestReferences: ids and odd names are neither tags nor digests.
func TestReferences(t *testing.T) {
	d := digest.FromString("x")
	img := Image{Names: []string{
		string(d), "busybox", "example.com/a:1", "example.com/a@" + d.String(), "example.com/a:1@" + d.String(), "example.com/bare", "not one", "UPPER",
	}}
	if got, want := img.Tags(), []string{"docker.io/library/busybox:latest", "example.com/a:1"}; !slices.Equal(got, want) {
		t.Errorf("tags %q, want %q", got, want)
	}
	if got, want := img.Digests(), []string{"example.com/a@" + d.String(), "example.com/a:1@" + d.String()}; !slices.Equal(got, want) {
		t.Errorf("digests %q, want %q", got, want)
	}
}

// TestUser: a name that is cut must not become no name, which means root.
func TestUser(t *testing.T) {
	for _, test := range []struct{ config, want string }{
		{"", ""}, {"0", "0 "}, {"1000", "1000 "}, {"1000:1000", "1000 "}, {"-1", "-1 "}, {"app", "app"}, {"app:0", "app"},
		{":5", ""}, {"99999999999999999999", "99999999999999999999"},
		{strings.Repeat("é", 500), strings.Repeat("é", 128)}, {"x" + strings.Repeat("é", 500), "x" + strings.Repeat("é", 127)},
	} {
		uid, name := user(test.config)
		got := name
		if uid != nil {
			got = fmt.Sprint(*uid, " ", name)
		}
		if got != test.want {
			t.Errorf("%.20q: got %q, want %q", test.config, got, test.want)
		}
	}
}

func FuzzFind(f *testing.F) {
	a := id("abcd")
	for _, seed := range []string{"", "app", "sha256:", "sha256:abcd", string(a), "a:1@sha256:0", "::", "sha256:sha256:"} {
		f.Add(seed)
	}
	all := []Image{{Names: []string{"broken"}}, {ID: a, Names: []string{"docker.io/library/app:latest", string(a)}}}
	f.Fuzz(func(t *testing.T, name string) {
		img, err := find(all, name)
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
		if name == "" && err == nil {
			t.Errorf("no name is %v", img)
		}
	})
}
