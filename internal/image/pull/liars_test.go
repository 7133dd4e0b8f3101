package pull

import (
	"testing"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// withMirrors is a house whose registry has an image of one layer, with mirrors before it that have it too.
func withMirrors(t *testing.T, n, size int) (*house, []*registrytest.Server, string) {
	t.Helper()
	var set settings
	var mirrors []*registrytest.Server
	for range n {
		m := registrytest.New(t)
		m.PushFormat("app", "1", registrytest.Format{Platform: host()}, simple(1, size))
		mirrors = append(mirrors, m)
		set.mirrors = append(set.mirrors, m.Host())
	}
	h := newHouse(t, set)
	img := h.push("app", "1", simple(1, size))
	return h, mirrors, "/blobs/" + img.Layers[0].Digest.String()
}

// TestManyLiars: mirror after mirror sends wrong bytes; the registry's come in the end.
func TestManyLiars(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h, mirrors, blob := withMirrors(t, 2, 50_000)
			for i, m := range mirrors {
				m.Fault(blob, registrytest.Fault{Corrupt: true, At: int64(1000 * i)})
			}
			h.mustPull("app:1", Request{Snapshotter: driver})
			h.whole("app:1", driver)
			for i, m := range mirrors {
				if n := m.Count(blob); n != 1 {
					t.Errorf("liar %d was asked %d times", i, n)
				}
			}
		})
	}
}

// TestLiarAfterResume: there are bytes from an earlier pull, and a mirror sends the rest wrong. Whose are bad shows only
// when the mirror has sent them all.
func TestLiarAfterResume(t *testing.T) {
	h, mirrors, blob := withMirrors(t, 1, 200_000)
	h.srv.Fault(blob, registrytest.Fault{Drop: true})
	mirrors[0].Fault(blob, registrytest.Fault{Drop: true})
	mirrors[0].Fault(blob, registrytest.Fault{Truncate: true, At: 100_000, Times: 1})
	wantError(t, h.pull("app:1", Request{}), mirrors[0].Host(), h.srv.Host())
	h.srv.Heal()
	mirrors[0].Heal()
	mirrors[0].Fault(blob, registrytest.Fault{Corrupt: true, At: 10})
	h.mustPull("app:1", Request{})
	h.whole("app:1", "overlayfs")
}

// TestLiarThatBreaksOff: a mirror sends wrong bytes and breaks off, and the registry sends the rest, right. The registry
// is not taken for the liar.
func TestLiarThatBreaksOff(t *testing.T) {
	for _, driver := range drivers {
		t.Run(driver, func(t *testing.T) {
			h, mirrors, blob := withMirrors(t, 1, 200_000)
			mirrors[0].Fault(blob, registrytest.Fault{Status: 404})
			mirrors[0].Fault(blob, registrytest.Fault{Replace: []byte(noise(9, len(simple(1, 200_000).Data))), Truncate: true, At: 100_000, Times: 1})
			h.mustPull("app:1", Request{Snapshotter: driver})
			h.whole("app:1", driver)
			if n := h.srv.Count(blob); n != 2 {
				t.Errorf("the registry was asked %d times, want once for the rest and once for all of it", n)
			}
		})
	}
}

// TestAllLie: the error names every host that has lied.
func TestAllLie(t *testing.T) {
	h, mirrors, blob := withMirrors(t, 2, 50_000)
	for _, srv := range append(mirrors, h.srv) {
		srv.Fault(blob, registrytest.Fault{Corrupt: true, At: 7})
	}
	wantError(t, h.pull("app:1", Request{}), h.srv.Host(), mirrors[0].Host(), mirrors[1].Host(), "damages or changes content")
	h.nothing()
}

// TestLyingDocuments is TestManyLiars for manifest and config.
func TestLyingDocuments(t *testing.T) {
	h, mirrors, _ := withMirrors(t, 2, 1000)
	for i, m := range mirrors {
		m.Fault("GET /v2/app/manifests/sha256:", registrytest.Fault{Corrupt: true, At: int64(i)})
	}
	h.mustPull("app:1", Request{})
	h.whole("app:1", "overlayfs")
}
