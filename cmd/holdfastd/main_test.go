package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-dev/holdfast/internal/config"
)

// run is `holdfastd ARGS`.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	cmd := command()
	cmd.SetOut(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestConfigCommands(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.toml")
	doc := "version = 2\nroot = '/data'\nrequired_plugins = ['io.containerd.grpc.v1.cri']\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'x'\n[plugins.'io.containerd.internal.v1.opt']\npth = 'y'\n"
	if err := os.WriteFile(path, []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want []string
		err  string
	}{
		{[]string{"config", "default"}, []string{config.Default()}, ""},
		{[]string{"config", "dump", "-c", path, "--state", "/s"}, []string{"root = '/data' # " + path + ":2\n", "state = '/s' # --state\n", "pth = 'y' # " + path + ":7\n"}, ""},
		{[]string{"config", "check", "--config", path, "-a", "/x.sock"}, []string{
			"SET BY", "'/data'", path + ":2", "'/x.sock'", "--address",
			"plugins.'io.containerd.cri.v1.images'.pinned_images.sandbox", path + ":5", "Keys without effect: 2", "unknown",
		}, "the daemon would refuse to start"},
		{[]string{"config", "check", "-c", path + ".absent"}, nil, "no such file"},
		{[]string{"-c", path}, nil, "required_plugins has 'io.containerd.grpc.v1.cri'"},
		{[]string{"start"}, nil, "unknown command"},
		{[]string{"--version"}, []string{"holdfastd version dev"}, ""},
	} {
		t.Run(strings.Join(test.args[:1], " "), func(t *testing.T) {
			got, err := run(t, test.args...)
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("%q: error %v, want %q", test.args, err, test.err)
			}
			for _, want := range test.want {
				if !strings.Contains(got, want) {
					t.Errorf("%q prints no %q but\n%s", test.args, want, got)
				}
			}
		})
	}
}

func TestNothingToReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(config.Default()), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := run(t, "config", "check", "-c", path)
	if err != nil || !strings.Contains(got, "Every key of the configuration has its effect.") {
		t.Errorf("check of the defaults: %v\n%s", err, got)
	}
}

func TestStacks(t *testing.T) {
	if got := string(stacks()); !strings.Contains(got, "TestStacks") {
		t.Errorf("the stacks don't have this test:\n%s", got)
	}
}
