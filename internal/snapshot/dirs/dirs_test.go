package dirs

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/index"
)

// plain is the simplest layout: a directory with one file in it. Keys that
// begin with "bad" fail, after they have written something.
var plain = Layout{
	Holds: func(snapshot.Kind, string) bool { return true },
	Make: func(_ context.Context, dir string, n snapshot.New, _ []string) error {
		if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
			return err
		}
		if strings.HasPrefix(n.Key, "bad") {
			return errors.New("no room")
		}
		return nil
	},
	Sync: func(string) error { return nil },
	Finish: func(context.Context, string, snapshot.Commit, []string, bool) (snapshot.Usage, error) {
		return snapshot.Usage{}, nil
	},
}

func open(t *testing.T, root string, l Layout) *Store {
	t.Helper()
	s, err := Open(root, l, index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if len(s.making) > 0 {
			t.Errorf("still said to be in the making: %v", s.making)
		}
	})
	return s
}

func (s *Store) names(t *testing.T) []string {
	t.Helper()
	names, err := readNames(s.snapshots)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func active(key string) snapshot.New { return snapshot.New{Key: key, Kind: snapshot.KindActive} }

func TestFailedCreateLeavesNothing(t *testing.T) {
	s := open(t, t.TempDir(), plain)
	if err := s.Create(t.Context(), active("good"), active("bad"), active("other")); err == nil || !strings.Contains(err.Error(), "bad: no room") {
		t.Errorf("error %v; want one that names the snapshot", err)
	}
	// The same key twice passes every check but that of the transaction.
	if err := s.Create(t.Context(), active("twin"), active("twin")); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("error %v; want already exists", err)
	}
	if names := s.names(t); len(names) != 0 {
		t.Errorf("left: %q", names)
	}
	if err := s.Create(t.Context(), active("twin")); err != nil {
		t.Error(err)
	}
	if r, err := s.Get("twin"); err != nil || r.ID != 3 {
		t.Errorf("%+v, %v; want id 3, after two that were reserved in vain", r, err)
	}
}

func TestFailedCommitCommitsNothing(t *testing.T) {
	l := plain
	l.Finish = func(_ context.Context, _ string, c snapshot.Commit, _ []string, _ bool) (snapshot.Usage, error) {
		if c.Key == "b" {
			return snapshot.Usage{}, errdefs.ErrDataLoss
		}
		return snapshot.Usage{}, nil
	}
	s := open(t, t.TempDir(), l)
	if err := s.Create(t.Context(), active("a"), active("b")); err != nil {
		t.Fatal(err)
	}
	err := s.CommitChain(t.Context(), snapshot.Commit{Key: "a", Name: "1"}, snapshot.Commit{Key: "b", Name: "2"})
	if !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("error %v; want that of Finish", err)
	}
	if r, err := s.Get("a"); err != nil || r.Kind != snapshot.KindActive {
		t.Errorf("a is %v, %v; want it active", r.Kind, err)
	}
}

func TestOpenClosesOldDirectories(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(root+"/snapshots", 0o711); err != nil {
		t.Fatal(err)
	}
	open(t, root, plain)
	if fi, err := os.Stat(root + "/snapshots"); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v; want 0700", fi.Mode(), err)
	}
	if _, err := os.Stat(root + "/metadata.db"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open made the index: %v", err)
	}
}

// What is being made is spared, also under its final name.
func TestCleanupSparesWhatIsBeingMade(t *testing.T) {
	l := plain
	var s *Store
	cleaned := 0
	clean := func() {
		if err := s.Cleanup(t.Context()); err != nil {
			t.Error(err)
		}
		cleaned++
	}
	l.Make = func(ctx context.Context, dir string, n snapshot.New, parents []string) error {
		err := plain.Make(ctx, dir, n, parents)
		clean()
		return err
	}
	l.Sync = func(string) error { clean(); return nil }
	s = open(t, t.TempDir(), l)
	if err := s.Create(t.Context(), active("a"), active("b")); err != nil {
		t.Fatal(err)
	}
	clean()
	if names := s.names(t); !slices.Equal(names, []string{"1", "2"}) || cleaned != 5 {
		t.Errorf("%q left after %d cleanups; want 1 and 2 after 5", names, cleaned)
	}
}

func TestCleanupStopsWithItsContext(t *testing.T) {
	s := open(t, t.TempDir(), plain)
	if err := os.Mkdir(s.snapshots+"/new-left", 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Cleanup(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v; want canceled", err)
	}
	if names := s.names(t); len(names) != 1 {
		t.Errorf("%q left; want the remnant", names)
	}
}
