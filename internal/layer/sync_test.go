package layer

import (
	"bytes"
	"testing"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

// TestSyncOfReplaced: what was written and is replaced later in the archive, be it by a link round in a circle, needs no
// sync, and the rest gets one.
func TestSyncOfReplaced(t *testing.T) {
	written := layertest.File("a/b/f", "f")
	for _, end := range []layertest.Entry{
		layertest.Symlink("a", "a"), layertest.Symlink("a/b", "b"), layertest.Symlink("a", "nowhere"),
		layertest.Whiteout("a"), layertest.File("a", "a"), layertest.Opaque("."),
	} {
		archive := layertest.Archive(written, end, layertest.File("z", "z"))
		d, err := NewDirectory(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		o, err := NewOverlay(t.TempDir(), nil, OverlayOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for name, to := range map[string]interface {
			Emitter
			Sync() (bool, error)
		}{"directory": d, "overlay": o} {
			if _, err := Apply(t.Context(), bytes.NewReader(archive), "", to, Limits{}); err != nil {
				t.Fatal(err)
			}
			if done, err := to.Sync(); !done || err != nil {
				t.Errorf("%s, replaced by %s %q: synced: %t, %v", name, end.Name, end.Linkname, done, err)
			}
		}
	}
}
