package content

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// open opens a store in dir/content and, when the test ends, closes it and
// checks all of it.
func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(filepath.Join(dir, "content"), filepath.Join(dir, "trash"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		check(t, s)
	})
	return s
}

// check reads every blob and compares it with its name.
func check(t testing.TB, s *Store) {
	t.Helper()
	for i, err := range s.Blobs() {
		if err != nil {
			t.Error(err)
			continue
		}
		b := read(t, s, i.Digest)
		if got := i.Digest.Algorithm().FromBytes(b); got != i.Digest {
			t.Errorf("blob %s has digest %s", i.Digest, got)
		}
		if i.Size != int64(len(b)) {
			t.Errorf("blob %s: size %d, but %d bytes", i.Digest, i.Size, len(b))
		}
		if fi, err := os.Stat(s.blobPath(i.Digest)); err != nil || fi.Mode().Perm()&0o333 != 0 {
			t.Errorf("blob %s: %v, %v; want it read-only", i.Digest, fi.Mode(), err)
		}
	}
	if left, err := os.ReadDir(s.trash); err != nil || len(left) > 0 {
		t.Errorf("%d names in the trash, %v", len(left), err)
	}
}

func read(t testing.TB, s *Store, dgst digest.Digest) []byte {
	t.Helper()
	r, err := s.Reader(dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writer(t testing.TB, s *Store, ref string, opts WriterOptions) *Writer {
	t.Helper()
	w, err := s.Writer(t.Context(), ref, opts)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func write(t testing.TB, w *Writer, data string) {
	t.Helper()
	if n, err := io.WriteString(w, data); err != nil || n != len(data) {
		t.Fatalf("wrote %d of %d bytes: %v", n, len(data), err)
	}
}

// put makes data a blob.
func put(t testing.TB, s *Store, data string) digest.Digest {
	t.Helper()
	w := writer(t, s, "put-"+data, WriterOptions{})
	write(t, w, data)
	if err := w.Commit(t.Context(), int64(len(data)), digest.FromString(data), CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	return digest.FromString(data)
}

// tree lists the names below dir.
func tree(t testing.TB, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if path != dir {
			rel, _ := filepath.Rel(dir, path)
			names = append(names, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestBlobFromFirstByteToLast(t *testing.T) {
	s := open(t, t.TempDir())
	before := time.Now().Add(-time.Second)
	w := writer(t, s, "ns/1/layer", WriterOptions{Total: 11})
	write(t, w, "hello ")
	write(t, w, "world")
	dgst := digest.FromString("hello world")
	if got := w.Digest(); got != dgst {
		t.Errorf("digest so far %s, want %s", got, dgst)
	}
	if w.Ref() != "ns/1/layer" || w.Offset() != 11 {
		t.Errorf("ref %q, offset %d", w.Ref(), w.Offset())
	}
	onDisk, err := s.Status("ns/1/layer")
	if err != nil || onDisk.Ref != "ns/1/layer" || onDisk.Offset != 11 || onDisk.Total != 11 || onDisk.StartedAt.Before(before) || onDisk.UpdatedAt.Before(onDisk.StartedAt) {
		t.Errorf("status %+v, %v", onDisk, err)
	}
	if held, err := w.Status(); err != nil || held.Offset != 11 || held.Total != 11 || !held.StartedAt.Equal(onDisk.StartedAt) {
		t.Errorf("the writer's status %+v, %v", held, err)
	}
	r, err := w.Data()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := make([]byte, 5)
	if _, err := r.ReadAt(b, 6); err != nil || string(b) != "world" {
		t.Errorf("read back %q, %v", b, err)
	}
	if err := w.Commit(t.Context(), 11, dgst, CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close after Commit: %v", err)
	}
	i, err := s.Info(dgst)
	if err != nil || i.Digest != dgst || i.Size != 11 || i.Created.Before(before) || i.Updated.Before(before) {
		t.Errorf("info %+v, %v", i, err)
	}
	if fi, err := os.Stat(s.blobPath(dgst)); err != nil || fi.Mode() != 0o444 {
		t.Errorf("mode %v, %v; want 0444", fi.Mode(), err)
	}
	if got := tree(t, filepath.Join(s.dir, ingestDir)); len(got) > 0 {
		t.Errorf("ingest still holds %q", got)
	}
	if err := s.Remove(dgst); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{s.Remove(dgst), s.SyncBlob(dgst), third(s.Info(dgst)), third(s.Reader(dgst))} {
		if !errdefs.IsNotFound(err) {
			t.Errorf("after Remove: %v, want ErrNotFound", err)
		}
	}
}

func third[T any](_ T, err error) error { return err }

func TestDirectoryModes(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "x")
	w := writer(t, s, "ref", WriterOptions{})
	defer w.Close()
	for path, want := range map[string]os.FileMode{
		s.dir:                       0o755,
		s.trash:                     0o700,
		s.dir + "/blobs":            0o755,
		s.dir + "/blobs/sha256":     0o755,
		s.dir + "/ingest":           0o755,
		string(s.ingest("ref")):     0o755,
		s.ingest("ref").path("ref"): 0o644,
	} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %v", path, fi.Mode().Perm(), err, want)
		}
	}
}

func TestResumeGoesOnWhereItEnded(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	w := writer(t, s, "ref", WriterOptions{Total: 6})
	started, _ := w.Status()
	write(t, w, "abc")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("write after Close: %v", err)
	}
	if err := w.Commit(t.Context(), 0, "", CommitOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit after Close: %v", err)
	}
	s = open(t, dir) // as after a restart
	w = writer(t, s, "ref", WriterOptions{})
	st, _ := w.Status()
	if st.Offset != 3 || st.Total != 6 || !st.StartedAt.Equal(started.StartedAt) {
		t.Errorf("resumed with %+v", st)
	}
	write(t, w, "def")
	if err := w.Commit(t.Context(), 6, digest.FromString("abcdef"), CommitOptions{}); err != nil {
		t.Error(err)
	}
}

func TestResumeLearnsTheTotal(t *testing.T) {
	s := open(t, t.TempDir())
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, "abc")
	w.Close()
	w = writer(t, s, "ref", WriterOptions{Total: 5})
	defer w.Close()
	if st, err := s.Status("ref"); err != nil || st.Total != 5 || st.Offset != 3 {
		t.Errorf("status %+v, %v", st, err)
	}
}

func TestResumeDiscardsWhatItCannotTrust(t *testing.T) {
	for name, spoil := range map[string]func(in ingest) error{
		"other total":      func(in ingest) error { return os.WriteFile(in.path(totalFile), []byte("7"), 0o644) },
		"unreadable total": func(in ingest) error { return os.WriteFile(in.path(totalFile), []byte("six"), 0o644) },
		"negative total":   func(in ingest) error { return os.WriteFile(in.path(totalFile), []byte("-6"), 0o644) },
		"empty total":      func(in ingest) error { return os.Truncate(in.path(totalFile), 0) },
		"more than total":  func(in ingest) error { return os.WriteFile(in.path(dataFile), []byte("abcdefg"), 0o644) },
		"other ref":        func(in ingest) error { return os.WriteFile(in.path(refFile), []byte("elsewhere"), 0o644) },
		"no ref":           func(in ingest) error { return os.Remove(in.path(refFile)) },
		"giant ref":        func(in ingest) error { return os.Truncate(in.path(refFile), MaxRef+1) },
		"no startedat":     func(in ingest) error { return os.Remove(in.path(startedFile)) },
		"empty startedat":  func(in ingest) error { return os.Truncate(in.path(startedFile), 0) },
		"giant updatedat":  func(in ingest) error { return os.Truncate(in.path(updatedFile), 1<<30) },
		"no data":          func(in ingest) error { return os.Remove(in.path(dataFile)) },
		"data is a dir": func(in ingest) error {
			return errors.Join(os.Remove(in.path(dataFile)), os.Mkdir(in.path(dataFile), 0o755))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			w := writer(t, s, "ref", WriterOptions{Total: 6})
			write(t, w, "abc")
			w.Close()
			if err := spoil(s.ingest("ref")); err != nil {
				t.Fatal(err)
			}
			w, err := s.Writer(t.Context(), "ref", WriterOptions{Total: 6})
			if name == "data is a dir" {
				if err == nil {
					t.Error("a directory passes for data")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if w.Offset() != 0 {
				t.Errorf("resumed at %d", w.Offset())
			}
			if fi, err := os.Stat(s.ingest("ref").path(dataFile)); err != nil || fi.Size() != 0 {
				t.Errorf("data: %v, %v; want it empty", fi, err)
			}
			write(t, w, "abcdef")
			if err := w.Commit(t.Context(), 6, digest.FromString("abcdef"), CommitOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestResumeStopsHashingWithTheContext(t *testing.T) {
	s := open(t, t.TempDir())
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, strings.Repeat("x", 1<<20))
	w.Close()
	cause := errors.New("caller left")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := s.Writer(ctx, "ref", WriterOptions{}); !errors.Is(err, cause) {
		t.Errorf("err = %v, want the cause", err)
	}
	w = writer(t, s, "ref", WriterOptions{}) // neither locked nor truncated
	if w.Offset() != 1<<20 {
		t.Errorf("%d bytes left", w.Offset())
	}
	w.Close()
}

func TestOneWriterPerRef(t *testing.T) {
	s := open(t, t.TempDir())
	w := writer(t, s, "ref", WriterOptions{})
	_, err := s.Writer(t.Context(), "ref", WriterOptions{})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "ref ref locked for ") {
		t.Errorf("second writer: %v", err)
	}
	other := writer(t, s, "other", WriterOptions{})
	other.Close()
	write(t, w, "x")
	if err := w.Commit(t.Context(), 2, "", CommitOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit of the wrong size: %v", err)
	}
	w = writer(t, s, "ref", WriterOptions{}) // a failed commit lets go too
	w.Close()
}

func TestWritersAreBounded(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir+"/c", dir+"/t", Options{MaxWriters: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	writer(t, s, "a", WriterOptions{})
	if _, err := s.Writer(t.Context(), "b", WriterOptions{}); !errdefs.IsUnavailable(err) {
		t.Errorf("err = %v, want ErrUnavailable", err)
	}
	if err := s.Abort("b"); !errdefs.IsNotFound(err) {
		t.Errorf("abort at the bound: %v, want ErrNotFound", err)
	}
}

func TestWriterRefusesBadArguments(t *testing.T) {
	s := open(t, t.TempDir())
	for _, c := range []struct {
		ref  string
		opts WriterOptions
	}{
		{"", WriterOptions{}},
		{strings.Repeat("r", MaxRef+1), WriterOptions{}},
		{"ref", WriterOptions{Total: -1}},
		{"ref", WriterOptions{Expected: "sha256:short"}},
		{"ref", WriterOptions{Expected: "md5:d41d8cd98f00b204e9800998ecf8427e"}},
	} {
		if _, err := s.Writer(t.Context(), c.ref, c.opts); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Writer(%d bytes, %+v): %v", len(c.ref), c.opts, err)
		}
	}
	for _, dgst := range []digest.Digest{"", "sha256:../../../etc/passwd", "..", "sha256:" + digest.Digest(strings.Repeat("A", 64))} {
		for _, err := range []error{third(s.Info(dgst)), third(s.Reader(dgst)), s.Remove(dgst), s.SyncBlob(dgst)} {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("digest %q: %v", dgst, err)
			}
		}
	}
	w := writer(t, s, "ref", WriterOptions{})
	defer w.Close()
	if err := w.Truncate(1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Truncate(1): %v", err)
	}
}

func TestCommitThatDiffersKeepsTheIngest(t *testing.T) {
	for name, c := range map[string]struct {
		size int64
		dgst digest.Digest
		kind func(error) bool
	}{
		"size":          {4, digest.FromString("abc"), errdefs.IsFailedPrecondition},
		"digest":        {3, digest.FromString("abd"), errdefs.IsFailedPrecondition},
		"sha512":        {3, digest.SHA512.FromString("abd"), errdefs.IsFailedPrecondition},
		"negative size": {-1, "", errdefs.IsInvalidArgument},
		"no digest":     {3, "sha256:abc", errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			w := writer(t, s, "ref", WriterOptions{})
			write(t, w, "abc")
			if err := w.Commit(t.Context(), c.size, c.dgst, CommitOptions{}); !c.kind(err) {
				t.Errorf("err = %v", err)
			}
			for i := range s.Blobs() {
				t.Errorf("blob %s", i.Digest)
			}
			w = writer(t, s, "ref", WriterOptions{})
			if w.Offset() != 3 {
				t.Errorf("%d bytes left of the ingest", w.Offset())
			}
			if err := w.Commit(t.Context(), 0, "", CommitOptions{}); err != nil {
				t.Errorf("commit without conditions: %v", err)
			}
			if got := read(t, s, digest.FromString("abc")); string(got) != "abc" {
				t.Errorf("blob holds %q", got)
			}
		})
	}
}

func TestCommitOfWhatSomebodyElseChanged(t *testing.T) {
	s := open(t, t.TempDir())
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, "abc")
	if err := os.Truncate(w.in.path(dataFile), 1); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(t.Context(), 3, digest.FromString("abc"), CommitOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("err = %v", err)
	}
}

func TestCommitByOtherAlgorithms(t *testing.T) {
	s := open(t, t.TempDir())
	for _, alg := range []digest.Algorithm{digest.SHA384, digest.SHA512} {
		dgst := alg.FromString("abc")
		for _, opts := range []WriterOptions{{}, {Expected: dgst}} { // hashed again, and from the start
			w := writer(t, s, "ref", opts)
			write(t, w, "abc")
			if err := w.Commit(t.Context(), 3, dgst, CommitOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := s.Remove(dgst); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestCommitOfWhatIsThere(t *testing.T) {
	for name, opts := range map[string]CommitOptions{"": {}, "synced": {Synced: true}, "unsynced": {Unsynced: true}} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			dgst := put(t, s, "abc")
			was, _ := os.Stat(s.blobPath(dgst))
			w := writer(t, s, "ref", WriterOptions{Expected: dgst}) // not refused: that is meta's to do
			write(t, w, "abc")
			if err := w.Commit(t.Context(), 3, dgst, opts); !errdefs.IsAlreadyExists(err) {
				t.Errorf("err = %v", err)
			}
			if is, _ := os.Stat(s.blobPath(dgst)); !os.SameFile(was, is) {
				t.Error("the blob was replaced")
			}
			if _, err := s.Status("ref"); !errdefs.IsNotFound(err) {
				t.Errorf("ingest: %v, want ErrNotFound", err)
			}
		})
	}
}

func TestCommitReplacesDamage(t *testing.T) {
	s := open(t, t.TempDir())
	dgst := put(t, s, "abc")
	if err := os.Truncate(s.blobPath(dgst), 0); err != nil { // what a power cut makes of an unsynced blob
		t.Fatal(err)
	}
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, "abc")
	if err := w.Commit(t.Context(), 3, dgst, CommitOptions{}); err != nil {
		t.Error(err)
	}
}

func TestCommitWithoutSync(t *testing.T) {
	s := open(t, t.TempDir())
	for name, opts := range map[string]CommitOptions{"a": {Synced: true}, "b": {Unsynced: true}, "c": {Synced: true, Unsynced: true}} {
		w := writer(t, s, name, WriterOptions{})
		write(t, w, name)
		if err := w.Commit(t.Context(), 1, digest.FromString(name), opts); err != nil {
			t.Error(err)
		}
		if err := s.SyncBlob(digest.FromString(name)); err != nil {
			t.Error(err)
		}
	}
}

func TestTruncateBeginsAnew(t *testing.T) {
	s := open(t, t.TempDir())
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, "wrong bytes")
	if err := w.Truncate(0); err != nil {
		t.Fatal(err)
	}
	write(t, w, "abc")
	if err := w.Commit(t.Context(), 3, digest.FromString("abc"), CommitOptions{}); err != nil {
		t.Error(err)
	}
	if err := w.Truncate(0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after Commit: %v", err)
	}
	if _, err := w.Data(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("after Commit: %v", err)
	}
}

func TestTakeBack(t *testing.T) {
	s := open(t, t.TempDir())
	dgst := put(t, s, "all of it")
	if err := s.TakeBack(digest.FromString("absent"), "ref"); !errdefs.IsNotFound(err) {
		t.Errorf("absent: %v, want ErrNotFound", err)
	}
	w := writer(t, s, "other", WriterOptions{})
	w.Close()
	if err := s.TakeBack(dgst, "other"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("into an ingest with bytes: %v, want ErrAlreadyExists", err)
	}
	if err := s.TakeBack(dgst, "ref"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Info(dgst); !errdefs.IsNotFound(err) {
		t.Errorf("blob: %v, want ErrNotFound", err)
	}
	w = writer(t, s, "ref", WriterOptions{Expected: dgst})
	if st, err := w.Status(); err != nil || st.Offset != 9 || st.Total != 9 || w.Digest() != dgst {
		t.Errorf("%+v, %s, %v", st, w.Digest(), err)
	}
	if err := w.Commit(t.Context(), 9, dgst, CommitOptions{}); err != nil {
		t.Error(err)
	}
}

func TestAbort(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.Abort("ref"); !errdefs.IsNotFound(err) {
		t.Errorf("absent: %v, want ErrNotFound", err)
	}
	w := writer(t, s, "ref", WriterOptions{Total: 3})
	write(t, w, "abc")
	w.Close()
	if err := os.WriteFile(s.ingest("ref").path("foreign"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Abort("ref"); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, filepath.Join(s.dir, ingestDir)); len(got) > 0 {
		t.Errorf("left: %q", got)
	}
}

func TestAbortUnderAWriter(t *testing.T) {
	s := open(t, t.TempDir())
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, "abc")
	if err := s.Abort("ref"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("d")); !errdefs.IsAborted(err) {
		t.Errorf("write: %v, want ErrAborted", err)
	}
	if err := w.Commit(t.Context(), 0, "", CommitOptions{}); !errdefs.IsAborted(err) {
		t.Errorf("commit: %v, want ErrAborted", err)
	}
	next := writer(t, s, "ref", WriterOptions{})
	if err := w.Close(); err != nil { // must not free the ref of the next
		t.Error(err)
	}
	if _, err := s.Writer(t.Context(), "ref", WriterOptions{}); !errdefs.IsUnavailable(err) {
		t.Errorf("third writer: %v, want ErrUnavailable", err)
	}
	next.Close()
}

func TestCloseOfTheStoreKeepsIngests(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, "abc")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("d")); err == nil {
		t.Error("write to a closed store")
	}
	if _, err := s.Writer(t.Context(), "other", WriterOptions{}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("err = %v, want ErrClosed", err)
	}
	if err := s.Abort("ref"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("err = %v, want ErrClosed", err)
	}
	w = writer(t, open(t, dir), "ref", WriterOptions{})
	if w.Offset() != 3 {
		t.Errorf("%d bytes left", w.Offset())
	}
}

func TestListsAndStrays(t *testing.T) {
	s := open(t, t.TempDir())
	a, b := put(t, s, "a"), put(t, s, "b")
	held := writer(t, s, "held", WriterOptions{})
	left := writer(t, s, "left", WriterOptions{})
	left.Close()
	var want []string
	stray := func(path string, dir bool) {
		path = filepath.Join(s.dir, path)
		want = append(want, path)
		if dir {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, []byte("stray"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	stray("blobs/file", false)
	stray("blobs/md5", true)
	stray("blobs/sha256/.nfs0001", false)
	stray("blobs/sha256/"+strings.Repeat("0", 64), true)
	stray("ingest/"+strings.Repeat("0", 64), true) // such as a commit cut short leaves
	stray("ingest/lost+found", true)

	var blobs []digest.Digest
	for i, err := range s.Blobs() {
		if err != nil {
			t.Error(err)
		}
		blobs = append(blobs, i.Digest)
	}
	if len(blobs) != 2 || blobs[0] != min(a, b) || blobs[1] != max(a, b) {
		t.Errorf("blobs %v", blobs)
	}
	statuses, refs := map[string]bool{}, map[string]bool{}
	for st, err := range s.Statuses() {
		if err != nil {
			t.Error(err)
		}
		statuses[st.Ref] = true
	}
	for ref, err := range s.Refs() {
		if err != nil {
			t.Error(err)
		}
		refs[ref] = true
	}
	for _, got := range []map[string]bool{statuses, refs} {
		if len(got) != 2 || !got["held"] || !got["left"] {
			t.Errorf("ingests %v", got)
		}
	}
	if err := os.Remove(held.in.path(refFile)); err != nil { // in whatever state, a held one is no stray
		t.Fatal(err)
	}
	var got []string
	for path, err := range s.Strays() {
		if err != nil {
			t.Error(err)
		}
		got = append(got, path)
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("strays:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for range s.Strays() {
		break // must not go on yielding
	}
	dir := digest.NewDigestFromEncoded(digest.SHA256, strings.Repeat("0", 64))
	for _, err := range []error{third(s.Info(dir)), third(s.Reader(dir)), s.Remove(dir)} {
		if !errdefs.IsNotFound(err) {
			t.Errorf("a directory among the blobs: %v, want ErrNotFound", err)
		}
	}
}

func TestManyWritersOfOneBlob(t *testing.T) {
	s := open(t, t.TempDir())
	data := strings.Repeat("the same bytes ", 10000)
	dgst := digest.FromString(data)
	var all sync.WaitGroup
	var made, existed atomic.Int32
	for i := range 16 {
		all.Go(func() {
			w, err := s.Writer(t.Context(), string(rune('a'+i)), WriterOptions{})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := io.Copy(w, strings.NewReader(data)); err != nil {
				t.Error(err)
			}
			switch err := w.Commit(t.Context(), int64(len(data)), dgst, CommitOptions{Unsynced: i%2 == 0}); {
			case err == nil:
				made.Add(1)
			case errdefs.IsAlreadyExists(err):
				existed.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	if made.Load() != 1 || existed.Load() != 15 {
		t.Errorf("%d commits made the blob, %d found it", made.Load(), existed.Load())
	}
}

func TestWritersAndAbortsOfOneRef(t *testing.T) {
	s := open(t, t.TempDir())
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for range 50 {
				if i == 0 {
					if err := s.Abort("ref"); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) {
						t.Error(err)
					}
					continue
				}
				w, err := s.Writer(t.Context(), "ref", WriterOptions{})
				if errdefs.IsUnavailable(err) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if w.Offset() == 0 {
					if _, err := w.Write([]byte("abc")); err != nil && !errdefs.IsAborted(err) {
						t.Error(err)
					}
				}
				err = w.Commit(t.Context(), 3, digest.FromString("abc"), CommitOptions{Unsynced: true})
				if err != nil && !errdefs.IsAborted(err) && !errdefs.IsAlreadyExists(err) {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if got := tree(t, filepath.Join(s.dir, ingestDir)); len(got) > 0 {
		t.Errorf("left: %q", got)
	}
}

func TestReaderOutlivesRemove(t *testing.T) {
	s := open(t, t.TempDir())
	dgst := put(t, s, "abc")
	r, err := s.Reader(dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := s.Remove(dgst); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	if n, err := r.ReadAt(b, 0); n != 3 || err != io.EOF || !bytes.Equal(b[:n], []byte("abc")) {
		t.Errorf("read %q, %v", b[:n], err)
	}
}
