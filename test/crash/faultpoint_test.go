package crash

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/test/harness"
)

// TestKillAtEveryFaultPoint kills the daemon at each fault.Point of the source, while
// the script (script_test.go) leads it there. Started again it is sound, does
// everything the script asks for, and can be emptied to the last file.
//
// A new point needs no change here, unless no step of the script passes it.
func TestKillAtEveryFaultPoint(t *testing.T) {
	harness.NeedRoot(t)
	w := newWorld(t, newSeed(t))
	passes := []int{1}
	if *thorough {
		passes = []int{1, 2, 5}
	}
	for _, name := range faultPoints(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, pass := range passes {
				if !t.Run(fmt.Sprint(pass), func(t *testing.T) { killAt(t, w, name, pass) }) {
					return
				}
			}
		})
	}
}

// killAt kills the daemon when it passes a point for the n-th time since it started.
func killAt(t *testing.T, w *world, name string, pass int) {
	s := newScript(t, w)
	s.opts.Fault = fmt.Sprintf("%s#%d=kill", name, pass)
	step := s.run()
	switch {
	case step == "" && pass == 1:
		t.Fatalf("no step of the script passes fault.Point(%q): add one to script_test.go", name)
	case step == "":
		t.Logf("the script passes the point less than %d times", pass)
		return
	}
	t.Logf("killed in step %q", step)
	s.registry.Release()

	s.opts.Fault = ""
	d := harness.Start(t, s.opts)
	checkStore(t, d)
	checkHeld(t, d)
	for i, img := range s.images {
		pull(t, d, img, s.refs[i])
	}
	if err := d.Pull(s.refs[0], "--snapshotter", "native"); err != nil {
		t.Errorf("pull into the native snapshotter: %v", err)
	}
	dropAll(t, d)
	checkStore(t, d)
	d.Stop(t)
}

// TestScript runs the script without any fault.
func TestScript(t *testing.T) {
	harness.NeedRoot(t)
	s := newScript(t, newWorld(t, newSeed(t)))
	if step := s.run(); step != "" {
		t.Fatalf("the daemon died in step %q", step)
	}
	checkStore(t, s.daemon)
	dropAll(t, s.daemon)
	s.daemon.Stop(t)
}

// faultPoints returns the names of all points in the source, sorted. Each must be a
// literal and stand once.
func faultPoints(t *testing.T) []string {
	t.Helper()
	source, err := harness.Source()
	if err != nil {
		t.Fatal(err)
	}
	seen := make(map[string]token.Position)
	var names []string
	files := token.NewFileSet()
	visit := func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(node ast.Node) bool {
			call, ok := node.(*ast.CallExpr)
			if !ok || !isPoint(call) {
				return true
			}
			at := files.Position(call.Pos())
			literal, ok := call.Args[0].(*ast.BasicLit)
			if !ok || literal.Kind != token.STRING {
				t.Errorf("%s: the name of a fault point is not a literal", at)
				return true
			}
			name, _ := strconv.Unquote(literal.Value)
			if first, ok := seen[name]; ok {
				t.Errorf("%s: fault point %q stands also at %s", at, name, first)
				return true
			}
			seen[name] = at
			names = append(names, name)
			return true
		})
		return nil
	}
	for _, dir := range []string{"internal", "cmd"} {
		if err := filepath.WalkDir(filepath.Join(source, dir), visit); err != nil {
			t.Fatal(err)
		}
	}
	if len(names) == 0 {
		t.Fatal("the source has no fault points")
	}
	slices.Sort(names)
	return names
}

func isPoint(call *ast.CallExpr) bool {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != "Point" || len(call.Args) != 1 {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && pkg.Name == "fault"
}

// deathNotice is how long the kernel may need to tell us of a death that a call has already felt.
const deathNotice = 2 * time.Second

// killed reports whether a daemon was killed by its own fault. After a call
// has failed it waits a moment for the process to be gone.
func killed(d *harness.Daemon, callErr error) bool {
	if callErr != nil {
		select {
		case <-d.Done():
		case <-time.After(deathNotice):
		}
	}
	return d.KilledBy() == syscall.SIGKILL
}
