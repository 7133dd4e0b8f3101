package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is the time of everything in the image, so that it is the same image
// each time it is built from the same busybox.
var epoch = time.Unix(1_700_000_000, 0)

// entry is one name of a layer.
type entry struct {
	name string // directories end in a slash
	mode int64
	link string
	data []byte
}

// buildImage makes an OCI image of four layers: busybox, the links to its
// applets, the files of a system, and a last one that changes a file and
// deletes another.
func buildImage(busybox string) (v1.Image, error) {
	binary, err := os.ReadFile(busybox)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: install it with `apt-get install busybox-static`", err)
	}
	if err != nil {
		return nil, err
	}
	links, err := applets(busybox)
	if err != nil {
		return nil, err
	}
	layers := [][]entry{
		{{name: "bin/", mode: 0o755}, {name: "bin/busybox", mode: 0o755, data: binary}, {name: "tmp/", mode: 0o1777}, {name: "root/", mode: 0o700}},
		links,
		{
			{name: "etc/", mode: 0o755},
			{name: "etc/passwd", mode: 0o644, data: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
			{name: "etc/group", mode: 0o644, data: []byte("root:x:0:\nnogroup:x:65534:\n")},
			{name: "etc/hostname", mode: 0o644, data: []byte("demo\n")},
			{name: "etc/motd.draft", mode: 0o644, data: []byte("to be written\n")},
			{name: "proc/", mode: 0o555}, {name: "sys/", mode: 0o555}, {name: "dev/", mode: 0o755},
		},
		{
			{name: "etc/motd", mode: 0o644, data: []byte("This image came from a registry that ran in memory.\n")},
			{name: "etc/.wh.motd.draft", mode: 0o644},
		},
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, entries := range layers {
		data, err := archive(entries)
		if err != nil {
			return nil, err
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(data)), nil
		}, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			return nil, err
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Created = "linux", runtime.GOARCH, v1.Time{Time: epoch}
	cfg.Config.Cmd = []string{"/bin/sh"}
	cfg.Config.Env = []string{"PATH=/bin"}
	return mutate.ConfigFile(img, cfg)
}

// applets asks busybox for the names it answers to.
func applets(busybox string) ([]entry, error) {
	out, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("ask %s for its applets: %w", busybox, err)
	}
	var links []entry
	for _, name := range strings.Fields(string(out)) {
		if name != "busybox" {
			links = append(links, entry{name: "bin/" + name, mode: 0o777, link: "busybox"})
		}
	}
	return links, nil
}

func archive(entries []entry) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: e.mode, ModTime: epoch, Size: int64(len(e.data)), Typeflag: tar.TypeReg}
		switch {
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		case e.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
}
