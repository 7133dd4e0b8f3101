package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/api"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
)

// loggedPuller says what was pulled. Of a pull that fails its caller hears.
type loggedPuller struct {
	puller api.Puller
	log    *slog.Logger
}

// Pull implements api.Puller.
func (l loggedPuller) Pull(ctx context.Context, sp meta.Space, reference string, req pull.Request) (meta.Image, error) {
	began := time.Now()
	var t tally
	req.Progress = t.tap(req.Progress)
	img, err := l.puller.Pull(ctx, sp, reference, req)
	if err == nil {
		layers, size, present := t.count()
		l.log.Info("pulled", "image", reference, "namespace", sp.Namespace(), "digest", img.Target.Digest,
			"layers", layers, "bytes", size, "layers_present", present, "duration", time.Since(began).Round(time.Millisecond))
	}
	return img, err
}

// tally counts the layers of one pull. The zero value is ready.
type tally struct {
	mu     sync.Mutex
	layers map[digest.Digest]layerSize
}

type layerSize struct {
	bytes   int64 // compressed
	present bool  // it was unpacked already
}

// tap passes events on to next, which may be nil.
func (t *tally) tap(next func(pull.Event)) func(pull.Event) {
	return func(e pull.Event) {
		if e.Stage == pull.StageComplete || e.Stage == pull.StageExists {
			t.mu.Lock()
			if t.layers == nil {
				t.layers = make(map[digest.Digest]layerSize)
			}
			t.layers[e.Desc.Digest] = layerSize{e.Desc.Size, e.Stage == pull.StageExists}
			t.mu.Unlock()
		}
		if next != nil {
			next(e)
		}
	}
}

// count is how many layers were made, of how many compressed bytes, and how
// many were there.
func (t *tally) count() (layers int, size int64, present int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.layers {
		if l.present {
			present++
			continue
		}
		layers++
		size += l.bytes
	}
	return layers, size, present
}

// logCollected says what a collection has removed, if it has.
func logCollected(log *slog.Logger) func(meta.Collected, error) {
	return func(c meta.Collected, err error) {
		if err != nil || c.Images+c.Blobs+c.Snapshots+c.Leases+c.Ingests == 0 && c.Bytes == 0 {
			return // errors are logged where they are handled
		}
		log.Info("collected", "images", c.Images, "blobs", c.Blobs, "snapshots", c.Snapshots, "leases", c.Leases, "ingests", c.Ingests,
			"bytes", c.Bytes, "duration", c.Elapsed.Round(time.Millisecond), "pause", c.Pause.Round(time.Microsecond))
	}
}
