// Package house tests that the code is what house.txt says it is.
package house

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/holdfast-dev/holdfast"

// plan is what house.txt says.
type plan struct {
	rooms []room
	gates []gate
}

type room struct {
	name     string // the folder below internal/
	sentence string
}

type gate struct {
	kind, what string
	list       []string
}

func parsePlan(text string) (plan, error) {
	var p plan
	inGates := false
	for n, line := range strings.Split(text, "\n") {
		switch fields := strings.Fields(line); {
		case len(fields) == 0 || fields[0][0] == '#' || fields[0] == "floor":
		case line == "gates":
			inGates = true
		case inGates && fields[0] == "name":
			p.gates = append(p.gates, gate{kind: "name", list: fields[1:]})
		case inGates && len(fields) > 3 && fields[2] == ":" && slices.Contains([]string{"only", "deps", "nowhere"}, fields[0]):
			p.gates = append(p.gates, gate{kind: fields[0], what: fields[1], list: fields[3:]})
		case !inGates && len(fields) > 2 && line[0] == ' ':
			p.rooms = append(p.rooms, room{name: fields[0], sentence: strings.Join(fields[1:], " ")})
		default:
			return plan{}, fmt.Errorf("house.txt:%d: can't read %q", n+1, line)
		}
	}
	return p, nil
}

// source is one Go file.
type source struct {
	file    string // its path below the project's root
	folder  string // of the file
	name    string // of the package
	doc     string // the package comment, on one line
	isTest  bool
	imports []string
}

// sources reads the imports and package comments of every Go file below
// root, whatever build tags it has.
func sources(root string) ([]source, error) {
	var found []source
	err := filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := entry.Name()
		if entry.IsDir() && (name == "testdata" || name != "." && file != root && strings.HasPrefix(name, ".")) {
			return fs.SkipDir
		}
		if entry.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		found = append(found, newSource(filepath.ToSlash(rel), parsed))
		return nil
	})
	return found, err
}

func newSource(file string, parsed *ast.File) source {
	s := source{
		file: file, folder: path.Dir(file), name: parsed.Name.Name,
		isTest: strings.HasSuffix(file, "_test.go"),
		doc:    strings.Join(strings.Fields(parsed.Doc.Text()), " "),
	}
	for _, spec := range parsed.Imports {
		if imported, err := strconv.Unquote(spec.Path.Value); err == nil {
			s.imports = append(s.imports, imported)
		}
	}
	return s
}

// inspect says where the sources differ from the plan, one line each.
func (p plan) inspect(files []source) []string {
	var complaints []string
	complain := func(format string, args ...any) {
		complaints = append(complaints, fmt.Sprintf(format, args...))
	}
	place := make(map[string]int, len(p.rooms))
	for i, r := range p.rooms {
		if _, double := place[r.name]; double {
			complain("house.txt has %s twice", r.name)
		}
		place[r.name] = i
	}
	documented := make(map[string]bool)
	for _, s := range files {
		for _, g := range p.gates {
			if err := g.check(s); err != nil {
				complain("%s: %v", s.file, err)
			}
		}
		name, internal := strings.CutPrefix(s.folder, "internal/")
		if !internal || s.isTest {
			continue
		}
		at, known := place[name]
		if !known {
			complain("%s: internal/house.txt doesn't have %s: give it a line, below what it imports", s.file, name)
			continue
		}
		documented[name] = documented[name] || s.doc != ""
		if want := "Package " + s.name + " " + p.rooms[at].sentence + "."; s.doc != "" && s.doc != want && !strings.HasPrefix(s.doc, want+" ") {
			complain("%s: the package comment must begin %q", s.file, want)
		}
		for _, imported := range s.imports {
			below, ours := strings.CutPrefix(imported, module+"/internal/")
			if i, ok := place[below]; ours && (!ok || i >= at) {
				complain("%s: %s imports %s, which doesn't stand above it in internal/house.txt", s.file, name, below)
			}
			if ours && isTestSupport(below) && !isTestSupport(name) {
				complain("%s: %s is for tests", s.file, below)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(documented)) {
		if !documented[name] {
			complain("internal/%s has no package comment", name)
		}
	}
	return complaints
}

// isTestSupport is true for rooms such as snapshot/snapshottest.
func isTestSupport(name string) bool {
	return path.Base(name) == path.Base(path.Dir(name))+"test"
}

// check holds one file against one gate.
func (g gate) check(s source) error {
	switch g.kind {
	case "name":
		if slices.Contains(g.list, s.name) || slices.Contains(g.list, path.Base(s.folder)) {
			return fmt.Errorf("a package can't be called %s: name it for what it does", path.Base(s.folder))
		}
	case "only":
		name, internal := strings.CutPrefix(s.folder, "internal/")
		if internal && !s.isTest && slices.ContainsFunc(s.imports, g.covers) && !slices.ContainsFunc(g.list, func(p string) bool { return inPattern(name, p) }) {
			return fmt.Errorf("%s is only for %s", g.what, strings.Join(g.list, ", "))
		}
	case "nowhere":
		allowed := func(folder string) bool { return inPattern(s.folder, folder+"/...") }
		if slices.ContainsFunc(s.imports, g.covers) && !slices.ContainsFunc(g.list, allowed) {
			return fmt.Errorf("%s is only for %s/", g.what, strings.Join(g.list, "/, "))
		}
	}
	return nil
}

// covers says whether a gate is about an import.
func (g gate) covers(imported string) bool { return inPattern(imported, g.what+"/...") }

// inPattern is true for the pattern itself and, if it ends in /..., for all
// that lies below.
func inPattern(name, pattern string) bool {
	folder, deep := strings.CutSuffix(pattern, "/...")
	return name == folder || deep && strings.HasPrefix(name, folder+"/")
}

func readPlan(t *testing.T) plan {
	t.Helper()
	text, err := os.ReadFile("house.txt")
	if err != nil {
		t.Fatal(err)
	}
	p, err := parsePlan(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestHouse(t *testing.T) {
	files, err := sources("..")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Fatalf("found %d Go files: is this the project?", len(files))
	}
	for _, complaint := range readPlan(t).inspect(files) {
		t.Error(complaint)
	}
}

// TestDeps asks Go what the packages of the `deps` gates are built from.
func TestDeps(t *testing.T) {
	for _, g := range readPlan(t).gates {
		if g.kind != "deps" {
			continue
		}
		if _, err := os.Stat(filepath.Join("..", g.what)); os.IsNotExist(err) {
			t.Logf("%s is not built yet", g.what)
			continue
		}
		out, err := exec.Command("go", "list", "-deps", module+"/"+g.what).Output()
		if err != nil {
			t.Fatalf("go list -deps %s: %v", g.what, err)
		}
		for _, complaint := range forbidden(g, strings.Fields(string(out))) {
			t.Error(complaint)
		}
	}
}

func forbidden(g gate, deps []string) []string {
	var complaints []string
	for _, dep := range deps {
		if slices.ContainsFunc(g.list, func(p string) bool { return inPattern(dep, p+"/...") }) {
			complaints = append(complaints, fmt.Sprintf("%s is built with %s", g.what, dep))
		}
	}
	return complaints
}

// TestInspect shows each complaint once, so that TestHouse can fail.
func TestInspect(t *testing.T) {
	p, err := parsePlan(`
floor 0 words
  low      is the lowest
  low/wire carries protobuf
  low/lowtest tests low
floor 1
  high     stands on low
gates
  only example.com/pb : low/...
  nowhere example.com/theirs : test
  name util
`)
	if err != nil {
		t.Fatal(err)
	}
	const good = "// Package low is the lowest. It has more to say.\npackage low\n"
	for _, test := range []struct{ name, file, text, want string }{
		{"right", "internal/low/a.go", good, ""},
		{"downward", "internal/high/a.go", "// Package high stands on low.\npackage high\nimport _ \"" + module + "/internal/low\"", ""},
		{"gate open", "internal/low/wire/a.go", "// Package wire carries protobuf.\npackage wire\nimport _ \"example.com/pb/x\"", ""},
		{"tests may import upward", "internal/low/a_test.go", "package low\nimport _ \"" + module + "/internal/high\"", ""},
		{"test folder", "test/compat/a_test.go", "package compat\nimport _ \"example.com/theirs/v2\"", ""},
		{"missing", "internal/new/a.go", "// Package new is new.\npackage new", "doesn't have new"},
		{"upward", "internal/low/a.go", "// Package low is the lowest.\npackage low\nimport _ \"" + module + "/internal/high\"", "low imports high"},
		{"itself", "internal/low/a.go", "// Package low is the lowest.\npackage low\nimport _ \"" + module + "/internal/low\"", "low imports low"},
		{"test support", "internal/high/a.go", "// Package high stands on low.\npackage high\nimport _ \"" + module + "/internal/low/lowtest\"", "low/lowtest is for tests"},
		{"unknown import", "internal/high/a.go", "// Package high stands on low.\npackage high\nimport _ \"" + module + "/internal/other\"", "high imports other"},
		{"other sentence", "internal/low/a.go", "// Package low is quite low.\npackage low", `must begin "Package low is the lowest."`},
		{"longer sentence", "internal/low/a.go", "// Package low is the lowest of all.\npackage low", "must begin"},
		{"no comment", "internal/low/a.go", "package low", "internal/low has no package comment"},
		{"gate shut", "internal/low/a.go", good + "import _ \"example.com/pb\"", "example.com/pb is only for low/wire"},
		{"containerd inside", "cmd/x/a_test.go", "package main\nimport _ \"example.com/theirs/client\"", "example.com/theirs is only for test/"},
		{"name", "cmd/x/util/a.go", "package util", "can't be called util"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := p
			if test.name == "gate shut" {
				p.gates = slices.Clone(p.gates)
				p.gates[0].list = []string{"low/wire"}
			}
			file := filepath.Join(t.TempDir(), test.file)
			root := strings.TrimSuffix(file, "/"+test.file)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(test.text), 0o644); err != nil {
				t.Fatal(err)
			}
			files, err := sources(root)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(p.inspect(files), "\n")
			if test.want == "" && got != "" || !strings.Contains(got, test.want) {
				t.Errorf("complains %q, want %q", got, test.want)
			}
		})
	}
	if got := forbidden(gate{what: "cmd/shim", list: []string{"net/http"}}, []string{"net", "net/http", "net/http/internal"}); len(got) != 2 {
		t.Errorf("forbidden finds %q", got)
	}
	if _, err := parsePlan("gates\n  maybe x : y"); err == nil {
		t.Error("an unknown gate is accepted")
	}
}
