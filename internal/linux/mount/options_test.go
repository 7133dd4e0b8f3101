package mount

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name  string
		m     Mount
		flags uintptr
		prop  uintptr
		data  string
		err   error
	}{
		{name: "last word wins", m: Mount{Type: "bind", Options: []string{"ro", "rbind", "rw"}}, flags: unix.MS_BIND | unix.MS_REC},
		{name: "joined", m: Mount{Type: "ext4", Options: []string{"ro,nodev", "errors=remount-ro"}}, flags: unix.MS_RDONLY | unix.MS_NODEV, data: "errors=remount-ro"},
		{name: "quoted comma", m: Mount{Type: "tmpfs", Options: []string{`context="a,b",size=1m`}}, data: `context="a,b"|size=1m`},
		{name: "escaped comma", m: Mount{Type: "overlay", Options: []string{`lowerdir=/a\,b:/c,index=off`}}, data: `lowerdir=/a\,b:/c|index=off`},
		{name: "propagation", m: Mount{Type: "bind", Options: []string{"bind", "rslave"}}, flags: unix.MS_BIND, prop: unix.MS_SLAVE | unix.MS_REC},
		{name: "loop", m: Mount{Type: "ext4", Options: []string{"loop"}}, err: errdefs.ErrNotImplemented},
		{name: "id map", m: Mount{Type: "bind", Options: []string{"uidmap=0:1000:1"}}, err: errdefs.ErrNotImplemented},
		{name: "manager", m: Mount{Type: "format/overlay"}, err: errdefs.ErrNotImplemented},
		{name: "fuse", m: Mount{Type: "fuse3.fuse-overlayfs"}, err: errdefs.ErrNotImplemented},
		{name: "remount", m: Mount{Type: "bind", Options: []string{"remount"}}, err: errdefs.ErrInvalidArgument},
		{name: "zero byte", m: Mount{Type: "tmpfs", Options: []string{"size=1\x00m"}}, err: errdefs.ErrInvalidArgument},
		{name: "too long", m: Mount{Type: "tmpfs", Options: []string{strings.Repeat("x", maxOptions)}}, err: errdefs.ErrInvalidArgument},
	} {
		p, err := parse(c.m)
		if !errors.Is(err, c.err) {
			t.Errorf("%s: error %v; want %v", c.name, err, c.err)
		}
		if c.err == nil && (p.flags != c.flags || p.propagation != c.prop || strings.Join(p.data, "|") != c.data) {
			t.Errorf("%s: %+v", c.name, p)
		}
	}
}

func TestSplitLower(t *testing.T) {
	for value, want := range map[string][2][]string{
		"/a:/b":          {{"/a", "/b"}, nil},
		`/a\:b:/c\\d`:    {{"/a:b", `/c\d`}, nil},
		`/a\,b`:          {{"/a,b"}, nil},
		"/a:/b::/d::/e":  {{"/a", "/b"}, {"/d", "/e"}},
		"":               {nil, nil},
		`/trailing\`:     {{`/trailing\`}, nil},
		"/only/colon/b:": {{"/only/colon/b"}, nil},
	} {
		lower, data := splitLower(value)
		if !slices.Equal(lower, want[0]) || !slices.Equal(data, want[1]) {
			t.Errorf("%q: %q and %q; want %q", value, lower, data, want)
		}
	}
}

// Any directories survive being put into a lowerdir option and read back.
func FuzzLowerdir(f *testing.F) {
	f.Add("/var/lib/a:b", `/c\d,e`)
	f.Fuzz(func(t *testing.T, a, b string) {
		if a == "" || b == "" {
			return
		}
		joined := splitOptions([]string{"lowerdir=" + Escape(a) + ":" + Escape(b)})
		if strings.Contains(a+b, `"`) { // quotes are SELinux's; no escape hides them
			return
		}
		l, err := overlayLayers(joined)
		if err != nil || !slices.Equal(l.lower, []string{a, b}) || l.rest != nil {
			t.Fatalf("%q, %q came back as %q, %v", a, b, l.lower, err)
		}
	})
}

func TestReadOnly(t *testing.T) {
	got := ReadOnly([]Mount{
		{Type: "bind", Source: "/s", Options: []string{"rw", "rbind"}},
		{Type: "overlay", Options: []string{"workdir=/w", `upperdir=/u:p`, "lowerdir=/a:/b", "index=off", "volatile"}},
		{Type: "overlay", Options: []string{"lowerdir=/a:/b"}},
	})
	want := []string{"rbind,ro", `lowerdir=/u\:p:/a:/b,index=off`, "lowerdir=/a:/b"}
	for i, m := range got {
		if strings.Join(m.Options, ",") != want[i] {
			t.Errorf("%d: %q; want %q", i, m.Options, want[i])
		}
		if !m.ReadOnly() {
			t.Errorf("%d: %q isn't read-only", i, m.Options)
		}
	}
	if (Mount{Type: "overlay", Options: []string{"lowerdir=/a,upperdir=/b"}}).ReadOnly() {
		t.Error("an overlay with an upper directory called read-only")
	}
}
