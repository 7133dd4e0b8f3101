// Package layertest generates layer archives, awkward and random, and compares trees.
package layertest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"path"
	"time"
)

// Epoch is the time of modification that entries have unless they say otherwise.
var Epoch = time.Unix(1_500_000_000, 0).UTC()

// Entry is one entry of a layer archive.
type Entry struct {
	tar.Header
	Body string
}

// An Image is a name for a test and the layers, lowest first, as uncompressed
// tar archives.
type Image struct {
	Name   string
	Layers [][]byte
}

// Archive makes an uncompressed layer. It panics on entries that can't be
// written, since it only serves tests.
func Archive(entries ...Entry) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		hdr := e.Header
		if hdr.Typeflag == tar.TypeReg {
			hdr.Size = int64(len(e.Body))
		}
		if hdr.ModTime.IsZero() {
			hdr.ModTime = Epoch
		}
		hdr.Format = tar.FormatPAX
		if err := w.WriteHeader(&hdr); err != nil {
			panic(fmt.Sprintf("%s: %v", hdr.Name, err))
		}
		if _, err := w.Write([]byte(e.Body)); err != nil {
			panic(fmt.Sprintf("%s: %v", hdr.Name, err))
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// File is a regular file of mode 0644.
func File(name, body string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, Body: body}
}

// Dir is a directory with these mode bits.
func Dir(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Link is a hard link, with mode 0644.
func Link(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

// Node is a FIFO (tar.TypeFifo) or device (tar.TypeChar, tar.TypeBlock).
func Node(name string, kind byte, major, minor int64) Entry {
	return Entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: 0o640, Devmajor: major, Devminor: minor}}
}

// Whiteout deletes name.
func Whiteout(name string) Entry {
	return File(path.Join(path.Dir(name), ".wh."+path.Base(name)), "")
}

// Opaque deletes what lower layers have in dir.
func Opaque(dir string) Entry { return File(path.Join(dir, ".wh..wh..opq"), "") }

// With changes an entry's header.
func (e Entry) With(change func(*tar.Header)) Entry {
	change(&e.Header)
	return e
}

// Owned sets the owner.
func (e Entry) Owned(uid, gid int) Entry {
	e.Uid, e.Gid = uid, gid
	return e
}

// Moded sets the mode bits.
func (e Entry) Moded(mode int64) Entry {
	e.Mode = mode
	return e
}

// Xattr adds an extended attribute.
func (e Entry) Xattr(key, value string) Entry {
	records := map[string]string{"SCHILY.xattr." + key: value}
	for k, v := range e.PAXRecords {
		records[k] = v
	}
	e.PAXRecords = records
	return e
}
