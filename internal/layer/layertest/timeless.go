package layertest

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// Timeless tells, for CompareOptions.IgnoreTimes, the directories of an image
// whose time of modification no layer says: whoever unpacks it leaves the time
// at which he did. They are those that a layer writes into, or makes, without
// an entry for them. If retained, that holds only until the first such entry,
// since a directory on an overlay then keeps its time in the layers above; on
// a plain directory whatever is written into it changes it.
func Timeless(img Image, retained bool) func(name string, dir bool) bool {
	says := make(map[string]bool)
	for _, archive := range img.Layers {
		named, implied, gone := directories(archive)
		for dir := range implied {
			if !named[dir] && !retained {
				says[dir] = false
			}
		}
		for dir := range named {
			says[dir] = true
		}
		for dir := range says {
			for above := dir; ; above = path.Dir(above) {
				if gone[above] || gone[dir] {
					says[dir] = false
				}
				if above == "." {
					break
				}
			}
		}
	}
	return func(name string, dir bool) bool { return dir && !says[name] }
}

// directories lists what a layer says about directories: those that it has
// entries for, those above any entry, and what it deletes or has as something
// else (a deleted directory may come again in the same layer, so all below it
// is open).
func directories(archive []byte) (named, implied, gone map[string]bool) {
	named, implied, gone = make(map[string]bool), map[string]bool{".": true}, make(map[string]bool)
	for entries := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return named, implied, gone
		} else if err != nil {
			panic(fmt.Sprintf("list a layer: %v", err)) // our own
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		switch dir, base := path.Split(name); {
		case name == "":
			continue
		case base == ".wh..wh..opq":
			gone[path.Clean(dir)] = true
		case strings.HasPrefix(base, ".wh."):
			gone[dir+strings.TrimPrefix(base, ".wh.")] = true
		case h.Typeflag == tar.TypeDir:
			named[name] = true
		default:
			gone[name] = true
		}
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			implied[dir] = true
		}
	}
}
