package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// registryProgram is Debian's package docker-registry.
const registryProgram = "docker-registry"

// distribution is a running docker-registry.
type distribution struct {
	host string
	ca   string // PEM file; "" for plain HTTP
	pool *x509.CertPool
	auth authn.Authenticator
}

// The login of a registry that wants one; the hash is bcrypt's.
const (
	login = "ann"
	word  = "secret"
	hash  = "$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a"
)

// startRegistry runs docker-registry on a loopback port for the duration of a test.
func startRegistry(t *testing.T, basic, encrypted bool) *distribution {
	t.Helper()
	program, err := exec.LookPath(registryProgram)
	if err != nil {
		t.Skip("install Debian's docker-registry (`make test` does) to run this")
	}
	dir := harness.TempDir(t)
	r := &distribution{host: registrytest.Refused(t), auth: authn.Anonymous}
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s/data}}\nhttp:\n  addr: %s\n", dir, r.host)
	if encrypted {
		cert, key := r.certify(t, dir)
		config += fmt.Sprintf("  tls: {certificate: %s, key: %s}\n", cert, key)
	}
	if basic {
		write(t, filepath.Join(dir, "htpasswd"), login+":"+hash+"\n")
		config += fmt.Sprintf("auth: {htpasswd: {realm: test, path: %s/htpasswd}}\n", dir)
		r.auth = &authn.Basic{Username: login, Password: word}
	}
	write(t, filepath.Join(dir, "config.yml"), config)
	var log bytes.Buffer
	cmd := exec.Command(program, "serve", filepath.Join(dir, "config.yml"))
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	soon(t, "docker-registry answers", func() bool {
		select {
		case <-ended:
			t.Fatalf("docker-registry ended:\n%s", log.String())
		default:
		}
		c, err := net.DialTimeout("tcp", r.host, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return r
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// certify makes a certificate that only r.ca vouches for.
func (r *distribution) certify(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	write(t, cert, string(text))
	write(t, key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})))
	r.ca, r.pool = cert, x509.NewCertPool()
	r.pool.AppendCertsFromPEM(text)
	return cert, key
}

// push uploads an image of layers and returns its digest.
func (r *distribution) push(t *testing.T, repo string, layers ...harness.Layer) v1.Hash {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	made := harness.NewImage(t, layers...)
	for _, desc := range made.Layers {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(made.Blobs[desc.Digest])), nil
		}, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", runtime.GOARCH
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(r.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.pool}}
	defer transport.CloseIdleConnections()
	if err := remote.Write(ref, img, remote.WithAuth(r.auth), remote.WithTransport(transport)); err != nil {
		t.Fatal(err)
	}
	dgst, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return dgst
}

// hostsConfig is a daemon's config that reads the hosts.toml files in a directory.
func hostsConfig(dir string) string {
	return fmt.Sprintf("version = 3\n[plugins.'io.containerd.transfer.v1.local']\nconfig_path = '%s'\n"+noOpt, dir)
}

// TestDockerRegistry pulls from Debian's registry, by tag and by digest.
func TestDockerRegistry(t *testing.T) {
	harness.NeedRoot(t)
	reg := startRegistry(t, false, false)
	dgst := reg.push(t, "team/app:1", harness.Random(1, 3)...)
	d := harness.Start(t, harness.Options{})
	byTag, byDigest := reg.host+"/team/app:1", reg.host+"/team/app@"+dgst.String()
	for _, ref := range []string{byTag, byDigest} {
		holdfast(t, d.Socket, "pull", "--plain-http", ref).wants(t, 0, dgst.String(), ref)
		if got := d.Images(t)[ref].String(); got != dgst.String() {
			t.Errorf("%s stands for %s, want %s", ref, got, dgst)
		}
	}
	// A registry on loopback that speaks HTTP is found out without a flag.
	holdfast(t, d.Socket, "pull", byTag).wants(t, 0, byTag)
	holdfast(t, d.Socket, "pull", "--plain-http", reg.host+"/team/app:2").wants(t, 1, "app:2", "check the name and the tag")
	whole(t, d)
	checkTree(t, d, "overlayfs", harness.NewImage(t, harness.Random(1, 3)...))
	d.Stop(t)
}

// checkTree fails unless the snapshot of img looks as unpacking must make it.
func checkTree(t *testing.T, d *harness.Daemon, snapshotter string, img *harness.Image) {
	t.Helper()
	tree, err := d.Tree(t, snapshotter, img.ChainID.String())
	if err != nil {
		t.Fatal(err)
	}
	if diff := img.Tree.Differences(tree); len(diff) > 0 {
		t.Errorf("unpacked tree:\n%s", strings.Join(diff, "\n"))
	}
}

// TestBasicLogin: docker-registry wants a name and a password.
func TestBasicLogin(t *testing.T) {
	harness.NeedRoot(t)
	reg := startRegistry(t, true, false)
	reg.push(t, "app:1", harness.Random(2, 2)...)
	d := harness.Start(t, harness.Options{})
	ref := reg.host + "/app:1"
	holdfast(t, d.Socket, "pull", "--plain-http", ref).wants(t, 1, "check the credentials for "+reg.host)
	bad := holdfast(t, d.Socket, "pull", "--plain-http", "-u", login+":not-this", ref)
	bad.wants(t, 1, "check the credentials for "+reg.host)
	if strings.Contains(bad.err+d.Log(), "not-this") {
		t.Error("a password is printed")
	}
	holdfast(t, d.Socket, "pull", "--plain-http", "-u", login, ref).wants(t, 2, "NAME:PASSWORD")
	holdfast(t, d.Socket, "pull", "--plain-http", "-u", login+":"+word, ref).wants(t, 0, ref)
	whole(t, d)
	d.Stop(t)
}

// TestDockerCredentials: the daemon finds a password in docker's config file.
func TestDockerCredentials(t *testing.T) {
	harness.NeedRoot(t)
	reg := startRegistry(t, true, false)
	reg.push(t, "app:1", harness.Random(2, 1)...)
	home := harness.TempDir(t)
	write(t, filepath.Join(home, "config.json"), fmt.Sprintf(`{"auths":{"%s":{"username":"%s","password":"%s"}}}`, reg.host, login, word))
	d := harness.Start(t, harness.Options{Env: []string{"DOCKER_CONFIG=" + home}})
	holdfast(t, d.Socket, "pull", "--plain-http", reg.host+"/app:1").wants(t, 0, reg.host+"/app:1")
	d.Stop(t)
}

// TestOwnAuthority: docker-registry speaks TLS with a certificate of nobody's; hosts.toml names the authority.
func TestOwnAuthority(t *testing.T) {
	harness.NeedRoot(t)
	reg := startRegistry(t, false, true)
	reg.push(t, "app:1", harness.Random(3, 2)...)
	certs := harness.TempDir(t)
	d := harness.Start(t, harness.Options{Config: hostsConfig(certs)})
	ref := reg.host + "/app:1"
	toml := filepath.Join(certs, reg.host, "hosts.toml")
	server := "server = 'https://" + reg.host + "'\n"
	write(t, toml, server+"[host.'https://"+reg.host+"']\ncapabilities = ['pull', 'resolve']\n")
	holdfast(t, d.Socket, "pull", ref).wants(t, 1, "name its certificate authority as ca in the hosts.toml of "+reg.host)
	write(t, toml, server+"[host.'https://"+reg.host+"']\ncapabilities = ['pull', 'resolve']\nca = '"+reg.ca+"'\n")
	holdfast(t, d.Socket, "pull", ref).wants(t, 0, ref)
	if err := d.RemoveImage(harness.Context(t), ref); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(toml); err != nil {
		t.Fatal(err)
	}
	holdfast(t, d.Socket, "pull", "--skip-verify", ref).wants(t, 0, ref)
	whole(t, d)
	d.Stop(t)
}

// TestDeadMirrors: mirrors of hosts.toml that refuse, or don't answer at all, cost about a second each and pull.
func TestDeadMirrors(t *testing.T) {
	harness.NeedRoot(t)
	reg := startRegistry(t, false, false)
	reg.push(t, "app:1", harness.Random(4, 6)...)
	certs := harness.TempDir(t)
	refused, silent := registrytest.Refused(t), registrytest.BlackHole(t)
	const mirror = "[host.'http://%s']\ncapabilities = ['pull', 'resolve']\n"
	write(t, filepath.Join(certs, reg.host, "hosts.toml"),
		fmt.Sprintf("server = 'http://%s'\n"+mirror+mirror, reg.host, refused, silent))
	d := harness.Start(t, harness.Options{Config: hostsConfig(certs)})
	begin := time.Now()
	holdfast(t, d.Socket, "pull", reg.host+"/app:1").wants(t, 0, reg.host+"/app:1")
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("with two dead mirrors a pull takes %s", took)
	}
	whole(t, d)
	d.Stop(t)
}

// TestMirror: a name of a registry that doesn't exist is served by the mirror that hosts.toml gives for it.
func TestMirror(t *testing.T) {
	harness.NeedRoot(t)
	reg := startRegistry(t, false, false)
	reg.push(t, "library/app:1", harness.Random(5, 2)...)
	certs := harness.TempDir(t)
	write(t, filepath.Join(certs, "registry.invalid", "hosts.toml"),
		fmt.Sprintf("server = 'https://registry.invalid'\n[host.'http://%s']\ncapabilities = ['pull', 'resolve']\n", reg.host))
	d := harness.Start(t, harness.Options{Config: hostsConfig(certs)})
	holdfast(t, d.Socket, "pull", "registry.invalid/library/app:1").wants(t, 0, "registry.invalid/library/app:1")
	whole(t, d)
	d.Stop(t)
}
