package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// entry is one entry of a layer; open is nil for what has no body.
type entry struct {
	tar.Header
	open func() (io.ReadCloser, error)
}

var epoch = time.Unix(1_700_000_000, 0)

func dirEntry(name string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755, ModTime: epoch}}
}

func tarLink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o755, ModTime: epoch}
}

// parents are the entries for the directories above name.
func parents(name string) (entries []entry) {
	for i, c := range name {
		if c == '/' {
			entries = append(entries, dirEntry(name[:i]))
		}
	}
	return entries
}

// fileEntry copies one file of the machine.
func fileEntry(name, source string) (entry, error) {
	info, err := os.Stat(source)
	if err != nil {
		return entry{}, err
	}
	return entry{
		Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(info.Mode().Perm()), Size: info.Size(), ModTime: epoch},
		open:   func() (io.ReadCloser, error) { return os.Open(source) },
	}, nil
}

// patternEntry is a file of which the first of every period bytes, up to random,
// come from a generator with seed, and the rest are zero.
func patternEntry(name string, size, random, period int64, seed uint64) entry {
	return entry{
		Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: epoch},
		open: func() (io.ReadCloser, error) {
			var key [32]byte
			binary.LittleEndian.PutUint64(key[:], seed)
			p := &pattern{noise: rand.NewChaCha8(key), random: random, period: period}
			return io.NopCloser(io.LimitReader(p, size)), nil
		},
	}
}

type pattern struct {
	noise          *rand.ChaCha8
	at             int64
	random, period int64
}

func (p *pattern) Read(buf []byte) (int, error) {
	phase := p.at % p.period
	if phase < p.random {
		buf = buf[:min(int64(len(buf)), p.random-phase)]
		p.noise.Read(buf)
	} else {
		buf = buf[:min(int64(len(buf)), p.period-phase)]
		clear(buf)
	}
	p.at += int64(len(buf))
	return len(buf), nil
}

// walk is the tree below dir, as entries below prefix, in the order of their names.
func walk(dir, prefix string) ([]entry, error) {
	var entries []entry
	links := make(map[uint64]string) // names by inode number
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil || rel == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		target := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			if target, err = os.Readlink(file); err != nil {
				return err
			}
		} else if !info.IsDir() && !info.Mode().IsRegular() {
			return nil // sockets and devices
		}
		header, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		e := entry{Header: tar.Header{
			Typeflag: header.Typeflag, Name: path.Join(prefix, rel), Linkname: target,
			Mode: header.Mode, Size: header.Size, ModTime: header.ModTime.Truncate(time.Second),
		}}
		switch stat := info.Sys().(*syscall.Stat_t); {
		case info.IsDir():
			e.Name += "/"
		case info.Mode().IsRegular() && stat.Nlink > 1 && links[stat.Ino] != "":
			e.Typeflag, e.Linkname, e.Size = tar.TypeLink, links[stat.Ino], 0
		case info.Mode().IsRegular():
			links[stat.Ino] = e.Name
			e.open = func() (io.ReadCloser, error) { return os.Open(file) }
		}
		entries = append(entries, e)
		return nil
	})
	return entries, err
}

// layer is a finished layer.
type layer struct {
	Desc   ocispec.Descriptor `json:"desc"`
	DiffID digest.Digest      `json:"diff_id"`
	Files  int64              `json:"files"` // regular files, hard links too
	Bytes  int64              `json:"bytes"` // their bodies, each link's once
}

// writeLayer packs entries by gzip at its default level, as most images are, and adds the blob to the library.
func (l *library) writeLayer(ctx context.Context, entries []entry) (made layer, err error) {
	file, err := os.CreateTemp(l.dir, "layer-")
	if err != nil {
		return layer{}, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	packed, unpacked := digest.Canonical.Digester(), digest.Canonical.Digester()
	size := new(counter)
	gz := gzip.NewWriter(io.MultiWriter(file, packed.Hash(), size))
	archive := tar.NewWriter(io.MultiWriter(gz, unpacked.Hash()))
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return layer{}, err
		}
		if err := e.write(archive); err != nil {
			return layer{}, fmt.Errorf("pack %s: %w", e.Name, err)
		}
		if e.Typeflag == tar.TypeReg || e.Typeflag == tar.TypeLink {
			made.Files++
			made.Bytes += e.Size
		}
	}
	if err := archive.Close(); err != nil {
		return layer{}, err
	}
	if err := gz.Close(); err != nil {
		return layer{}, err
	}
	made.DiffID = unpacked.Digest()
	made.Desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: packed.Digest(), Size: int64(*size)}
	return made, os.Rename(file.Name(), l.blob(made.Desc.Digest))
}

func (e entry) write(w *tar.Writer) error {
	if err := w.WriteHeader(&e.Header); err != nil || e.open == nil {
		return err
	}
	body, err := e.open()
	if err != nil {
		return err
	}
	defer body.Close()
	_, err = io.Copy(w, body)
	return err
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

// readme is an entry with a short text, which makes a layer differ from all others.
func readme(name, text string) entry {
	return entry{
		Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text)), ModTime: epoch},
		open:   func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader([]byte(text))), nil },
	}
}

// within are the entries with one of the names, with the directories above them.
func within(entries []entry, names ...string) (found []entry) {
	have := make(map[string]bool)
	for _, e := range entries {
		for _, name := range names {
			if strings.TrimSuffix(e.Name, "/") != name {
				continue
			}
			for _, p := range parents(name) {
				if !have[p.Name] {
					found = append(found, p)
				}
				have[p.Name] = true
			}
			found = append(found, e)
		}
	}
	return found
}
