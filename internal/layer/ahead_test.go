package layer

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

// What goes in comes out, however the reads on both sides are cut.
func TestAheadKeepsTheBytes(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	want := make([]byte, 5<<20)
	for i := range want {
		want[i] = byte(rnd.Uint32())
	}
	for _, most := range []int{100, 5000, 1 << 20} {
		broken := errors.New("broken")
		cut := rand.New(rand.NewPCG(3, uint64(most)))
		a := newAhead(io.MultiReader(readerFunc(bytes.NewReader(want), func(n int) int { return 1 + cut.IntN(min(n, most)) }), iotestErr{broken}), new([slots]slot))
		go a.run()
		head, err := a.peek(512)
		if !bytes.Equal(head, want[:512]) || err != nil {
			t.Errorf("peek: %d bytes, %v", len(head), err)
		}
		var got []byte
		for err == nil {
			p := make([]byte, 1+rnd.IntN(most))
			var n int
			n, err = a.Read(p)
			got = append(got, p[:n]...)
		}
		if !bytes.Equal(got, want) || !errors.Is(err, broken) || a.compressed.Load() != int64(len(want)) {
			t.Errorf("pieces of %d: %d bytes, %d counted, %v", most, len(got), a.compressed.Load(), err)
		}
	}
}

// readerFunc reads as much at once as size says of what it is asked for.
func readerFunc(r io.Reader, size func(int) int) io.Reader { return sizedReader{r, size} }

type sizedReader struct {
	r    io.Reader
	size func(int) int
}

func (s sizedReader) Read(p []byte) (int, error) { return s.r.Read(p[:s.size(len(p))]) }

// What has come can be had while the source waits for more, and the source is
// not asked for more than there is room for.
func TestAheadNeitherWaitsNorSwells(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		a := newAhead(r, new([slots]slot))
		go a.run()
		p := make([]byte, slotSize)
		for _, s := range []string{"a", "few", "bytes"} {
			if _, err := w.Write([]byte(s)); err != nil {
				t.Fatal(err)
			}
			if n, err := a.Read(p); string(p[:n]) != s || err != nil {
				t.Fatalf("%q, %v: want %q", p[:n], err, s)
			}
		}
		r.Close()
		<-a.ended

		var asked atomic.Int64
		a = newAhead(sizedReader{zeroReader{}, func(n int) int { asked.Add(int64(n)); return n }}, new([slots]slot))
		go a.run()
		synctest.Wait()
		if n := asked.Load(); n != slots*slotSize {
			t.Errorf("%d bytes read ahead, want %d", n, slots*slotSize)
		}
		a.stop()
		<-a.ended
		if _, err := a.Read(p[:0]); err != nil {
			t.Error(err)
		}
	})
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A source that returns nothing, again and again, is given up.
func TestAheadGivesUp(t *testing.T) {
	a := newAhead(sizedReader{zeroReader{}, func(int) int { return 0 }}, new([slots]slot))
	go a.run()
	if _, err := a.Read(make([]byte, 1)); err != io.ErrNoProgress {
		t.Error(err)
	}
}

// brokenEmitter fails at the second entry.
type brokenEmitter struct {
	slowEmitter
	n   int
	err error
}

func (b *brokenEmitter) put(_ *entry, _ io.Reader) error {
	if b.n++; b.n == 2 {
		return b.err
	}
	return nil
}

// When an entry fails, a Read of the source that is under way is waited for,
// and none follows; nor does a goroutine stay behind.
func TestFailureEndsTheStages(t *testing.T) {
	one := layertest.Archive(layertest.File("a", ""), layertest.File("b", ""), layertest.File("c", strings.Repeat("c", 4<<20)))
	for name, data := range map[string][]byte{"plain": one, "gzip": gzipped(t, one), "zstd": zstded(t, one)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var reads atomic.Int32
				src := slowReader{sizedReader{bytes.NewReader(data), func(n int) int { reads.Add(1); return n }}, 16 << 10, time.Second}
				broken := errors.New("broken")
				_, err := Apply(t.Context(), src, "", &brokenEmitter{err: broken}, Limits{})
				if !errors.Is(err, broken) || !strings.Contains(err.Error(), `layer entry "b"`) {
					t.Error(err)
				}
				was := reads.Load()
				time.Sleep(time.Hour)
				if now := reads.Load(); now != was || now == 0 {
					t.Errorf("%d reads at first, %d in the end", was, now)
				}
			})
		})
	}
}

// A layer takes the same little memory whatever its size.
func TestMemoryIsBounded(t *testing.T) {
	archive := layertest.Archive(layertest.File("large", strings.Repeat("some text that repeats\n", 3<<20)))
	for form, data := range map[string][]byte{"plain": archive, "gzip": gzipped(t, archive)} {
		for range 2 {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			res, err := Apply(t.Context(), bytes.NewReader(data), "", slowEmitter{}, Limits{})
			runtime.ReadMemStats(&after)
			if err != nil || res.Size != int64(len(archive)) {
				t.Fatal(res, err)
			}
			if got := after.TotalAlloc - before.TotalAlloc; got > 4<<20 {
				t.Errorf("%s: %d bytes allocated for %d", form, got, res.Size)
			}
		}
	}
}
