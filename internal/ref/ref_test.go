package ref

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const sum = "b89d9c93e9ed3597455c90a0b88a8bbb5cb7188438f70953fede212a0c4394e0"

const sha512 = "sha512:" + sum + sum

var dgst = digest.NewDigestFromEncoded(digest.SHA256, sum)

func TestParse(t *testing.T) {
	for in, want := range map[string]Reference{
		"docker.io/library/alpine:3.20.1":               {"docker.io", "library/alpine", "3.20.1", ""},
		"docker.io/library/alpine":                      {"docker.io", "library/alpine", "", ""},
		"docker.io/library/alpine@sha256:" + sum:        {"docker.io", "library/alpine", "", dgst},
		"docker.io/library/alpine:3.20.1@sha256:" + sum: {"docker.io", "library/alpine", "3.20.1", dgst},
		"localhost:5000/x:_tag":                         {"localhost:5000", "x", "_tag", ""},
		"127.0.0.1:5000/a/b/c-d__e.f:v1.0-rc.1":         {"127.0.0.1:5000", "a/b/c-d__e.f", "v1.0-rc.1", ""},
		"[::1]:5000/x:y":                                {"[::1]:5000", "x", "y", ""},
		"[fe80::1]/x:y":                                 {"[fe80::1]", "x", "y", ""},
		"alpine/latest":                                 {"alpine", "latest", "", ""}, // at its word: a host
		"host/Upper:Case":                               {"host", "Upper", "Case", ""},
		"host/" + strings.Repeat("p", 255):              {"host", strings.Repeat("p", 255), "", ""},
		"host/p:" + strings.Repeat("t", 128):            {"host", "p", strings.Repeat("t", 128), ""},
		"h/p@" + sha512:                                 {"h", "p", "", digest.Digest(sha512)},
	} {
		got, err := Parse(in)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
		if got.String() != in {
			t.Errorf("%q reads back as %q", in, got)
		}
	}
}

func TestParseSaysWhatToWrite(t *testing.T) {
	for in, want := range map[string]string{
		"":                                      "it is empty; write one like docker.io/library/alpine:latest",
		"alpine":                                "write it in full, as in docker.io/library/alpine",
		"alpine:latest":                         "write it in full, as in docker.io/library/alpine:latest",
		"https://docker.io/library/alpine":      "leave out the scheme",
		"/library/alpine":                       "it names no registry",
		":5000/x":                               "it names no registry",
		"docker.io/":                            "it names no repository",
		"docker.io/:tag":                        "it names no repository",
		"host:/x":                               `port "" is no number`,
		"host:http/x":                           `port "http" is no number`,
		"host:65536/x":                          `port "65536" is no number`,
		"user:pw@host/x":                        `port "pw@host" is no number`,
		"user@host/x":                           `'@' can't stand in the name of a registry`,
		"ho st/x":                               `' ' can't stand`,
		"[::1/x":                                `'[' can't stand`,
		"[g::]/x":                               `'g' can't stand`,
		"[]/x":                                  `'[' can't stand`,
		"host/../other:x":                       `".." can't stand between slashes`,
		"host/a/./b":                            `"." can't stand between slashes`,
		"host/a//b":                             `"" can't stand between slashes`,
		"host/a/":                               `"" can't stand between slashes`,
		"host/a?x=y:z":                          `'?' can't stand in the repository's name`,
		"host/a%2f..":                           `'%' can't stand in the repository's name`,
		"host/a\x00":                            `'\x00' can't stand`,
		"host/a:":                               "a tag has 1 to 128 characters, not 0",
		"host/a:@sha256:" + sum:                 "a tag has 1 to 128 characters, not 0",
		"host/a:b:c":                            `':' can't stand at byte 2 of the tag`,
		"host/a:-b":                             `'-' can't stand at byte 1 of the tag`,
		"host/a:b/c":                            `'/' can't stand at byte 2 of the tag`,
		"host/a@":                               "after @ comes a whole digest",
		"host/a@sha256:" + sum[:12]:             "after @ comes a whole digest",
		"host/a@sha1:" + sum[:40]:               "after @ comes a whole digest",
		"host/a@sha256:" + strings.ToUpper(sum): "after @ comes a whole digest",
		"host/a:b@" + sum:                       "after @ comes a whole digest",
		"host/a@sha256:" + sum + "@x":           "after @ comes a whole digest",
		"host/" + strings.Repeat("p", 256):      "longer than 255 bytes",
		strings.Repeat("h", 256) + "/p":         "longer than 255 bytes",
		"host/p:" + strings.Repeat("t", 129):    "1 to 128 characters, not 129",
		"h/" + strings.Repeat("p", MaxLength):   "longer than 1024 bytes",
	} {
		got, err := Parse(in)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v; want %q", in, got, err, want)
		}
		if err != nil && len(err.Error()) > 500 {
			t.Errorf("%q: an error of %d bytes", in, len(err.Error()))
		}
	}
}

func TestNormalize(t *testing.T) {
	for in, want := range map[string]string{
		"alpine":                         "docker.io/library/alpine:latest",
		"alpine:3.20.1":                  "docker.io/library/alpine:3.20.1",
		"alpine@sha256:" + sum:           "docker.io/library/alpine@sha256:" + sum,
		"alpine:3.20.1@sha256:" + sum:    "docker.io/library/alpine@sha256:" + sum,
		"user/image":                     "docker.io/user/image:latest",
		"docker.io/alpine":               "docker.io/library/alpine:latest",
		"index.docker.io/library/alpine": "docker.io/library/alpine:latest",
		"localhost/x":                    "localhost/x:latest",
		"localhost:5000/x:y":             "localhost:5000/x:y",
		"registry.k8s.io/pause:3.10":     "registry.k8s.io/pause:3.10",
		"[::1]:5000/x":                   "[::1]:5000/x:latest",
	} {
		got, err := Normalize(in)
		if err != nil || got.String() != want {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"", "Alpine", sum, "a b", "https://docker.io/library/alpine", "alpine:", "x/../y", strings.Repeat("x", MaxLength+1)} {
		if got, err := Normalize(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v; want ErrInvalidArgument", in, got, err)
		}
	}
}

func TestParts(t *testing.T) {
	for in, want := range map[string]string{
		"h/p":                 "",
		"h/p:t":               "t",
		"h/p@sha256:" + sum:   "sha256:" + sum,
		"h/p:t@sha256:" + sum: "t@sha256:" + sum,
	} {
		r, err := Parse(in)
		if err != nil || r.Object() != want || r.Locator() != "h/p" {
			t.Errorf("%q: object %q, locator %q, %v", in, r.Object(), r.Locator(), err)
		}
	}
}

// FuzzParse: what parses is written as it was read, and stays within the
// registry's part of a URL; what normalises stays what it is.
func FuzzParse(f *testing.F) {
	for _, in := range []string{"alpine", "docker.io/library/alpine:3.20.1", "[::1]:5000/a/b@sha256:" + sum, "h/p:t@sha256:" + sum, "h/../p", "h:1/p?x#y"} {
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in string) {
		if r, err := Parse(in); err == nil {
			if r.String() != in {
				t.Errorf("%q reads back as %q", in, r)
			}
			if r.Host == "" || r.Path == "" || strings.ContainsAny(r.Host+r.Path, "?#%@\\ ") || strings.Contains("/"+r.Path+"/", "/../") {
				t.Errorf("%q: %+v", in, r)
			}
		} else if !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}
		r, err := Normalize(in)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Error(err)
			}
			return
		}
		if again, err := Normalize(r.String()); err != nil || again != r {
			t.Errorf("%q: %q, then %q, %v", in, r, again, err)
		}
		if r.Object() == "" || r.Tag != "" && r.Digest != "" {
			t.Errorf("%q: %+v", in, r)
		}
	})
}
