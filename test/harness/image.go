package harness

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Entry is one entry of a layer.
type Entry struct {
	tar.Header
	Body []byte
}

// Layer is the entries of a layer's archive, in order.
type Layer []Entry

var epoch = time.Unix(1_700_000_000, 0)

// File is a regular file.
func File(name string, body []byte) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body)), ModTime: epoch}, body}
}

// Dir is a directory.
func Dir(name string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: epoch}, nil}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: epoch}, nil}
}

// Link is a hard link to an earlier entry.
func Link(name, target string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644, ModTime: epoch}, nil}
}

// Whiteout deletes what lower layers have at name.
func Whiteout(name string) Entry {
	return File(path.Join(path.Dir(name), ".wh."+path.Base(name)), nil)
}

// Opaque hides what lower layers have in a directory.
func Opaque(dir string) Entry { return File(path.Join(dir, ".wh..wh..opq"), nil) }

// Image is an image made for a test, with all its blobs.
type Image struct {
	Target  ocispec.Descriptor // of the manifest
	Layers  []ocispec.Descriptor
	ChainID digest.Digest // of all layers
	Blobs   map[digest.Digest][]byte
	Tree    Tree // what the unpacked image must look like
}

// NewImage makes an image for this machine's platform. Equal layers have equal digests.
func NewImage(t testing.TB, layers ...Layer) *Image {
	t.Helper()
	img := &Image{Blobs: make(map[digest.Digest][]byte), Tree: make(Tree)}
	var diffIDs []digest.Digest
	for _, layer := range layers {
		archive := layer.archive(t)
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		w.Write(archive)
		w.Close()
		img.Layers = append(img.Layers, img.add(ocispec.MediaTypeImageLayerGzip, packed.Bytes()))
		diffIDs = append(diffIDs, digest.FromBytes(archive))
		img.Tree.apply(layer)
	}
	img.ChainID = identity.ChainID(diffIDs)
	config := img.addJSON(t, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffIDs},
	})
	img.Target = img.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    config,
		Layers:    img.Layers,
	})
	return img
}

// LayerBytes returns the size of all layers together, compressed, in bytes.
func (i *Image) LayerBytes() (n int64) {
	for _, desc := range i.Layers {
		n += desc.Size
	}
	return n
}

func (i *Image) add(mediaType string, blob []byte) ocispec.Descriptor {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	i.Blobs[desc.Digest] = blob
	return desc
}

func (i *Image) addJSON(t testing.TB, mediaType string, doc any) ocispec.Descriptor {
	t.Helper()
	blob, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return i.add(mediaType, blob)
}

func (l Layer) archive(t testing.TB) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range l {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.Body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// Random makes n layers from a seed: small files and empty ones, one of
// 1 MiB each that doesn't compress, links, and from the second layer on files that replace and delete
// those of the layer below.
func Random(seed uint64, n int) []Layer {
	rnd := rand.New(rand.NewPCG(seed, 1))
	bytes := func(size int) []byte {
		p := make([]byte, size)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		return p
	}
	layers := make([]Layer, n)
	for i := range layers {
		dir := fmt.Sprintf("layer%d", i)
		l := Layer{Dir("etc"), File("etc/release", bytes(100)), Dir(dir), File(dir+"/empty", nil), Dir(dir + "/sub")}
		for j := range 12 {
			l = append(l, File(fmt.Sprintf("%s/sub/small%d", dir, j), bytes(1+rnd.IntN(6000))))
		}
		l = append(l,
			File(dir+"/big", bytes(1<<20)),
			Link(dir+"/hard", dir+"/big"),
			Symlink(dir+"/soft", "../etc/release"))
		if i > 0 {
			below := fmt.Sprintf("layer%d", i-1)
			l = append(l, Dir(below),
				Whiteout(below+"/empty"),
				Dir(below+"/sub"), Whiteout(below+"/sub/small0"), File(below+"/sub/small1", bytes(500)))
		}
		if i > 1 {
			old := fmt.Sprintf("layer%d", i-2)
			l = append(l, Dir(old), Dir(old+"/sub"), Opaque(old+"/sub"), File(old+"/sub/only", bytes(50)))
		}
		layers[i] = l
	}
	return layers
}

// Tree is a file tree, by slash-separated path without the root itself.
type Tree map[string]Node

// Node is one file of a Tree.
type Node struct {
	Type   fs.FileMode // type bits
	Perm   fs.FileMode
	UID    int
	GID    int
	Target string        // of a symbolic link
	Body   digest.Digest // of a regular file
	Size   int64
}

// apply is the model of what unpacking does, for what Random uses: it knows
// files, directories, links and deletions.
func (tree Tree) apply(l Layer) {
	for _, e := range l {
		if dir, base := path.Split(e.Name); base == ".wh..wh..opq" {
			tree.removeBelow(dir)
		} else if name, ok := strings.CutPrefix(base, ".wh."); ok {
			delete(tree, dir+name)
			tree.removeBelow(dir + name + "/")
		}
	}
	for _, e := range l {
		name := strings.TrimSuffix(e.Name, "/")
		node := Node{Perm: e.FileInfo().Mode().Perm(), UID: e.Uid, GID: e.Gid}
		switch e.Typeflag {
		case tar.TypeReg:
			if strings.HasPrefix(path.Base(name), ".wh.") {
				continue
			}
			node.Body, node.Size = digest.FromBytes(e.Body), int64(len(e.Body))
		case tar.TypeDir:
			node.Type = fs.ModeDir
		case tar.TypeSymlink:
			node.Type, node.Target = fs.ModeSymlink, e.Linkname
		case tar.TypeLink:
			node = tree[e.Linkname]
		default:
			panic(fmt.Sprintf("no model of entry %s of type %q", e.Name, e.Typeflag))
		}
		tree[name] = node
	}
}

func (tree Tree) removeBelow(prefix string) {
	maps.DeleteFunc(tree, func(name string, _ Node) bool { return strings.HasPrefix(name, prefix) })
}

// ReadTree reads the tree below a directory.
func ReadTree(dir string) (Tree, error) {
	tree := make(Tree)
	err := filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		node := Node{Type: info.Mode().Type(), Perm: info.Mode().Perm(), UID: int(st.Uid), GID: int(st.Gid)}
		switch node.Type {
		case 0:
			body, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			node.Body, node.Size = digest.FromBytes(body), int64(len(body))
		case fs.ModeSymlink:
			if node.Target, err = os.Readlink(name); err != nil {
				return err
			}
		}
		rel, _ := filepath.Rel(dir, name)
		tree[rel] = node
		return nil
	})
	return tree, err
}

// String describes a node on one line.
func (n Node) String() string {
	s := fmt.Sprintf("%s %d:%d", n.Type|n.Perm, n.UID, n.GID)
	switch n.Type {
	case 0:
		s += fmt.Sprintf(" %d bytes %.12s", n.Size, n.Body.Encoded())
	case fs.ModeSymlink:
		s += " -> " + n.Target
	}
	return s
}

// differencesShown bounds the lines of Differences.
const differencesShown = 8

// Differences lists how got differs from the tree, one line per file; a
// last line counts those that are too many to show.
func (tree Tree) Differences(got Tree) (lines []string) {
	for name, want := range tree {
		if node, ok := got[name]; !ok {
			lines = append(lines, name+": missing")
		} else if node != want {
			lines = append(lines, fmt.Sprintf("%s: is %s, want %s", name, node, want))
		}
	}
	for name := range got {
		if _, ok := tree[name]; !ok {
			lines = append(lines, name+": should not be there")
		}
	}
	slices.Sort(lines)
	if more := len(lines) - differencesShown; more > 0 {
		lines = append(lines[:differencesShown], fmt.Sprintf("and %d more", more))
	}
	return lines
}
