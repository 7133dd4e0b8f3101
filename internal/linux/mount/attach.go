package mount

import (
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ability says which mount calls the kernel has, each including those before.
type ability int

const (
	byMount2 ability = iota // mount(2) only
	byString                // an overlay's layers one by one, as strings (Linux 6.8)
	byFD                    // an overlay's layers one by one, as descriptors (Linux 6.13)
)

// maxString is the longest value that fsconfig(2) takes, in bytes.
const maxString = 255

// kernel asks the running kernel once.
var kernel = sync.OnceValue(func() ability {
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return byMount2
	}
	defer unix.Close(fs)
	dir, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return byMount2
	}
	defer unix.Close(dir)
	if unix.FsconfigSetFd(fs, "lowerdir+", dir) == nil {
		return byFD
	}
	if unix.FsconfigSetString(fs, "lowerdir+", "/") == nil {
		return byString
	}
	return byMount2
})

// attach mounts p on the open mount point at.
func (p parsed) attach(at int, k ability) error {
	var err error
	switch {
	case p.flags&unix.MS_BIND != 0:
		err = p.bind(at, k)
	case p.fstype == "overlay":
		err = p.overlay(at, k)
	default:
		err = p.mount2(at, "", p.data)
	}
	if err != nil || p.propagation == 0 {
		return err
	}
	// A mount made in a shared place is shared; only now can it be changed.
	top, err := reopen(at)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	return unix.Mount("", procPath(top), "", p.propagation, "")
}

// reopen opens what is mounted on the mount point at.
func reopen(at int) (int, error) {
	path, err := pathOf(at)
	if err != nil {
		return -1, err
	}
	return unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
}

// bind shows the tree at p.source. The clone gets its flags before anyone can
// see it, so that a read-only bind is never writable for a moment.
func (p parsed) bind(at int, k ability) error {
	if len(p.data) > 0 {
		return fmt.Errorf("mount option %q on a bind: %w", p.data[0], errdefs.ErrInvalidArgument)
	}
	if k == byMount2 {
		return p.bind2(at)
	}
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if p.flags&unix.MS_REC != 0 {
		flags |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, p.source, flags)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	if attr := p.attributes(); attr != (unix.MountAttr{}) {
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("mount_setattr: %w", err)
		}
	}
	return move(tree, at)
}

// attributes are the flags that belong to the mount, not to the file system.
// What is not named stays as it was: a bind keeps its source's nodev.
func (p parsed) attributes() unix.MountAttr {
	var a unix.MountAttr
	for ms, attr := range map[uintptr]uint64{
		unix.MS_RDONLY:     unix.MOUNT_ATTR_RDONLY,
		unix.MS_NOSUID:     unix.MOUNT_ATTR_NOSUID,
		unix.MS_NODEV:      unix.MOUNT_ATTR_NODEV,
		unix.MS_NOEXEC:     unix.MOUNT_ATTR_NOEXEC,
		unix.MS_NODIRATIME: unix.MOUNT_ATTR_NODIRATIME,
	} {
		if p.flags&ms != 0 {
			a.Attr_set |= attr
		}
	}
	switch { // one field of several values: all its bits are cleared first
	case p.flags&unix.MS_STRICTATIME != 0:
		a.Attr_clr, a.Attr_set = unix.MOUNT_ATTR__ATIME, a.Attr_set|unix.MOUNT_ATTR_STRICTATIME
	case p.flags&unix.MS_NOATIME != 0:
		a.Attr_clr, a.Attr_set = unix.MOUNT_ATTR__ATIME, a.Attr_set|unix.MOUNT_ATTR_NOATIME
	case p.flags&unix.MS_RELATIME != 0:
		a.Attr_clr = unix.MOUNT_ATTR__ATIME
	}
	return a
}

// overlay mounts an overlay of any number of layers. All in one option string
// is the simple way, and fails for images of some fifty layers, because
// mount(2) reads one page of options. So the layers are given one by one
// where the kernel takes them so, by descriptor if it can: fsconfig(2) takes
// strings of 255 bytes at most.
func (p parsed) overlay(at int, k ability) error {
	l, err := overlayLayers(p.data)
	if err != nil {
		return err
	}
	if k == byMount2 || !l.fit(k) {
		return p.overlay2(at, l)
	}
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fs)
	if err := p.configure(fs, l, k); err != nil {
		return withLog(fs, err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return withLog(fs, fmt.Errorf("create overlay: %w", err))
	}
	mnt, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(p.attributes().Attr_set))
	if err != nil {
		return withLog(fs, fmt.Errorf("fsmount overlay: %w", err))
	}
	defer unix.Close(mnt)
	return move(mnt, at)
}

// fit says whether every value is short enough for fsconfig(2).
func (l layers) fit(k ability) bool {
	for _, o := range l.rest {
		if len(o) > maxString {
			return false
		}
	}
	if k == byFD {
		return true
	}
	for _, dirs := range [][]string{l.lower, l.data, {l.upperRaw, l.workRaw}} {
		for _, dir := range dirs {
			if len(dir) > maxString {
				return false
			}
		}
	}
	return true
}

func (p parsed) configure(fs int, l layers, k ability) error {
	if err := unix.FsconfigSetString(fs, "source", p.source); err != nil {
		return fmt.Errorf("source=%s: %w", p.source, err)
	}
	if p.flags&unix.MS_RDONLY != 0 {
		if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
			return fmt.Errorf("ro: %w", err)
		}
	}
	for _, o := range l.rest {
		if err := setOption(fs, o); err != nil {
			return err
		}
	}
	set := setDirectory
	if k == byString {
		set = unix.FsconfigSetString
		l.upper, l.work = l.upperRaw, l.workRaw // which the kernel unescapes
	}
	dirs := [][2]string{}
	for _, dir := range l.lower {
		dirs = append(dirs, [2]string{"lowerdir+", dir})
	}
	for _, dir := range l.data {
		dirs = append(dirs, [2]string{"datadir+", dir})
	}
	if l.upper != "" {
		dirs = append(dirs, [2]string{"upperdir", l.upper})
	}
	if l.work != "" {
		dirs = append(dirs, [2]string{"workdir", l.work})
	}
	for _, d := range dirs {
		if err := set(fs, d[0], d[1]); err != nil {
			return fmt.Errorf("%s=%s: %w", d[0], d[1], err)
		}
	}
	return nil
}

func setOption(fs int, o string) error {
	key, value, ok := strings.Cut(o, "=")
	var err error
	if ok {
		err = unix.FsconfigSetString(fs, key, strings.Trim(value, `"`))
	} else {
		err = unix.FsconfigSetFlag(fs, key)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", o, err)
	}
	return nil
}

func setDirectory(fs int, key, dir string) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.FsconfigSetFd(fs, key, fd)
}

func move(mnt, at int) error {
	const flags = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
	if err := unix.MoveMount(mnt, "", at, "", flags); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// maxLog bounds how many messages of the kernel go into one error.
const maxLog = 8

// withLog adds what the kernel says in a file system context about a failure,
// each message a line such as "e overlay: Unknown parameter 'x'".
func withLog(fs int, err error) error {
	var said []string
	buf := make([]byte, 1024)
	for range maxLog {
		n, e := unix.Read(fs, buf)
		if e != nil || n <= 0 {
			break
		}
		line := strings.TrimSpace(string(buf[:n]))
		if _, after, ok := strings.Cut(line, " "); ok {
			line = after
		}
		said = append(said, line)
	}
	if len(said) == 0 {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.Join(said, "; "))
}
