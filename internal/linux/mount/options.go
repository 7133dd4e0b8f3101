package mount

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// parsed is a description whose options are sorted by who reads them.
type parsed struct {
	fstype, source string
	flags          uintptr  // MS_* of mount(2)
	propagation    uintptr  // MS_SHARED and so on, with MS_REC
	data           []string // for the file system, `key` or `key=value`, still escaped
}

// maxOptions bounds the options of one mount, in bytes: room for the 500
// layers at which overlayfs itself stops, with paths of PATH_MAX/2.
const maxOptions = 1 << 20

type flag struct {
	ms    uintptr
	clear bool
}

// flagWords are the options that mount(8) turns into flags.
var flagWords = map[string]flag{
	"async": {unix.MS_SYNCHRONOUS, true}, "sync": {unix.MS_SYNCHRONOUS, false},
	"atime": {unix.MS_NOATIME, true}, "noatime": {unix.MS_NOATIME, false},
	"diratime": {unix.MS_NODIRATIME, true}, "nodiratime": {unix.MS_NODIRATIME, false},
	"relatime": {unix.MS_RELATIME, false}, "norelatime": {unix.MS_RELATIME, true},
	"strictatime": {unix.MS_STRICTATIME, false}, "nostrictatime": {unix.MS_STRICTATIME, true},
	"bind": {unix.MS_BIND, false}, "rbind": {unix.MS_BIND | unix.MS_REC, false},
	"defaults": {}, "dirsync": {unix.MS_DIRSYNC, false},
	"dev": {unix.MS_NODEV, true}, "nodev": {unix.MS_NODEV, false},
	"exec": {unix.MS_NOEXEC, true}, "noexec": {unix.MS_NOEXEC, false},
	"suid": {unix.MS_NOSUID, true}, "nosuid": {unix.MS_NOSUID, false},
	"mand": {unix.MS_MANDLOCK, false}, "nomand": {unix.MS_MANDLOCK, true},
	"rw": {unix.MS_RDONLY, true}, "ro": {unix.MS_RDONLY, false},
}

// propagationWords set how mounts spread to other mount namespaces.
var propagationWords = map[string]uintptr{
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC,
	"slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC,
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC,
	"unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

func parse(m Mount) (parsed, error) {
	p := parsed{fstype: m.Type, source: m.Source}
	if strings.HasPrefix(m.Type, "fuse.") || strings.HasPrefix(m.Type, "fuse3.") || strings.Contains(m.Type, "/") {
		return p, fmt.Errorf("mounts of type %q: %w", m.Type, errdefs.ErrNotImplemented)
	}
	size := 0
	for _, o := range splitOptions(m.Options) {
		if size += len(o) + 1; size > maxOptions {
			return p, fmt.Errorf("more than %d bytes of mount options: %w", maxOptions, errdefs.ErrInvalidArgument)
		}
		if strings.ContainsRune(o, 0) {
			return p, fmt.Errorf("mount option with a zero byte: %w", errdefs.ErrInvalidArgument)
		}
		key, _, _ := strings.Cut(o, "=")
		switch {
		case o == "loop", key == "uidmap", key == "gidmap", strings.HasPrefix(o, "X-containerd."):
			return p, fmt.Errorf("mount option %q: %w", key, errdefs.ErrNotImplemented)
		case o == "remount":
			return p, fmt.Errorf("mount option %q: %w", o, errdefs.ErrInvalidArgument)
		}
		if f, ok := flagWords[o]; ok {
			if f.clear {
				p.flags &^= f.ms
			} else {
				p.flags |= f.ms
			}
		} else if ms, ok := propagationWords[o]; ok {
			p.propagation = ms
		} else {
			p.data = append(p.data, o)
		}
	}
	if m.Type == "bind" {
		p.flags |= unix.MS_BIND
	}
	return p, nil
}

// splitOptions splits elements that hold several options. A comma does not
// split inside double quotes or after a backslash.
func splitOptions(elements []string) []string {
	var out []string
	for _, e := range elements {
		start, quoted := 0, false
		for i := 0; i < len(e); i++ {
			switch c := e[i]; {
			case c == '\\':
				i++
			case c == '"':
				quoted = !quoted
			case c == ',' && !quoted:
				if i > start {
					out = append(out, e[start:i])
				}
				start = i + 1
			}
		}
		if start < len(e) {
			out = append(out, e[start:])
		}
	}
	return out
}

// layers are the directories of an overlay, unescaped, uppermost first.
type layers struct {
	lower, data  []string // data: layers after `::`, reached only by redirects
	upper, work  string
	rest         []string // the other options
	upperRaw     string   // as in the option, for calls that unescape themselves
	workRaw      string
	lowerOptions int // how many lowerdir options there were
}

func overlayLayers(data []string) (layers, error) {
	var l layers
	for _, o := range data {
		key, value, _ := strings.Cut(o, "=")
		switch key {
		case "lowerdir":
			l.lowerOptions++
			l.lower, l.data = splitLower(value)
		case "upperdir":
			l.upper, l.upperRaw = unescape(value), value
		case "workdir":
			l.work, l.workRaw = unescape(value), value
		default:
			l.rest = append(l.rest, o)
		}
	}
	if l.lowerOptions != 1 || len(l.lower) == 0 {
		return l, fmt.Errorf("an overlay needs one lowerdir option with at least one directory: %w", errdefs.ErrInvalidArgument)
	}
	return l, nil
}

// splitLower splits at colons that no backslash escapes. After the first
// double colon come data-only layers.
func splitLower(value string) (lower, data []string) {
	inData, start := false, 0
	take := func(end int) {
		if end == start {
			inData = true
		} else if inData {
			data = append(data, unescape(value[start:end]))
		} else {
			lower = append(lower, unescape(value[start:end]))
		}
		start = end + 1
	}
	for i := 0; i < len(value); i++ {
		switch value[i] {
		case '\\':
			i++
		case ':':
			take(i)
		}
	}
	if start < len(value) {
		take(len(value))
	}
	return lower, data
}

// unescape removes one level of backslashes, as overlayfs does.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Escape writes a directory as overlay's lowerdir, upperdir and workdir
// options need it: a backslash before what would separate.
func Escape(dir string) string {
	return strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace(dir)
}
