//go:build fault

package content

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/fault"
)

const killDir = "CONTENT_KILL_DIR"

// storeLife passes every fault point of the package. It is what the child of
// TestKillAtEveryPoint does until it dies.
func storeLife(t *testing.T, dir string) {
	s, err := Open(filepath.Join(dir, "content"), filepath.Join(dir, "trash"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Abort("aborted"); err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	for _, data := range []string{"kept", "removed", "taken back"} {
		w := writer(t, s, data, WriterOptions{Total: int64(len(data))})
		write(t, w, data[w.Offset():])
		err := w.Commit(t.Context(), int64(len(data)), digest.FromString(data), CommitOptions{})
		if err != nil && !errdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	if err := s.Remove(digest.FromString("removed")); err != nil {
		t.Fatal(err)
	}
	if err := s.TakeBack(digest.FromString("taken back"), "aborted"); err != nil {
		t.Fatal(err)
	}
	if err := s.Abort("aborted"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// points lists the fault points of the package from its source.
func points(t *testing.T) []string {
	var names []string
	files, _ := filepath.Glob("*.go")
	for _, file := range files {
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`fault\.Point\("(content\.[a-z.]+)"\)`).FindAllSubmatch(src, -1) {
			names = append(names, string(m[1]))
		}
	}
	return names
}

func TestKillAtEveryPoint(t *testing.T) {
	if dir := os.Getenv(killDir); dir != "" {
		storeLife(t, dir)
		return
	}
	names := points(t)
	if len(names) < 7 {
		t.Fatalf("only %d points found", len(names))
	}
	for _, name := range names {
		for _, at := range []string{"#1", "#2"} {
			t.Run(name+at, func(t *testing.T) {
				dir := t.TempDir()
				cmd := exec.Command(os.Args[0], "-test.run", "^TestKillAtEveryPoint$")
				cmd.Env = append(os.Environ(), killDir+"="+dir, fault.Env+"="+name+at+"=kill")
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
				if at == "#1" && !killed || err != nil && !killed {
					t.Fatalf("child: %v\n%s", err, out)
				}
				s := open(t, dir)
				for path, err := range s.Strays() {
					t.Errorf("stray %s, %v", path, err)
				}
				check(t, s)
				storeLife(t, dir)
				if got := tree(t, s.dir); len(got) != 4 { // blobs, blobs/sha256, the blob, ingest
					t.Errorf("after another life: %q", got)
				}
			})
		}
	}
}
