package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

const (
	opaqueTrusted = "trusted.overlay.opaque"
	opaqueUser    = "user.overlay.opaque" // on an overlay mounted with userxattr

	// stackLinks bounds the symbolic links followed for one name, as the
	// kernel does.
	stackLinks = 40
	// stackMemo bounds the directories that a stack remembers.
	stackMemo = 4096
	// stackKeep is how many descriptors each layer of a stack keeps.
	stackKeep = 8
)

// stack looks names up in overlay layers that are not mounted, nearest first,
// as the kernel would in the mounted overlay: the first layer that has a name
// decides, directories merge, and a whiteout or an opaque directory ends the
// search.
type stack struct {
	layers []*inroot.Root
	memo   map[string]found // directories only
}

// found is what a name is in the merged tree.
type found struct {
	path  string // without links
	layer int    // the first that has it
	st    unix.Stat_t
	dirs  []int // for a directory, the layers that make it up
	shut  bool  // nothing of further layers shows in this directory
}

// missing says that a name is not in the merged tree.
type missing struct {
	path, rest string // how far the name exists, without links, and what doesn't
	hidden     bool   // it is deleted, so that further layers couldn't have it either
}

func (m *missing) Error() string {
	if m.hidden {
		return fmt.Sprintf("%q is deleted or hidden", brief(path.Join(m.path, m.rest)))
	}
	return fmt.Sprintf("%q does not exist", brief(path.Join(m.path, m.rest)))
}

// Is makes it an fs.ErrNotExist.
func (m *missing) Is(target error) bool { return target == fs.ErrNotExist }

func newStack(layers ...*inroot.Root) *stack {
	return &stack{layers: layers, memo: make(map[string]found)}
}

// changed forgets what was found; it must follow every change to a layer.
func (s *stack) changed() { clear(s.memo) }

// lookup finds name, following links on the way, and the last one too if
// follow says so. The error is a *missing if nothing is there.
func (s *stack) lookup(name string, follow bool) (found, error) {
	at, err := s.top()
	if err != nil {
		return found{}, err
	}
	above := []found{at} // from the root to where we are
	todo, links := strings.Split(name, "/"), 0
	for len(todo) > 0 {
		c := todo[0]
		todo = todo[1:]
		if c == "" || c == "." {
			continue
		}
		if !isDir(at.st) {
			return found{}, &missing{path: at.path, rest: path.Join(c, path.Join(todo...)), hidden: true}
		}
		if c == ".." {
			above = above[:max(len(above)-1, 1)]
			at = above[len(above)-1]
			continue
		}
		next, err := s.child(at, c)
		if m, ok := errors.AsType[*missing](err); ok {
			m.rest = path.Join(m.rest, path.Join(todo...))
		}
		if err != nil {
			return found{}, err
		}
		if next.st.Mode&unix.S_IFMT != unix.S_IFLNK || len(todo) == 0 && !follow {
			at = next
			above = append(above, at)
			continue
		}
		if links++; links > stackLinks {
			return found{}, fmt.Errorf("look up %q: %w", brief(name), unix.ELOOP)
		}
		target, err := s.layers[next.layer].Readlink(next.path)
		if err != nil {
			return found{}, err
		}
		if len(target)+len(todo) > 2*4096 {
			return found{}, fmt.Errorf("look up %q: %w", brief(name), unix.ENAMETOOLONG)
		}
		if path.IsAbs(target) {
			above = above[:1]
			at = above[0]
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return at, nil
}

// top is the merged root.
func (s *stack) top() (found, error) {
	if f, ok := s.memo["."]; ok {
		return f, nil
	}
	f := found{path: ".", st: unix.Stat_t{Mode: unix.S_IFDIR}}
	for i := range s.layers {
		f.dirs = append(f.dirs, i)
		opaque, err := s.isOpaque(i, ".")
		if err != nil {
			return found{}, err
		}
		if opaque {
			f.shut = true
			break
		}
	}
	s.memo["."] = f
	return f, nil
}

// child finds one component in a merged directory.
func (s *stack) child(at found, c string) (found, error) {
	f := found{path: path.Join(at.path, c), shut: at.shut}
	if m, ok := s.memo[f.path]; ok {
		return m, nil
	}
	for _, i := range at.dirs {
		st, err := s.layers[i].Lstat(f.path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return found{}, err
		}
		if first := len(f.dirs) == 0; first && isWhiteout(st) {
			return found{}, &missing{path: at.path, rest: c, hidden: true}
		} else if first {
			f.layer, f.st = i, st
			if !isDir(st) {
				return f, nil
			}
		}
		opaque := false
		if isDir(st) {
			f.dirs = append(f.dirs, i)
			if opaque, err = s.isOpaque(i, f.path); err != nil {
				return found{}, err
			}
		}
		if opaque || !isDir(st) {
			f.shut = true
			break
		}
	}
	if len(f.dirs) == 0 {
		return found{}, &missing{path: at.path, rest: c, hidden: at.shut}
	}
	if len(s.memo) >= stackMemo {
		clear(s.memo)
	}
	s.memo[f.path] = f
	return f, nil
}

// isOpaque reports whether a directory of one layer hides those below it.
func (s *stack) isOpaque(i int, name string) (bool, error) {
	n, err := s.layers[i].Node(name)
	if err != nil {
		return false, err
	}
	defer n.Close()
	key, err := opaqueKey(n)
	return key != "", err
}

// opaqueKey returns the attribute that makes a directory opaque, or "".
func opaqueKey(n *inroot.Node) (string, error) {
	for _, key := range []string{opaqueTrusted, opaqueUser} {
		value, err := n.Getxattr(key)
		switch {
		case err == nil && string(value) == "y":
			return key, nil
		case err == nil, errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.EPERM):
		default:
			return "", err
		}
	}
	return "", nil
}
