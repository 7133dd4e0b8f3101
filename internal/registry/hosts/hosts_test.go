package hosts

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func yes() *bool { b := true; return &b }
func no() *bool  { b := false; return &b }

// lay writes files (path below the root -> content) and yields the root.
func lay(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestDefaults(t *testing.T) {
	for _, tc := range []struct {
		host string
		want Host
	}{
		{"docker.io", Host{Scheme: "https", Host: "registry-1.docker.io"}},
		{"ghcr.io", Host{Scheme: "https", Host: "ghcr.io", Implied: true}},
		{"reg.example:5000", Host{Scheme: "https", Host: "reg.example:5000", Implied: true}},
		{"localhost", Host{Scheme: "https", Host: "localhost", Implied: true, SkipVerify: yes()}},
		{"localhost:443", Host{Scheme: "https", Host: "localhost:443", Implied: true, SkipVerify: yes()}},
		{"localhost:80", Host{Scheme: "http", Host: "localhost:80", Implied: true}},
		{"127.0.0.1:5000", Host{Scheme: "http", Host: "127.0.0.1:5000", Implied: true, SkipVerify: yes()}},
		{"127.9.9.9:5000", Host{Scheme: "http", Host: "127.9.9.9:5000", Implied: true, SkipVerify: yes()}},
		{"[::1]:5000", Host{Scheme: "http", Host: "[::1]:5000", Implied: true, SkipVerify: yes()}},
	} {
		tc.want.Path, tc.want.Capabilities = "/v2", Everything
		got, err := Dirs{}.Lookup(t.Context(), tc.host)
		if err != nil || !reflect.DeepEqual(got, []Host{tc.want}) {
			t.Errorf("%s: %+v, %v; want %+v", tc.host, got, err, tc.want)
		}
	}
}

func TestWhichFolderDecides(t *testing.T) {
	toml := func(server string) string { return `server = "https://` + server + `"` }
	first := lay(t, map[string]string{
		"a.example_5000_/hosts.toml": toml("underscore"),
		"a.example:5000/hosts.toml":  toml("colon"),
		"b.example:5000/hosts.toml":  toml("b-colon"),
	})
	second := lay(t, map[string]string{
		"b.example_5000_/hosts.toml": toml("later-root"),
		"c.example/hosts.toml":       toml("c"),
		"_default/hosts.toml":        toml("default"),
	})
	d := Dirs{Paths: Split(first + "::" + second)}
	for host, want := range map[string]string{
		"a.example:5000": "underscore",
		"b.example:5000": "b-colon",
		"c.example":      "c",
		"c.example:1":    "default",
	} {
		got, err := d.Lookup(t.Context(), host)
		if err != nil || got[0].Host != want {
			t.Errorf("%s: %+v, %v; want %s", host, got, err, want)
		}
	}
}

func TestHostsTOML(t *testing.T) {
	const dir = "up.example"
	root := lay(t, map[string]string{dir + "/hosts.toml": `
server = "https://server.example"
capabilities = ["pull"]
ca = "/etc/root.pem"
skip_verify = false

[host."http://z.example:8080"]
  capabilities = ["Pull", "resolve"]
  ca = ["one.pem", "/abs/two.pem"]
  client = [["a.cert", "a.key"], ["b.cert", "/k/b.key"]]
  skip_verify = true
  dial_timeout = "250ms"
  [host."http://z.example:8080".header]
    x-lower = "one"
    X-List = ["a", "b"]

[host."https://a.example/proxy"]
  client = "both.pem"

[host."https://m.example/v2/cache/"]
  override_path = true
  client = ["c.pem", "d.pem"]

[host."plain.example"]
`})
	base := filepath.Join(root, dir)
	origin := filepath.Join(base, "hosts.toml")
	want := []Host{
		{Scheme: "http", Host: "z.example:8080", Path: "/v2", Capabilities: Pull | Resolve,
			CA:     []string{base + "/one.pem", "/abs/two.pem"},
			Client: []KeyPair{{base + "/a.cert", base + "/a.key"}, {base + "/b.cert", "/k/b.key"}}, SkipVerify: yes(),
			DialTimeout: 250 * time.Millisecond,
			Header:      http.Header{"x-lower": {"one"}, "X-List": {"a", "b"}}},
		{Scheme: "https", Host: "a.example", Path: "/proxy/v2", Capabilities: Everything,
			Client: []KeyPair{{Cert: base + "/both.pem"}}},
		{Scheme: "https", Host: "m.example", Path: "/v2/cache", Capabilities: Everything,
			Client: []KeyPair{{Cert: base + "/c.pem"}, {Cert: base + "/d.pem"}}},
		{Scheme: "https", Host: "plain.example", Path: "/v2", Capabilities: Everything},
		{Scheme: "https", Host: "server.example", Path: "/v2", Capabilities: Pull, CA: []string{"/etc/root.pem"}, SkipVerify: no()},
	}
	for i := range want {
		want[i].Origin = origin
	}
	got, err := Dirs{Paths: []string{root}, Warn: func(file string, err error) { t.Errorf("%s: %v", file, err) }}.Lookup(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		if i >= len(got) || !reflect.DeepEqual(got[i], want[i]) {
			t.Errorf("entry %d: %+v\nwant %+v", i, got, want[i])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d entries, want %d", len(got), len(want))
	}
}

func TestRootWithoutServerIsTheUpstream(t *testing.T) {
	root := lay(t, map[string]string{"docker.io/hosts.toml": `
capabilities = ["push"]
override_path = true
ca = "ca.pem"
dial_timeout = "3s"
[header]
  k = "v"
[host."https://mirror.example"]
`})
	got, err := Dirs{Paths: []string{root}}.Lookup(t.Context(), "docker.io")
	if err != nil || len(got) != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	want := Host{Scheme: "https", Host: "registry-1.docker.io", Path: "/v2", Capabilities: Everything,
		CA: []string{root + "/docker.io/ca.pem"}, Header: http.Header{"k": {"v"}}, DialTimeout: 3 * time.Second,
		Origin: root + "/docker.io/hosts.toml"}
	if !reflect.DeepEqual(got[1], want) {
		t.Errorf("%+v\nwant %+v", got[1], want)
	}
}

func TestOrderOfTheFile(t *testing.T) {
	for name, text := range map[string]string{
		"tables":                 "[host.'https://c']\n[host.'https://a']\n[host.'https://b']",
		"subtables first":        "[host.'https://c'.header]\nx='y'\n[host.'https://a']\n[host.'https://b'.header]\n[host.'https://c']\nskip_verify=true",
		"dotted keys":            "host.'https://c'.skip_verify = true\nhost.'https://a'.skip_verify = true\nhost.'https://b'.dial_timeout='1s'",
		"inline":                 "host = { 'https://c' = {}, 'https://a' = {skip_verify=true}, 'https://b'.skip_verify = true }",
		"inline below the table": "[host]\n'https://c' = {}\n'https://a'.skip_verify = true\n'https://b' = {}",
	} {
		found, unknown, err := parse("/d", []byte(text))
		var got []string
		for _, h := range found {
			got = append(got, h.Host)
		}
		if err != nil || unknown != nil || strings.Join(got, ",") != "c,a,b," {
			t.Errorf("%s: %q, %v, %v", name, got, unknown, err)
		}
	}
}

func TestBadFileCountsAsMissing(t *testing.T) {
	for name, text := range map[string]string{
		"syntax":       "server = ",
		"capability":   `capabilities = ["pull", "fly"]`,
		"type of ca":   `ca = 3`,
		"list of ca":   `ca = ["a", 3]`,
		"client":       `client = [["a", "b", "c"]]`,
		"client type":  `client = [3]`,
		"header":       `header = { a = 3 }`,
		"header break": `header = { a = "x\r\nAuthorization: Basic eA==" }`,
		"header name":  `header = { "a b" = "x" }`,
		"dial":         `dial_timeout = "soon"`,
		"dial sign":    `dial_timeout = "-1s"`,
		"scheme":       `server = "ftp://x"`,
		"no host":      `server = "https://"`,
		"user":         `server = "https://u:p@x"`,
		"query":        `server = "https://x?a=b"`,
		"url":          "[host.'https://%zz']",
		"too large":    "#" + strings.Repeat("x", maxFile),
	} {
		root := lay(t, map[string]string{"r.example/hosts.toml": text, "r.example/ca.crt": ""})
		var warned error
		d := Dirs{Paths: []string{root}, Warn: func(_ string, err error) { warned = err }}
		got, err := d.Lookup(t.Context(), "r.example")
		want := []Host{{Scheme: "https", Host: "r.example", Path: "/v2", Capabilities: Everything, Implied: true,
			CA: []string{root + "/r.example/ca.crt"}, Origin: root + "/r.example"}}
		if err != nil || warned == nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v; warned %v", name, got, err, warned)
		}
	}
}

func TestUnknownKeysAreReportedAndTheRestHolds(t *testing.T) {
	root := lay(t, map[string]string{"_default/hosts.toml": "sever = 'x'\n[host.'https://m']\nskip_verfy = true\nskip_verify = true\n"})
	var warned error
	got, err := Dirs{Paths: []string{root}, Warn: func(_ string, err error) { warned = err }}.Lookup(t.Context(), "x")
	if err != nil || len(got) != 2 || got[0].Host != "m" || got[0].SkipVerify == nil {
		t.Fatalf("%+v, %v", got, err)
	}
	if warned == nil || !strings.Contains(warned.Error(), "sever") || !strings.Contains(warned.Error(), "skip_verfy (line 3)") {
		t.Errorf("warned %v", warned)
	}
}

func TestDockerCertificates(t *testing.T) {
	root := lay(t, map[string]string{
		"r.example/a.crt": "", "r.example/b.crt": "", "r.example/client.cert": "", "r.example/client.key": "",
		"r.example/both.cert": "", "r.example/readme": "", "r.example/sub.crt/x": "", "r.example/hosts.toml": "",
	})
	got, err := Dirs{Paths: []string{root}}.Lookup(t.Context(), "r.example")
	if err != nil {
		t.Fatal(err)
	}
	base := root + "/r.example/"
	if !reflect.DeepEqual(got[0].CA, []string{base + "a.crt", base + "b.crt"}) ||
		!reflect.DeepEqual(got[0].Client, []KeyPair{{Cert: base + "both.cert"}, {base + "client.cert", base + "client.key"}}) {
		t.Errorf("%+v", got)
	}
}

func TestTriesTLSFirst(t *testing.T) {
	for _, tc := range []struct {
		h    Host
		want bool
	}{
		{Host{Scheme: "http", Host: "x:5000"}, false},
		{Host{Scheme: "http", Host: "x:5000", CA: []string{"f"}}, true},
		{Host{Scheme: "http", Host: "x", SkipVerify: no()}, true},
		{Host{Scheme: "http", Host: "x:80", SkipVerify: yes()}, false},
		{Host{Scheme: "https", Host: "x:5000", SkipVerify: yes()}, false},
	} {
		if got := tc.h.TriesTLSFirst(); got != tc.want {
			t.Errorf("%+v: %v", tc.h, got)
		}
	}
}

func TestNamesThatLeaveTheRoot(t *testing.T) {
	for _, host := range []string{"", ".", "..", "a/b", "../etc", `a\b`, "a\x00b"} {
		if _, err := (Dirs{Paths: []string{t.TempDir()}}).Lookup(t.Context(), host); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", host, err)
		}
	}
}

func TestFilesThatAreNoFiles(t *testing.T) {
	root := lay(t, map[string]string{"r.example/x": ""})
	fifo := root + "/r.example/hosts.toml"
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (Dirs{Paths: []string{root}}).Lookup(t.Context(), "r.example"); err == nil || !strings.Contains(err.Error(), fifo) {
		t.Errorf("fifo: %v", err)
	}
	if _, err := (Dirs{Paths: []string{root + "/r.example/x"}}).Lookup(t.Context(), "r.example"); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("root that is a file: %v", err)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (Dirs{}).Lookup(ctx, "x"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestTLSConfig(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	private := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	root := lay(t, map[string]string{"c": cert, "k": private, "both": cert + private, "junk": "junk"})
	file := func(name string) string { return filepath.Join(root, name) }

	c, err := Host{CA: []string{file("c")}, Client: []KeyPair{{file("c"), file("k")}, {Cert: file("both")}}, SkipVerify: yes()}.TLSConfig()
	if err != nil || len(c.Certificates) != 2 || c.RootCAs == nil || !c.InsecureSkipVerify {
		t.Errorf("%+v, %v", c, err)
	}
	for name, h := range map[string]Host{
		"junk":    {CA: []string{file("junk")}},
		"missing": {CA: []string{file("missing")}},
		"/c":      {Client: []KeyPair{{Cert: file("c")}}},
	} {
		h.Origin = "/etc/x/hosts.toml"
		if _, err := h.TLSConfig(); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), h.Origin) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("server = 'x'\n[host.'https://m'.header]\na = ['b']\n"))
	f.Add([]byte("host = { a = { ca = 1 } }"))
	f.Add([]byte("[[host]]\n[host.a]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		found, _, err := parse("/d", data)
		if err != nil {
			return
		}
		if len(found) == 0 {
			t.Fatal("a good file yields no entry")
		}
		for i, h := range found {
			if i < len(found)-1 && (h.Host == "" || h.Scheme != "http" && h.Scheme != "https") {
				t.Fatalf("%+v", h)
			}
			if h.Capabilities == 0 {
				t.Fatalf("%+v may do nothing", h)
			}
		}
	})
}
