package layer

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

// defaultACL is a posix_acl_default: u::rwx, u:1234:rwx, g::r-x, mask rwx, o::---.
func defaultACL() []byte {
	acl := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range [][3]uint32{{1, 7, 1<<32 - 1}, {2, 7, 1234}, {4, 5, 1<<32 - 1}, {0x10, 7, 1<<32 - 1}, {0x20, 0, 1<<32 - 1}} {
		acl = binary.LittleEndian.AppendUint16(acl, uint16(e[0]))
		acl = binary.LittleEndian.AppendUint16(acl, uint16(e[1]))
		acl = binary.LittleEndian.AppendUint32(acl, e[2])
	}
	return acl
}

// Owners, modes and times are the archive's, whatever the umask and the
// directory that it is unpacked into would make of new files.
func TestSurroundingsDoNotMatter(t *testing.T) {
	needRoot(t)
	layertest.InMemory(t)
	archive := layertest.Archive(
		layertest.File("root", "r"), layertest.File("open", "").Moded(0o666), layertest.File("closed", "c").Moded(0),
		layertest.File("setid", "s").Moded(0o6755), layertest.File("theirs", "t").Owned(5, 6).Moded(0o2711), layertest.File("group", "g").Owned(0, 77),
		layertest.Dir("d", 0o755), layertest.Dir("d/sticky", 0o1777), layertest.Dir("d/shut", 0), layertest.File("d/shut/in", "i"), layertest.Dir("d/setgid", 0o2770).Owned(8, 9),
		layertest.File("d/setgid/f", "f"), layertest.Dir("d/setgid/d", 0o750), layertest.Dir("d/group", 0o751).Owned(0, 77),
		layertest.Symlink("l", "x"), layertest.Symlink("theirl", "y").Owned(3, 4), layertest.Symlink("d/setgid/l", "z"),
		layertest.Node("fifo", tar.TypeFifo, 0, 0).Moded(0o622), layertest.Node("null", tar.TypeChar, 1, 3).Moded(0o666).Owned(1, 2),
		layertest.Link("again", "setid").Moded(0o6755),
	)
	apply := func(prepare func(dir string)) (string, Usage) {
		dir := t.TempDir()
		prepare(dir)
		res, err := applyTo(t, dir, archive, "", Limits{})
		if err != nil {
			t.Fatal(err)
		}
		return dir, res.Usage
	}
	plain, usage := apply(func(string) {})
	var st unix.Stat_t
	if err := unix.Stat(plain+"/setid", &st); err != nil || st.Mode != unix.S_IFREG|0o6755 || st.Uid != 0 {
		t.Fatalf("%+v, %v", st, err)
	}
	for name, prepare := range map[string]func(dir string) error{
		"umask":    func(string) error { syscall.Umask(0o077); return nil },
		"no umask": func(string) error { syscall.Umask(0); return nil },
		"setgid":   func(dir string) error { return unix.Chown(dir, 0, 123) },
		"acl":      func(dir string) error { return unix.Setxattr(dir, "system.posix_acl_default", defaultACL(), 0) },
		"everything": func(dir string) error {
			syscall.Umask(0o027)
			return unix.Setxattr(dir, "system.posix_acl_default", defaultACL(), 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			old := syscall.Umask(0o022)
			defer syscall.Umask(old)
			dir, got := apply(func(dir string) {
				if err := prepare(dir); err != nil {
					t.Skip(err)
				}
				if name == "setgid" || name == "everything" {
					if err := unix.Chmod(dir, 0o2755); err != nil {
						t.Fatal(err)
					}
				}
			})
			diffs, err := layertest.Compare(plain, dir, layertest.CompareOptions{IgnoreRoot: true})
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range diffs {
				if d.What != "xattrs" || name != "acl" && name != "everything" { // they are inherited, and limited by the mode
					t.Error(d)
				}
			}
			if got != usage {
				t.Errorf("usage %+v, want %+v", got, usage)
			}
		})
	}
}

// A second entry of a file gives what its first one would have, also when it is
// a link: an owner that is set again takes capabilities away.
func TestLastEntryCounts(t *testing.T) {
	needRoot(t)
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	dir := t.TempDir()
	capable := layertest.File("ping", "p").Moded(0o755).Xattr("security.capability", capability)
	if _, err := applyTo(t, dir, layertest.Archive(capable, layertest.Link("ping2", "ping").Moded(0o711)), "", Limits{}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if n, err := unix.Getxattr(dir+"/ping", "security.capability", buf); err != unix.ENODATA {
		t.Errorf("%x, %v", buf[:max(n, 0)], err)
	}
	if _, err := applyTo(t, dir, layertest.Archive(layertest.Dir("d", 0o700), layertest.Dir("d", 0o1777).Owned(1, 2), capable), "", Limits{}); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Getxattr(dir+"/ping", "security.capability", buf); err != nil || !bytes.Equal(buf[:n], []byte(capability)) {
		t.Errorf("%x, %v", buf[:max(n, 0)], err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir+"/d", &st); err != nil || st.Mode != unix.S_IFDIR|0o1777 || st.Uid != 1 || st.Gid != 2 {
		t.Errorf("%+v, %v", st, err)
	}
}

// Until an object has its owner, nobody may do more with it than afterwards.
func TestEarlyMode(t *testing.T) {
	for mode, want := range map[uint32]uint32{
		0o644: 0o644, 0o755: 0o755, 0o600: 0o600, 0o777: 0o777, 0o4755: 0o755, 0o1777: 0o777, 0: 0,
		0o640: 0o600, 0o664: 0o644, 0o775: 0o755, 0o2770: 0o700, 0o604: 0o600, 0o751: 0o711,
	} {
		if got := (&attributes{mode: mode}).early(); got != want {
			t.Errorf("%#o of %#o, want %#o", got, mode, want)
		}
	}
}
