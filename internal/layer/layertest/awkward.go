package layertest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"time"
)

// capability is a version 2 security.capability: cap_net_raw=ep.
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// Awkward returns images that are known to be hard to get right. All of them
// can be unpacked; those whose result depends on the kind of driver have names
// that begin with `driver-`: writing through a link of a lower layer follows
// the link on a plain directory, and hides it on an overlay.
func Awkward() []Image {
	image := func(name string, layers ...[]byte) Image { return Image{name, layers} }
	base := Archive(
		Dir("etc", 0o755), File("etc/passwd", "root"), File("etc/shadow", "x").Moded(0o600).Owned(0, 42),
		Dir("usr", 0o755), Dir("usr/bin", 0o750).Owned(7, 8), File("usr/bin/tool", "tool").Moded(0o755),
		Dir("var", 0o1777), Dir("var/lib", 0o700).Owned(100, 101), File("var/lib/db", strings.Repeat("db", 5000)),
		Dir("var/lib/deep", 0o711), Dir("var/lib/deep/er", 0o2755), File("var/lib/deep/er/f", "f"),
	)
	return []Image{
		image("whiteouts", base, Archive(Whiteout("etc/passwd"), Whiteout("var/lib"), Whiteout("nowhere"), Whiteout("absent/dir/x"))),
		image("whiteout-then-again", base, Archive(Whiteout("etc/passwd"), File("etc/passwd", "new"), Whiteout("var/lib"), Dir("var/lib", 0o755), File("var/lib/new", "n"))),
		image("whiteout-then-implied", base, Archive(Whiteout("var/lib"), File("var/lib/x/new", "n"))),
		image("whiteout-of-own", base, Archive(File("etc/own", "o"), Whiteout("etc/own"), Dir("etc/d", 0o755), File("etc/d/f", "f"), Whiteout("etc/d"))),
		image("whiteout-of-own-and-lower", base, Archive(File("etc/passwd", "new"), Whiteout("etc/passwd"))),
		image("whiteout-restored-above", base, Archive(Whiteout("var")), Archive(Dir("var", 0o755), File("var/z", "z"))),
		image("whiteout-in-base", Archive(Whiteout("x"), Dir("d", 0o755), Whiteout("d/y"), File("f", "f"))),
		image("opaque", base, Archive(Dir("var", 0o700), Opaque("var"), File("var/only", "o"))),
		image("opaque-late", base, Archive(File("var/only", "o"), Dir("var/lib", 0o700), File("var/lib/kept", "k"), Opaque("var"))),
		image("opaque-nested", base, Archive(Opaque("var/lib/deep"), File("var/lib/deep/n", "n"), Opaque("var/lib"), Opaque("var"), Opaque("var"))),
		image("opaque-implied", base, Archive(Opaque("var/lib"), File("var/lib/deep/er/g", "g"))),
		image("opaque-absent", base, Archive(Opaque("srv/none"))),
		image("opaque-root", base, Archive(Dir("etc", 0o755), File("etc/only", "o"), Opaque("."))),
		image("opaque-root-late", base, Archive(Opaque("."), Dir("usr", 0o755)), Archive(File("etc/x", "x"))),
		image("aufs-names", base, Archive(Dir(".wh..wh.plnk", 0o700), File(".wh..wh.plnk/1.2", "x"), File(".wh..wh.aufs", ""), File("etc/n", "n"))),
		image("hardlinks-within", Archive(File("a", "a"), Link("b", "a"), Dir("d", 0o755), Link("d/c", "/b"), Symlink("s", "a"), Link("t", "s"), Node("p", tar.TypeFifo, 0, 0), Link("q", "p"))),
		image("hardlink-to-itself", Archive(File("a", "a"), Link("a", "a"))),
		image("hardlinks-across", base, Archive(Link("etc/p2", "etc/passwd"), Link("p3", "/etc/passwd"), Link("p4", "p3"))),
		image("hardlinks-across-deep", base, Archive(Link("f2", "var/lib/deep/er/f"), Link("var/lib/deep/er/f3", "var/lib/deep/er/f")), Archive(File("var/lib/deep/er/g", "g"))),
		image("hardlinks-across-two", base, Archive(File("z", "z")), Archive(Link("etc/t2", "usr/bin/tool").Moded(0o4711).Owned(3, 4))),
		image("hardlink-to-replaced", base, Archive(Link("old", "etc/passwd"), File("etc/passwd", "new"))),
		image("hardlink-to-deleted", base, Archive(Link("old", "etc/passwd"), Whiteout("etc/passwd"), Link("old2", "old"))),
		image("hardlink-replaced", base, Archive(Link("x", "etc/passwd"), File("x", "own"), Link("y", "etc/passwd"), Whiteout("y"), Link("d/z", "etc/passwd"), Whiteout("d"), File("d/w", "w"))),
		image("hardlink-over-lower", base, Archive(Link("etc/passwd", "etc/shadow").Moded(0o600))),
		image("hardlink-to-lower-symlink", Archive(Symlink("s", "nowhere"), Dir("d", 0o755), File("d/f", "f"), Symlink("l", "d")), Archive(Link("t", "s"), Link("g", "l/f"))),
		image("hardlink-through-own-symlink", base, Archive(Symlink("v", "var/lib"), Link("db2", "v/db"))),
		image("implied", base, Archive(File("var/lib/deep/er/new", "n"), File("quite/new/dir/f", "f"))),
		image("implied-setgid", Archive(Dir("g", 0o2775).Owned(3, 33), Dir("g/h", 0o755)), Archive(File("g/new/dir/f", "f"), File("g/h/i/f", "f"))),
		image("implied-twice", base, Archive(File("var/lib/deep/er/new", "n")), Archive(File("var/lib/deep/er/newer", "n"))),
		image("implied-then-entry", base, Archive(File("var/lib/new", "n"), Dir("var/lib", 0o711).Owned(1, 1))),
		image("implied-xattrs", Archive(Dir("d", 0o755).Xattr("user.k", "v"), Dir("d/e", 0o700).Xattr("user.l", "w")), Archive(File("d/e/f", "f"))),
		image("types-change", Archive(Dir("a", 0o755), File("a/f", "f"), File("b", "b"), Symlink("c", "a"), Node("e", tar.TypeFifo, 0, 0)),
			Archive(File("a", "a"), Dir("b", 0o755), File("b/f", "f"), Dir("c", 0o755), File("c/g", "g"), Symlink("e", "b")),
			Archive(Dir("a", 0o700), Symlink("b", "a"), File("c", "c"), Dir("e", 0o755))),
		image("types-change-in-layer", base, Archive(File("var", "v"), Dir("var", 0o755), File("etc", "e"), Symlink("etc", "usr"), Dir("etc", 0o711), File("etc/f", "f"))),
		image("written-then-looped", base, Archive(File("srv/x/f", "f"), Symlink("srv", "srv"), File("etc/n/f", "f"), Symlink("etc/n", "m"))),
		image("duplicates", Archive(File("a", "1"), File("a", "2"), Dir("d", 0o755), File("d/f", "f"), Dir("d", 0o700), Symlink("s", "a"), File("s", "s"))),
		image("xattrs", Archive(File("f", "f").Xattr("user.one", "1").Xattr("user.zero", "a\x00b"), File("cap", "c").Owned(5, 6).Moded(0o755).Xattr("security.capability", capability),
			Dir("d", 0o755).Xattr("user.d", "d"), Symlink("s", "f").Xattr("user.ignored", "x"), File("t", "t").Xattr("trusted.secret", "x").Xattr("trusted.overlay.opaque", "y"))),
		image("xattrs-across", Archive(File("cap", "c").Owned(5, 6).Moded(0o755).Xattr("security.capability", capability)), Archive(Link("cap2", "cap").Owned(5, 6).Moded(0o755).Xattr("security.capability", capability))),
		image("modes", Archive(File("suid", "s").Moded(0o4755).Owned(9, 9), File("sgid", "s").Moded(0o2755).Owned(9, 9), Dir("sticky", 0o1777), Dir("sgid.d", 0o2775).Owned(1, 2), File("none", "n").Moded(0), Dir("none.d", 0), File("none.d/f", "f"))),
		image("owners", Archive(File("big", "b").Owned(2_000_000_000, 4_000_000_000), Symlink("l", "big").Owned(12, 13), Dir("d", 0o755).Owned(65534, 65534))),
		image("devices", Archive(Dir("dev", 0o755), Node("dev/null", tar.TypeChar, 1, 3).Moded(0o666), Node("dev/sda", tar.TypeBlock, 8, 0), Node("dev/pipe", tar.TypeFifo, 0, 0).Moded(0o600).Owned(4, 5))),
		image("names", Archive(File("sp ace", "x"), File("new\nline", "x"), File("uml\u00e4ut", "x"), File("bad\xff\xfe", "x"), File("./dot/./f", "x"), File("/abs/f", "x"), File("../../up", "x"), File("a/../b/f", "x"), File("...", "x"), Dir(".", 0o700), File("-rf", "x"))),
		image("long-names", Archive(File(strings.Repeat("n", 255), "x"), File(strings.Repeat("d/", 120)+"f", "x"), Symlink("l", strings.Repeat("t", 3000)), Dir(strings.Repeat(strings.Repeat("x", 200)+"/", 15)+"y", 0o700), Link("h", strings.Repeat("d/", 120)+"f"))),
		image("deep", Archive(File(strings.Repeat("d/", 500)+"f", "x")), Archive(Whiteout(strings.Repeat("d/", 400)+"d")), Archive(File(strings.Repeat("d/", 450)+"g", "x"))),
		image("own-links-in-path", Archive(Dir("usr", 0o755), Dir("usr/bin", 0o755), Symlink("bin", "usr/bin"), Symlink("abs", "/usr/bin"), Symlink("up", "../../usr"), Symlink("dangling", "not/yet"), File("bin/a", "a"), File("abs/b", "b"), File("up/c", "c"), File("dangling/d", "d"))),
		image("links-kept", Archive(Symlink("abs", "/etc/passwd"), Symlink("up", "../../../etc/passwd"), Symlink("loop", "loop"), Symlink("self", "."), Dir("etc", 0o755)), Archive(File("etc/passwd", "p"))),
		image("times", Archive(
			File("pax", "x").With(func(h *tar.Header) {
				h.ModTime = time.Unix(1_600_000_000, 123_456_789)
				h.AccessTime = time.Unix(1_600_000_001, 5)
			}),
			File("old", "x").With(func(h *tar.Header) { h.ModTime = time.Unix(-5, 0) }), File("zero", "x").With(func(h *tar.Header) { h.ModTime = time.Unix(0, 0) }),
			File("far", "x").With(func(h *tar.Header) { h.ModTime = time.Unix(1<<40, 0) }),
			Symlink("l", "pax").With(func(h *tar.Header) { h.ModTime = time.Unix(1_400_000_000, 1) }),
			Dir("d", 0o755).With(func(h *tar.Header) { h.ModTime = time.Unix(1_300_000_000, 7) }), File("d/f", "f"))),
		image("sparse", Sparse(16<<20, 1<<20, "middle")),
		image("empty", Archive(), Archive(File("a", "a")), Archive()),
		image("large", Archive(File("large", strings.Repeat("0123456789abcdef", 1<<17)), File("after", "a"))),
		hundred(),
		image("driver-link-below", Archive(Dir("usr", 0o755), Dir("usr/bin", 0o750), File("usr/bin/a", "a"), Symlink("bin", "usr/bin")), Archive(File("bin/b", "b"))),
	}
}

// hundred is an image of 100 layers, each of which changes what others did.
func hundred() Image {
	img := Image{Name: "hundred-layers"}
	for i := range 100 {
		entries := []Entry{Dir("d", 0o755), File("d/common", fmt.Sprint(i)), File(fmt.Sprintf("d/own%d", i), "x"), File("e/implied", fmt.Sprint(i))}
		if i > 0 && i%3 == 0 {
			entries = append(entries, Whiteout(fmt.Sprintf("d/own%d", i-1)))
		}
		if i > 0 && i%10 == 0 {
			entries = append(entries, Link(fmt.Sprintf("d/link%d", i), fmt.Sprintf("d/own%d", i-i%3)))
		}
		if i%40 == 39 {
			entries = append(entries, Opaque("e"))
		}
		img.Layers = append(img.Layers, Archive(entries...))
	}
	return img
}

// Sparse is a layer with one file, "sparse", in PAX format 1.0, of that size
// and with data at that offset only; the rest is a hole.
func Sparse(size, offset int64, data string) []byte {
	table := fmt.Sprintf("1\n%d\n%d\n", offset, len(data))
	body := table + strings.Repeat("\x00", 512-len(table)) + data
	var buf bytes.Buffer
	records := ""
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=sparse", fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		records += Record(r)
	}
	Raw(&buf, 'x', "PaxHeaders/sparse", records)
	Raw(&buf, '0', "GNUSparseFile.0/sparse", body)
	buf.Write(make([]byte, 1024))
	return buf.Bytes()
}

// Record is one PAX record, with its length before it.
func Record(kv string) string {
	for n := len(kv) + 3; ; n++ {
		if s := fmt.Sprintf("%d %s\n", n, kv); len(s) == n {
			return s
		}
	}
}

// Raw writes one header of any type, and its body, as they are.
func Raw(buf *bytes.Buffer, kind byte, name, body string) {
	RawSize(buf, kind, name, fmt.Sprintf("%011o", len(body)))
	buf.WriteString(body)
	if n := len(body) % 512; n > 0 {
		buf.Write(make([]byte, 512-n))
	}
}

// RawSize writes one header whose size field is what it is told.
func RawSize(buf *bytes.Buffer, kind byte, name, size string) {
	var h [512]byte
	copy(h[0:100], name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:136], size)
	copy(h[136:], "13132255400\x00")
	copy(h[148:156], "        ")
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	buf.Write(h[:])
}
