// Package inroot resolves names inside a directory as a chroot would, and works on them by descriptor.
//
// A name is slash-separated and relative to the root. Links on the way to its
// last component are followed as after a chroot: absolute ones and those with
// `..` start again at the root, and none is refused. The last component is
// never followed. The simple way, joining strings and checking each part with
// lstat, loses against anyone who swaps a directory for a link between check
// and use. So the kernel resolves (openat2 with RESOLVE_IN_ROOT, Linux 5.6),
// and everything else is an *at call on the descriptor of the parent (inv 9).
//
// Nothing here depends on the umask, which belongs to the whole process: modes
// are set explicitly.
package inroot

import (
	"container/list"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxName is the longest name taken, in bytes: the kernel's PATH_MAX less
	// its final zero.
	maxName = 4095
	// maxCached bounds the open parent descriptors of one Root, unless Keep
	// says otherwise.
	maxCached = 128
	// maxLinks bounds the dangling links that MkdirAll follows for one name,
	// as the kernel bounds links.
	maxLinks = 40
	// maxRaces bounds how often a lookup is tried again because a rename or
	// mount elsewhere made its result uncertain (EAGAIN).
	maxRaces = 1000
)

// Root is an open directory that names are resolved in. It keeps the
// descriptors of recently used parents. It is not for use by
// several goroutines at once.
type Root struct {
	top    *parent
	cached map[string]*list.Element // of *parent
	recent *list.List               // front: used last
	most   int                      // how many to keep
}

// parent is a directory kept open.
type parent struct {
	fd   int
	name string // as asked for
	real string // without links
}

// Open opens dir, which must be a directory (it may be reached through links:
// dir is ours, only the names inside are not).
func Open(dir string) (*Root, error) {
	fd, err := retry(func() (int, error) {
		return unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, fmt.Errorf("open root %s: %w", dir, err)
	}
	return &Root{
		top:    &parent{fd: fd, name: ".", real: "."},
		cached: make(map[string]*list.Element),
		recent: list.New(),
		most:   maxCached,
	}, nil
}

// Keep sets how many descriptors of parents are kept, at least 2; 128 unless it
// is called. Who has many roots open keeps fewer.
func (r *Root) Keep(n int) { r.most = max(n, 2) }

// Close closes the root and the descriptors it keeps.
func (r *Root) Close() error {
	r.forget()
	return unix.Close(r.top.fd)
}

// Clean gives the name its one spelling: relative, without `.`, `..`, doubled
// or trailing slashes; the root itself is ".". Like a chroot it takes `/x` and
// `../x` for `x`. It refuses what the kernel would: zero bytes, and more than
// 4095 bytes.
func Clean(name string) (string, error) {
	if isClean(name) {
		return name, nil
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("name contains a zero byte")
	}
	if name = path.Clean("/" + name)[1:]; name == "" {
		return ".", nil
	}
	if len(name) > maxName {
		return "", fmt.Errorf("name of %d bytes: %w", len(name), unix.ENAMETOOLONG)
	}
	return name, nil
}

// isClean reports whether Clean would change nothing; most names are clean,
// and that costs no memory.
func isClean(name string) bool {
	if len(name) > maxName {
		return false
	}
	start := 0 // of the component
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '/' {
			if name[i] == 0 {
				return false
			}
			continue
		}
		if part := name[start:i]; part == "" || part == "." || part == ".." {
			return name == "."
		}
		start = i + 1
	}
	return true
}

// Split divides a clean name at its last slash: the name of its directory, "."
// for the root, and the last component.
func Split(name string) (dir, base string) {
	i := strings.LastIndexByte(name, '/')
	if i < 0 {
		return ".", name
	}
	return name[:i], name[i+1:]
}

// Real says what a directory is called without the links on the way. The
// answer can be outdated at once when others rename in the root.
func (r *Root) Real(dir string) (string, error) {
	p, err := r.dir(dir)
	if err != nil {
		return "", named("resolve", dir, err)
	}
	return p.real, nil
}

// split returns the open parent of name and its last component. The
// descriptor stays open until the next but one call of split.
func (r *Root) split(name string) (*parent, string, error) {
	name, err := Clean(name)
	if err != nil {
		return nil, "", err
	}
	if name == "." {
		return nil, "", unix.EEXIST
	}
	dir, base := Split(name)
	p, err := r.dir(dir)
	return p, base, err
}

// dir returns the open directory of that name, from the cache if it can.
func (r *Root) dir(name string) (*parent, error) {
	name, err := Clean(name)
	if err != nil {
		return nil, err
	}
	if name == "." {
		return r.top, nil
	}
	if e, ok := r.cached[name]; ok {
		r.recent.MoveToFront(e)
		return e.Value.(*parent), nil
	}
	p, err := r.open(name)
	if err != nil {
		return nil, err
	}
	r.keep(p)
	return p, nil
}

// open resolves name, at first on the assumption that no link is in it: then
// the real name is known, and the walk can begin at a cached parent.
func (r *Root) open(name string) (*parent, error) {
	from, rest := r.top, name
	dir, base := Split(name)
	if e, ok := r.cached[dir]; ok {
		from, rest = e.Value.(*parent), base
	}
	fd, err := resolve(from.fd, rest, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
	if err == nil {
		return &parent{fd: fd, name: name, real: path.Join(from.real, rest)}, nil
	}
	if err != unix.ELOOP {
		return nil, err
	}
	if fd, err = resolve(r.top.fd, name, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		return nil, err
	}
	real, err := r.realName(fd)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &parent{fd: fd, name: name, real: real}, nil
}

// realName asks the kernel what an open directory below the root is called.
func (r *Root) realName(fd int) (string, error) {
	top, err := readlinkat(unix.AT_FDCWD, procPath(r.top.fd))
	if err != nil {
		return "", err
	}
	full, err := readlinkat(unix.AT_FDCWD, procPath(fd))
	if err != nil {
		return "", err
	}
	if full == top {
		return ".", nil
	}
	real, ok := strings.CutPrefix(full, strings.TrimSuffix(top, "/")+"/")
	if !ok {
		return "", unix.ENOENT // moved out of the root, or removed, meanwhile
	}
	return real, nil
}

func (r *Root) keep(p *parent) {
	if e, ok := r.cached[p.name]; ok { // others removed that one
		unix.Close(r.recent.Remove(e).(*parent).fd)
	}
	r.cached[p.name] = r.recent.PushFront(p)
	if r.recent.Len() > r.most {
		oldest := r.recent.Remove(r.recent.Back()).(*parent)
		delete(r.cached, oldest.name)
		unix.Close(oldest.fd)
	}
}

// forget drops the cache. It must follow every removal or rename of a
// directory or link, since any cached name may have led through it.
func (r *Root) forget() {
	for e := r.recent.Front(); e != nil; e = e.Next() {
		unix.Close(e.Value.(*parent).fd)
	}
	r.recent.Init()
	clear(r.cached)
}

// resolve is openat2 as in a chroot at fd.
func resolve(fd int, name string, flags int, more uint64) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | more,
	}
	for range maxRaces {
		got, err := unix.Openat2(fd, name, &how)
		if err != unix.EAGAIN && err != unix.EINTR {
			return got, err
		}
	}
	return -1, unix.EAGAIN
}

func retry[T any](call func() (T, error)) (T, error) {
	for {
		if v, err := call(); err != unix.EINTR {
			return v, err
		}
	}
}

func readlinkat(fd int, name string) (string, error) {
	buf := make([]byte, maxName+1)
	n, err := unix.Readlinkat(fd, name, buf)
	if err != nil {
		return "", err
	}
	if n == len(buf) {
		return "", unix.ENAMETOOLONG
	}
	return string(buf[:n]), nil
}

func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func named(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %q: %w", op, shorten(name), err)
}

// shorten keeps a hostile name from filling a log.
func shorten(name string) string {
	const most = 200
	if len(name) <= most {
		return name
	}
	return name[:most] + "..."
}
