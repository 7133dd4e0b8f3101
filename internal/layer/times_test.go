package layer

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

// slowReader takes its time for each piece.
type slowReader struct {
	r     io.Reader
	piece int
	pause time.Duration
}

func (s slowReader) Read(p []byte) (int, error) {
	time.Sleep(s.pause)
	return s.r.Read(p[:min(len(p), s.piece)])
}

// slowEmitter takes its time for each entry, and throws it away.
type slowEmitter struct {
	Emitter
	pause time.Duration
}

func (slowEmitter) begin(Limits) error   { return nil }
func (slowEmitter) end()                 {}
func (slowEmitter) finish(*Result) error { return nil }
func (s slowEmitter) put(_ *entry, body io.Reader) error {
	time.Sleep(s.pause)
	_, err := io.Copy(io.Discard, body)
	return err
}

// TestTimes has the one side wait for the other, in the bubble's time, in
// which what is no waiting takes none.
func TestTimes(t *testing.T) {
	data := layertest.Archive(layertest.File("a", strings.Repeat("a", 1<<20)), layertest.File("b", strings.Repeat("b", 1<<20)), layertest.File("c", strings.Repeat("c", 1<<20)))
	archive := func() io.Reader { return bytes.NewReader(data) }
	t.Run("slow source", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			src := slowReader{archive(), 64 << 10, time.Second}
			res, err := Apply(t.Context(), src, "", slowEmitter{}, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if got := res.Times; got.Source < 48*time.Second || got.Starved != got.Source || got.Inflate != 0 || got.Blocked != 0 || got.Emit != 0 {
				t.Errorf("%+v", got)
			}
		})
	})
	t.Run("slow emitter", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			res, err := Apply(t.Context(), archive(), "", slowEmitter{pause: time.Minute}, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if got := res.Times; got.Emit != 3*time.Minute || got.Blocked < time.Minute || got.Blocked > got.Emit || got.Source != 0 || got.Starved != 0 {
				t.Errorf("%+v", got)
			}
		})
	})
	t.Run("failed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			res, err := Apply(t.Context(), slowReader{io.LimitReader(archive(), 1<<20), 64 << 10, time.Second}, "", slowEmitter{}, Limits{})
			if err == nil || res.Times.Source < 16*time.Second || res.DiffID != "" {
				t.Errorf("%+v, %v", res, err)
			}
		})
	})
}
