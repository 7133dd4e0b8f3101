package snapshottest

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

func lifecycle(h *harness) {
	h.prepare("work", "")
	h.mounted("work", func(dir string) { h.write(dir+"/hello", "world") })
	h.mounted("work", func(dir string) { h.wantFiles(dir, "hello") }) // it stays between mounts
	h.commit("base", "work")
	if _, err := h.d.Stat(h.Context(), "work"); !errors.Is(err, errdefs.ErrNotFound) {
		h.Errorf("the key outlives its commit: %v", err)
	}
	info, err := h.d.Stat(h.Context(), "base")
	h.must(err)
	if info.Kind != snapshot.KindCommitted || info.Key != "base" || info.Parent != "" || info.Created.IsZero() {
		h.Errorf("committed: %+v", info)
	}
	h.view("look", "base")
	h.view("empty", "")
	h.mounted("empty", func(dir string) { h.wantFiles(dir) })
	h.mounted("look", func(dir string) {
		h.wantFiles(dir, "hello")
		for what, err := range map[string]error{
			"create": os.WriteFile(dir+"/new", nil, 0o644),
			"remove": os.Remove(dir + "/hello"),
			"chmod":  os.Chmod(dir+"/hello", 0o600),
		} {
			if !errors.Is(err, syscall.EROFS) {
				h.Errorf("%s in a view: %v; want read-only", what, err)
			}
		}
	})
	h.prepare("next", "base")
	h.mounted("next", func(dir string) {
		h.wantFiles(dir, "hello")
		h.must(os.Remove(dir + "/hello"))
		h.write(dir+"/bye", "world")
	})
	h.mounted("look", func(dir string) { h.wantFiles(dir, "hello") })
	for _, key := range []string{"next", "look", "empty", "base"} {
		h.must(h.d.Remove(h.Context(), key))
	}
}

func refusals(h *harness) {
	ctx := h.Context()
	h.layer("base", "")
	h.layer("other", "")
	h.prepare("active", "base")
	h.view("view", "base")
	create := func(n snapshot.New) error { return h.d.Create(ctx, n) }
	commit := func(c snapshot.Commit) error { return h.d.CommitChain(ctx, c) }
	mounts := func(key string) error { _, err := h.d.Mounts(ctx, key); return err }
	dir := func(key string) error { _, err := h.d.Dir(ctx, key); return err }
	use := func(key string) error { _, err := h.d.Usage(ctx, key); return err }
	parents := func(key string) error { _, err := h.d.Parents(ctx, key); return err }
	update := func(key string, fields ...string) error { _, err := h.d.Update(ctx, key, nil, fields...); return err }
	active, view := snapshot.KindActive, snapshot.KindView
	for name, c := range map[string]struct{ err, want error }{
		"create existing key":     {create(snapshot.New{Key: "active", Kind: active}), errdefs.ErrAlreadyExists},
		"create existing name":    {create(snapshot.New{Key: "base", Kind: view}), errdefs.ErrAlreadyExists},
		"create without key":      {create(snapshot.New{Kind: active}), errdefs.ErrInvalidArgument},
		"create committed":        {create(snapshot.New{Key: "n", Kind: snapshot.KindCommitted}), errdefs.ErrInvalidArgument},
		"create on missing":       {create(snapshot.New{Key: "n", Parent: "missing", Kind: active}), errdefs.ErrNotFound},
		"create on active":        {create(snapshot.New{Key: "n", Parent: "active", Kind: active}), errdefs.ErrInvalidArgument},
		"create on view":          {create(snapshot.New{Key: "n", Parent: "view", Kind: view}), errdefs.ErrInvalidArgument},
		"commit missing":          {commit(snapshot.Commit{Key: "missing", Name: "n"}), errdefs.ErrNotFound},
		"commit view":             {commit(snapshot.Commit{Key: "view", Name: "n"}), errdefs.ErrFailedPrecondition},
		"commit to existing":      {commit(snapshot.Commit{Key: "active", Name: "other"}), errdefs.ErrAlreadyExists},
		"commit without name":     {commit(snapshot.Commit{Key: "active"}), errdefs.ErrInvalidArgument},
		"commit to another base":  {commit(snapshot.Commit{Key: "active", Name: "n", Parent: "other"}), errdefs.ErrInvalidArgument},
		"mount missing":           {mounts("missing"), errdefs.ErrNotFound},
		"mount committed":         {mounts("base"), errdefs.ErrFailedPrecondition},
		"directory of missing":    {dir("missing"), errdefs.ErrNotFound},
		"directory of view":       {dir("view"), errdefs.ErrFailedPrecondition},
		"usage of missing":        {use("missing"), errdefs.ErrNotFound},
		"parents of missing":      {parents("missing"), errdefs.ErrNotFound},
		"update missing":          {update("missing"), errdefs.ErrNotFound},
		"update of another field": {update("active", "parent"), errdefs.ErrInvalidArgument},
		"remove missing":          {h.d.Remove(ctx, "missing"), errdefs.ErrNotFound},
		"remove parent":           {h.d.Remove(ctx, "base"), errdefs.ErrFailedPrecondition},
		"create one good, one bad": {h.d.Create(ctx, snapshot.New{Key: "good", Kind: active},
			snapshot.New{Key: "bad", Parent: "missing", Kind: active}), errdefs.ErrNotFound},
		"create one key twice": {h.d.Create(ctx, snapshot.New{Key: "twice", Kind: active},
			snapshot.New{Key: "twice", Kind: active}), errdefs.ErrAlreadyExists},
	} {
		if !errors.Is(c.err, c.want) {
			h.Errorf("%s: %v; want %v", name, c.err, c.want)
		}
	}
	if got, want := h.keys(), []string{"active", "base", "other", "view"}; !slices.Equal(got, want) {
		h.Errorf("keys %q; want %q", got, want)
	}
}

func (h *harness) keys() (out []string) {
	h.Helper()
	for info, err := range h.d.Walk(h.Context()) {
		h.must(err)
		out = append(out, info.Key)
	}
	return out
}

func labels(h *harness) {
	ctx := h.Context()
	h.must(h.d.Create(ctx, snapshot.New{Key: "k", Kind: snapshot.KindActive, Labels: map[string]string{"a": "1", "b": "2"}}))
	info, err := h.d.Update(ctx, "k", map[string]string{"a": "3", "c": "4"}, "labels.a", "labels.b")
	h.must(err)
	if want := map[string]string{"a": "3"}; !maps.Equal(info.Labels, want) {
		h.Errorf("labels %v; want %v", info.Labels, want)
	}
	again, err := h.d.Stat(ctx, "k")
	h.must(err)
	if !maps.Equal(again.Labels, info.Labels) || !again.Updated.After(again.Created) {
		h.Errorf("stat says %+v", again)
	}
	h.must(h.d.CommitChain(ctx, snapshot.Commit{Key: "k", Name: "n", Labels: map[string]string{"d": "5"}}))
	committed, err := h.d.Stat(ctx, "n")
	h.must(err)
	if want := map[string]string{"d": "5"}; !maps.Equal(committed.Labels, want) {
		h.Errorf("labels after commit %v; want %v, nothing inherited", committed.Labels, want)
	}
}

func walk(h *harness) {
	var want []string
	var news []snapshot.New
	for i := range 250 { // several batches
		key := fmt.Sprintf("key-%03d", i)
		news = append(news, snapshot.New{Key: key, Kind: snapshot.KindView})
		want = append(want, key)
	}
	slices.Reverse(news)
	h.must(h.d.Create(h.Context(), news...))
	if got := h.keys(); !slices.Equal(got, want) {
		h.Errorf("walk yields %q", got)
	}
	for info, err := range h.d.Walk(h.Context()) {
		h.must(err)
		if info.Key == "key-007" {
			h.must(h.d.Remove(h.Context(), "key-008")) // a walk stands in nobody's way
		}
		if info.Key == "key-150" {
			break
		}
	}
}

func usage(h *harness) {
	ctx := h.Context()
	h.prepare("counted", "")
	h.prepare("walked", "")
	dir, err := h.d.Dir(ctx, "walked")
	h.must(err)
	h.write(dir+"/a/file", strings.Repeat("x", 100_000))
	h.must(os.Link(dir+"/a/file", dir+"/a/again"))
	before, err := h.d.Usage(ctx, "walked")
	h.must(err)
	if before.Inodes != 3 || before.Size < 100_000 || before.Size > 200_000 {
		h.Errorf("usage of two directories and one file of two names: %+v", before)
	}
	h.must(h.d.CommitChain(ctx,
		snapshot.Commit{Key: "counted", Name: "by the caller", Usage: &snapshot.Usage{Inodes: 77, Size: 1 << 33}},
		snapshot.Commit{Key: "walked", Name: "by the driver"}))
	for name, want := range map[string]snapshot.Usage{"by the caller": {Inodes: 77, Size: 1 << 33}, "by the driver": before} {
		if got, err := h.d.Usage(ctx, name); err != nil || got != want {
			h.Errorf("usage counted %s: %+v, %v; want %+v", name, got, err, want)
		}
	}
}

func directories(h *harness) {
	ctx := h.Context()
	h.layer("base", "")
	h.layer("middle", "base")
	h.prepare("top", "middle")
	dir, err := h.d.Dir(ctx, "top")
	h.must(err)
	h.write(dir+"/direct", "written past the mount")
	h.mounted("top", func(m string) { h.wantFiles(m, "base", "middle", "direct") })
	parents, err := h.d.Parents(ctx, "top")
	h.must(err)
	if h.d.Traits().Form == snapshot.FormPlain {
		if len(parents) != 0 {
			h.Errorf("parents of a whole tree: %q", parents)
		}
		h.wantFiles(dir, "base", "middle", "direct")
		return
	}
	h.wantFiles(dir, "direct")
	if len(parents) != 2 {
		h.Fatalf("parents %q; want two", parents)
	}
	h.wantFiles(parents[0], "middle")
	h.wantFiles(parents[1], "base")
}

// changes is what a container does to the layers below it.
func changes(h *harness) {
	h.prepare("work", "")
	h.mounted("work", func(dir string) {
		h.write(dir+"/etc/passwd", "root")
		h.write(dir+"/opt/gone/a", "a")
		h.write(dir+"/opt/replaced/old", "old")
		h.write(dir+"/moved", "here")
	})
	h.commit("base", "work")
	h.prepare("work", "base")
	h.mounted("work", func(dir string) {
		h.write(dir+"/etc/passwd", "root and user")
		h.must(os.RemoveAll(dir + "/opt/gone"))
		h.must(os.RemoveAll(dir + "/opt/replaced"))
		h.write(dir+"/opt/replaced/new", "new")
		h.must(os.Rename(dir+"/moved", dir+"/there"))
	})
	h.commit("top", "work")
	h.view("old", "base")
	h.view("new", "top")
	h.mounted("old", func(dir string) {
		h.wantFiles(dir, "etc/passwd", "opt/gone/a", "opt/replaced/old", "moved")
		if text, _ := os.ReadFile(dir + "/etc/passwd"); string(text) != "root" {
			h.Errorf("a committed file changed to %q", text)
		}
	})
	h.mounted("new", func(dir string) { h.wantFiles(dir, "etc/passwd", "opt/replaced/new", "there") })
}

func rootOwner(h *harness) {
	h.prepare("work", "")
	h.mounted("work", func(dir string) {
		if st := h.stat(dir); st.Mode&0o7777 != 0o755 {
			h.Errorf("a new root has mode %o; want 755", st.Mode&0o7777)
		}
		h.must(os.Chown(dir, 1001, 1002))
	})
	h.commit("base", "work")
	h.prepare("above", "base")
	h.mounted("above", func(dir string) {
		if st := h.stat(dir); st.Uid != 1001 || st.Gid != 1002 {
			h.Errorf("the root above is owned by %d:%d", st.Uid, st.Gid)
		}
	})
	if st := h.stat(h.root + "/snapshots"); st.Mode&0o7777 != 0o700 {
		h.Errorf("snapshots has mode %o; want 700", st.Mode&0o7777)
	}
}

func deepChain(h *harness) {
	const depth = 110
	var want []string
	parent := ""
	for i := range depth {
		name := fmt.Sprintf("layer-%03d", i)
		h.prepare("work", parent)
		dir, err := h.d.Dir(h.Context(), "work")
		h.must(err)
		h.write(dir+"/"+name, name)
		h.commit(name, "work")
		want = append(want, name)
		parent = name
	}
	h.prepare("top", parent)
	h.view("look", parent)
	h.mounted("top", func(dir string) {
		h.wantFiles(dir, want...)
		h.write(dir+"/new", "")
	})
	h.mounted("look", func(dir string) { h.wantFiles(dir, want...) })
}

// concurrent creates, commits and removes from several sides, while Cleanup
// runs over and over: what is being made is not garbage.
func concurrent(h *harness) {
	h.layer("base", "")
	ctx := h.Context()
	var workers, cleaner sync.WaitGroup
	stop := make(chan struct{})
	cleaner.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := h.d.Cleanup(ctx); err != nil {
				h.Errorf("cleanup: %v", err)
			}
		}
	})
	var won sync.Map
	for w := range 6 {
		workers.Go(func() {
			for i := range 4 {
				key := fmt.Sprint(w, "-", i)
				err := h.d.Create(ctx, snapshot.New{Key: key, Parent: "base", Kind: snapshot.KindActive},
					snapshot.New{Key: "view " + key, Kind: snapshot.KindView})
				if err == nil {
					err = h.d.CommitChain(ctx, snapshot.Commit{Key: key, Name: "done " + key})
				}
				if err == nil {
					err = h.d.Remove(ctx, "view "+key)
				}
				if err != nil {
					h.Errorf("%s: %v", key, err)
				}
				shared := fmt.Sprint("shared ", i) // one of the six gets it
				err = h.d.Create(ctx, snapshot.New{Key: shared, Kind: snapshot.KindActive})
				if err == nil {
					if _, twice := won.LoadOrStore(shared, w); twice {
						h.Errorf("%s was created twice", shared)
					}
				} else if !errors.Is(err, errdefs.ErrAlreadyExists) {
					h.Errorf("%s: %v", shared, err)
				}
			}
		})
	}
	workers.Wait()
	close(stop)
	cleaner.Wait()
	if n := len(h.keys()); n != 1+6*4+4 {
		h.Errorf("%d snapshots; want %d", n, 1+6*4+4)
	}
}

func chainIsOneCommit(h *harness) {
	ctx := h.Context()
	var steps []snapshot.Commit
	for i := range 5 {
		key := fmt.Sprint("work-", i)
		h.prepare(key, "")
		steps = append(steps, snapshot.Commit{Key: key, Name: fmt.Sprint("done-", i)})
	}
	before := h.keys()
	bad := append(slices.Clone(steps), snapshot.Commit{Key: "missing", Name: "n"})
	if err := h.d.CommitChain(ctx, bad...); !errors.Is(err, errdefs.ErrNotFound) {
		h.Errorf("chain with a missing key: %v", err)
	}
	twice := append(slices.Clone(steps), snapshot.Commit{Key: "work-0", Name: "n"})
	if err := h.d.CommitChain(ctx, twice...); !errors.Is(err, errdefs.ErrInvalidArgument) {
		h.Errorf("chain with a key twice: %v", err)
	}
	if after := h.keys(); !slices.Equal(before, after) {
		h.Errorf("a failed chain left %q", after)
	}
	h.must(h.d.CommitChain(ctx, steps...))
	if got, want := h.keys(), []string{"done-0", "done-1", "done-2", "done-3", "done-4"}; !slices.Equal(got, want) {
		h.Errorf("keys %q; want %q", got, want)
	}
}

func rebase(h *harness) {
	ctx := h.Context()
	h.layer("base", "")
	h.prepare("b", "")
	h.prepare("c", "")
	for _, key := range []string{"b", "c"} {
		dir, err := h.d.Dir(ctx, key)
		h.must(err)
		h.write(dir+"/"+key, key)
	}
	err := h.d.CommitChain(ctx,
		snapshot.Commit{Key: "b", Name: "middle", Parent: "base"},
		snapshot.Commit{Key: "c", Name: "top", Parent: "middle"})
	if !h.d.Traits().Rebase {
		if !errors.Is(err, errdefs.ErrInvalidArgument) {
			h.Errorf("error %v; want invalid argument", err)
		}
		return
	}
	h.must(err)
	if info, err := h.d.Stat(ctx, "top"); err != nil || info.Parent != "middle" {
		h.Errorf("top is %+v, %v", info, err)
	}
	h.view("look", "top")
	h.mounted("look", func(dir string) { h.wantFiles(dir, "b", "base", "c") })
	if err := h.d.Remove(ctx, "base"); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		h.Errorf("remove of a parent given at commit: %v", err)
	}
	h.prepare("d", "")
	if err := h.d.CommitChain(ctx, snapshot.Commit{Key: "d", Name: "n", Parent: "look"}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		h.Errorf("rebase onto a view: %v", err)
	}
	if err := h.d.CommitChain(ctx, snapshot.Commit{Key: "d", Name: "n", Parent: "missing"}); !errors.Is(err, errdefs.ErrNotFound) {
		h.Errorf("rebase onto nothing: %v", err)
	}
}

// rebaseCompletes: what a layer could not know of its parents while it was
// written is right once they are there.
func rebaseCompletes(h *harness) {
	if !h.d.Traits().Rebase {
		h.Skip("the driver knows every parent in time")
	}
	ctx := h.Context()
	h.prepare("a", "")
	a, err := h.d.Dir(ctx, "a")
	h.must(err)
	h.write(a+"/etc/secret/key", "lower")
	h.must(os.Chmod(a+"/etc/secret", 0o710))
	h.must(os.Chown(a+"/etc/secret", 7, 8))
	h.must(os.Chown(a, 5, 6))
	h.prepare("b", "")
	b, err := h.d.Dir(ctx, "b")
	h.must(err)
	h.write(b+"/etc/secret/new", "upper") // etc and etc/secret are implied
	h.write(b+"/etc/hard", "")            // holds the link's place, as package layer does
	h.must(h.d.CommitChain(ctx,
		snapshot.Commit{Key: "a", Name: "base"},
		snapshot.Commit{Key: "b", Name: "top", Parent: "base",
			Usage:   &snapshot.Usage{Inodes: 4, Size: 16384},
			Implied: []string{"etc", "etc/secret"},
			Links:   []layer.Link{{Name: "etc/hard", Target: "etc/secret/key"}},
		}))
	h.view("look", "top")
	h.mounted("look", func(dir string) {
		h.wantFiles(dir, "etc/hard", "etc/secret/key", "etc/secret/new")
		if st := h.stat(dir + "/etc/secret"); st.Mode&0o7777 != 0o710 || st.Uid != 7 || st.Gid != 8 {
			h.Errorf("implied directory is %o %d:%d; want 710 7:8", st.Mode&0o7777, st.Uid, st.Gid)
		}
		if st := h.stat(dir); st.Uid != 5 || st.Gid != 6 {
			h.Errorf("the root is owned by %d:%d; want 5:6", st.Uid, st.Gid)
		}
		hard, key := h.stat(dir+"/etc/hard"), h.stat(dir+"/etc/secret/key")
		if hard.Ino != key.Ino || key.Nlink != 2 {
			h.Errorf("the link is another file: inodes %d and %d, %d links", hard.Ino, key.Ino, key.Nlink)
		}
	})
	u, err := h.d.Usage(ctx, "top")
	h.must(err)
	if u.Inodes != 5 || u.Size <= 16384 {
		h.Errorf("usage %+v; want what was counted and the file that was copied up", u)
	}
}

// crashRemnants: directories that no key names are what a crash leaves.
func crashRemnants(h *harness) {
	h.layer("base", "")
	h.prepare("work", "base")
	snapshots := h.root + "/snapshots"
	for _, name := range []string{"new-123", "rm-7", "99", "3"} {
		h.write(snapshots+"/"+name+"/fs/file", "left")
	}
	if st := h.stat(snapshots + "/3/fs/file"); st.Size != 4 {
		h.Fatal("no remnant")
	}
	h.prepare("next", "base") // which would have been 3
	h.mounted("next", func(dir string) { h.wantFiles(dir, "base") })
	h.must(os.Mkdir(snapshots+"/lost+found", 0o700))
	h.must(h.d.Cleanup(h.Context()))
	for _, name := range []string{"new-123", "rm-7", "99", "3"} {
		if _, err := os.Lstat(snapshots + "/" + name); !errors.Is(err, fs.ErrNotExist) {
			h.Errorf("%s: %v; want gone", name, err)
		}
	}
	h.must(os.Remove(snapshots + "/lost+found")) // which is not ours to remove
	h.mounted("work", func(dir string) { h.wantFiles(dir, "base") })
}

func missingDirectory(h *harness) {
	ctx := h.Context()
	h.layer("base", "")
	h.prepare("work", "base")
	dir, err := h.d.Dir(ctx, "work")
	h.must(err)
	for filepath.Base(filepath.Dir(dir)) != "snapshots" {
		dir = filepath.Dir(dir)
	}
	h.must(os.RemoveAll(dir))
	_, statErr := h.d.Stat(ctx, "work")
	_, mountErr := h.d.Mounts(ctx, "work")
	_, usageErr := h.d.Usage(ctx, "work")
	commitErr := h.d.CommitChain(ctx, snapshot.Commit{Key: "work", Name: "n"})
	for what, err := range map[string]error{"stat": statErr, "mounts": mountErr, "usage": usageErr, "commit": commitErr} {
		if !errors.Is(err, errdefs.ErrNotFound) {
			h.Errorf("%s: %v; want not found", what, err)
		}
	}
	if got := h.keys(); !slices.Contains(got, "work") {
		h.Errorf("walk yields %q; want the broken key too", got)
	}
	h.must(h.d.Remove(ctx, "work"))
}

// lostIndex: without metadata.db, directories are not known to be garbage.
func lostIndex(h *harness) {
	h.layer("base", "")
	h.close()
	h.must(os.Rename(h.root+"/metadata.db", h.root+"/../saved.db"))
	h.open()
	h.must(h.d.Cleanup(h.Context()))
	if len(h.keys()) != 0 {
		h.Error("snapshots without an index")
	}
	h.close()
	h.must(os.Rename(h.root+"/../saved.db", h.root+"/metadata.db"))
	h.open()
	h.view("look", "base")
	h.mounted("look", func(dir string) { h.wantFiles(dir, "base") })
}

func reopen(h *harness) {
	if _, err := os.Stat(h.root + "/metadata.db"); !errors.Is(err, fs.ErrNotExist) {
		h.Errorf("the index is there before it is needed: %v", err)
	}
	h.layer("base", "")
	h.prepare("work", "base")
	h.mounted("work", func(dir string) { h.write(dir+"/mine", "") })
	h.close()
	if _, err := h.d.Stat(h.Context(), "base"); err == nil {
		h.Error("a closed driver answers")
	}
	h.open()
	h.must(h.d.Cleanup(h.Context()))
	h.mounted("work", func(dir string) { h.wantFiles(dir, "base", "mine") })
	h.commit("top", "work")
	h.layer("next", "top")
}

func removal(h *harness) {
	ctx := h.Context()
	h.layer("base", "")
	h.prepare("work", "base")
	dir, err := h.d.Dir(ctx, "work")
	h.must(err)
	// Deeper than any path, full of links out, and with closed doors.
	at, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	h.must(err)
	for range 1500 {
		h.must(unix.Symlinkat(h.root, at, "out"))
		h.must(unix.Mkdirat(at, "deeper", 0o700))
		next, err := unix.Openat(at, "deeper", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		h.must(err)
		unix.Close(at)
		at = next
	}
	h.must(unix.Fchmod(at, 0))
	unix.Close(at)
	h.must(h.d.Remove(ctx, "work"))
	left, err := os.ReadDir(h.root + "/snapshots")
	h.must(err)
	if len(left) != 1 {
		h.Errorf("%v left; want the base alone", left)
	}
	h.must(h.d.Remove(ctx, "base"))
	h.layer("base", "") // the name is free again, and its id is another
}
