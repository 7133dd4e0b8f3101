package auth

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Limits of what is read for one credential.
const (
	maxConfig     = 1 << 20 // bytes of config.json
	maxHelper     = 64 << 10
	helperTimeout = 30 * time.Second
	helperDrain   = time.Second // how long a helper's children may hold its output open
)

// hubServer is the name under which docker keeps the credentials of its own registry.
const hubServer = "https://index.docker.io/v1/"

// helperTokenUser is the user name by which helpers say that the secret is an identity token.
const helperTokenUser = "<token>"

// DockerConfig reads credentials as the docker command line keeps them: in config.json's auths, or with a program
// docker-credential-<name> that credHelpers (one registry) or credsStore (all) names. The file is read anew each time,
// so a docker login takes effect at once. A missing file is anonymous; one that can't be read is an error.
type DockerConfig struct {
	Dir string // the folder of config.json; empty: $DOCKER_CONFIG, else ~/.docker
}

// The part of config.json that matters here (docker/cli, cli/config/configfile).
type dockerConfig struct {
	Auths       map[string]dockerAuth `json:"auths"`
	CredsStore  string                `json:"credsStore"`
	CredHelpers map[string]string     `json:"credHelpers"`
}

type dockerAuth struct {
	Auth          string `json:"auth"` // base64 of user:password
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// Credential implements Credentials.
func (d DockerConfig) Credential(ctx context.Context, host string) (Credential, error) {
	file := d.file()
	if file == "" {
		return Credential{}, nil
	}
	config, err := readDockerConfig(file)
	if err != nil {
		return Credential{}, err
	}
	server, helper := lookup(config.CredHelpers, host)
	if helper == "" {
		server, helper = host, config.CredsStore
	}
	if helper != "" {
		if canonical(host) == hub {
			server = hubServer
		}
		cred, err := askHelper(ctx, helper, server)
		if err != nil || !cred.IsAnonymous() {
			return cred, err
		}
	}
	key, entry := lookup(config.Auths, host)
	cred, err := entry.credential()
	if err != nil {
		return Credential{}, fmt.Errorf("%s: auths of %s: %w", file, key, err)
	}
	return cred, nil
}

func (d DockerConfig) file() string {
	dir := d.Dir
	if dir == "" {
		dir = os.Getenv("DOCKER_CONFIG")
	}
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "" // a service without a home has no login either
		}
		dir = filepath.Join(home, ".docker")
	}
	return filepath.Join(dir, "config.json")
}

func readDockerConfig(file string) (config dockerConfig, err error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return config, nil
	} else if err != nil {
		return config, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return config, err
	} else if !fi.Mode().IsRegular() {
		return config, fmt.Errorf("%s: not a regular file", file)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return config, err
	}
	if len(data) > maxConfig {
		return config, fmt.Errorf("%s: more than %d bytes", file, maxConfig)
	}
	if err := json.Unmarshal(data, &config); err != nil {
		return dockerConfig{}, fmt.Errorf("%s: not valid JSON of docker's form", file) // the cause may quote a secret
	}
	return config, nil
}

// lookup finds the entry of host. Keys may be hosts or URLs; the one that is written exactly so goes first.
func lookup[V any](entries map[string]V, host string) (string, V) {
	if v, ok := entries[host]; ok {
		return host, v
	}
	want := canonical(host)
	for _, key := range slices.Sorted(maps.Keys(entries)) {
		if canonical(key) == want {
			return key, entries[key]
		}
	}
	var none V
	return "", none
}

func (a dockerAuth) credential() (Credential, error) {
	c := Credential{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
	if a.Auth != "" {
		text, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return Credential{}, errors.New("auth is not base64")
		}
		user, password, ok := strings.Cut(string(text), ":")
		if !ok || user == "" {
			return Credential{}, errors.New("auth is not user:password in base64")
		}
		c.Username, c.Password = user, strings.TrimRight(password, "\x00")
	}
	return c, nil
}

// askHelper runs docker-credential-<name> (docker/docker-credential-helpers: the server on standard input, JSON or an
// error message on standard output). What it writes is not quoted in errors.
func askHelper(ctx context.Context, name, server string) (Credential, error) {
	if strings.ContainsFunc(name, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-", r))
	}) {
		return Credential{}, fmt.Errorf("credential helper %q: not a program's name", clip(name))
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	program := "docker-credential-" + name
	cmd := exec.CommandContext(ctx, program, "get")
	out := &bounded{limit: maxHelper}
	cmd.Stdin, cmd.Stdout, cmd.WaitDelay = strings.NewReader(server), out, helperDrain
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // with its children
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return Credential{}, fmt.Errorf("credential helper %s: %w", program, ctx.Err())
	case out.overflow:
		return Credential{}, fmt.Errorf("credential helper %s: more than %d bytes of output", program, maxHelper)
	case err != nil && strings.Contains(out.buf.String(), "credentials not found"):
		return Credential{}, nil
	case err != nil:
		return Credential{}, fmt.Errorf("credential helper %s: %w (try `echo %s | %s get`)", program, err, server, program)
	}
	var reply struct{ Username, Secret string }
	if json.Unmarshal(out.buf.Bytes(), &reply) != nil {
		return Credential{}, fmt.Errorf("credential helper %s: the output is not the JSON of a credential", program)
	}
	if reply.Username == helperTokenUser {
		return Credential{IdentityToken: reply.Secret}, nil
	}
	return Credential{Username: reply.Username, Password: reply.Secret}, nil
}

// bounded keeps up to limit bytes and refuses more.
type bounded struct {
	buf      bytes.Buffer
	limit    int
	overflow bool
}

func (b *bounded) Write(p []byte) (int, error) {
	if b.buf.Len()+len(p) > b.limit {
		b.overflow = true
		return 0, errors.New("too much output")
	}
	return b.buf.Write(p)
}
