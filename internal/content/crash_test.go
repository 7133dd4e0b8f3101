package content

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// What a crash can leave of an ingest: each state on the way of its making,
// its removal by Commit, and its removal by Abort.
var crashStates = map[string][]string{
	"made":                {},
	"ref empty":           {"ref="},
	"ref":                 {"ref"},
	"startedat.tmp":       {"ref", "startedat.tmp"},
	"startedat":           {"ref", "startedat"},
	"updatedat.tmp":       {"ref", "startedat", "updatedat.tmp"},
	"updatedat":           {"ref", "startedat", "updatedat"},
	"total":               {"ref", "startedat", "updatedat", "total"},
	"closing":             {"ref", "startedat", "updatedat", "updatedat.tmp", "total", "data"},
	"committed":           {"ref", "startedat", "updatedat", "total"},
	"committed, no ref":   {"startedat", "updatedat", "total"},
	"committed, total":    {"total"},
	"aborted, no ref":     {"startedat", "updatedat", "total", "data"},
	"aborted, no times":   {"total", "data"},
	"aborted, data":       {"data"},
	"zeros for ref":       {"ref=\x00\x00\x00", "startedat", "updatedat", "total", "data"},
	"zeros for startedat": {"ref", "startedat=\x00\x00\x00", "updatedat", "total", "data"},
	"zeros for total":     {"ref", "startedat", "updatedat", "total=\x00", "data"},
}

// resumable are the states with which a Writer goes on.
var resumable = map[string]bool{"closing": true}

func leave(t *testing.T, in ingest, state []string) {
	t.Helper()
	now, _ := time.Now().MarshalText()
	whole := map[string]string{"ref": "ref", "startedat": string(now), "updatedat": string(now), "total": "6", "data": "abc"}
	if err := os.MkdirAll(string(in), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, file := range state {
		name, data := file, whole[file]
		for i := range file {
			if file[i] == '=' {
				name, data = file[:i], file[i+1:]
			}
		}
		if err := os.WriteFile(in.path(name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWriterGoesOnFromEveryCrash(t *testing.T) {
	for name, state := range crashStates {
		for _, restart := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, dir)
				leave(t, s.ingest("ref"), state)
				if restart {
					s = open(t, dir)
				}
				_, err := s.Status("ref")
				if resumable[name] != (err == nil) || err != nil && !errdefs.IsNotFound(err) {
					t.Errorf("status: %v", err)
				}
				w := writer(t, s, "ref", WriterOptions{Total: 6})
				if want := map[bool]int64{true: 3}[resumable[name]]; w.Offset() != want {
					t.Errorf("goes on at %d, want %d", w.Offset(), want)
				}
				write(t, w, "abcdef"[w.Offset():])
				if err := w.Commit(t.Context(), 6, digest.FromString("abcdef"), CommitOptions{}); err != nil {
					t.Error(err)
				}
				if got := tree(t, filepath.Join(s.dir, ingestDir)); len(got) > 0 {
					t.Errorf("left: %q", got)
				}
			})
		}
	}
}

func TestOpenClearsWhatNothingCanResume(t *testing.T) {
	for name, state := range crashStates {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			leave(t, s.ingest("ref"), state)
			s = open(t, dir)
			got := tree(t, filepath.Join(s.dir, ingestDir))
			var ref, data bool
			for _, file := range state {
				ref, data = ref || file == "ref", data || file == "data"
			}
			if kept := len(got) > 0; kept != (ref && data) {
				t.Errorf("after Open: %q", got)
			}
		})
	}
}

func TestOpenEmptiesTheTrash(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := os.WriteFile(filepath.Join(s.trash, "sha256-0"), []byte("x"), 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.trash, "old", "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	if got := tree(t, s.trash); len(got) != 0 {
		t.Errorf("left in the trash: %q", got)
	}
}

// A commit that is cut between making the file read-only and the rename is
// resumed; a cut before the removal of the rest of the ingest leaves a blob.
func TestResumeOfAnInterruptedCommit(t *testing.T) {
	s := open(t, t.TempDir())
	leave(t, s.ingest("ref"), crashStates["closing"])
	if err := os.Chmod(s.ingest("ref").path(dataFile), 0o444); err != nil {
		t.Fatal(err)
	}
	w := writer(t, s, "ref", WriterOptions{})
	write(t, w, "def")
	if err := w.Commit(t.Context(), 6, digest.FromString("abcdef"), CommitOptions{}); err != nil {
		t.Error(err)
	}
}
