package compat

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// moves are command lines that go through the daemons' transfer service.
const moves = `
images pull --plain-http {one}
images pull --plain-http {one}
images pull --plain-http {index}
images pull --plain-http --skip-metadata {lean}
images pull --plain-http --platform linux/s390x {index}
images pull --plain-http --platform linux/s390x --platform {host platform} {both}
images pull --plain-http --all-platforms {all}
images pull --plain-http --label team=red --label tier=1 {two}
images pull --plain-http {host}/no/such:1
images pull --plain-http NOT/A-REFERENCE
images pull --plain-http {host}/one
images pull --plain-http {host}/one@{manifest}
images pull --plain-http --snapshotter nope {one}
images pull --plain-http --platform windows/amd64 {one}
images pull --plain-http --user me:wrong {private}/one:latest
images pull --plain-http --user me:secret {private}/one:latest
images pull --plain-http {private}/two:latest
images pull --plain-http --http-trace {one}

images tag {one} {host}/tagged:1
images tag {one} {host}/tagged:1 {host}/tagged:2
images tag {two} {host}/tagged:1
images tag nope {host}/tagged:3
images tag {one} UPPER
images tag --skip-reference-check {one} UPPER
`

// movedOtherwise are those of the moves for which ours has other words, and a
// part of them.
var movedOtherwise = map[string]string{
	"images pull --plain-http {host}/no/such:1":                     "not found; check the name and the tag",
	"images pull --plain-http NOT/A-REFERENCE":                      "invalid argument", // a kind, which containerd's error has not
	"images pull --plain-http {host}/one":                           "invalid argument",
	"images pull --plain-http --user me:wrong {private}/one:latest": "does not accept the password of user me",
	"images pull --plain-http {private}/two:latest":                 "asks for a user and password",
	"images pull --plain-http --http-trace {one}":                   "not implemented", // not built yet
}

// TestTransfer has both daemons move the same images, and compares what
// containerd's command line says and what is in the databases afterwards.
func TestTransfer(t *testing.T) {
	t.Parallel()
	names := moveNames(t)
	stores := make(map[kind]root)
	said := make(map[kind][]exchange)
	for _, which := range []kind{theirs, ours} {
		stores[which] = newRoot(t)
		d := stores[which].start(t, which)
		for line := range strings.Lines(moves) {
			if line = strings.TrimSpace(line); line == "" {
				continue
			}
			out := d.ctr(t, append([]string{"-n", "default"}, strings.Fields(names.Replace(line))...)...)
			if strings.Contains(line, "pull") {
				out.stdout = "" // TestTransferProgress compares it, moments apart
			}
			said[which] = append(said[which], exchange{line, d.even(fmt.Sprintf("exit %d\n%s--\n%s", out.code, out.stdout, out.stderr))})
		}
		d.mustBeSound(t)
		d.stop()
	}
	for i, w := range said[theirs] {
		g := said[ours][i]
		if part, ok := movedOtherwise[w.line]; ok {
			if g.text == w.text || !strings.Contains(g.text, part) {
				t.Errorf("ctr %s: ours says\n%s\nwant %q, which is another thing than containerd's\n%s", w.line, g.text, part, w.text)
			}
		} else if g.text != w.text {
			t.Errorf("ctr %s\ncontainerd: %s\nholdfastd:  %s", w.line, w.text, g.text)
		}
	}
	for _, file := range []string{metaFile, indexFile} {
		if lines := lineDifferences(stores[theirs].dump(t, file), stores[ours].dump(t, file)); lines != "" {
			t.Errorf("%s is not as containerd writes it:%s", file, lines)
		}
	}
}

// moveNames makes what the command lines refer to.
func moveNames(t *testing.T) *strings.Replacer {
	srv, private := registrytest.New(t), registrytest.New(t)
	one := push(srv, "one", baseLayer, nextLayer)
	manifest, _ := documents(t, srv, one)
	push(private, "one", baseLayer)
	push(private, "two", baseLayer)
	private.Require(registrytest.Auth{Basic: true, User: "me", Password: "secret"})
	return strings.NewReplacer(
		"{host}", srv.Host(), "{one}", one, "{two}", push(srv, "two", baseLayer, sideLayer), "{manifest}", manifest,
		"{index}", pushIndex(srv, "index", "base"), "{lean}", pushIndex(srv, "lean"), "{both}", pushIndex(srv, "both", "base"), "{all}", pushIndex(srv, "all"),
		"{private}", private.Host(), "{host platform}", "linux/"+platform().Architecture,
	)
}

// pushIndex puts an index of this machine's image, another platform's and an
// attestation into a registry, all with layers of their own unless the two share some.
func pushIndex(srv *registrytest.Server, repository string, shared ...string) string {
	layer := func(text string) registrytest.Layer {
		plain := layertest.Archive(layertest.File(repository+"/"+text, text))
		return registrytest.Layer{Data: packed(plain), DiffID: digest.FromBytes(plain)}
	}
	layers := func(own string) (all []registrytest.Layer) {
		for _, text := range append(shared, own, own+" too") {
			all = append(all, layer(text))
		}
		return all
	}
	image := func(p ocispec.Platform, layers ...registrytest.Layer) registrytest.Image {
		return srv.PushFormat(repository, "", registrytest.Format{Platform: p}, layers...)
	}
	srv.PushIndex(repository, "latest",
		image(ocispec.Platform{OS: "linux", Architecture: "s390x"}, layers("s390x")...),
		image(platform(), layers("here")...),
		image(ocispec.Platform{OS: "unknown", Architecture: "unknown"}, registrytest.Layer{Data: []byte(`{"_type":"` + repository + `"}`), MediaType: "application/vnd.in-toto+json"}))
	return srv.Host() + "/" + repository + ":latest"
}

// heard is what a client was told of a transfer: where each thing stands and
// how it ended, and the words for the whole.
type heard struct {
	mu    sync.Mutex
	ends  map[string]string
	words []string
}

func (h *heard) progress(p transfer.Progress) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.Name == "" {
		h.words = append(h.words, p.Event)
		return
	}
	parents := strings.Join(slices.Sorted(slices.Values(p.Parents)), " ")
	if old, ok := h.ends[p.Name]; ok && parents == "" {
		_, parents, _ = strings.Cut(old, " below ") // containerd leaves them out at times
	}
	desc := "nothing"
	if p.Desc != nil {
		desc = fmt.Sprintf("%s %s %d", p.Desc.MediaType, p.Desc.Digest, p.Desc.Size)
	}
	h.ends[p.Name] = fmt.Sprintf("%s %d/%d of %s below %s", p.Event, p.Progress, p.Total, desc, parents)
}

func (h *heard) listing() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	lines := slices.Clone(h.words)
	for _, name := range slices.Sorted(maps.Keys(h.ends)) {
		lines = append(lines, name+": "+h.ends[name])
	}
	return strings.Join(lines, "\n")
}

// settled waits until nothing more is heard: messages may come after the
// transfer's own answer.
func (h *heard) settled() string {
	for last := h.listing(); ; {
		time.Sleep(time.Second) // as long as containerd's own updates are apart, and more
		now := h.listing()
		if now == last {
			return now
		}
		last = now
	}
}

// TestTransferProgress pulls by containerd's client and compares what both
// daemons tell it: the tree of things, and how each of them ended.
func TestTransferProgress(t *testing.T) {
	t.Parallel()
	srv := registrytest.New(t)
	for _, c := range []struct {
		name   string
		opts   []image.StoreOpt
		shared []string // layers of all platforms; containerd fetches them twice at once and tells of either
		again  bool
	}{
		{name: "index", opts: []image.StoreOpt{image.WithPlatforms(platform()), image.WithUnpack(platform(), ""), image.WithAllMetadata}, shared: []string{"base"}},
		{name: "lean", opts: []image.StoreOpt{image.WithPlatforms(platform()), image.WithUnpack(platform(), "overlayfs")}},
		{name: "packed", opts: []image.StoreOpt{image.WithPlatforms(platform())}},
		{name: "all"},
		{name: "all-again", again: true},
	} {
		reference := pushIndex(srv, c.name, c.shared...)
		told := make(map[kind]string)
		for _, which := range []kind{theirs, ours} {
			d := newRoot(t).start(t, which)
			reg, err := registry.NewOCIRegistry(t.Context(), reference, registry.WithDefaultScheme("http"))
			if err != nil {
				t.Fatal(err)
			}
			pull := func() string {
				ctx, cancel := context.WithTimeout(in(t, "default"), commandTimeout)
				defer cancel()
				h := &heard{ends: make(map[string]string)}
				if err := d.client.Transfer(ctx, reg, image.NewStore(reference, c.opts...), transfer.WithProgress(h.progress)); err != nil {
					t.Fatalf("pull %s by %s: %v", reference, which, err)
				}
				return h.settled()
			}
			told[which] = pull()
			if c.again {
				told[which] = pull()
			}
		}
		if lines := lineDifferences(told[theirs], told[ours]); lines != "" {
			t.Errorf("%s: clients are not told what containerd tells them:%s", c.name, lines)
		}
	}
}
