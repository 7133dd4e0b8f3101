package compat

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// plainResolver speaks HTTP without TLS to every registry, as `ctr --plain-http` does.
func plainResolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts)),
	})
}

// platform is this machine's.
func platform() ocispec.Platform {
	return ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
}

// push puts an image of uncompressed layers into a registry, gzipped, and
// returns its reference.
func push(srv *registrytest.Server, repository string, layers ...[]byte) string {
	return pushFor(srv, platform(), repository, layers...)
}

// pushFor is push for another platform.
func pushFor(srv *registrytest.Server, p ocispec.Platform, repository string, layers ...[]byte) string {
	var all []registrytest.Layer
	for _, layer := range layers {
		all = append(all, registrytest.Layer{Data: packed(layer), DiffID: digest.FromBytes(layer)})
	}
	srv.PushFormat(repository, "latest", registrytest.Format{Platform: p}, all...)
	return srv.Host() + "/" + repository + ":latest"
}

// packed is a layer as push compresses it.
func packed(layer []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	w.Write(layer)
	w.Close()
	return buf.Bytes()
}

// documents returns the digests of an image's manifest and config.
func documents(t testing.TB, srv *registrytest.Server, reference string) (manifest, config string) {
	t.Helper()
	repository, _, _ := strings.Cut(strings.TrimPrefix(reference, srv.Host()+"/"), ":")
	reply, err := http.Get(srv.URL() + "/v2/" + repository + "/manifests/latest")
	if err != nil {
		t.Fatal(err)
	}
	defer reply.Body.Close()
	data, err := io.ReadAll(reply.Body)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	return digest.FromBytes(data).String(), m.Config.Digest.String()
}
