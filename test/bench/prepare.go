package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// recipe is the version of the images: a change of what goes into them is a new number, and they are made anew.
const recipe = 1

// listName is the file of the work directory that lists the images; it is written last.
const listName = "images.json"

// smallImages is how many images scenario d pulls at once.
const smallImages = 30

// library is the images of all scenarios, as they lie in a work directory.
type library struct {
	Recipe int      `json:"recipe"`
	Images []*image `json:"images"`

	dir string
}

type image struct {
	Scenario string             `json:"scenario"`
	Name     string             `json:"name"` // its repository
	Target   ocispec.Descriptor `json:"target"`
	Layers   []layer            `json:"layers"`
}

func (l *library) blob(dgst digest.Digest) string {
	return filepath.Join(l.dir, "blobs", dgst.Encoded())
}

func (l *library) image(name string) *image {
	for _, img := range l.Images {
		if img.Name == name {
			return img
		}
	}
	return nil
}

// of are the images of one scenario.
func (l *library) of(scenario string) (images []*image) {
	for _, img := range l.Images {
		if img.Scenario == scenario {
			images = append(images, img)
		}
	}
	return images
}

// layersOf are the different layers of one scenario.
func (l *library) layersOf(scenario string) (layers []layer) {
	have := make(map[digest.Digest]bool)
	for _, img := range l.of(scenario) {
		for _, made := range img.Layers {
			if !have[made.DiffID] {
				layers = append(layers, made)
			}
			have[made.DiffID] = true
		}
	}
	return layers
}

// prepare returns the images in dir, which it makes if they aren't there.
func prepare(ctx context.Context, dir string) (*library, error) {
	lib, err := openLibrary(dir)
	if err == nil && lib.Recipe == recipe {
		return lib, nil
	}
	fmt.Printf("making the images in %s; they stay there for the next time\n", dir)
	start := time.Now()
	for _, name := range []string{"blobs", "sources", listName} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "blobs"), 0o755); err != nil {
		return nil, err
	}
	src := sources{dir: filepath.Join(dir, "sources")}
	if err := src.gather(ctx); err != nil {
		return nil, fmt.Errorf("gather files for the images: %w", err)
	}
	lib = &library{Recipe: recipe, dir: dir}
	if err := lib.makeImages(ctx, &src); err != nil {
		return nil, fmt.Errorf("make the images: %w", err)
	}
	if err := os.RemoveAll(src.dir); err != nil {
		return nil, err
	}
	body, err := json.MarshalIndent(lib, "", "\t")
	if err != nil {
		return nil, err
	}
	fmt.Printf("made the images in %s\n", time.Since(start).Round(time.Second))
	return lib, os.WriteFile(filepath.Join(dir, listName), body, 0o644)
}

// sources are trees of real files.
type sources struct {
	dir                             string
	runtime, compiler, node, golang []entry
}

// What the trees are made of. Debian's packages come with all they depend on.
var (
	runtimePackages  = []string{"python3", "git", "vim", "perl", "curl", "openssh-client", "tzdata", "locales", "fonts-dejavu", "nginx"}
	compilerPackages = []string{"build-essential"}
	nodePackages     = []string{
		"typescript@5.4.5", "webpack@5.91.0", "eslint@8.57.0", "react@18.3.1", "react-dom@18.3.1", "@mui/icons-material@5.15.15",
		"date-fns@2.30.0", "rxjs@7.8.1", "lodash@4.17.21", "core-js@3.37.0", "jest@29.7.0", "next@14.2.3", "@babel/preset-env@7.24.5",
	}
)

func (s *sources) gather(ctx context.Context) error {
	have := make(map[string]bool)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		if s.runtime, err = s.debian(ctx, "runtime", have, runtimePackages); err == nil {
			s.compiler, err = s.debian(ctx, "compiler", have, compilerPackages)
		}
		return err
	})
	g.Go(func() (err error) {
		dir := filepath.Join(s.dir, "node")
		args := append([]string{"install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", dir}, nodePackages...)
		if err = command(ctx, s.dir, "npm", args...); err == nil {
			s.node, err = walk(filepath.Join(dir, "node_modules"), "srv/app/node_modules")
		}
		return err
	})
	g.Go(func() (err error) {
		s.golang, err = goTree(ctx)
		return err
	})
	return g.Wait()
}

// debian unpacks packages and what they need, except what is in have already.
func (s *sources) debian(ctx context.Context, name string, have map[string]bool, packages []string) ([]entry, error) {
	cache, tree := filepath.Join(s.dir, name+"-debs"), filepath.Join(s.dir, name)
	for _, dir := range []string{filepath.Join(cache, "partial"), tree} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	// On an empty list of installed packages, everything is missing.
	status := filepath.Join(cache, "status")
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return nil, err
	}
	args := append([]string{
		"-q", "-y", "--no-install-recommends", "--download-only", "-o", "Dir::State::status=" + status,
		"-o", "Dir::Cache::archives=" + cache, "-o", "APT::Sandbox::User=root", "install",
	}, packages...)
	if err := command(ctx, s.dir, "apt-get", args...); err != nil {
		return nil, err
	}
	archives, err := filepath.Glob(filepath.Join(cache, "*.deb"))
	if err != nil {
		return nil, err
	}
	for _, archive := range archives {
		if have[filepath.Base(archive)] {
			continue
		}
		have[filepath.Base(archive)] = true
		if err := command(ctx, s.dir, "dpkg-deb", "--extract", archive, tree); err != nil {
			return nil, err
		}
	}
	return walk(tree, "")
}

// goTree is the Go distribution and the source of the modules that Holdfast is made of.
func goTree(ctx context.Context) ([]entry, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{if not .Main}}{{.Path}}@{{.Version}} {{.Dir}}{{end}}", "all").Output()
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("find Go: %w", err)
	}
	entries, err := walk(strings.TrimSpace(string(root)), "usr/local/go")
	if err != nil {
		return nil, err
	}
	have := make(map[string]bool)
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) != 2 {
			continue // not downloaded, since no package of ours needs it
		}
		prefix := "go/pkg/mod/" + fields[0]
		module, err := walk(fields[1], prefix)
		if err != nil {
			return nil, err
		}
		for _, dir := range append(parents(prefix), dirEntry(prefix)) {
			if !have[dir.Name] {
				entries = append(entries, dir)
			}
			have[dir.Name] = true
		}
		entries = append(entries, module...)
	}
	return entries, nil
}

func command(ctx context.Context, dir, name string, args ...string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s(`scripts/setup bench` installs what is needed)", name, args[0], err, out)
	}
	return nil
}

// makeImages packs all layers, as many at once as there are cores, and writes the manifests.
func (l *library) makeImages(ctx context.Context, src *sources) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.NumCPU())
	pack := func(into *layer, entries []entry) {
		g.Go(func() (err error) {
			*into, err = l.writeLayer(ctx, entries)
			return err
		})
	}
	small, err := smallLayer(src)
	if err != nil {
		return err
	}
	everything := append([]entry{readme("README", "one large layer\n")}, src.golang...)
	everything = append(append(append(everything, src.node...), src.runtime...), src.compiler...)

	a, b, c, e := &image{Scenario: "a"}, &image{Scenario: "b"}, &image{Scenario: "c"}, &image{Scenario: "e"}
	a.Layers, b.Layers, c.Layers, e.Layers = make([]layer, 1), make([]layer, 5), make([]layer, 1), make([]layer, 4)
	l.Images = []*image{a, b, c, e}
	pack(&c.Layers[0], everything) // first, since it takes longest
	pack(&b.Layers[3], src.golang)
	pack(&b.Layers[2], src.node)
	pack(&b.Layers[1], src.compiler)
	pack(&b.Layers[0], src.runtime)
	pack(&b.Layers[4], []entry{dirEntry("data"), patternEntry("data/noise", 80<<20, 1, 1, 1)})
	pack(&a.Layers[0], small)
	for i := range e.Layers {
		pack(&e.Layers[i], []entry{patternEntry(fmt.Sprintf("sparse%d", i), 1<<30, 1<<20, 8<<20, uint64(2+i))})
	}
	pieces, err := slice(src.runtime, smallImages)
	if err != nil {
		return err
	}
	ds := make([]*image, smallImages)
	for i := range ds {
		ds[i] = &image{Scenario: "d", Layers: make([]layer, 3)}
		pack(&ds[i].Layers[1], pieces[i])
		pack(&ds[i].Layers[2], []entry{dirEntry("etc"), readme("etc/app", fmt.Sprintf("app %d\n", i))})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i, d := range ds {
		d.Layers[0] = a.Layers[0]
		d.Name = fmt.Sprintf("bench/d%02d", i)
		l.Images = append(l.Images, d)
	}
	for _, img := range l.Images {
		if img.Name == "" {
			img.Name = "bench/" + img.Scenario
		}
		if err := l.writeManifest(img); err != nil {
			return err
		}
	}
	return nil
}

// smallLayer looks like a busybox image with a little beside it: one static
// binary with a link for each of its commands, a shell, an interpreter and a server.
func smallLayer(src *sources) ([]entry, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: run `scripts/setup bench`", err)
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox' commands: %w", err)
	}
	binary, err := fileEntry("sbin/busybox", busybox)
	if err != nil {
		return nil, err
	}
	entries := []entry{dirEntry("sbin"), binary}
	for name := range strings.FieldsSeq(string(list)) {
		if name != "busybox" {
			entries = append(entries, entry{Header: tarLink("sbin/"+name, "sbin/busybox")})
		}
	}
	rest := within(src.runtime, "bin/bash", "usr/bin/bash", "usr/bin/perl", "usr/sbin/nginx")
	if len(rest) == 0 {
		return nil, errors.New("no shell among the Debian packages")
	}
	return append(entries, rest...), nil
}

// slice makes n layers of about 2 to 8 MB each from the small files of a tree.
func slice(tree []entry, n int) ([][]entry, error) {
	pieces := make([][]entry, 0, n)
	var piece []entry
	var size int64
	have := make(map[string]bool)
	for _, e := range tree {
		if e.open == nil || e.Size > 2<<20 {
			continue
		}
		e.Name = fmt.Sprintf("opt/app%d/%s", len(pieces), e.Name)
		for _, p := range parents(e.Name) {
			if !have[p.Name] {
				piece = append(piece, p)
			}
			have[p.Name] = true
		}
		piece = append(piece, e)
		if size += e.Size; size < int64(2+len(pieces)%4*2)<<20 {
			continue
		}
		if pieces = append(pieces, piece); len(pieces) == n {
			return pieces, nil
		}
		piece, size, have = nil, 0, make(map[string]bool)
	}
	return nil, fmt.Errorf("the Debian packages are enough for %d small layers of %d", len(pieces), n)
}

func (l *library) writeManifest(img *image) error {
	config := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Created:  &epoch,
		Config:   ocispec.ImageConfig{Cmd: []string{"/sbin/busybox", "true"}},
		Author:   img.Name, // so that no two images have the same config
	}
	config.RootFS.Type = "layers"
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, made := range img.Layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, made.DiffID)
		manifest.Layers = append(manifest.Layers, made.Desc)
	}
	var err error
	if manifest.Config, err = l.writeJSON(ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	img.Target, err = l.writeJSON(ocispec.MediaTypeImageManifest, manifest)
	return err
}

func (l *library) writeJSON(mediaType string, doc any) (ocispec.Descriptor, error) {
	body, err := json.Marshal(doc)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	return desc, os.WriteFile(l.blob(desc.Digest), body, 0o644)
}

// warm reads the blobs of a scenario, so that the registry has them in the page cache.
func (l *library) warm(scenario string) error {
	for _, made := range l.layersOf(scenario) {
		file, err := os.Open(l.blob(made.Desc.Digest))
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, file)
		file.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
