package config

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A line that sets a key. Elements of an array that goes over several lines have none.
var setting = regexp.MustCompile(`^\s*('[^']*'|"[^"]*"|[A-Za-z0-9_-]+) = `)

// TestEveryKeyOfContainerdIsAccountedFor gives `holdfastd config check` the
// defaults of containerd. Every key must be there once, honoured or with the
// reason why not, and none unknown.
func TestEveryKeyOfContainerdIsAccountedFor(t *testing.T) {
	dir := t.TempDir()
	holdfastd := filepath.Join(dir, "holdfastd")
	build := exec.Command("go", "build", "-o", holdfastd, "./cmd/holdfastd")
	build.Dir = "../../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build holdfastd: %v\n%s", err, out)
	}
	file := filepath.Join(dir, "containerd.toml")
	text := withoutImports(run(t, peer(t), "config", "default"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	report := run(t, holdfastd, "-c", file, "config", "check")
	if unknown := regexp.MustCompile(`(?m)^.* unknown  .*$`).FindAllString(report, -1); len(unknown) > 0 {
		t.Errorf("keys of containerd that nobody has heard of:\n%s", strings.Join(unknown, "\n"))
	}
	keys, number := 0, 0
	for line := range strings.Lines(text) {
		number++
		name := setting.FindStringSubmatch(line)
		if name == nil || name[1] == "version" {
			continue
		}
		keys++
		at := regexp.MustCompile(`(?m)^.*` + regexp.QuoteMeta(fmt.Sprintf("%s:%d", file, number)) + `( .*)?$`)
		switch found := at.FindAllString(report, -1); {
		case len(found) == 0:
			t.Errorf("line %d of containerd's defaults, %q, is not accounted for", number, strings.TrimSpace(line))
		case len(found) > 1:
			t.Errorf("line %d of containerd's defaults, %q, is accounted for %d times", number, strings.TrimSpace(line), len(found))
		case !strings.Contains(found[0], strings.Trim(name[1], `'"`)):
			t.Errorf("line %d of containerd's defaults, %q, is told as %q", number, strings.TrimSpace(line), found[0])
		}
	}
	if keys < 100 {
		t.Errorf("containerd's defaults have %d keys, which are too few to be all", keys)
	}
}
