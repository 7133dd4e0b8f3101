package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

// asDirectory applies the layers of an image one after the other to one
// directory: the reference.
func asDirectory(t *testing.T, img layertest.Image) string {
	t.Helper()
	dir := t.TempDir()
	for i, archive := range img.Layers {
		d, err := NewDirectory(dir)
		if err != nil {
			t.Fatal(err)
		}
		res, err := Apply(t.Context(), bytes.NewReader(archive), "", d, Limits{})
		if err != nil {
			t.Fatalf("layer %d onto the directory: %v", i, err)
		}
		if want := digest.FromBytes(archive); res.DiffID != want {
			t.Errorf("layer %d: diffID %s, want %s", i, res.DiffID, want)
		}
	}
	return dir
}

// asOverlay applies each layer of an image to an upper directory of its own,
// with the parents given at once or at commit, and mounts them.
func asOverlay(t *testing.T, img layertest.Image, parentsKnown bool) string {
	t.Helper()
	needRoot(t)
	base := t.TempDir()
	var parents []string // nearest first
	for i, archive := range img.Layers {
		dir := filepath.Join(base, strconv.Itoa(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		got := applyOverlay(t, dir, parents, archive, parentsKnown)
		if want := walked(t, dir); got.Inodes != want.Inodes {
			t.Errorf("layer %d: counted %v, walking finds %v", i, got, want)
		}
		parents = append([]string{dir}, parents...)
	}
	return mountLayers(t, parents)
}

func applyOverlay(t *testing.T, dir string, parents []string, archive []byte, known bool) Usage {
	t.Helper()
	var given []string
	if known {
		given = append([]string{}, parents...)
	}
	o, err := NewOverlay(dir, given, OverlayOptions{})
	if err != nil {
		t.Fatal(err)
	}
	res, err := Apply(t.Context(), bytes.NewReader(archive), "", o, Limits{})
	if err != nil {
		t.Fatalf("layer in %s as overlay: %v", dir, err)
	}
	usage := res.Usage
	if !known && len(res.Implied)+len(res.Links) > 0 {
		more, err := Complete(dir, parents, res.Implied, res.Links)
		if err != nil {
			t.Fatalf("complete layer in %s: %v", dir, err)
		}
		usage.Inodes += more.Inodes
		usage.Size += more.Size
	}
	return usage
}

// walked counts a directory as containerd does.
func walked(t *testing.T, dir string) (u Usage) {
	t.Helper()
	seen := make(map[uint64]bool)
	err := filepath.WalkDir(dir, func(name string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			u.Inodes++
			u.Size += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// mountLayers mounts overlay layers, nearest first, read-only. It takes the
// calls that have no limit on the length of all names together.
func mountLayers(t *testing.T, layers []string) string {
	t.Helper()
	if len(layers) == 1 {
		return layers[0]
	}
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fs)
	for _, dir := range layers {
		if err := unix.FsconfigSetString(fs, "lowerdir+", dir); err != nil {
			t.Fatalf("lowerdir %s: %v", dir, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatal(err)
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(mnt)
	dir := t.TempDir()
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
}

// followsLinkBelow is where a plain directory and an overlay must differ.
var followsLinkBelow = []string{"driver-link-below"}

// Every way to unpack an image gives the same tree.
func TestEmittersAgree(t *testing.T) {
	layertest.InMemory(t)
	images := layertest.Awkward()
	// LAYER_SEED=n LAYER_COUNT=m tries others than these.
	first, count := uint64(1), uint64(40)
	if n, err := strconv.ParseUint(os.Getenv("LAYER_SEED"), 10, 64); err == nil {
		first = n
	}
	if n, err := strconv.ParseUint(os.Getenv("LAYER_COUNT"), 10, 64); err == nil {
		count = n
	}
	for seed := range count {
		images = append(images, layertest.Random(first+seed), layertest.Orderly(first+seed, true))
	}
	for _, img := range images {
		if slices.Contains(followsLinkBelow, img.Name) {
			continue
		}
		t.Run(img.Name, func(t *testing.T) {
			want := asDirectory(t, img)
			for _, known := range []bool{true, false} {
				got := asOverlay(t, img, known)
				diffs, err := layertest.Compare(want, got, layertest.CompareOptions{IgnoreTimes: layertest.DirTimes, IgnoreRoot: true})
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range diffs {
					t.Errorf("directory | overlay (parents known: %v): %s", known, d)
				}
			}
		})
	}
}

// Writing through a link of a lower layer: containerd's overlay hides the
// link behind a directory, and so do we; a plain directory follows it.
func TestLinkBelow(t *testing.T) {
	i := slices.IndexFunc(layertest.Awkward(), func(i layertest.Image) bool { return i.Name == "driver-link-below" })
	img := layertest.Awkward()[i]
	plain := asDirectory(t, img)
	if target, err := os.Readlink(filepath.Join(plain, "bin")); err != nil || target != "usr/bin" {
		t.Errorf("link on the directory: %q, %v", target, err)
	}
	if _, err := os.Stat(filepath.Join(plain, "usr/bin/b")); err != nil {
		t.Error(err)
	}
	over := asOverlay(t, img, false)
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(over, "bin"), &st); err != nil || st.Mode != unix.S_IFDIR|0o750 {
		t.Errorf("bin on the overlay is %#o, %v; want a directory with the mode of usr/bin", st.Mode, err)
	}
}

// A link whose target no layer has is an error that names the entry.
func TestLinkToNowhere(t *testing.T) {
	archive := layertest.Archive(layertest.Link("x/y", "no/where"))
	d, _ := NewDirectory(t.TempDir())
	_, err := Apply(t.Context(), bytes.NewReader(archive), "", d, Limits{})
	if !errors.Is(err, os.ErrNotExist) || !bytes.Contains([]byte(err.Error()), []byte(`layer entry "x/y"`)) {
		t.Errorf("directory: %v", err)
	}
	dir := t.TempDir()
	o, _ := NewOverlay(dir, nil, OverlayOptions{})
	res, err := Apply(t.Context(), bytes.NewReader(archive), "", o, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = Complete(dir, nil, res.Implied, res.Links)
	if !errors.Is(err, os.ErrNotExist) || !bytes.Contains([]byte(err.Error()), []byte(`layer entry "x/y"`)) {
		t.Errorf("overlay: %v", err)
	}
}

// A link to what the same layer deleted is an error too.
func TestLinkToDeleted(t *testing.T) {
	lower := t.TempDir()
	d, _ := NewDirectory(lower)
	if _, err := Apply(t.Context(), bytes.NewReader(layertest.Archive(layertest.File("d/x", "x"))), "", d, Limits{}); err != nil {
		t.Fatal(err)
	}
	for _, gone := range []layertest.Entry{layertest.Whiteout("d/x"), layertest.Whiteout("d"), layertest.Opaque("d"), layertest.Opaque(".")} {
		o, _ := NewOverlay(t.TempDir(), []string{lower}, OverlayOptions{})
		_, err := Apply(t.Context(), bytes.NewReader(layertest.Archive(gone, layertest.Link("y", "d/x"))), "", o, Limits{})
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after %s: %v", gone.Name, err)
		}
	}
}

// The bytes counted while writing are those that walking finds.
func TestUsage(t *testing.T) {
	for _, img := range layertest.Awkward() {
		dir := t.TempDir()
		got := applyOverlay(t, dir, nil, img.Layers[0], true)
		if want := walked(t, dir); got != want {
			t.Errorf("%s: counted %v, walking finds %v", img.Name, got, want)
		}
	}
	for seed := range uint64(20) {
		img := layertest.Random(seed)
		dir, sum := t.TempDir(), walkedRoot()
		for i, archive := range img.Layers {
			d, _ := NewDirectory(dir)
			res, err := Apply(t.Context(), bytes.NewReader(archive), "", d, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			sum.Inodes += res.Usage.Inodes
			if want := walked(t, dir); sum.Inodes != want.Inodes {
				t.Errorf("%s, layer %d: counted %d inodes, walking finds %d", img.Name, i, sum.Inodes, want.Inodes)
			}
		}
	}
}

func walkedRoot() Usage { return Usage{Inodes: 1} }

func ExampleApply() {
	dir, _ := os.MkdirTemp("", "")
	defer os.RemoveAll(dir)
	to, _ := NewDirectory(dir)
	archive := layertest.Archive(layertest.File("hello", "world"))
	res, err := Apply(context.Background(), bytes.NewReader(archive), "application/vnd.oci.image.layer.v1.tar", to, Limits{})
	fmt.Println(res.Files, res.Bytes, err)
	// Output: 1 5 <nil>
}
