package auth

import (
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
)

func TestChallenges(t *testing.T) {
	bearer := map[string]string{"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"}
	for _, tc := range []struct {
		name  string
		lines []string
		want  []Challenge
	}{
		{"docker's", []string{`Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"`}, []Challenge{{"bearer", bearer}}},
		{"spaces and case", []string{`  bEARER  Realm = "https://a/t" , Service=s ,  scope="repository:x:pull,push" ,`}, []Challenge{{"bearer", bearer}}},
		{"basic after bearer", []string{`Basic realm="b"`, `Bearer realm="r"`},
			[]Challenge{{"bearer", map[string]string{"realm": "r"}}, {"basic", map[string]string{"realm": "b"}}}},
		{"several in one line", []string{`Negotiate, Basic realm="b", Bearer realm="r",service="s"`},
			[]Challenge{{"bearer", map[string]string{"realm": "r", "service": "s"}}, {"basic", map[string]string{"realm": "b"}}, {"negotiate", map[string]string{}}}},
		{"token68", []string{`Negotiate YWJj==, Basic realm="b"`},
			[]Challenge{{"basic", map[string]string{"realm": "b"}}, {"negotiate", map[string]string{"ywjj": ""}}}},
		{"escapes", []string{`Basic realm="a\"b\\c, d=e"`}, []Challenge{{"basic", map[string]string{"realm": `a"b\c, d=e`}}}},
		{"the first of two values", []string{`Basic realm="a",realm="b"`}, []Challenge{{"basic", map[string]string{"realm": "a"}}}},
		{"unclosed quote", []string{`Basic realm="a`}, []Challenge{{"basic", map[string]string{"realm": ""}}}},
		{"backslash at the end", []string{`Basic realm="a\`}, []Challenge{{"basic", map[string]string{"realm": ""}}}},
		{"parameter of nothing", []string{`realm="a"`}, nil},
		{"junk", []string{`"`, ``, `@`, `=`}, nil},
	} {
		got := Challenges(http.Header{"Www-Authenticate": tc.lines})
		if !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestChallengesAreBounded(t *testing.T) {
	var params strings.Builder
	for i := range 10 * maxParams {
		fmt.Fprintf(&params, ",p%d=x", i)
	}
	got := Challenges(http.Header{"Www-Authenticate": {strings.Repeat("Basic ", 10*maxChallenges), "Bearer " + params.String()}})
	if len(got) != maxChallenges {
		t.Errorf("%d challenges", len(got))
	}
	got = Challenges(http.Header{"Www-Authenticate": {"Bearer " + params.String()}})
	if len(got) != 1 || len(got[0].Params) != maxParams {
		t.Errorf("%d challenges, %d parameters", len(got), len(got[0].Params))
	}
}

func FuzzChallenges(f *testing.F) {
	for _, seed := range []string{`Bearer realm="https://a/t",service="s"`, `Negotiate YQ==, Basic realm="\"`, `a=b, c d=`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		got := Challenges(http.Header{"Www-Authenticate": {line}})
		if len(got) > maxChallenges {
			t.Fatalf("%d challenges", len(got))
		}
		for _, c := range got {
			if c.Scheme == "" || c.Scheme != strings.ToLower(c.Scheme) || len(c.Params) > maxParams {
				t.Fatalf("%q", c)
			}
			for _, v := range c.Params {
				if len(v) > len(line) {
					t.Fatalf("a value longer than the header: %q", c)
				}
			}
		}
	})
}
