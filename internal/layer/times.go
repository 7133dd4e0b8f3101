package layer

import (
	"io"
	"sync/atomic"
	"time"
)

// Times says what an Apply did with its time. Its two sides work at once:
// Source, Inflate and Blocked are what the side that decompresses spent on
// reading compressed bytes, on making others of them, and on waiting until
// somebody wants those; Starved, Hash and Emit are what the side that writes
// spent on waiting for bytes, on their digest, and on everything else.
type Times struct {
	Source, Inflate, Blocked time.Duration
	Starved, Hash, Emit      time.Duration
}

// clock measures Times. The clock is read a few times for each chunk and not
// for each entry: hundreds of nanoseconds for hundreds of kilobytes.
type clock struct {
	begun                    time.Time
	source, inflate, blocked atomic.Int64 // ns; the decompressor may outlive the Apply
	starved, hash            time.Duration
}

// lap adds the time since t to n and returns now.
func lap(n *atomic.Int64, t time.Time) time.Time {
	now := time.Now()
	n.Add(int64(now.Sub(t)))
	return now
}

func (c *clock) times() Times {
	source := time.Duration(c.source.Load())
	return Times{
		Source:  source,
		Inflate: max(0, time.Duration(c.inflate.Load())-source), // it reads on the way
		Blocked: time.Duration(c.blocked.Load()),
		Starved: c.starved,
		Hash:    c.hash,
		Emit:    max(0, time.Since(c.begun)-c.starved-c.hash),
	}
}

// timed counts what a decompressor reads, and for how long.
type timed struct {
	r    io.Reader
	n    *atomic.Int64
	took *atomic.Int64
}

func (t timed) Read(p []byte) (int, error) {
	begun := time.Now()
	n, err := t.r.Read(p)
	lap(t.took, begun)
	t.n.Add(int64(n))
	return n, err
}
