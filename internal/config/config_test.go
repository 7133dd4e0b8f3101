package config

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// write makes files under a new directory and returns the path of the first.
func write(t *testing.T, files ...string) string {
	t.Helper()
	dir := t.TempDir()
	for i := 0; i < len(files); i += 2 {
		path := filepath.Join(dir, files[i])
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(files[i+1]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, files[0])
}

func load(t *testing.T, files ...string) *Config {
	t.Helper()
	c, err := Load(write(t, files...), Flags{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func finding(c *Config, key string) (Finding, bool) {
	found := c.Check()
	i := slices.IndexFunc(found, func(f Finding) bool { return f.Key == key })
	if i < 0 {
		return Finding{}, false
	}
	return found[i], true
}

func TestDefaults(t *testing.T) {
	c := load(t, "config.toml", "version = 4\n")
	want := Config{
		Root: "/var/lib/containerd", State: "/run/containerd",
		GRPC:     GRPC{Address: "/run/containerd/containerd.sock", MaxRecvMessage: 16 << 20, MaxSendMessage: 16 << 20},
		Metadata: Metadata{ContentSharing: "shared"},
		GC:       GC{PauseThreshold: 0.02, MutationThreshold: 100, StartupDelay: 100 * time.Millisecond},
		Overlay:  Overlay{MountOptions: []string{}},
		Pull:     Pull{MaxConcurrentDownloads: 3},
		CRI: CRI{
			Snapshotter: "overlayfs", Snapshotters: map[string]string{}, MaxConcurrentDownloads: 3,
			PullProgressTimeout: 5 * time.Minute, PinnedImages: map[string]string{"sandbox": "registry.k8s.io/pause:3.10.2"},
		},
		OptPath:  "/opt/containerd",
		Disabled: []string{}, Required: []string{},
	}
	got := *c
	got.tree, got.noted, got.Documents = nil, nil, nil
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if dirs := c.Registry.Dirs(); !slices.Equal(dirs, []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}) {
		t.Errorf("registry directories %q", dirs)
	}
	for _, f := range c.Check() {
		if f.Status != Honoured || f.Origin.String() != "default" {
			t.Errorf("an empty document has the finding %+v", f)
		}
	}
}

// TestDefaultDocument holds default.toml and the bindings together: each key
// of the one is in the other.
func TestDefaultDocument(t *testing.T) {
	tree, err := parseDocument([]byte(Default()), "default.toml")
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]bool{"version": true, "imports": true}
	for _, b := range bindings {
		keys[joinPath(b.path)] = true
		if tree.lookup(b.path...) == nil {
			t.Errorf("default.toml doesn't have %s", dotted(b.path))
		}
	}
	inFamily := func(path []string) bool {
		return slices.ContainsFunc(families, func(f family) bool { return matches(f.path, path) })
	}
	for path := range tree.leaves(nil) {
		if !keys[joinPath(path)] && !inFamily(path) {
			t.Errorf("default.toml has %s, which isn't bound", dotted(path))
		}
	}
}

// TestContainerdDefaults reads what `containerd config default` of 2.4.2
// prints: we know every key, and have the same default for each that we honour.
func TestContainerdDefaults(t *testing.T) {
	data, err := os.ReadFile("testdata/containerd-2.4.2-default.toml")
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := load(t, "config.toml", string(data)), load(t, "config.toml", "version = 4")
	for _, f := range theirs.Check() {
		if f.Status == Unknown {
			t.Errorf("unknown: %+v", f)
		}
		if f.Status != Honoured && f.Reason == "" {
			t.Errorf("no reason: %+v", f)
		}
	}
	for _, b := range bindings {
		got, want := reflect.ValueOf(b.field(theirs)).Elem().Interface(), reflect.ValueOf(b.field(ours)).Elem().Interface()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: containerd's default is %v, ours %v", dotted(b.path), got, want)
		}
		if theirs.Origin(b.path...).File == "" {
			t.Errorf("containerd 2.4.2 doesn't have %s", dotted(b.path))
		}
	}
	for _, f := range families {
		if got, want := *f.field(theirs), *f.field(ours); !maps.Equal(got, want) {
			t.Errorf("%s: containerd's default is %v, ours %v", dotted(f.path), got, want)
		}
	}
}

// TestCheckGolden shows what `holdfastd config check` says about an old
// document with mistakes.
func TestCheckGolden(t *testing.T) {
	data, err := os.ReadFile("testdata/kubeadm-v2.toml")
	if err != nil {
		t.Fatal(err)
	}
	path := write(t, "config.toml", string(data))
	c, err := Load(path, Flags{State: "/run/other"})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, f := range c.Check() {
		if f.Origin == (Origin{}) {
			continue
		}
		fmt.Fprintf(&b, "%s = %s\n    %s (%s): %s: %s\n", f.Key, f.Value, strings.ReplaceAll(f.Origin.String(), path, "config.toml"), f.Origin.Key, f.Status, f.Reason)
	}
	const golden = "testdata/kubeadm-v2.check"
	if *rewrite {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("check says other than %s (run with -rewrite and look):\n%s", golden, b.String())
	}
}

func TestValues(t *testing.T) {
	const cri = "io.containerd.grpc.v1.cri"
	for _, test := range []struct {
		name  string
		files []string
		get   func(*Config) any
		want  any
	}{
		{"absent version is 1", []string{"c", "[plugins.scheduler]\nmutation_threshold = 7"}, func(c *Config) any { return c.GC.MutationThreshold }, 7},
		{"version 1 disables by short name", []string{"c", "disabled_plugins = ['cri', 'native', 'tasks-service']"}, func(c *Config) any { return c.Disabled },
			[]string{cri, native, "io.containerd.service.v1.tasks-service"}},
		{"version 3 socket", []string{"c", "version = 3\n[grpc]\naddress = '/a'\nuid = 5"}, func(c *Config) any { return [2]any{c.GRPC.Address, c.GRPC.UID} }, [2]any{"/a", 5}},
		{"version 3 socket loses to the plugin", []string{"c", "version = 3\n[grpc]\naddress = '/a'\n[plugins.'io.containerd.server.v1.grpc']\naddress = '/b'"}, func(c *Config) any { return c.GRPC.Address }, "/b"},
		{"version 4 has no [grpc]", []string{"c", "version = 4\n[grpc]\naddress = '/a'"}, func(c *Config) any { return c.GRPC.Address }, "/run/containerd/containerd.sock"},
		{"version 2 registry", []string{"c", "version = 2\n[plugins.'" + cri + "'.registry]\nconfig_path = '/x:/y'"}, func(c *Config) any { return c.Registry.Dirs() }, []string{"/x", "/y"}},
		{"transfer's registry first", []string{"c", "version = 4\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/x'\n[plugins.'io.containerd.transfer.v1.local']\nconfig_path = '/y'"}, func(c *Config) any { return c.Registry.Dirs() }, []string{"/y"}},
		{"imports override, breadth first", []string{
			"c", "version = 4\nroot = '/1'\nimports = ['d/*.toml', 'last.toml']",
			"d/a.toml", "version = 4\nroot = '/2'\nimports = ['deep/x.toml']",
			"d/deep/x.toml", "version = 4\nroot = '/4'",
			"d/b.txt", "root = 'not read'",
			"last.toml", "version = 4\nroot = '/3'",
		}, func(c *Config) any { return c.Root }, "/4"},
		{"each import has its version", []string{"c", "version = 4\nimports = ['old']", "old", "[plugins.overlayfs]\nroot_path = '/o'"}, func(c *Config) any { return c.Overlay.RootPath }, "/o"},
		{"imports may loop", []string{"c", "version = 4\nimports = ['c', 'e']", "e", "version = 4\nimports = ['c']\nroot = '/e'"}, func(c *Config) any { return [2]any{c.Root, len(c.Documents)} }, [2]any{"/e", 2}},
		{"a pattern may match nothing", []string{"c", "version = 4\nimports = ['none*.toml']"}, func(c *Config) any { return len(c.Documents) }, 1},
		{"top-level zero doesn't override", []string{"c", "version = 4\nroot = '/1'\noom_score = 5\nimports = ['e']", "e", "version = 4\nroot = ''\noom_score = 0"}, func(c *Config) any { return [2]any{c.Root, c.OOMScore} }, [2]any{"/1", 5}},
		{"top-level lists add up", []string{"c", "version = 4\ndisabled_plugins = ['a.b', 'c.d']\nimports = ['e']", "e", "version = 4\ndisabled_plugins = ['c.d', 'e.f']"}, func(c *Config) any { return c.Disabled }, []string{"a.b", "c.d", "e.f"}},
		{"plugin zero does override", []string{"c", "version = 4\nimports = ['e']\n[plugins.'" + gcScheduler + "']\nmutation_threshold = 9\ndeletion_threshold = 4", "e", "version = 4\n[plugins.'" + gcScheduler + "']\nmutation_threshold = 0"},
			func(c *Config) any { return [2]int{c.GC.MutationThreshold, c.GC.DeletionThreshold} }, [2]int{0, 4}},
		{"plugin lists are replaced", []string{"c", "version = 4\nimports = ['e']\n[plugins.'" + overlay + "']\nmount_options = ['a', 'b']", "e", "version = 4\n[plugins.'" + overlay + "']\nmount_options = ['c']"}, func(c *Config) any { return c.Overlay.MountOptions }, []string{"c"}},
		{"dotted keys and inline tables", []string{"c", "version = 4\nplugins = { '" + optService + "' = { path = '/p' } }\ndebug.level = 'info'"}, func(c *Config) any { return [2]any{c.OptPath, c.Log.Level} }, [2]any{"/p", "info"}},
		{"pinned images add up", []string{"c", "version = 4\n[plugins.'" + criImages + "'.pinned_images]\nmine = 'x/y:1'\nempty = ''"},
			func(c *Config) any { return c.CRI.PinnedImages }, map[string]string{"sandbox": "registry.k8s.io/pause:3.10.2", "mine": "x/y:1"}},
		{"version 2 pause image", []string{"c", "version = 2\n[plugins.'" + cri + "']\nsandbox_image = 'x/pause:1'"},
			func(c *Config) any { return c.CRI.PinnedImages }, map[string]string{"sandbox": "x/pause:1"}},
		{"snapshotters of handlers", []string{"c", "version = 4\n[plugins.'" + criRuntime + "'.containerd.runtimes.kata]\nsnapshotter = 'a'\n[plugins.'" + criRuntime + "'.containerd.runtimes.other]\nsnapshotter = 'b'\n[plugins.'" + criRuntime + "'.containerd.runtimes.runc]\nsnapshotter = ''\n[plugins.'" + criImages + "'.runtime_platforms.kata]\nsnapshotter = 'c'"},
			func(c *Config) any { return c.CRI.Snapshotters }, map[string]string{"kata": "c", "other": "b"}},
		{"downloads of all pulls are the kubelet's", []string{"c", "version = 4\n[plugins.'" + transfer + "']\nmax_concurrent_downloads = 9"}, func(c *Config) any { return c.CRIDownloads() }, 9},
		{"but for its own", []string{"c", "version = 4\n[plugins.'" + transfer + "']\nmax_concurrent_downloads = 9\n[plugins.'" + criImages + "']\nmax_concurrent_downloads = 5"}, func(c *Config) any { return c.CRIDownloads() }, 5},
		{"a number for a share", []string{"c", "version = 4\n[plugins.'" + gcScheduler + "']\npause_threshold = 0"}, func(c *Config) any { return c.GC.PauseThreshold }, 0.0},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := test.get(load(t, test.files...)); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestFlagsOverride(t *testing.T) {
	path := write(t, "c", "version = 4\nroot = '/1'")
	c, err := Load(path, Flags{Root: "rel", Address: "/run/x.sock", LogLevel: "debug"})
	if err != nil {
		t.Fatal(err)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if c.Root != filepath.Join(wd, "rel") || c.GRPC.Address != "/run/x.sock" || c.Log.Level != "debug" {
		t.Errorf("root %s, address %s, level %s", c.Root, c.GRPC.Address, c.Log.Level)
	}
	if got := c.Origin("root").String(); got != "--root" {
		t.Errorf("root was set by %s", got)
	}
}

func TestErrors(t *testing.T) {
	long := "/" + strings.Repeat("x", maxSocketPath)
	for _, test := range []struct{ name, doc, want string }{
		{"syntax", "version = 4\nroot = '/a\n", "row 2, column "},
		{"double key", "version = 4\nroot = '/a'\nroot = '/b'\n", "row 3"},
		{"version too high", "\nversion = 5", "line 2: the document has version 5, and this Holdfast reads up to version 4"},
		{"negative version", "version = -1", "has version -1"},
		{"version in quotes", "version = '2'", "must be a whole number"},
		{"missing import", "version = 4\nimports = ['gone.toml']", "c:2: imported file "},
		{"imports is no list", "version = 4\nimports = 'x'", "c:2: imports must be a list"},
		{"bad pattern", "version = 4\nimports = ['[*']", "syntax error in pattern"},
		{"root is a number", "version = 4\nroot = 3", "c:2: root must be a string"},
		{"root is a table", "version = 4\n[root]\na = 1", "root must be a value"},
		{"plugins is a number", "version = 2\nplugins = 3", "line 2: plugins must be a table"},
		{"a plugin is a number", "version = 4\n[plugins]\n'a.b' = 3", "line 3: plugins.'a.b' must be a table"},
		{"registry is a number", "version = 4\n[plugins.'io.containerd.cri.v1.images']\nregistry = 3", "is not a table"},
		{"relative root", "version = 4\nroot = 'x'", "must be an absolute path"},
		{"one directory for both", "version = 4\nroot = '/x'\nstate = '/x/'", "another directory than root"},
		{"long socket", "version = 4\n[plugins.'io.containerd.server.v1.grpc']\naddress = '" + long + "'", "at most 104 bytes"},
		{"level", "version = 4\n[debug]\nlevel = 'loud'", "c:3: debug.level = 'loud': must be one of"},
		{"format", "version = 4\n[debug]\nformat = 'xml'", "must be text or json"},
		{"duration", "version = 4\n[timeouts]\n'io.containerd.timeout.bolt.open' = 'soon'", "must be a duration"},
		{"negative progress", "version = 4\n[plugins.'" + criImages + "']\nimage_pull_progress_timeout = '-1s'", "must not be negative"},
		{"pinned number", "version = 4\n[plugins.'" + criImages + "'.pinned_images]\nsandbox = 3", "c:3: plugins.'" + criImages + "'.pinned_images.sandbox must be a string"},
		{"policy", "version = 4\n[plugins.'io.containerd.metadata.v1.bolt']\ncontent_sharing_policy = ''", "must be shared or isolated"},
		{"bool", "version = 4\n[plugins.'io.containerd.snapshotter.v1.overlayfs']\nslow_chown = 1", "must be true or false"},
		{"number", "version = 4\noom_score = 99999999999", "32 bits"},
		{"list", "version = 4\ndisabled_plugins = ['a.b', 3]", "must be a list of strings"},
		{"short name after version 1", "version = 2\ndisabled_plugins = ['cri']", "must be a whole plugin URI"},
		{"nan", "version = 4\n[plugins.'" + gcScheduler + "']\npause_threshold = nan", "must be a number"},
		{"too large", "version = 4\n#" + strings.Repeat("x", maxFileSize), "larger than"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Load(write(t, "c", test.doc), Flags{})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
	if _, err := Load(filepath.Join(t.TempDir(), "absent.toml"), Flags{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a named file that is absent gives %v", err)
	}
}

func TestTooManyImports(t *testing.T) {
	files := []string{"c", "version = 4\nimports = ['d/*']"}
	for i := range maxDocuments {
		files = append(files, fmt.Sprintf("d/%d", i), "version = 4")
	}
	_, err := Load(write(t, files...), Flags{})
	if err == nil || !strings.Contains(err.Error(), "more than 256 files") {
		t.Errorf("got %v", err)
	}
}

func TestNothingIsDroppedSilently(t *testing.T) {
	c := load(t, "c", `version = 3
root = '/x'
surprise = 1
imports = ['e']
[plugins.'io.containerd.gc.v1.scheduler']
pause = 1
[plugins.'io.containerd.transfer.v1.local']
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = 'linux'
[plugins.'no.such.plugin']
[grpc]
address = '/a'
[plugins.'io.containerd.server.v1.grpc']
`, "e", "version = 4\nroot = ''\n")
	for key, want := range map[string]Finding{
		"surprise": {Status: Unknown, Origin: Origin{Line: 3}},
		"plugins.'io.containerd.gc.v1.scheduler'.pause":           {Status: Unknown, Origin: Origin{Line: 6}},
		"plugins.'io.containerd.transfer.v1.local'.unpack_config": {Status: Later, Origin: Origin{Line: 8}},
		"plugins.'no.such.plugin'":                                {Status: Unknown, Origin: Origin{Line: 10}},
		"grpc.address":                                            {Status: Never, Origin: Origin{Line: 12}},
	} {
		got, ok := finding(c, key)
		if !ok || got.Status != want.Status || got.Origin.Line != want.Origin.Line || got.Reason == "" {
			t.Errorf("%s: got %+v, want status %s and line %d", key, got, want.Status, want.Origin.Line)
		}
	}
	found := c.Check()
	if !slices.ContainsFunc(found, func(f Finding) bool { return f.Key == "root" && f.Status == Never && f.Value == "''" }) {
		t.Errorf("the empty root of the import isn't reported: %+v", found)
	}
}

func TestParts(t *testing.T) {
	c := load(t, "c", "version = 4\ndisabled_plugins = ['"+native+"', '"+metaBolt+"']\nrequired_plugins = ['"+overlay+"', '"+criServer+"', '"+native+"']")
	if c.Offers(native) || !c.Offers(overlay) || !c.Offers(metaBolt) {
		t.Errorf("offers native %t, overlayfs %t, bolt %t", c.Offers(native), c.Offers(overlay), c.Offers(metaBolt))
	}
	if c := load(t, "c", "version = 4\ndisabled_plugins = ['"+criServer+"', '"+criImages+"']"); c.Offers(criServer) || c.Offers(criImages) {
		t.Error("the kubelet's door can't be left out")
	}
	err := c.Refuse()
	if err == nil || !strings.Contains(err.Error(), criServer) || !strings.Contains(err.Error(), native) || strings.Contains(err.Error(), overlay) {
		t.Errorf("refuses with %v", err)
	}
	if err := load(t, "c", "version = 4").Refuse(); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
}

func TestKeysFile(t *testing.T) {
	keys, err := parseKeys(keysText)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if k.reason == "" {
			t.Errorf("%v has no reason", k.path)
		}
		for _, b := range bindings {
			if matches(k.path, b.path) {
				t.Errorf("%v is honoured, and in keys.txt", k.path)
			}
		}
		for _, f := range families {
			if matches(k.path, f.path) {
				t.Errorf("%v is honoured, and in keys.txt", k.path)
			}
		}
	}
	for _, bad := range []string{"soon x | y", "later x", "  a | b", "  a | soon | c"} {
		if _, err := parseKeys(bad); err == nil {
			t.Errorf("parseKeys(%q) has no error", bad)
		}
	}
}

// TestDumpIsStable: a dump read again is the same configuration.
func TestDumpIsStable(t *testing.T) {
	for _, file := range []string{"testdata/containerd-2.4.2-default.toml", "testdata/kubeadm-v2.toml"} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		first := load(t, "c", string(data)).Dump()
		if again := load(t, "c", first).Dump(); withoutComments(again) != withoutComments(first) {
			t.Errorf("%s: dumped\n%s\nthen\n%s", file, first, again)
		}
	}
}

// withoutComments takes the origins from a dump.
func withoutComments(dump string) string {
	var b strings.Builder
	for line := range strings.Lines(dump) {
		if strings.HasPrefix(line, "# read: ") {
			continue
		}
		if i := strings.LastIndex(line, " # "); i >= 0 {
			line = line[:i] + "\n"
		}
		b.WriteString(line)
	}
	return b.String()
}

func FuzzLoad(f *testing.F) {
	for _, file := range []string{"testdata/containerd-2.4.2-default.toml", "testdata/kubeadm-v2.toml"} {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("version=1\n[[plugins.cri.x]]\na={b=[{c=1979-05-27}]}\n['']\n''=nan"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := newLoader()
		if err != nil {
			t.Fatal(err)
		}
		doc, err := parseDocument(data, "fuzz")
		if err != nil || l.add(doc, "fuzz") != nil {
			return
		}
		c := &Config{tree: l.tree, noted: l.noted, Documents: []string{"fuzz"}}
		if c.decode() != nil || c.validate() != nil {
			return
		}
		c.Check()
		dump := c.Dump()
		again, err := parseDocument([]byte(dump), "dump")
		if err != nil {
			t.Fatalf("the dump can't be read: %v\n%s", err, dump)
		}
		again.take("version")
		second := (&Config{tree: again}).Dump()
		if want := (&Config{tree: l.tree}).Dump(); strings.Count(second, "\n") != strings.Count(want, "\n") {
			t.Fatalf("read again, the dump is\n%s\nand was\n%s", second, want)
		}
	})
}
