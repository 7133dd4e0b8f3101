package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zstded(t testing.TB, data []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	var buf bytes.Buffer
	z, err := zstd.NewWriter(&buf, opts...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func applyTo(t testing.TB, dir string, data []byte, mediaType string, limits Limits) (Result, error) {
	t.Helper()
	d, err := NewDirectory(dir)
	if err != nil {
		t.Fatal(err)
	}
	return Apply(t.Context(), bytes.NewReader(data), mediaType, d, limits)
}

// All forms of compression come out the same, whatever the media type says,
// and the diffID covers every byte, also behind the end of the archive.
func TestCompression(t *testing.T) {
	plain := append(layertest.Archive(layertest.File("f", strings.Repeat("text", 100_000))), "trailing bytes"...)
	half := len(plain) / 2
	forms := map[string][]byte{
		"plain":         plain,
		"gzip":          gzipped(t, plain),
		"gzip members":  append(gzipped(t, plain[:half]), gzipped(t, plain[half:])...),
		"zstd":          zstded(t, plain),
		"zstd frames":   append(zstded(t, plain[:half]), zstded(t, plain[half:])...),
		"zstd skipping": append([]byte{0x51, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'a', 'b', 'c'}, zstded(t, plain)...),
	}
	types := []string{
		"", "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar+zstd",
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.gzip",
		"application/vnd.docker.image.rootfs.diff.tar.zstd", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "application/x-tar",
	}
	for form, data := range forms {
		for _, mt := range types {
			dir := t.TempDir()
			res, err := applyTo(t, dir, data, mt, Limits{})
			if err != nil {
				t.Errorf("%s as %q: %v", form, mt, err)
				continue
			}
			if res.DiffID != digest.FromBytes(plain) || res.Size != int64(len(plain)) || res.Files != 1 || res.Bytes != 400_000 {
				t.Errorf("%s as %q: %+v", form, mt, res)
			}
		}
	}
	for _, mt := range []string{"application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "application/vnd.in-toto+json", "application/vnd.erofs.layer.v1", "/;"} {
		if _, err := applyTo(t, t.TempDir(), plain, mt, Limits{}); !errdefs.IsNotImplemented(err) {
			t.Errorf("%q: %v", mt, err)
		}
	}
}

// hostile is an archive that must be refused with an error that says so.
type hostile struct {
	name   string
	data   []byte
	limits Limits
	want   string // in the error
	kind   func(error) bool
}

func raw(f func(*bytes.Buffer)) []byte {
	var buf bytes.Buffer
	f(&buf)
	buf.Write(make([]byte, 1024))
	return buf.Bytes()
}

func hostiles(t testing.TB) []hostile {
	any := func(error) bool { return true }
	zeros := make([]byte, 32<<20)
	noise := make([]byte, 1<<20)
	rnd := rand.NewChaCha8([32]byte{})
	_, _ = rnd.Read(noise)
	manyXattrs := layertest.File("x/attrs", "")
	for i := range 100 {
		manyXattrs = manyXattrs.Xattr(fmt.Sprintf("user.%d", i), strings.Repeat("v", 4000))
	}
	f := layertest.File("before", "b")
	valid := layertest.Archive(layertest.File("cut", string(noise[:5000])))
	return []hostile{
		{"whiteout of nothing", layertest.Archive(layertest.File("d/.wh.", "")), Limits{}, `layer entry "d/.wh.": whiteout of nothing`, errdefs.IsInvalidArgument},
		{"whiteout of .", layertest.Archive(layertest.File("d/.wh..", "")), Limits{}, `layer entry "d/.wh.."`, errdefs.IsInvalidArgument},
		{"whiteout of ..", layertest.Archive(layertest.File("d/.wh...", "")), Limits{}, `layer entry "d/.wh..."`, errdefs.IsInvalidArgument},
		{"hard link to a directory", layertest.Archive(layertest.Dir("d", 0o755), layertest.Link("l", "d")), Limits{}, `layer entry "l"`, any},
		{"hard link to nothing", layertest.Archive(layertest.Link("l", "../../../etc/passwd")), Limits{}, `layer entry "l": hard link to "etc/passwd"`, any},
		{"below a file", layertest.Archive(f, layertest.File("before/x", "")), Limits{}, `layer entry "before/x"`, any},
		{"below a FIFO", layertest.Archive(layertest.Node("p", tar.TypeFifo, 0, 0), layertest.File("p/x", "")), Limits{}, `layer entry "p/x"`, any},
		{"below a link loop", layertest.Archive(layertest.Symlink("a", "b"), layertest.Symlink("b", "a"), layertest.File("a/x", "")), Limits{}, `layer entry "a/x"`, any},
		{"name too long", layertest.Archive(layertest.File(strings.Repeat("long/", 900)+"f", "")), Limits{}, `layer entry "long/`, any},
		{"component too long", layertest.Archive(layertest.File(strings.Repeat("n", 256), "")), Limits{}, `layer entry "nnn`, any},
		{"too deep", layertest.Archive(layertest.File(strings.Repeat("d/", 1500)+"f", "")), Limits{}, "1501 directories deep where 1024 are allowed", errdefs.IsResourceExhausted},
		{"link too deep", layertest.Archive(layertest.Link("l", strings.Repeat("d/", 1500)+"f")), Limits{}, `layer entry "l": hard link: 1501 directories deep`, errdefs.IsResourceExhausted},
		{"empty link", raw(func(b *bytes.Buffer) { layertest.Raw(b, '2', "l", "") }), Limits{}, `layer entry "l"`, errdefs.IsInvalidArgument},
		{"unknown type", raw(func(b *bytes.Buffer) { layertest.Raw(b, 'Z', "z", "") }), Limits{}, `layer entry "z": entry of unknown type 'Z'`, errdefs.IsInvalidArgument},
		{"device number", layertest.Archive(layertest.Node("dev", tar.TypeChar, 4096, 0)), Limits{}, `layer entry "dev": device number 4096:0`, errdefs.IsInvalidArgument},
		{"owner -1", raw(func(b *bytes.Buffer) {
			layertest.Raw(b, 'x', "pax", layertest.Record("uid=4294967295"))
			layertest.Raw(b, '0', "owned", "")
		}), Limits{}, `layer entry "owned": owner 4294967295:0`, errdefs.IsInvalidArgument},
		{"negative owner", raw(func(b *bytes.Buffer) {
			layertest.Raw(b, 'x', "pax", layertest.Record("gid=-7"))
			layertest.Raw(b, '0', "owned", "")
		}), Limits{}, `layer entry "owned": owner`, errdefs.IsInvalidArgument},
		{"negative size", raw(func(b *bytes.Buffer) {
			layertest.Raw(b, '0', "ok", "")
			layertest.Raw(b, 'x', "pax", layertest.Record("size=-1"))
			layertest.Raw(b, '0', "neg", "")
		}), Limits{}, `after entry "ok"`, any},
		{"negative binary size", raw(func(b *bytes.Buffer) {
			layertest.RawSize(b, '0', "neg", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
		}), Limits{}, "layer archive", any},
		{"zero byte in a name", raw(func(b *bytes.Buffer) {
			layertest.Raw(b, 'x', "pax", layertest.Record("path=a\x00b"))
			layertest.Raw(b, '0', "n", "")
		}), Limits{}, "layer archive", any},
		{"zero byte in a link", raw(func(b *bytes.Buffer) {
			layertest.Raw(b, 'x', "pax", layertest.Record("linkpath=a\x00b"))
			layertest.Raw(b, '2', "n", "")
		}), Limits{}, "layer archive", any},
		{"size of an exabyte", raw(func(b *bytes.Buffer) {
			layertest.RawSize(b, '0', "huge", "\x80\x00\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00")
		}), Limits{}, `layer entry "huge"`, any},
		{"giant PAX header", raw(func(b *bytes.Buffer) {
			layertest.Raw(b, 'x', "pax", layertest.Record("comment="+strings.Repeat("x", 2<<20)))
			layertest.Raw(b, '0', "n", "")
		}), Limits{}, "layer archive", any},
		{"endless PAX headers", raw(func(b *bytes.Buffer) {
			for range 40 {
				layertest.Raw(b, 'x', "pax", layertest.Record("comment="+strings.Repeat("x", 64<<10)))
			}
			layertest.Raw(b, '0', "n", "")
		}), Limits{}, "headers of more than 1048576 bytes", errdefs.IsResourceExhausted},
		{"giant long name", raw(func(b *bytes.Buffer) {
			layertest.Raw(b, 'L', "././@LongLink", strings.Repeat("n", 900<<10))
			layertest.Raw(b, '0', "n", "")
		}), Limits{}, "name of 921600 bytes", any},
		{"giant attributes", layertest.Archive(manyXattrs), Limits{}, `layer entry "x/attrs": more than 262144 bytes of extended attributes`, errdefs.IsResourceExhausted},
		{"giant attribute", layertest.Archive(layertest.File("x", "").Xattr("user.x", strings.Repeat("v", 100<<10))), Limits{}, `layer entry "x": set attribute "user.x"`, any},
		{"sparse giant", layertest.Sparse(1<<50, 0, "x"), Limits{}, `layer entry "sparse": layer is larger`, errdefs.IsResourceExhausted},
		{"sparse giant by ratio", layertest.Sparse(1<<39, 0, "x"), Limits{}, `layer entry "sparse": layer has more than 200 times its compressed size`, errdefs.IsResourceExhausted},
		{"gzip bomb", gzipped(t, append(layertest.Archive(layertest.File("zeros", string(zeros))), zeros...)), Limits{RatioFloor: 1 << 20}, `layer entry "zeros": layer has more than 200 times`, errdefs.IsResourceExhausted},
		{"gzip bomb behind the end", gzipped(t, append(layertest.Archive(f), zeros...)), Limits{RatioFloor: 1 << 20}, "after the end of the archive: layer has more than 200 times", errdefs.IsResourceExhausted},
		{"zstd bomb", zstded(t, append(layertest.Archive(f), zeros...)), Limits{RatioFloor: 1 << 20}, "layer has more than 200 times", errdefs.IsResourceExhausted},
		{"zstd window", append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa0}, noise[:100]...), Limits{}, "layer archive", any},
		{"too large", layertest.Archive(layertest.File("large", string(noise))), Limits{Size: 1 << 18}, "layer is larger than 262144 bytes uncompressed", errdefs.IsResourceExhausted},
		{"many entries", layertest.Archive(f, f, f, f, f), Limits{Entries: 3}, `layer entry "before": more than 3 entries`, errdefs.IsResourceExhausted},
		{"many implied", layertest.Archive(layertest.File(strings.Repeat("d/", 50)+"f", "")), Limits{Entries: 30}, "more than 30 entries and directories implied", errdefs.IsResourceExhausted},
		{"many names", layertest.Archive(layertest.Dir("d", 0o755), layertest.Dir("e", 0o755)), Limits{NameBytes: 100}, "names to remember", errdefs.IsResourceExhausted},
		{"truncated in a file", valid[:3000], Limits{}, `layer entry "cut": unexpected EOF`, any},
		{"truncated in a header", layertest.Archive(f, f)[:1024+100], Limits{}, `layer archive after entry "before"`, any},
		{"truncated gzip", gzipped(t, valid)[:2000], Limits{}, "unexpected EOF", any},
		{"truncated zstd", zstded(t, valid)[:2000], Limits{}, "unexpected EOF", any},
		{"garbage", noise[:4096], Limits{}, "layer archive", any},
		{"garbage in gzip", append(gzipped(t, valid)[:200], noise[:200]...), Limits{}, "", any},
		{"garbage behind gzip", append(gzipped(t, valid), "garbage behind it"...), Limits{}, "after the end of the archive: behind the gzip content: not a gzip header", any},
		{"gzip head only", []byte{0x1f, 0x8b}, Limits{}, "read gzip header", any},
		{"bad checksum", raw(func(b *bytes.Buffer) { layertest.Raw(b, '0', "n", ""); b.Bytes()[0] = 'm' }), Limits{}, "layer archive", any},
	}
}

func TestHostileIsRefused(t *testing.T) {
	for _, h := range hostiles(t) {
		t.Run(h.name, func(t *testing.T) {
			start := time.Now()
			_, err := applyTo(t, t.TempDir(), h.data, "", h.limits)
			if err == nil || !strings.Contains(err.Error(), h.want) || !h.kind(err) {
				t.Errorf("error %v, want one with %q", err, h.want)
			}
			if len(fmt.Sprint(err)) > 2000 {
				t.Errorf("an error of %d bytes", len(fmt.Sprint(err)))
			}
			o, _ := NewOverlay(t.TempDir(), nil, OverlayOptions{})
			res, err := Apply(t.Context(), bytes.NewReader(h.data), "", o, h.limits)
			if err == nil && len(res.Links) == 0 {
				t.Error("the overlay took it")
			}
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

// escapes are archives that try to write outside. Whether they are taken or
// refused, nothing outside may change.
func escapes(outside string) map[string][]byte {
	up := strings.Repeat("../", 12)
	rel := up + strings.TrimPrefix(outside, "/")
	e := func(entries ...layertest.Entry) []byte { return layertest.Archive(entries...) }
	return map[string][]byte{
		"dotdot name":           e(layertest.File(rel+"/evil", "x"), layertest.File("d/../../../evil", "x")),
		"absolute name":         e(layertest.File(outside+"/evil", "x"), layertest.Dir(outside, 0o777)),
		"absolute link parent":  e(layertest.Symlink("l", outside), layertest.File("l/evil", "x"), layertest.File("l/file", "x"), layertest.Dir("l/sub", 0o777)),
		"relative link parent":  e(layertest.Symlink("l", rel), layertest.File("l/evil", "x"), layertest.Dir("l/sub", 0o777)),
		"chain of links":        e(layertest.Symlink("a", "b"), layertest.Symlink("b", "c/.."), layertest.Symlink("c", rel), layertest.File("a/evil", "x"), layertest.File("c/evil", "x")),
		"link as file":          e(layertest.Symlink("l", outside+"/file"), layertest.File("l", "overwritten")),
		"dir over link":         e(layertest.Symlink("l", outside), layertest.Dir("l", 0o777).Owned(1, 1)),
		"link swapped in":       e(layertest.Dir("d", 0o755), layertest.File("d/x", ""), layertest.Symlink("d", outside), layertest.File("d/evil", "x"), layertest.Dir("d/sub", 0o777)),
		"dir times by link":     e(layertest.Dir("d", 0o777).Owned(1, 1), layertest.Dir("d/sub", 0o777), layertest.Whiteout("d"), layertest.Symlink("d", outside)),
		"hard link out":         e(layertest.Link("h", outside+"/file"), layertest.File("h", "overwritten")),
		"hard link dotdot":      e(layertest.Link("h", rel+"/file").Moded(0o777)),
		"hard link by link":     e(layertest.Symlink("l", outside), layertest.Link("h", "l/file").Moded(0o777).Owned(1, 1)),
		"hard link to link":     e(layertest.Symlink("l", outside+"/file"), layertest.Link("h", "l").Moded(0o777).Owned(1, 1), layertest.File("h", "x")),
		"attributes by link":    e(layertest.Symlink("l", outside+"/file").Xattr("user.evil", "x").Owned(1, 1).Moded(0o777)),
		"whiteout out":          e(layertest.Symlink("l", outside), layertest.Whiteout("l/file"), layertest.Whiteout("l/sub")),
		"whiteout dotdot":       e(layertest.Whiteout(rel+"/file"), layertest.File(".wh.x/../../file", "")),
		"whiteout of link":      e(layertest.Symlink("l", outside), layertest.Whiteout("l")),
		"opaque out":            e(layertest.Symlink("l", outside), layertest.Opaque("l"), layertest.Opaque(rel)),
		"opaque over links":     e(layertest.Dir("d", 0o755), layertest.Symlink("d/l", outside), layertest.Opaque("d"), layertest.Opaque(".")),
		"dangling parent":       e(layertest.Symlink("l", outside+"/new"), layertest.File("l/evil", "x"), layertest.Symlink("m", rel+"/new2"), layertest.File("m/evil", "x")),
		"proc":                  e(layertest.Symlink("l", "/proc/self/root"+outside), layertest.File("l/evil", "x"), layertest.Symlink("cwd", "/proc/self/cwd"), layertest.File("cwd/evil", "x")),
		"implied through links": e(layertest.Symlink("l", outside), layertest.File("l/sub/a/b/c/evil", "x")),
		"device":                e(layertest.Node("null", tar.TypeChar, 1, 3), layertest.File("null", "x")),
	}
}

func TestNothingEscapes(t *testing.T) {
	for _, lower := range []bool{false, true} {
		top := t.TempDir()
		outside := filepath.Join(top, "outside")
		for _, d := range []string{outside, filepath.Join(outside, "sub")} {
			if err := os.Mkdir(d, 0o750); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range []string{"file", "sub/file"} {
			if err := os.WriteFile(filepath.Join(outside, f), []byte("precious"), 0o640); err != nil {
				t.Fatal(err)
			}
		}
		before, err := layertest.Snapshot(outside)
		if err != nil {
			t.Fatal(err)
		}
		for name, archive := range escapes(outside) {
			var dirs []string
			for _, kind := range []string{"directory", "overlay", "overlay, parents known"} {
				dir := filepath.Join(top, name+kind)
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				dirs = append(dirs, dir)
				if lower { // the traps were set by an earlier layer
					if err := errors.Join(os.Symlink(outside, filepath.Join(dir, "l")), os.Symlink("../outside", filepath.Join(dir, "d"))); err != nil {
						t.Fatal(err)
					}
				}
			}
			_, err1 := applyTo(t, dirs[0], archive, "", Limits{})
			o, _ := NewOverlay(dirs[1], nil, OverlayOptions{})
			res, err2 := Apply(t.Context(), bytes.NewReader(archive), "", o, Limits{})
			if err2 == nil {
				_, err2 = Complete(dirs[1], []string{dirs[0]}, res.Implied, res.Links)
			}
			o, _ = NewOverlay(dirs[2], []string{dirs[0]}, OverlayOptions{})
			_, err3 := Apply(t.Context(), bytes.NewReader(archive), "", o, Limits{})
			after, err := layertest.Snapshot(outside)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{".", "file", "sub", "sub/file"} {
				if before[f] != after[f] {
					t.Errorf("%s: %s outside was %s, is %s", name, f, before[f], after[f])
				}
			}
			if len(after) != len(before) {
				t.Errorf("%s: outside holds %v", name, after)
			}
			for _, err := range []error{err1, err2, err3} {
				if err != nil && !strings.Contains(err.Error(), "layer entry ") {
					t.Errorf("%s: the error names no entry: %v", name, err)
				}
			}
		}
	}
}

// The time grows with the archive, not with its square: nested opaque markers,
// whiteouts and directories made and deleted again.
func TestTimeIsLinear(t *testing.T) {
	layertest.InMemory(t)
	nested := func(n int) []byte {
		var entries []layertest.Entry
		dir := "d"
		for i := range n {
			if i < 500 {
				dir += "/d"
			}
			entries = append(entries, layertest.File(fmt.Sprintf("%s/f%d", dir, i), ""), layertest.Opaque(dir), layertest.Opaque("d"), layertest.Whiteout(fmt.Sprintf("%s/g%d", dir, i)))
		}
		return layertest.Archive(entries...)
	}
	replaced := func(n int) []byte {
		var entries []layertest.Entry
		for range n {
			entries = append(entries, layertest.File("a/b/c/f", ""), layertest.Symlink("a", "z"), layertest.Whiteout("a"))
		}
		return layertest.Archive(entries...)
	}
	for name, make := range map[string]func(int) []byte{"nested": nested, "replaced": replaced} {
		took := func(n int) time.Duration {
			start := time.Now()
			if _, err := applyTo(t, t.TempDir(), make(n), "", Limits{}); err != nil {
				t.Fatal(name, err)
			}
			return time.Since(start)
		}
		took(250)
		small, large := took(500), took(4000)
		if large > 30*small+time.Second {
			t.Errorf("%s: 8 times the entries took %v instead of %v", name, large, small)
		}
	}
}

// A context that ends is noticed while a read blocks, and nobody waits for it.
func TestCancel(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		go func() { _, _ = w.Write(layertest.Archive(layertest.File("f", "f"))[:700]) }()
		d, _ := NewDirectory(dir)
		start := time.Now()
		_, err := Apply(ctx, r, "", d, Limits{})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		r.Close() // the reading goroutine ends with this, or synctest complains
	})
}

// What fails below comes out unchanged, and nobody reads any more.
func TestReadError(t *testing.T) {
	broken := errors.New("connection reset")
	archive := layertest.Archive(layertest.File("f", strings.Repeat("x", 1<<20)))
	for _, n := range []int{0, 100, 600, 1 << 19} {
		d, _ := NewDirectory(t.TempDir())
		r := io.MultiReader(bytes.NewReader(archive[:n]), iotestErr{broken})
		if _, err := Apply(t.Context(), r, "", d, Limits{}); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

type iotestErr struct{ err error }

func (e iotestErr) Read([]byte) (int, error) { return 0, e.err }

// A disk that fills up is an error that says so and names the entry.
func TestFullDisk(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	_, err := applyTo(t, dir, layertest.Archive(layertest.File("big", strings.Repeat("x", 4<<20))), "", Limits{})
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), `layer entry "big"`) {
		t.Error(err)
	}
}

func TestSparse(t *testing.T) {
	dir := t.TempDir()
	res, err := applyTo(t, dir, layertest.Sparse(64<<20, 1<<20, "middle"), "", Limits{})
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "sparse"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 64<<20 || st.Blocks > 64 || res.Usage.Size != st.Blocks*512 {
		t.Errorf("%d bytes in %d blocks, counted %v", st.Size, st.Blocks, res.Usage)
	}
	got := make([]byte, 8)
	f, err := os.Open(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(got, 1<<20-1); err != nil || string(got) != "\x00middle\x00" {
		t.Errorf("%q, %v", got, err)
	}
}

// Directories have the time of their entry, though more is written into them
// after it; on an overlay also when Complete puts a file there.
func TestDirectoryTimes(t *testing.T) {
	when := time.Unix(1_234_567_890, 987_654_321)
	at := func(h *tar.Header) { h.ModTime = when }
	lower := t.TempDir()
	if _, err := applyTo(t, lower, layertest.Archive(layertest.Dir("e", 0o755).With(at), layertest.File("e/x", "x")), "", Limits{}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o, _ := NewOverlay(dir, []string{lower}, OverlayOptions{})
	archive := layertest.Archive(layertest.Dir("d", 0o755).With(at), layertest.File("d/a", ""), layertest.Link("d/x", "e/x"), layertest.Whiteout("d/w"), layertest.File("e/implied", ""))
	if _, err := Apply(t.Context(), bytes.NewReader(archive), "", o, Limits{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{filepath.Join(lower, "e"), filepath.Join(dir, "d"), filepath.Join(dir, "e")} {
		fi, err := os.Stat(name)
		if err != nil || !fi.ModTime().Equal(when) {
			t.Errorf("%s: %v, %v", name, fi.ModTime(), err)
		}
	}
}

func TestSync(t *testing.T) {
	few := layertest.Archive(layertest.File("a/b", "x"), layertest.File("gone", "x"), layertest.Whiteout("gone"), layertest.Symlink("a/l", "b"), layertest.Dir("d", 0o755), layertest.Symlink("d", "a"))
	var entries []layertest.Entry
	for i := range fewFiles + 1 {
		entries = append(entries, layertest.File(fmt.Sprint(i), "x"))
	}
	for _, c := range []struct {
		archive []byte
		want    bool
	}{{few, true}, {layertest.Archive(entries...), false}, {layertest.Archive(), true}} {
		d, _ := NewDirectory(t.TempDir())
		if _, err := Apply(t.Context(), bytes.NewReader(c.archive), "", d, Limits{}); err != nil {
			t.Fatal(err)
		}
		if done, err := d.Sync(); done != c.want || err != nil {
			t.Errorf("directory: %v, %v; want %v", done, err, c.want)
		}
		o, _ := NewOverlay(t.TempDir(), nil, OverlayOptions{})
		if _, err := Apply(t.Context(), bytes.NewReader(c.archive), "", o, Limits{}); err != nil {
			t.Fatal(err)
		}
		if done, err := o.Sync(); done != c.want || err != nil {
			t.Errorf("overlay: %v, %v; want %v", done, err, c.want)
		}
	}
}

func TestUserXattr(t *testing.T) {
	dir := t.TempDir()
	o, _ := NewOverlay(dir, nil, OverlayOptions{UserXattr: true})
	archive := layertest.Archive(layertest.Dir("d", 0o755), layertest.Opaque("d"), layertest.Dir("e", 0o755).Xattr("user.overlay.opaque", "y"))
	if _, err := Apply(t.Context(), bytes.NewReader(archive), "", o, Limits{}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 8)
	if n, err := unix.Getxattr(filepath.Join(dir, "d"), opaqueUser, buf); err != nil || string(buf[:n]) != "y" {
		t.Errorf("d: %q, %v", buf[:max(n, 0)], err)
	}
	if _, err := unix.Getxattr(filepath.Join(dir, "e"), opaqueUser, buf); !errors.Is(err, unix.ENODATA) {
		t.Errorf("the archive made e opaque: %v", err)
	}
}

// Any input ends, with bounded work, and leaves what is outside alone.
func FuzzApply(f *testing.F) {
	for _, img := range layertest.Awkward() {
		for _, l := range img.Layers[:min(len(img.Layers), 2)] {
			if len(l) < 64<<10 {
				f.Add(l)
			}
		}
	}
	small := layertest.Archive(layertest.File("f", "f"))
	f.Add(gzipped(f, small))
	f.Add(zstded(f, small))
	for _, h := range hostiles(f) {
		if len(h.data) < 16<<10 {
			f.Add(h.data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		dirs := []string{filepath.Join(top, "a"), filepath.Join(top, "b")}
		for _, d := range dirs {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		limits := Limits{Entries: 2000, Size: 16 << 20}
		res, err := applyTo(t, dirs[0], data, "", limits)
		if err == nil && res.Size < int64(min(len(data), 1)) {
			t.Errorf("%d bytes came to %d", len(data), res.Size)
		}
		o, _ := NewOverlay(dirs[1], []string{dirs[0]}, OverlayOptions{})
		_, _ = Apply(t.Context(), bytes.NewReader(data), "", o, limits)
		names, err := os.ReadDir(top)
		if err != nil || len(names) != 2 || !slices.IsSortedFunc(names, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) }) {
			t.Errorf("beside the roots: %v, %v", names, err)
		}
	})
}
