package pull

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/linux/mount/mounttest"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

func TestMain(m *testing.M) { mounttest.Main(m) }

// manner is one way to pull an image; its tree must not depend on it.
type manner struct {
	name      string
	downloads int
	procs     int
	pack      func(n int, archive []byte) registrytest.Layer
}

// The first has nothing side by side, and is what the others are held against.
var manners = []manner{
	{"one by one, plain, on one core", 1, 1, func(_ int, a []byte) registrytest.Layer { return plain(a) }},
	{"side by side, gzip", 8, 2, func(_ int, a []byte) registrytest.Layer { return gzipped(a) }},
	{"side by side, zstd, on one core", 8, 1, func(_ int, a []byte) registrytest.Layer { return zstandard(a) }},
	{"some at once, mixed", 3, 2, mixed},
}

func mixed(n int, archive []byte) registrytest.Layer {
	return []func([]byte) registrytest.Layer{members, plain, gzipped, zstandard}[n%4](archive)
}

// members packs an archive as several gzip members, as some builders do.
func members(archive []byte) registrytest.Layer {
	var buf bytes.Buffer
	for rest := archive; len(rest) > 0; {
		part := rest[:min(len(rest), 1+len(archive)/3)]
		rest = rest[len(part):]
		w := gzip.NewWriter(&buf)
		w.Write(part)
		w.Close()
	}
	return registrytest.Layer{Data: buf.Bytes(), DiffID: digest.FromBytes(archive)}
}

// The random images: LAYER_SEED=n LAYER_COUNT=m tries others than from the clock, or more of them.
const randomImages = 200

func randomTrees(t *testing.T) (images []layertest.Image) {
	first, count := uint64(time.Now().Unix()), uint64(randomImages)
	if n, err := strconv.ParseUint(os.Getenv("LAYER_SEED"), 10, 64); err == nil {
		first = n
	}
	if n, err := strconv.ParseUint(os.Getenv("LAYER_COUNT"), 10, 64); err == nil {
		count = n
	}
	t.Logf("LAYER_SEED=%d LAYER_COUNT=%d", first, count)
	for n := range count {
		switch seed := first + n; {
		case n%50 == 49:
			images = append(images, layertest.Bulky(seed))
		case n%2 == 0:
			images = append(images, layertest.Random(seed))
		default:
			images = append(images, layertest.Orderly(seed, true))
		}
	}
	return images
}

// treesAtOnce is how many images lie in memory at the same time.
const treesAtOnce = 40

// TestTrees: an image whose layers are unpacked side by side, while they are fetched and before any of them knows its
// parents, is what the same layers make one after the other on one directory, in names, types, modes, owners, sizes,
// bytes, extended attributes, hard links, device numbers and all times that the layers give. And the directory of each
// layer is the same, overlay's marks included, whatever goes on side by side and however the layer is packed.
func TestTrees(t *testing.T) {
	mounttest.Root(t)
	layertest.InMemory(t)
	images := append(randomTrees(t), layertest.Awkward()...)
	for n := 0; n < len(images); n += treesAtOnce {
		part := images[n:min(n+treesAtOnce, len(images))]
		t.Run(fmt.Sprintf("%s to %s", part[0].Name, part[len(part)-1].Name), func(t *testing.T) {
			var houses []*house
			for range manners {
				houses = append(houses, newHouse(t, settings{}))
			}
			for _, img := range part {
				for i, m := range manners {
					houses[i].pullTree(img, m)
				}
				sameUppers(t, img, houses)
				sameTree(t, img, houses)
			}
		})
	}
}

func (h *house) pullTree(img layertest.Image, m manner) {
	h.t.Helper()
	var layers []registrytest.Layer
	for i, archive := range img.Layers {
		layers = append(layers, m.pack(i, archive))
	}
	h.push("tree", img.Name, layers...)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(m.procs))
	if err := h.pull("tree:"+img.Name, Request{Downloads: m.downloads}); err != nil {
		h.t.Errorf("%s, %s: %v", img.Name, m.name, err)
	}
}

// sameUppers compares the directory of each layer over all manners.
func sameUppers(t *testing.T, img layertest.Image, houses []*house) {
	t.Helper()
	for n := range img.Layers {
		// What a layer's directory has is what the layers up to it say.
		opts := layertest.CompareOptions{Uppers: true, IgnoreTimes: layertest.Timeless(layertest.Image{Layers: img.Layers[:n+1]}, true)}
		first := houses[0].upper(img, n)
		for i, h := range houses[1:] {
			compareTrees(t, fmt.Sprintf("%s, layer %d: %s | %s", img.Name, n, manners[0].name, manners[i+1].name), first, h.upper(img, n), opts)
		}
	}
}

// upper is the directory of layer n.
func (h *house) upper(img layertest.Image, n int) string {
	h.t.Helper()
	dir, _, err := h.overlays().Dir(h.t.Context(), chainOf(img.Layers[:n+1]))
	if err != nil {
		h.t.Fatal(err)
	}
	return dir
}

func (h *house) overlays() meta.Snapshots {
	h.t.Helper()
	snaps, err := h.space().Snapshots("overlayfs")
	if err != nil {
		h.t.Fatal(err)
	}
	return snaps
}

// chainOf is the ChainID of layers.
func chainOf(layers [][]byte) string {
	chain := digest.FromBytes(layers[0])
	for _, archive := range layers[1:] {
		chain = digest.FromString(chain.String() + " " + digest.FromBytes(archive).String())
	}
	return chain.String()
}

// followsLinkBelow is the one image whose tree depends on the driver: to write through a link of a lower layer follows
// the link on a plain directory, and hides it on an overlay, ours and containerd's.
const followsLinkBelow = "driver-link-below"

// sameTree compares what a container would see with the layers unpacked in order onto one directory.
func sameTree(t *testing.T, img layertest.Image, houses []*house) {
	t.Helper()
	if img.Name == followsLinkBelow {
		return
	}
	serial := inOrder(t, img)
	opts := layertest.CompareOptions{IgnoreTimes: layertest.Timeless(img, false)}
	for i, h := range houses {
		err := h.view(chainOf(img.Layers), func(dir string) {
			compareTrees(t, fmt.Sprintf("%s: in order onto one directory | %s", img.Name, manners[i].name), serial, dir, opts)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	opts.FileLinks = true
	compareTrees(t, img.Name+": in order onto one directory | native", serial, houses[0].onNative(img), opts)
	if err := os.RemoveAll(serial); err != nil {
		t.Fatal(err)
	}
}

// onNative pulls an image that is here with the driver that unpacks each layer onto a copy of those below it.
func (h *house) onNative(img layertest.Image) (dir string) {
	h.t.Helper()
	h.mustPull("tree:"+img.Name, Request{Snapshotter: "native"})
	snaps, err := h.space().Snapshots("native")
	if err != nil {
		h.t.Fatal(err)
	}
	if dir, _, err = snaps.Dir(h.t.Context(), chainOf(img.Layers)); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

// inOrder unpacks the layers of an image one after the other onto one directory.
func inOrder(t *testing.T, img layertest.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "serial")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, archive := range img.Layers {
		d, err := layer.NewDirectory(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := layer.Apply(t.Context(), bytes.NewReader(archive), "", d, layer.Limits{}); err != nil {
			t.Fatalf("%s, layer %d in order: %v", img.Name, i, err)
		}
	}
	return dir
}

// view mounts a committed snapshot as a container would see it.
func (h *house) view(chain string, look func(dir string)) (err error) {
	h.t.Helper()
	ctx, snaps, key := h.t.Context(), h.overlays(), "view-"+chain
	made, release, err := snaps.Create(ctx, snapshot.New{Key: key, Parent: chain, Kind: snapshot.KindView})
	if err != nil {
		return err
	}
	defer release()
	if err := h.space().Update(ctx, func(tx *meta.Tx) error { return tx.RecordSnapshot(made[0]) }); err != nil {
		return err
	}
	mounts, err := snaps.Mounts(ctx, key)
	if err != nil {
		return err
	}
	dir := h.t.TempDir()
	if err := mount.All(ctx, dir, mounts); err != nil {
		return err
	}
	look(dir)
	if err := unix.Unmount(dir, 0); err != nil {
		return err
	}
	return snaps.Remove(ctx, key)
}

// differencesShown bounds what is said of one pair of trees.
const differencesShown = 10

func compareTrees(t *testing.T, what, a, b string, opts layertest.CompareOptions) {
	t.Helper()
	diffs, err := layertest.Compare(a, b, opts)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	for _, d := range diffs[:min(len(diffs), differencesShown)] {
		t.Errorf("%s: %s", what, d)
	}
}
