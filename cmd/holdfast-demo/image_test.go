package main

import (
	"archive/tar"
	"io"
	"testing"
)

func TestImageIsReproducibleAndWhole(t *testing.T) {
	a, err := buildImage("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	b, err := buildImage("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	da, _ := a.Digest()
	db, _ := b.Digest()
	if da != db {
		t.Errorf("two builds differ: %s, %s", da, db)
	}
	layers, err := a.Layers()
	if err != nil || len(layers) != 4 {
		t.Fatalf("%d layers (%v), want 4", len(layers), err)
	}
	names := map[string]byte{}
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(r)
		for {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			names[h.Name] = h.Typeflag
		}
	}
	for name, typ := range map[string]byte{"bin/busybox": tar.TypeReg, "bin/sh": tar.TypeSymlink, "tmp/": tar.TypeDir, "etc/.wh.motd.draft": tar.TypeReg} {
		if names[name] != typ {
			t.Errorf("%s is %q, want %q", name, names[name], typ)
		}
	}
}
