package pull

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestHostileDocuments: documents that can be read in two ways, that break a bound or don't fit each other are refused,
// with a word on why and before anything is fetched.
func TestHostileDocuments(t *testing.T) {
	const manifestType, indexType = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex
	desc := func(d ocispec.Descriptor) string { return string(encode(d)) }
	for name, test := range map[string]struct {
		mediaType string
		doc       func(img registrytest.Image) string
		says      string
	}{
		"layers and manifests": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s],"manifests":[]}`, desc(img.Config), desc(img.Layers[0]))
		}, "manifests"},
		"index with layers": {indexType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"layers":[],"manifests":[%s]}`, desc(img.Descriptor))
		}, "layers"},
		"duplicate key": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s],"layers":[]}`, desc(img.Config), desc(img.Layers[0]))
		}, "layers"},
		"key in another case": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s],"Layers":[]}`, desc(img.Config), desc(img.Layers[0]))
		}, "ayers"},
		"media type conflict": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"mediaType":"%s","config":%s,"layers":[%s]}`, indexType, desc(img.Config), desc(img.Layers[0]))
		}, "calls itself"},
		"something after": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]} {}`, desc(img.Config), desc(img.Layers[0]))
		}, "follows"},
		"schema 1": {"application/vnd.docker.distribution.manifest.v1+prettyjws", func(registrytest.Image) string {
			return `{"schemaVersion":1,"name":"app","tag":"1","architecture":"amd64","fsLayers":[],"history":[]}`
		}, "schema 1"},
		"schema 1 in disguise": {manifestType, func(registrytest.Image) string {
			return `{"schemaVersion":1,"name":"app","tag":"1","architecture":"amd64","fsLayers":[],"history":[]}`
		}, ""},
		"fewer layers than diffIDs": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[]}`, desc(img.Config))
		}, "the manifest has 0 layers and the config 1"},
		"more layers than diffIDs": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s,%[2]s]}`, desc(img.Config), desc(img.Layers[0]))
		}, "the manifest has 2 layers and the config 1"},
		"negative size": {manifestType, func(img registrytest.Image) string {
			img.Layers[0].Size = -1
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]}`, desc(img.Config), desc(img.Layers[0]))
		}, "size -1"},
		"digest with a path": {manifestType, func(img registrytest.Image) string {
			img.Layers[0].Digest = "sha256:../../../../etc/passwd"
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]}`, desc(img.Config), desc(img.Layers[0]))
		}, "digest"},
		"no digest": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[{"mediaType":"x","size":3}]}`, desc(img.Config))
		}, "digest"},
		"no config": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"layers":[%s]}`, desc(img.Layers[0]))
		}, "no config"},
		"config too large": {manifestType, func(img registrytest.Image) string {
			img.Config.Size = 1 << 40
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]}`, desc(img.Config), desc(img.Layers[0]))
		}, "more than"},
		"too many layers": {manifestType, func(img registrytest.Image) string {
			return fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s{}]}`, desc(img.Config), strings.Repeat("{},", 20_000))
		}, "descriptors"},
		"deep": {manifestType, func(registrytest.Image) string {
			return `{"schemaVersion":2,"annotations":` + strings.Repeat("[", 100_000) + strings.Repeat("]", 100_000) + `}`
		}, "deeper"},
		"empty":     {manifestType, func(registrytest.Image) string { return `` }, ""},
		"no object": {manifestType, func(registrytest.Image) string { return `[1,2]` }, "JSON object"},
		"binary":    {manifestType, func(registrytest.Image) string { return "\x00\xff\x1f\x8b" }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t, settings{})
			img := h.push("app", "", simple(1, 100))
			layer := img.Layers[0]
			h.srv.PushManifest("app", "1", test.mediaType, []byte(test.doc(img)))
			err := h.pull("app:1", Request{})
			wantError(t, err, "app:1", test.says)
			if n := h.requests(layer); n > 0 {
				t.Error("a layer was fetched")
			}
			h.nothing()
			h.collect()
			h.settled()
		})
	}
}

// TestTooLargeManifest: a manifest above the bound is refused by its declared size.
func TestTooLargeManifest(t *testing.T) {
	h := newHouse(t, settings{})
	h.srv.PushManifest("app", "1", ocispec.MediaTypeImageManifest, append([]byte(`{"x":"`), bytes.Repeat([]byte("x"), 5<<20)...))
	if err := h.pull("app:1", Request{}); err == nil {
		t.Error("a manifest of 5 MiB was taken")
	}
	if n := h.srv.Bytes("/manifests/"); n > 5<<20+100 {
		t.Errorf("%d bytes were read", n)
	}
	h.nothing()
}

// TestNesting: an index that would list itself can't exist, but one may nest for ever.
func TestNesting(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "", simple(1, 100))
	for range 30 {
		img = registrytest.Image{Descriptor: h.srv.PushIndex("app", "deep", img)}
	}
	wantError(t, h.pull("app:deep", Request{}), "nest deeper")
	h.nothing()
}

// TestWrongDiffID: the layer is what the manifest says and not what the config says.
func TestWrongDiffID(t *testing.T) {
	for _, driver := range drivers {
		h := newHouse(t, settings{})
		l := simple(1, 100)
		l.DiffID = digest.FromString("something else")
		img := h.push("app", "1", l)
		err := h.pull("app:1", Request{Snapshotter: driver})
		wantError(t, err, img.Layers[0].Digest.String(), l.DiffID.String(), "its author must rebuild it")
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("error %v is of another kind", err)
		}
		h.nothing()
	}
}

// TestAnnotations: a manifest may label the snapshot, and may not ask for an id mapping.
func TestAnnotations(t *testing.T) {
	h := newHouse(t, settings{})
	img := h.push("app", "", simple(1, 100))
	m := img.Manifest
	m.Layers[0].Annotations = map[string]string{
		"containerd.io/snapshot/uidmapping":    "0:0:4294967295",
		"containerd.io/snapshot/gidmapping":    "0:0:4294967295",
		"containerd.io/snapshot/x/uidmapping":  "0:0:4294967295",
		"containerd.io/snapshot/remote/hint":   "yes",
		"containerd.io/snapshot/long":          strings.Repeat("x", 10_000),
		"containerd.io/snapshot/diff-id":       "sha256:" + strings.Repeat("0", 64),
		"containerd.io/snapshot.ref":           "mine",
		"containerd.io/gc.root":                "forever",
		"containerd.io/gc.ref.content.evil":    "sha256:" + strings.Repeat("0", 64),
		"org.opencontainers.image.description": "no business of a snapshot",
	}
	h.srv.PushManifest("app", "1", m.MediaType, encode(m))
	h.mustPull("app:1", Request{})
	top := h.whole("app:1", "overlayfs").TopChain().String()
	snaps, err := h.space().Snapshots("overlayfs")
	if err != nil {
		t.Fatal(err)
	}
	info, err := snaps.Stat(t.Context(), top)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range info.Labels {
		switch k {
		case "containerd.io/snapshot/remote/hint", "containerd.io/snapshot/diff-id":
		case "containerd.io/snapshot.ref":
			if v != top {
				t.Errorf("label %s is %q", k, v)
			}
		default:
			t.Errorf("label %s=%q", k, v)
		}
	}
	if info.Labels["containerd.io/snapshot/remote/hint"] != "yes" {
		t.Error("the annotation for a snapshotter is missing")
	}
}

// outside is a directory beside the store, which hostile layers try to reach.
type outside struct {
	dir    string
	before map[string]string
}

func newOutside(t *testing.T) *outside {
	o := &outside{dir: filepath.Join(t.TempDir(), "outside")}
	for _, err := range []error{
		os.Mkdir(o.dir, 0o700),
		os.WriteFile(filepath.Join(o.dir, "secret"), []byte("secret"), 0o600),
		os.Mkdir(filepath.Join(o.dir, "sub"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	o.before = o.look(t)
	return o
}

// look describes every file: mode, owner, inode, links, times and content.
func (o *outside) look(t *testing.T) map[string]string {
	all := map[string]string{}
	err := filepath.WalkDir(o.dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		body := ""
		if info.Mode().IsRegular() {
			b, _ := os.ReadFile(name)
			body = string(b)
		}
		all[name] = fmt.Sprint(info.Mode(), st.Uid, st.Gid, st.Ino, st.Nlink, st.Mtim, st.Ctim, body)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func (o *outside) check(t *testing.T) {
	t.Helper()
	after := o.look(t)
	for name, was := range o.before {
		if after[name] != was {
			t.Errorf("%s was %s and is %s", name, was, after[name])
		}
	}
	if len(after) != len(o.before) {
		t.Errorf("%d files outside, and there were %d", len(after), len(o.before))
	}
}

// TestEscapes: names and links that lead out of the root lead nowhere.
func TestEscapes(t *testing.T) {
	up := strings.Repeat("../", 30)
	for name, layers := range map[string]func(out string) [][]layertest.Entry{
		"dotdot": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.File(up+out+"/secret", "bad"), layertest.File("ok", "")}}
		},
		"absolute": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.File("/"+out+"/secret", "bad")}}
		},
		"through a link": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("l", "/"+out), layertest.File("l/secret", "bad")}}
		},
		"through a link that climbs": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("l", up+out), layertest.File("l/new", "bad"), layertest.Dir("l/sub", 0o777)}}
		},
		"through a link of a lower layer": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("l", "/"+out)}, {layertest.File("l/secret", "bad")}}
		},
		"links in a chain": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("a", "b/.."), layertest.Symlink("b", "/"+out+"/sub"), layertest.File("a/secret", "bad")}}
		},
		"link swapped": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Dir("d", 0o755), layertest.File("d/secret", "1"), layertest.Symlink("d", "/"+out), layertest.File("d/secret", "bad")}}
		},
		"chmod of a link": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("l", "/"+out+"/secret").Moded(0o777).Owned(1, 1).Xattr("user.x", "y")}}
		},
		"directory over a link": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("l", "/"+out)}, {layertest.Dir("l", 0o777).Owned(1, 1)}}
		},
		"whiteout outside": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("l", "/"+out), layertest.Whiteout("l/secret"), layertest.Whiteout(up + out + "/secret")}}
		},
		"opaque outside": func(out string) [][]layertest.Entry {
			return [][]layertest.Entry{{layertest.Symlink("l", "/"+out), layertest.Opaque("l")}}
		},
	} {
		for _, driver := range drivers {
			t.Run(name+"/"+driver, func(t *testing.T) {
				t.Parallel()
				out := newOutside(t)
				h := newHouse(t, settings{})
				var stack []registrytest.Layer
				for _, entries := range layers(strings.TrimPrefix(out.dir, "/")) {
					stack = append(stack, gzipped(layertest.Archive(entries...)))
				}
				h.push("app", "1", stack...)
				if err := h.pull("app:1", Request{Snapshotter: driver}); err == nil {
					h.whole("app:1", driver)
				} else {
					h.nothingNamed()
				}
				out.check(t)
			})
		}
	}
}

// nothingNamed fails if there is an image.
func (h *house) nothingNamed() {
	h.t.Helper()
	if n := len(h.dump().Images); n > 0 {
		h.t.Errorf("%d images", n)
	}
}

// TestBadArchives: the error names the layer and the entry, nothing is committed, and the other layers survive in
// their ingests.
func TestBadArchives(t *testing.T) {
	out := newOutside(t)
	secret := strings.TrimPrefix(out.dir, "/") + "/secret"
	good := layertest.Archive(layertest.File("good", noise(3, 5000)))
	for name, test := range map[string]struct {
		archive []byte
		says    string
		kind    error
	}{
		"hard link outside":       {layertest.Archive(layertest.File("a", ""), layertest.Link("steal", strings.Repeat("../", 30)+secret)), "steal", nil},
		"absolute hard link":      {layertest.Archive(layertest.File("a", ""), layertest.Link("steal", "/"+secret)), "steal", nil},
		"hard link to nothing":    {layertest.Archive(layertest.File("a", ""), layertest.Link("dangling", "nowhere")), "dangling", nil},
		"truncated":               {good[:700], "good", nil},
		"garbage":                 {bytes.Repeat([]byte("garbage "), 512), "", nil},
		"damaged header":          {damage(layertest.Archive(layertest.File("first", "x"), layertest.File("second", "y")), 1024+150), "first", nil},
		"name too deep":           {layertest.Archive(layertest.File("a", ""), layertest.File(strings.Repeat("d/", 1500)+"deep", "")), "d/d/d/", errdefs.ErrResourceExhausted},
		"name part too long":      {layertest.Archive(layertest.File("a", ""), layertest.File(strings.Repeat("n", 300), "")), "nnnn", nil},
		"giant header":            {layertest.Archive(layertest.File("a", ""), layertest.File("big", "").Xattr("user.x", strings.Repeat("x", 700<<10))), "", errdefs.ErrResourceExhausted},
		"header claims terabytes": {promise("huge", 1<<50), "", nil},
		"whiteout of everything":  {layertest.Archive(layertest.File("a", ""), layertest.File(".wh...", "")), ".wh...", nil},
		"whiteout of itself":      {layertest.Archive(layertest.File("a", ""), layertest.File("d/.wh..", "")), ".wh..", nil},
	} {
		for i, driver := range slices.Concat(drivers, drivers) {
			at := i / len(drivers) // in the stack of layers
			t.Run(fmt.Sprintf("%s/%s/%d", name, driver, at), func(t *testing.T) {
				t.Parallel()
				h := newHouse(t, settings{})
				stack := slices.Insert([]registrytest.Layer{simple(1, 100), simple(2, 100)}, at, gzipped(test.archive))
				img := h.push("app", "1", stack...)
				err := h.pull("app:1", Request{Snapshotter: driver})
				wantError(t, err, "app:1", "layer "+img.Layers[at].Digest.String()+": ", test.says)
				if test.kind != nil && !errors.Is(err, test.kind) {
					t.Errorf("error %q is no %v", err, test.kind)
				}
				h.nothingNamed()
				if at == 0 {
					h.nothing()
				}
				out.check(t)
			})
		}
	}
}

func damage(archive []byte, at int) []byte {
	archive = bytes.Clone(archive)
	archive[at] ^= 0xff
	return archive
}

// promise is an archive whose one header promises more than follows.
func promise(name string, size int64) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, Format: tar.FormatPAX})
	return append(buf.Bytes(), make([]byte, 2048)...)
}

// TestCompressionDamage: what isn't what its media type says, or ends early, is refused.
func TestCompressionDamage(t *testing.T) {
	good := gzipped(layertest.Archive(layertest.File("f", noise(1, 50_000))))
	for name, l := range map[string]registrytest.Layer{
		"gzip cut":             {Data: good.Data[:len(good.Data)/2], DiffID: good.DiffID},
		"gzip with wrong sum":  {Data: damage(good.Data, len(good.Data)-6), DiffID: good.DiffID},
		"gzip and garbage":     {Data: append(bytes.Clone(good.Data), "garbage"...), DiffID: good.DiffID},
		"empty":                {Data: []byte{}, DiffID: good.DiffID, MediaType: ocispec.MediaTypeImageLayerGzip},
		"unknown type":         {Data: good.Data, DiffID: good.DiffID, MediaType: "application/vnd.example.layer.v9.tar+lzma"},
		"encrypted":            {Data: good.Data, DiffID: good.DiffID, MediaType: ocispec.MediaTypeImageLayerGzip + "+encrypted"},
		"zstd that is nothing": {Data: []byte("\x28\xb5\x2f\xfd nothing"), DiffID: good.DiffID, MediaType: ocispec.MediaTypeImageLayerZstd},
	} {
		for _, driver := range drivers {
			t.Run(name+"/"+driver, func(t *testing.T) {
				t.Parallel()
				h := newHouse(t, settings{})
				img := h.push("app", "1", l)
				wantError(t, h.pull("app:1", Request{Snapshotter: driver}), img.Layers[0].Digest.String())
				h.nothing()
			})
		}
	}
}

// TestBombs: a small layer that unpacks to a large one is cut off at the bounds, with little memory.
func TestBombs(t *testing.T) {
	limits := layer.Limits{Size: 64 << 20, Ratio: 50, RatioFloor: 4 << 20, Entries: 2000}
	zeros := func(n int64) registrytest.Layer {
		var buf bytes.Buffer
		z, _ := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
		w := tar.NewWriter(z)
		w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Size: n, Mode: 0o644})
		block := make([]byte, 1<<20)
		for range n >> 20 {
			w.Write(block)
		}
		w.Close()
		z.Close()
		return registrytest.Layer{Data: buf.Bytes(), DiffID: digest.FromString("never reached")}
	}
	entries := func(n int) registrytest.Layer {
		var all []layertest.Entry
		for i := range n {
			all = append(all, layertest.Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i), Mode: 0o755}})
		}
		return gzipped(layertest.Archive(all...))
	}
	for name, l := range map[string]registrytest.Layer{"ratio": zeros(200 << 20), "entries": entries(3000)} {
		for _, driver := range drivers {
			t.Run(name+"/"+driver, func(t *testing.T) {
				h := newHouse(t, settings{limits: limits})
				img := h.push("app", "1", l)
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				begin := time.Now()
				err := h.pull("app:1", Request{Snapshotter: driver})
				runtime.ReadMemStats(&after)
				wantError(t, err, img.Layers[0].Digest.String(), "layer")
				if !errdefs.IsResourceExhausted(err) {
					t.Errorf("error %v is of another kind", err)
				}
				if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
					t.Errorf("%d MiB were allocated", n>>20)
				}
				if took := time.Since(begin); took > 20*time.Second {
					t.Errorf("it took %s", took)
				}
				h.nothing()
				h.collect()
			})
		}
	}
}
