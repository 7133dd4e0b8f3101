package auth

import (
	"context"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func configDir(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func TestAuths(t *testing.T) {
	dir := configDir(t, `{"auths":{
		"https://index.docker.io/v1/":{"auth":"`+b64("hub:pw:with:colons")+`"},
		"r.example":{"auth":"`+b64("joe:exact\x00")+`"},
		"https://r.example/v1/":{"auth":"`+b64("joe:byURL")+`"},
		"https://u.example/v2/":{"username":"u","password":"p"},
		"i.example":{"identitytoken":"id","auth":"`+b64("00000000-0000:")+`"},
		"t.example:5000":{"registrytoken":"rt"},
		"bad.example":{"auth":"***"},
		"empty.example":{}
	},"credHelpers":{}, "psFormat":"x"}`)
	for host, want := range map[string]Credential{
		"registry-1.docker.io": {Username: "hub", Password: "pw:with:colons"},
		"docker.io":            {Username: "hub", Password: "pw:with:colons"},
		"r.example":            {Username: "joe", Password: "exact"},
		"R.example:443":        {Username: "joe", Password: "byURL"},
		"u.example":            {Username: "u", Password: "p"},
		"i.example":            {Username: "00000000-0000", IdentityToken: "id"},
		"t.example:5000":       {RegistryToken: "rt"},
		"t.example":            {},
		"empty.example":        {},
		"other.example":        {},
	} {
		got, err := DockerConfig{Dir: dir}.Credential(t.Context(), host)
		if err != nil || got != want {
			t.Errorf("%s: %#v %q, %v", host, got, got.Password, err)
		}
	}
	if _, err := (DockerConfig{Dir: dir}).Credential(t.Context(), "bad.example"); err == nil || !strings.Contains(err.Error(), "config.json: auths of bad.example") {
		t.Errorf("%v", err)
	}
}

func TestWhereTheConfigIs(t *testing.T) {
	entry := func(user string) string { return `{"auths":{"r":{"username":"` + user + `","password":"p"}}}` }
	home, env := t.TempDir(), configDir(t, entry("env"))
	if err := os.Mkdir(filepath.Join(home, ".docker"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".docker/config.json"), []byte(entry("home")), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", "")
	for want, set := range map[string]string{"home": "", "env": env} {
		t.Setenv("DOCKER_CONFIG", set)
		if got, err := (DockerConfig{}).Credential(t.Context(), "r"); err != nil || got.Username != want {
			t.Errorf("%s: %v, %v", want, got, err)
		}
	}
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	if got, err := (DockerConfig{}).Credential(t.Context(), "r"); err != nil || !got.IsAnonymous() {
		t.Errorf("no file: %v, %v", got, err)
	}
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("HOME", "")
	if got, err := (DockerConfig{}).Credential(t.Context(), "r"); err != nil || !got.IsAnonymous() {
		t.Errorf("no home: %v, %v", got, err)
	}
}

func TestBadConfig(t *testing.T) {
	for name, text := range map[string]string{
		"syntax": `{"auths":{"r":{"password":"hunter2",}}}`,
		"types":  `{"auths":{"r":{"password":["hunter2"]}}}`,
		"size":   `{"x":"hunter2` + strings.Repeat("a", maxConfig) + `"}`,
	} {
		_, err := DockerConfig{Dir: configDir(t, text)}.Credential(t.Context(), "r")
		if err == nil || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "config.json") {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "config.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (DockerConfig{Dir: dir}).Credential(t.Context(), "r"); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("fifo: %v", err)
	}
}

// helper puts a program docker-credential-<name> into the path.
func helper(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-"+name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestHelpers(t *testing.T) {
	helper(t, "store", `
read server
test "$1" = get || exit 9
case $server in
https://index.docker.io/v1/) echo '{"ServerURL":"x","Username":"hub","Secret":"s"}' ;;
id.example) echo '{"Username":"<token>","Secret":"idt"}' ;;
noisy.example) yes hunter2 ;;
junk.example) echo hunter2 ;;
broken.example) echo hunter2; echo hunter2 >&2; exit 1 ;;
*) echo credentials not found in native keychain; exit 1 ;;
esac`)
	helper(t, "one", `read server; echo "{\"Username\":\"one\",\"Secret\":\"$server\"}"`)
	d := DockerConfig{Dir: configDir(t, `{"credsStore":"store","credHelpers":{"https://one.example":"one","gone.example":"gone","up.example":"../../bin/sh"},
		"auths":{"file.example":{"username":"f","password":"p"},"id.example":{}}}`)}
	for host, want := range map[string]Credential{
		"docker.io":    {Username: "hub", Password: "s"},
		"id.example":   {IdentityToken: "idt"},
		"one.example":  {Username: "one", Password: "https://one.example"},
		"file.example": {Username: "f", Password: "p"},
		"none.example": {},
	} {
		if got, err := d.Credential(t.Context(), host); err != nil || got != want {
			t.Errorf("%s: %v %q, %v", host, got, got.Password, err)
		}
	}
	for host, words := range map[string]string{
		"noisy.example":  "more than",
		"junk.example":   "not the JSON",
		"broken.example": "exit status 1 (try `echo broken.example | docker-credential-store get`)",
		"gone.example":   "docker-credential-gone",
		"up.example":     "not a program's name",
	} {
		_, err := d.Credential(t.Context(), host)
		if err == nil || !strings.Contains(err.Error(), words) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", host, err)
		}
	}
}

func TestHelperThatHangs(t *testing.T) {
	helper(t, "slow", "sleep 1000 & wait")
	d := DockerConfig{Dir: configDir(t, `{"credsStore":"slow"}`)}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := d.Credential(ctx, "r"); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
		t.Errorf("%v after %s", err, time.Since(start))
	}
}

func FuzzDockerConfig(f *testing.F) {
	f.Add([]byte(`{"auths":{"r":{"auth":"am9lOnB3"}}}`))
	f.Add([]byte(`{"auths":{"https://r/v1/":{"identitytoken":"x"}},"credHelpers":null}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		file := filepath.Join(dir, "config.json")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		config, err := readDockerConfig(file)
		if err != nil {
			return
		}
		if _, entry := lookup(config.Auths, "r"); entry.Auth != "" {
			if c, err := entry.credential(); err == nil && c.Username == "" {
				t.Fatalf("no user in %q", data)
			}
		}
	})
}
