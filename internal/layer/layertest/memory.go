package layertest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// InMemory puts the temporary directories of the rest of the test on a tmpfs:
// hundreds of trees, each synced, would take minutes on a disk. Without root,
// which mounting needs, it leaves them where they are.
func InMemory(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("TMPDIR", dir)
}
