package filter

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// object is something to list: a name, a number of uses and labels.
type object struct {
	name, uses string
	labels     map[string]string
}

func (o object) Field(path []string) (string, bool) {
	switch path[0] {
	case "name":
		return o.name, o.name != ""
	case "uses":
		return o.uses, o.uses != ""
	case "labels":
		return Label(o.labels, path[1:])
	}
	return "", false
}

var objects = []object{
	{name: "docker.io/library/alpine:3.20.1", uses: "2", labels: map[string]string{"a": "true", "io.cri/managed": "yes"}},
	{name: "busybox", labels: map[string]string{"a": "", "a.b.c": "deep", `quo"te\`: "q"}},
	{name: "a, b", uses: "été", labels: map[string]string{"x\xffy": "byte"}},
	{name: "sha256:0=1!", uses: `/\|"`},
	{},
}

// list shows which of the objects pass, as a string of their indexes.
func list(f Filter) string {
	var b strings.Builder
	for i, o := range objects {
		if f.Match(o) {
			b.WriteByte(byte('0' + i))
		}
	}
	return b.String()
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		want    string
		filters []string
	}{
		{"01234", nil},
		{"01234", []string{""}},
		{"0123", []string{"name"}},
		{"01", []string{"labels.a"}},
		{"0", []string{"labels.a==true"}},
		{"1", []string{`labels.a==""`}},
		{"1", []string{"labels.a.b.c"}},
		{"1", []string{`labels."a.b".c==deep`}},
		{"0", []string{`labels."io.cri/managed"==yes`}},
		{"0", []string{`labels.io."cri/managed"==yes`}},
		{"1", []string{`labels."quo\"te\\"`}},
		{"2", []string{`labels."x\xffy"`}},
		{"2", []string{`labels."x\377y"`}},
		{"0", []string{"name==docker.io/library/alpine:3.20.1"}},
		{"3", []string{"name==sha256:0=1!"}},
		{"2", []string{`name=="a, b"`}},
		{"2", []string{`uses==été`}},
		{"2", []string{`uses=="\u00e9t\U000000E9"`}},
		{"3", []string{`uses=="/\\|\""`}},
		{"1234", []string{"uses!=2"}},
		{"023", []string{`uses!=""`}},
		{"01234", []string{"absent!=x"}},
		{"", []string{`absent!=""`}},
		{"", []string{"absent"}},
		{"01", []string{"name~=^(docker|busy)"}},
		{"01", []string{"name~=/^(docker|busy)/"}},
		{"2", []string{"name~=|^a, b$|"}},
		{"0", []string{`name~=/docker\\.io\/.*:3/`}},
		{"3", []string{`uses~=/\//`}},
		{"3", []string{`uses~=|\||,name~=sha`}},
		{"01234", []string{"absent~=^$"}},
		{"", []string{"name~=["}},
		{"", []string{`name~="a{2000}"`}},
		{"0", []string{"name,uses==2"}},
		{"0", []string{" name, uses ==\t2"}},
		{"01", []string{"name==busybox", "uses==2"}},
		{"01234", []string{"name==busybox", ""}},
	} {
		f, err := Parse(c.filters...)
		if err != nil {
			t.Errorf("%q: %v", c.filters, err)
			continue
		}
		if got := list(f); got != c.want {
			t.Errorf("%q lists %q, want %q", c.filters, got, c.want)
		}
	}
}

func TestParseSaysWhatIsWrong(t *testing.T) {
	for in, want := range map[string]string{
		"name==foo,":         `byte 11: expected a field`,
		"labels.":            `byte 8: expected a field`,
		",name":              `byte 1: expected a field`,
		" ":                  `byte 2: expected a field`,
		"labels.?x":          `byte 8: expected a field`,
		"labels.|x|==y":      `byte 8: expected a field`,
		"labels.a/b==c":      `byte 9: expected ==, != or ~= after a field`,
		"name=x":             `byte 5: expected ==, != or ~=`,
		"name===x":           `byte 5: expected ==, != or ~=`,
		"name x":             `byte 6: expected ==, != or ~=`,
		"name ,uses":         `byte 6: expected ==, != or ~=`,
		"name==":             `byte 7: expected a value`,
		"name==,uses":        `byte 7: expected a value`,
		"name== =x":          `byte 8: expected a value`,
		"name==.x":           `byte 7: expected a value`,
		"name==/x/":          `byte 7: a value that begins with / needs double quotes`,
		"name==x ,uses":      `byte 8: unexpected ' '`,
		`name=="x"y`:         `byte 10: unexpected 'y'`,
		"name==x\x01":        `byte 8: unexpected '\x01'`,
		`name=="x`:           `byte 7: the quoted part has no end`,
		`name=="x\`:          `byte 9: the quoted part has no end`,
		"name==\"x\ny\"":     `byte 7: the quoted part has no end`,
		`name~=/x`:           `byte 7: the quoted part has no end`,
		`name=="\q"`:         `byte 8: no such escape`,
		`name=="\'"`:         `byte 8: no such escape`,
		`name~=/\"/`:         `byte 8: no such escape`,
		`name=="\400"`:       `byte 8: no such escape`,
		`name=="\U00110000"`: `byte 8: no such escape`,
		`name=="\x4"`:        `byte 8: an escape has too few digits`,
		`name=="\08"`:        `byte 8: an escape has too few digits`,
		"name==x\x00":        `byte 8: a filter is UTF-8 text`,
		"name==\xff":         `byte 7: a filter is UTF-8 text`,
	} {
		_, err := Parse("name", in)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want %s", in, err, want)
		}
	}
}

func TestParseIsBounded(t *testing.T) {
	long := strings.Repeat("x", MaxExpression)
	for name, c := range map[string]struct {
		ok      bool
		filters []string
	}{
		"bytes":                      {true, []string{strings.Repeat("x", MaxBytes)}},
		"too many bytes":             {false, []string{strings.Repeat("x", MaxBytes), "x"}},
		"expressions":                {true, []string{strings.Repeat(",name~=x", MaxExpressions)[1:]}},
		"too many expressions":       {false, []string{strings.Repeat(",name~=x", MaxExpressions)[1:], "name~=x"}},
		"long expression":            {true, []string{"name~=" + long}},
		"too long expression":        {false, []string{"name~=" + long + "x"}},
		"an error is short":          {false, []string{strings.Repeat("x", MaxBytes-1) + "?"}},
		"values have no such bounds": {true, []string{"name==" + long + long}},
	} {
		_, err := Parse(c.filters...)
		if c.ok != (err == nil) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && len(err.Error()) > 1000 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
}

// FuzzParse checks that a filter, or its error, is well formed, and that a
// filter means the same after white space and when doubled.
func FuzzParse(f *testing.F) {
	for _, in := range []string{
		"", "name", "name==x", `labels."a/b"!="\x41\u00e9"`, "name~=/^a|b$/,uses", "name~=|a/b|", "a.b.c==d,e", `x=="\U0010ffff`,
	} {
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in string) {
		flt, err := Parse(in)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v", err)
			}
			return
		}
		if in == "" {
			return
		}
		for _, same := range []string{" " + in, in + "," + in} {
			other, err := Parse(same)
			if err != nil {
				if strings.Count(same, "~") > MaxExpressions || len(same) > MaxBytes {
					continue
				}
				t.Fatalf("%q: %v", same, err)
			}
			if list(other) != list(flt) {
				t.Errorf("%q lists %q, %q lists %q", in, list(flt), same, list(other))
			}
		}
	})
}
