package diff

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// fixture is a Differ and a store without drivers: mounts are made by hand.
type fixture struct {
	*Differ
	sp    meta.Space
	blobs string // their directory
	temp  string
}

func open(t *testing.T) *fixture {
	t.Helper()
	dir := t.TempDir()
	blobs, err := content.Open(filepath.Join(dir, "content"), filepath.Join(dir, "trash"), content.Options{})
	check(t, err)
	t.Cleanup(func() { check(t, blobs.Close()) })
	db, err := meta.Open(t.Context(), filepath.Join(dir, "meta.db"), blobs, nil, meta.Options{})
	check(t, err)
	t.Cleanup(func() {
		report, err := fsck.Check(context.Background(), fsck.Store{DB: db, Content: blobs}, fsck.Options{})
		check(t, err)
		if len(report.Findings) > 0 {
			t.Errorf("the store is left with %+v", report.Findings)
		}
		check(t, db.Close())
	})
	f := &fixture{sp: db.Space("test"), blobs: filepath.Join(dir, "content", "blobs", "sha256"), temp: filepath.Join(dir, "tmpmounts")}
	f.Differ = New(Options{Temp: mount.Temp{Dir: f.temp}})
	t.Cleanup(func() {
		if left, err := os.ReadDir(f.temp); err == nil && len(left) > 0 {
			t.Errorf("mounts are left: %v", left)
		}
	})
	return f
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// put makes a blob of data and describes it.
func (f *fixture) put(t *testing.T, mediaType string, data []byte) oci.Descriptor {
	t.Helper()
	w, err := f.sp.OpenWriter(t.Context(), "put", meta.WriterOptions{})
	check(t, err)
	defer w.Close()
	_, err = w.Write(data)
	check(t, err)
	desc := oci.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := w.Commit(t.Context(), desc.Size, desc.Digest, nil); !errdefs.IsAlreadyExists(err) {
		check(t, err)
	}
	return desc
}

// file makes a regular file's header.
func file(name string, mode int64) *tar.Header {
	return &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode, ModTime: time.Unix(1e9, 0)}
}

func archive(t *testing.T, entries ...*tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range entries {
		if h.Typeflag == tar.TypeReg && !strings.Contains(h.Name, ".wh.") {
			h.Size = int64(len(h.Name))
		}
		check(t, w.WriteHeader(h))
		_, err := io.WriteString(w, h.Name[:h.Size])
		check(t, err)
	}
	check(t, w.Close())
	return buf.Bytes()
}

func gzipped(t *testing.T, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, err := w.Write(data)
	check(t, errors.Join(err, w.Close()))
	return buf.Bytes()
}

func zstded(t *testing.T, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	check(t, err)
	return w.EncodeAll(data, nil)
}

func bind(dir string, options ...string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: append([]string{"rbind"}, options...)}}
}

// dirs makes directories below one of the test's.
func dirs(t *testing.T, names ...string) []string {
	t.Helper()
	top := t.TempDir()
	for i, name := range names {
		names[i] = filepath.Join(top, name)
		check(t, os.MkdirAll(names[i], 0o755))
	}
	return names
}

func TestApplyMediaTypes(t *testing.T) {
	f := open(t)
	plain := archive(t, file("a", 0o640))
	tests := []struct {
		mediaType string
		data      []byte
	}{
		{ocispec.MediaTypeImageLayer, plain},
		{ocispec.MediaTypeImageLayerGzip, gzipped(t, plain)},
		{ocispec.MediaTypeImageLayerZstd, zstded(t, plain)},
		{oci.MediaTypeDockerLayer, plain},
		{oci.MediaTypeDockerLayer + ".gzip", gzipped(t, plain)},
		{oci.MediaTypeDockerForeign + ".gzip", gzipped(t, plain)},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", zstded(t, plain)},
	}
	for _, tt := range tests {
		dir := t.TempDir()
		got, err := f.Apply(t.Context(), f.sp, f.put(t, tt.mediaType, tt.data), bind(dir, "rw"))
		check(t, err)
		want := oci.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(plain), Size: int64(len(plain))}
		if got.Digest != want.Digest || got.Size != want.Size || got.MediaType != want.MediaType {
			t.Errorf("%s: got %v, want %v", tt.mediaType, got, want)
		}
		if fi, err := os.Stat(filepath.Join(dir, "a")); err != nil || fi.Mode() != 0o640 {
			t.Errorf("%s: the file is %v (%v)", tt.mediaType, fi, err)
		}
	}
	for _, mt := range []string{"", "text/plain", ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayer + "+encrypted", ocispec.MediaTypeImageLayerGzip + "+encrypted"} {
		_, err := f.Apply(t.Context(), f.sp, f.put(t, mt, plain), bind(t.TempDir(), "rw"))
		if !errdefs.IsNotImplemented(err) {
			t.Errorf("media type %q: %v", mt, err)
		}
	}
}

func TestApplyRefuses(t *testing.T) {
	f := open(t)
	desc := f.put(t, ocispec.MediaTypeImageLayer, archive(t, file("a", 0o644)))
	longer := desc
	longer.Size++
	absent := oci.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("x"), Size: 1}
	broken := f.put(t, ocispec.MediaTypeImageLayerGzip, []byte("\x1f\x8bno more"))
	tests := []struct {
		name   string
		desc   oci.Descriptor
		mounts []mount.Mount
		is     func(error) bool
	}{
		{"another size", longer, bind(t.TempDir(), "rw"), errdefs.IsFailedPrecondition},
		{"no blob", absent, bind(t.TempDir(), "rw"), errdefs.IsNotFound},
		{"no directory", desc, bind("/nowhere", "rw"), func(err error) bool { return errors.Is(err, fs.ErrNotExist) }},
		{"read-only", desc, bind(t.TempDir(), "ro"), func(err error) bool { return errors.Is(err, syscall.EROFS) }},
		{"broken gzip", broken, bind(t.TempDir(), "rw"), func(err error) bool { return err != nil && !errdefs.IsDataLoss(err) }},
	}
	for _, tt := range tests {
		if _, err := f.Apply(t.Context(), f.sp, tt.desc, tt.mounts); !tt.is(err) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// A blob that has changed on disk since it was verified is named as the cause.
func TestApplyDamaged(t *testing.T) {
	f := open(t)
	tests := []struct {
		name string
		edit func(data []byte)
	}{
		{"a file's byte", func(data []byte) { data[512] ^= 1 }},
		{"a header's byte", func(data []byte) { data[0] ^= 1 }},
		{"the padding", func(data []byte) { data[len(data)-1] ^= 1 }},
	}
	for _, tt := range tests {
		desc := f.put(t, ocispec.MediaTypeImageLayer, archive(t, file(tt.name, 0o644)))
		path := filepath.Join(f.blobs, desc.Digest.Encoded())
		data, err := os.ReadFile(path)
		check(t, err)
		tt.edit(data)
		check(t, os.Chmod(path, 0o644))
		check(t, os.WriteFile(path, data, 0o644))
		_, err = f.Apply(t.Context(), f.sp, desc, bind(t.TempDir(), "rw"))
		if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "damaged on disk") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestApplyCancelled(t *testing.T) {
	f := open(t)
	desc := f.put(t, ocispec.MediaTypeImageLayer, archive(t, file("a", 0o644)))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Apply(ctx, f.sp, desc, bind(t.TempDir(), "rw")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// changes is a layer that adds, replaces and deletes, and links into the
// layer below.
func changes(t *testing.T) []byte {
	return archive(t,
		file("new", 0o644),
		file("dir/added", 0o644),
		file("dir/.wh.gone", 0),
		file(".wh.removed", 0),
		&tar.Header{Name: "fresh/", Typeflag: tar.TypeDir, Mode: 0o700},
		file("fresh/.wh..wh..opq", 0),
		file("fresh/only", 0o644),
		&tar.Header{Name: "linked", Typeflag: tar.TypeLink, Linkname: "kept"},
	)
}

func fillLower(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{"kept", "removed", "dir/gone", "dir/stays", "fresh/old"} {
		path := filepath.Join(dir, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, []byte(name), 0o644))
	}
	check(t, os.Chmod(filepath.Join(dir, "dir"), 0o711))
}

// tree lists what is below dir.
func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if path != dir {
			names = append(names, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	}))
	return names
}

var afterChanges = []string{"dir", "dir/added", "dir/stays", "fresh", "fresh/only", "kept", "linked", "new"}

// The same layer gives the same tree whichever way it is applied.
func TestApplyIntoMounts(t *testing.T) {
	f := open(t)
	desc := f.put(t, ocispec.MediaTypeImageLayer, changes(t))
	t.Run("bind", func(t *testing.T) {
		dir := t.TempDir()
		fillLower(t, dir)
		_, err := f.Apply(t.Context(), f.sp, desc, bind(dir, "rw"))
		check(t, err)
		verifyChanges(t, dir)
	})
	t.Run("bind that needs mounting", func(t *testing.T) {
		dir := t.TempDir()
		fillLower(t, dir)
		_, err := f.Apply(t.Context(), f.sp, desc, bind(dir, "rw", "nosuid"))
		check(t, err)
		verifyChanges(t, dir)
	})
	for name, extra := range map[string]string{"overlay": "index=off", "overlay that needs mounting": `redirect_dir=nofollow,index=off`} {
		t.Run(name, func(t *testing.T) {
			d := dirs(t, "lower", "upper", "work")
			fillLower(t, d[0])
			m := []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{extra, "lowerdir=" + d[0], "upperdir=" + d[1], "workdir=" + d[2]}}}
			if _, direct := overlayOf(m[0]); direct != (name == "overlay") {
				t.Fatalf("direct is %v", direct)
			}
			_, err := f.Apply(t.Context(), f.sp, desc, m)
			check(t, err)
			check(t, mount.Temp{Dir: f.temp}.With(t.Context(), mount.ReadOnly(m), func(dir string) error {
				verifyChanges(t, dir)
				return nil
			}))
			if _, err := os.Stat(filepath.Join(d[0], "removed")); err != nil {
				t.Error("the lower layer was written to")
			}
		})
	}
}

func verifyChanges(t *testing.T, dir string) {
	t.Helper()
	if got := list(t, dir); !slices.Equal(got, afterChanges) {
		t.Errorf("the tree is %q, want %q", got, afterChanges)
	}
	if fi, err := os.Stat(filepath.Join(dir, "dir")); err != nil || fi.Mode().Perm() != 0o711 {
		t.Errorf("an implied directory has the mode %v (%v)", fi.Mode(), err)
	}
	a, err := os.Stat(filepath.Join(dir, "kept"))
	check(t, err)
	b, err := os.Stat(filepath.Join(dir, "linked"))
	check(t, err)
	if !os.SameFile(a, b) {
		t.Error("the hard link is a copy")
	}
}

// An overlay whose lower layers are named at commit takes what needs none.
func TestApplyWithoutParent(t *testing.T) {
	f := open(t)
	d := dirs(t, "lower", "upper", "work")
	fillLower(t, d[0])
	upperOnly := []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=" + d[1]}}}
	desc := f.put(t, ocispec.MediaTypeImageLayer, archive(t, file("new", 0o644), file("dir/.wh.gone", 0), file("fresh/.wh..wh..opq", 0)))
	_, err := f.Apply(t.Context(), f.sp, desc, upperOnly)
	check(t, err)
	whole := []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + d[0], "upperdir=" + d[1], "workdir=" + d[2]}}}
	check(t, mount.Temp{Dir: f.temp}.With(t.Context(), whole, func(dir string) error {
		if got, want := list(t, dir), []string{"dir", "dir/stays", "fresh", "kept", "new", "removed"}; !slices.Equal(got, want) {
			t.Errorf("the tree is %q, want %q", got, want)
		}
		return nil
	}))
	desc = f.put(t, ocispec.MediaTypeImageLayer, archive(t, &tar.Header{Name: "linked", Typeflag: tar.TypeLink, Linkname: "kept"}))
	if _, err := f.Apply(t.Context(), f.sp, desc, upperOnly); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a link into a parent that nobody names: %v", err)
	}
}

func TestOverlayOf(t *testing.T) {
	overlayMount := func(options ...string) mount.Mount { return mount.Mount{Type: "overlay", Options: options} }
	tests := []struct {
		m    mount.Mount
		want string // upper|lower,lower|userxattr
	}{
		{overlayMount("upperdir=/u", "workdir=/w", "lowerdir=/a:/b"), "/u|/a,/b|false"},
		{overlayMount("index=off", "userxattr", "upperdir=/u", "lowerdir=/a"), "/u|/a|true"},
		{overlayMount("upperdir=/u"), "/u||false"},
		{overlayMount("upperdir=/u,workdir=/w", "lowerdir=/a"), ""},
		{overlayMount("upperdir=/u", `lowerdir=/a\:b:/c`), ""},
		{overlayMount("upperdir=/u", "lowerdir+=/a"), ""},
		{overlayMount("lowerdir=/a:/b"), ""},
		{overlayMount("ro", "upperdir=/u", "lowerdir=/a"), ""},
		{mount.Mount{Type: "bind", Options: []string{"upperdir=/u"}}, ""},
		{mount.Mount{Type: "overlay", Target: "/x", Options: []string{"upperdir=/u"}}, ""},
	}
	for _, tt := range tests {
		o, ok := overlayOf(tt.m)
		got := ""
		if ok {
			got = o.upper + "|" + strings.Join(o.lower, ",") + "|" + map[bool]string{true: "true", false: "false"}[o.userXattr]
		}
		if got != tt.want {
			t.Errorf("%v: %q, want %q", tt.m, got, tt.want)
		}
	}
}

func TestDiffThereAndBack(t *testing.T) {
	f := open(t)
	for _, mt := range []string{"", ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd} {
		d := dirs(t, "lower", "upper", "again")
		fillLower(t, d[0])
		fillLower(t, d[2])
		fillLower(t, d[1])
		check(t, os.Remove(filepath.Join(d[1], "removed")))
		check(t, os.RemoveAll(filepath.Join(d[1], "fresh")))
		check(t, os.WriteFile(filepath.Join(d[1], "new"), []byte("new"), 0o600))

		desc, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{MediaType: mt, Labels: map[string]string{"k": "v"}})
		check(t, err)
		if want := mt; desc.MediaType != want && !(want == "" && desc.MediaType == ocispec.MediaTypeImageLayerGzip) {
			t.Errorf("%q: made %v", mt, desc)
		}
		blob, err := f.sp.Blob(t.Context(), desc.Digest)
		check(t, err)
		if blob.Size != desc.Size || blob.Labels["k"] != "v" {
			t.Errorf("%q: made %v, recorded %v", mt, desc, blob)
		}
		applied, err := f.Apply(t.Context(), f.sp, desc, bind(d[2], "rw"))
		check(t, err)
		want := applied.Digest.String()
		if mt == ocispec.MediaTypeImageLayer {
			want = "" // the digest says it
		}
		if got := blob.Labels[oci.LabelUncompressed]; got != want {
			t.Errorf("%q: the label is %q, the DiffID %q", mt, got, want)
		}
		if got, want := list(t, d[2]), list(t, d[1]); !slices.Equal(got, want) {
			t.Errorf("%q: there and back the tree is %q, want %q", mt, got, want)
		}
	}
	noIngests(t, f)
}

func noIngests(t *testing.T, f *fixture) {
	t.Helper()
	left, err := f.sp.Ingests(t.Context())
	check(t, err)
	if len(left) > 0 {
		t.Errorf("ingests are left: %v", left)
	}
}

// The upper directory of an overlay in use is read, and not mounted as one.
func TestDiffOfOverlay(t *testing.T) {
	f := open(t)
	d := dirs(t, "lower", "upper", "work", "empty")
	fillLower(t, d[0])
	m := []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + d[0], "upperdir=" + d[1], "workdir=" + d[2]}}}
	check(t, mount.Temp{Dir: f.temp}.With(t.Context(), m, func(dir string) error {
		check(t, os.Remove(filepath.Join(dir, "kept")))
		check(t, os.WriteFile(filepath.Join(dir, "dir/written"), nil, 0o644))
		desc, err := f.Diff(t.Context(), f.sp, bind(d[0]), m, DiffOptions{MediaType: ocispec.MediaTypeImageLayer})
		check(t, err)
		r, err := f.sp.Reader(t.Context(), desc.Digest)
		check(t, err)
		defer r.Close()
		var names []string
		for tr := tar.NewReader(io.NewSectionReader(r, 0, r.Size())); ; {
			h, err := tr.Next()
			if err == io.EOF {
				break
			}
			check(t, err)
			names = append(names, strings.TrimSuffix(h.Name, "/"))
		}
		slices.Sort(names)
		if !slices.Contains(names, ".wh.kept") || !slices.Contains(names, "dir/written") || slices.Contains(names, "removed") {
			t.Errorf("the layer has %q", names)
		}
		return nil
	}))
}

// The same trees give the same bytes, so the blob is there already the second
// time: then its record gets the label that it lacks.
func TestDiffExisting(t *testing.T) {
	f := open(t)
	d := dirs(t, "lower", "upper")
	fillLower(t, d[1])
	first, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{})
	check(t, err)
	_, err = f.sp.UpdateBlob(t.Context(), meta.Blob{Digest: first.Digest, Labels: map[string]string{"other": "1"}})
	check(t, err)
	second, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{})
	check(t, err)
	if second.Digest != first.Digest || second.Size != first.Size {
		t.Errorf("made %v and then %v", first, second)
	}
	blob, err := f.sp.Blob(t.Context(), first.Digest)
	check(t, err)
	if blob.Labels[oci.LabelUncompressed] == "" || blob.Labels["other"] != "1" {
		t.Errorf("the labels are %v", blob.Labels)
	}
	noIngests(t, f)
}

func TestDiffFails(t *testing.T) {
	f := open(t)
	d := dirs(t, "lower", "upper")
	fillLower(t, d[1])
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Diff(cancelled, f.sp, bind(d[0]), bind(d[1]), DiffOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := f.Diff(t.Context(), f.sp, bind("/nowhere"), bind(d[1]), DiffOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no lower tree: %v", err)
	}
	if _, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{MediaType: "text/plain"}); !errdefs.IsNotImplemented(err) {
		t.Errorf("another media type: %v", err)
	}
	// A walk that fails after bytes were written.
	ctx, stop := context.WithCancel(t.Context())
	_, err := keep(t.Context(), f.sp, DiffOptions{}, func(w io.Writer) (digest.Digest, error) {
		_, err := w.Write([]byte("half"))
		check(t, err)
		stop()
		return "", ctx.Err()
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("half-way: %v", err)
	}
	noIngests(t, f)
}

// An ingest that the caller names starts anew, and stays after a failure.
func TestDiffRef(t *testing.T) {
	f := open(t)
	d := dirs(t, "lower", "upper")
	fillLower(t, d[1])
	w, err := f.sp.OpenWriter(t.Context(), "mine", meta.WriterOptions{})
	check(t, err)
	_, err = w.Write([]byte("left from before"))
	check(t, err)
	if _, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{Ref: "mine"}); !errdefs.IsUnavailable(err) {
		t.Errorf("into an ingest in use: %v", err)
	}
	check(t, w.Close())
	_, err = keep(t.Context(), f.sp, DiffOptions{Ref: "mine"}, func(io.Writer) (digest.Digest, error) { return "", io.ErrUnexpectedEOF })
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("half-way: %v", err)
	}
	if _, err := f.sp.Ingest(t.Context(), "mine"); err != nil {
		t.Errorf("the caller's ingest: %v", err)
	}
	named, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{Ref: "mine"})
	check(t, err)
	own, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{})
	check(t, err)
	if named.Digest != own.Digest {
		t.Error("what was in the ingest is in the layer")
	}
	noIngests(t, f)
}

func TestDiffEpoch(t *testing.T) {
	f := open(t)
	d := dirs(t, "lower", "upper")
	check(t, os.WriteFile(filepath.Join(d[1], "young"), nil, 0o644))
	epoch := time.Unix(1e9, 0)
	desc, err := f.Diff(t.Context(), f.sp, bind(d[0]), bind(d[1]), DiffOptions{MediaType: ocispec.MediaTypeImageLayer, Epoch: epoch})
	check(t, err)
	r, err := f.sp.Reader(t.Context(), desc.Digest)
	check(t, err)
	defer r.Close()
	for tr := tar.NewReader(io.NewSectionReader(r, 0, r.Size())); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		check(t, err)
		if h.ModTime.After(epoch) {
			t.Errorf("%s is of %v", h.Name, h.ModTime)
		}
	}
}
