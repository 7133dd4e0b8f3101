package compat

import (
	"fmt"
	"testing"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

func TestProbe(t *testing.T) {
	srv := registrytest.New(t)
	c := newRoot(t).start(t, theirs)
	for _, img := range layertest.Awkward() {
		ref := push(srv, img.Name, img.Layers...)
		trees := map[string]tree{}
		for _, snapshotter := range []string{"native", "overlayfs"} {
			if err := c.pull(t, "default", snapshotter, ref); err != nil {
				fmt.Println(img.Name, snapshotter, "FAILS", err)
				continue
			}
			trees[snapshotter] = c.imageTree(t, "default", snapshotter, ref)
		}
		if len(trees) == 2 {
			if l := trees["native"].differences(trees["overlayfs"], nil); len(l) > 0 {
				fmt.Println(img.Name, "native/overlay", listing(l))
			}
		}
	}
}
