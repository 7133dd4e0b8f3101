package compat

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"io"
	"path"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// The snapshot drivers that both daemons have.
const (
	overlay = "overlayfs"
	native  = "native"
)

// ways are how an image gets unpacked by us: our own pull, and containerd's
// client that asks for snapshots and differences one by one.
var ways = []struct {
	name string
	pull func(t *testing.T, d *daemon, snapshotter, reference string) (ns string, err error)
}{
	{"holdfast pull", func(t *testing.T, d *daemon, snapshotter, reference string) (string, error) {
		_, err := d.holdfast.Ctl("-n", "default", "pull", "--plain-http", "--snapshotter", snapshotter, reference)
		return "default", err
	}},
	{"containerd's client", func(t *testing.T, d *daemon, snapshotter, reference string) (string, error) {
		return "client", d.pull(t, "client", snapshotter, reference)
	}},
}

// oddity is an image that containerd does not unpack, or not as it says. What
// we make of it is then the same as containerd makes of it with the other
// driver, or of another image. An oddity that is none any more is an error.
type oddity struct {
	image, snapshotter string
	fails              string   // the end of containerd's error; empty: it gives another tree
	like               [][]byte // the layers of an image that must look the same; none: the other driver's result
	why                string
}

const lostLink = `link .*: no such file or directory$`

var oddities = []oddity{
	{image: "whiteouts", snapshotter: overlay,
		why: "the whiteout in a directory that no lower layer has stays visible, as a name without a file"},
	{image: "whiteout-then-again", snapshotter: overlay,
		why: "the directory that replaces a deleted one is not opaque, and shows again what was deleted"},
	{image: "types-change-in-layer", snapshotter: overlay,
		why: "the same, for a directory that was a file in between"},
	{image: "whiteout-then-implied", snapshotter: overlay, fails: `not a directory$`,
		why: "the parent of the new file is still the whiteout's device"},
	{image: "whiteout-of-own", snapshotter: overlay, fails: `file exists$`, like: [][]byte{oddBase, ownDeleted},
		why: "the whiteout's device is made where the layer has a file already"},
	{image: "whiteout-of-own", snapshotter: native, fails: `no such file or directory$`, like: [][]byte{oddBase, ownDeleted},
		why: "at the end a directory gets its time that is deleted by then"},
	{image: "whiteout-of-own-and-lower", snapshotter: overlay, fails: `file exists$`,
		why: "the whiteout's device is made where the layer has a file already"},
	{image: "opaque-nested", snapshotter: native,
		why: "the marker takes a directory without an entry for one of a lower layer, and deletes it with the layer's own file"},
	{image: "opaque-implied", snapshotter: overlay,
		why: "the directories that the marker has deleted give their modes to the new ones"},
	{image: "opaque-root", snapshotter: overlay,
		why: "overlayfs knows no opaque root, so nothing is deleted"},
	{image: "opaque-root-late", snapshotter: overlay,
		why: "overlayfs knows no opaque root, so nothing is deleted"},
	{image: "aufs-names", snapshotter: overlay, like: [][]byte{oddBase, layertest.Archive(layertest.File("etc/n", "n"))},
		why: "what lies in aufs' own directories is no part of an image"},
	{image: "aufs-names", snapshotter: native, like: [][]byte{oddBase, layertest.Archive(layertest.File("etc/n", "n"))},
		why: "what lies in aufs' own directories is no part of an image"},
	{image: "hardlink-to-itself", snapshotter: overlay, fails: `no such file or directory$`, like: [][]byte{layertest.Archive(layertest.File("a", "a"))},
		why: "the link's name is removed first, and with it its target"},
	{image: "hardlink-to-itself", snapshotter: native, fails: `no such file or directory$`, like: [][]byte{layertest.Archive(layertest.File("a", "a"))},
		why: "the link's name is removed first, and with it its target"},
	{image: "deep", snapshotter: overlay, fails: `not a directory$`,
		why: "the parent of the new file is still the whiteout's device"},
	{image: "hardlinks-across", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlinks-across-deep", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlinks-across-two", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlink-to-replaced", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlink-to-deleted", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlink-replaced", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlink-over-lower", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlink-to-lower-symlink", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hardlink-through-own-symlink", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "xattrs-across", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
	{image: "hundred-layers", snapshotter: overlay, fails: lostLink, why: hiddenTarget},
}

const hiddenTarget = "a layer is unpacked into its own directory, where the link's target in a lower layer does not show"

// What stands for images of layertest that containerd can't unpack at all.
var (
	oddBase    = layertest.Awkward()[0].Layers[0]
	ownDeleted = layertest.Archive(layertest.Dir("etc", 0o755))
)

// fixture is a registry and both daemons.
type fixture struct {
	srv        *registrytest.Server
	their, our *daemon
}

// TestRootFileSystems: however an image is unpacked, a container sees what
// containerd shows with the same driver, entry by entry.
func TestRootFileSystems(t *testing.T) {
	t.Parallel()
	f := fixture{registrytest.New(t), newRoot(t).start(t, theirs), newRoot(t).start(t, ours)}
	used := 0
	for _, img := range layertest.Awkward() {
		t.Run(img.Name, func(t *testing.T) {
			for _, snapshotter := range []string{overlay, native} {
				odd := oddityOf(img.Name, snapshotter)
				if odd != nil {
					used++
				}
				f.compare(t, img, snapshotter, odd)
			}
		})
	}
	if used != len(oddities) && !t.Failed() && flag.Lookup("test.run").Value.String() == "" {
		t.Errorf("%d of %d listed oddities belong to an image", used, len(oddities))
	}
	f.our.mustBeSound(t)
}

func oddityOf(image, snapshotter string) *oddity {
	for i, o := range oddities {
		if o.image == image && o.snapshotter == snapshotter {
			return &oddities[i]
		}
	}
	return nil
}

// compare unpacks one image with one driver in all ways.
func (f fixture) compare(t *testing.T, img layertest.Image, snapshotter string, odd *oddity) {
	t.Helper()
	want, err := f.oracle(t, img, snapshotter)
	free := timeless(t, img, snapshotter)
	if odd == nil && err != nil {
		t.Errorf("containerd with %s: %v", snapshotter, err)
		return
	}
	if odd != nil {
		theirs, failure := want, err
		want, free = f.instead(t, img, odd)
		switch {
		case failure == nil && odd.fails != "" || failure != nil && (odd.fails == "" || !regexp.MustCompile(odd.fails).MatchString(failure.Error())):
			t.Errorf("%s is listed as failing with %q, since %s; it gives %v", snapshotter, odd.fails, odd.why, failure)
		case failure == nil && len(want.differences(theirs, free)) == 0:
			t.Errorf("%s is listed as odd, since %s; it is no more", snapshotter, odd.why)
		}
	}
	reference := push(f.srv, img.Name, img.Layers...)
	for _, way := range ways {
		ns, err := way.pull(t, f.our, snapshotter, reference)
		if err != nil {
			t.Errorf("%s with %s: %v", way.name, snapshotter, err)
			continue
		}
		got := f.our.imageTree(t, ns, snapshotter, reference)
		if lines := want.differences(got, free); len(lines) > 0 {
			t.Errorf("%s with %s is not as containerd has it:%s", way.name, snapshotter, listing(lines))
		}
	}
}

// oracle is what containerd makes of an image, unless it fails.
func (f fixture) oracle(t *testing.T, img layertest.Image, snapshotter string) (tree, error) {
	t.Helper()
	reference := push(f.srv, img.Name, img.Layers...)
	if err := f.their.pull(t, "default", snapshotter, reference); err != nil {
		return nil, err
	}
	return f.their.imageTree(t, "default", snapshotter, reference), nil
}

// instead is the tree that stands for an odd one.
func (f fixture) instead(t *testing.T, img layertest.Image, odd *oddity) (tree, func(string) bool) {
	t.Helper()
	other := map[string]string{overlay: native, native: overlay}[odd.snapshotter]
	if odd.like != nil {
		img = layertest.Image{Name: img.Name + "-like", Layers: odd.like}
		other = odd.snapshotter
	}
	want, err := f.oracle(t, img, other)
	if err != nil {
		t.Fatalf("containerd with %s, which stands for %s: %v", other, odd.snapshotter, err)
	}
	return want, timeless(t, img, native)
}

// timeless tells the directories whose times depend on the moment: those that
// some layer changes, or all of them imply, without an entry of its own; and
// with the native driver all, since containerd copies a directory before what
// is in it.
func timeless(t *testing.T, img layertest.Image, snapshotter string) func(dir string) bool {
	t.Helper()
	named, implied := make(map[string]bool), map[string]bool{".": true}
	for _, layer := range img.Layers {
		own, parents := make(map[string]bool), make(map[string]bool)
		for entries := tar.NewReader(bytes.NewReader(layer)); ; {
			h, err := entries.Next()
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
			if h.Typeflag == tar.TypeDir {
				own[name], named[name] = true, true
			}
			for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
				parents[dir] = true
			}
		}
		for name := range parents {
			implied[name] = implied[name] || !own[name]
		}
	}
	return func(dir string) bool { return snapshotter == native || implied[dir] || !named[dir] }
}

// What is random comes from this seed on.
var seed = flag.Uint64("seed", 0, "first seed of what is random; 0 is one from the clock")

var firstSeed = sync.OnceValue(func() uint64 {
	if *seed == 0 {
		return uint64(time.Now().Unix())
	}
	return *seed
})

const randomImages = 30

// TestRandomRootFileSystems is TestRootFileSystems for random images. Where
// containerd fails with overlayfs, or shows another tree than with its native
// driver, ours may be as the native one.
func TestRandomRootFileSystems(t *testing.T) {
	t.Parallel()
	first := firstSeed()
	t.Logf("the first seed is %d", first)
	f := fixture{registrytest.New(t), newRoot(t).start(t, theirs), newRoot(t).start(t, ours)}
	var same, odd int
	for n := range uint64(randomImages) {
		img := randomImage(first + n)
		t.Run(img.Name, func(t *testing.T) {
			byNative, err := f.oracle(t, img, native)
			if err != nil {
				t.Fatalf("containerd with native: %v", err)
			}
			byOverlay, err := f.oracle(t, img, overlay)
			free := timeless(t, img, native)
			reference := push(f.srv, img.Name, img.Layers...)
			for _, snapshotter := range []string{overlay, native} {
				for _, way := range ways {
					ns, failure := way.pull(t, f.our, snapshotter, reference)
					if failure != nil {
						t.Errorf("%s with %s: %v", way.name, snapshotter, failure)
						continue
					}
					got := f.our.imageTree(t, ns, snapshotter, reference)
					lines := byNative.differences(got, free)
					if snapshotter == overlay && err == nil && len(byOverlay.differences(got, timeless(t, img, overlay))) == 0 {
						same++
					} else if len(lines) > 0 {
						t.Errorf("%s with %s is not as containerd's native driver has it:%s", way.name, snapshotter, listing(lines))
					} else if snapshotter == overlay {
						odd++
					}
				}
			}
		})
	}
	t.Logf("with overlayfs, %d trees are as containerd's, and %d as its native driver's only", same, odd)
	f.our.mustBeSound(t)
}
