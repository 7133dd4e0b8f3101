package layer

import (
	"sync/atomic"
	"time"
)

// Times says what an Apply did with its time. Its stages work at once:
//
//   - one reads compressed bytes, which takes Source;
//   - one decodes: it waits for those bytes (Hungry), works (Inflate), and
//     waits until there is room for more (Blocked), since somebody is slower;
//   - one takes the digest of what was decoded, Hash;
//   - one writes: it waits for decoded bytes (Starved), and Emit is the rest.
//
// Hungry, Inflate and Blocked follow one another, and so do Starved and Emit:
// the sum of either is what the Apply took, but for the end of the slower one.
type Times struct {
	Source                   time.Duration
	Hungry, Inflate, Blocked time.Duration
	Hash                     time.Duration
	Starved, Emit            time.Duration
}

// clock measures Times. The clock is read a few times for each chunk and not
// for each entry: hundreds of nanoseconds for hundreds of kilobytes.
type clock struct {
	begun                  time.Time
	inflate, blocked, hash atomic.Int64 // ns; their stages may outlive the Apply
	starved                time.Duration
}

// lap adds the time since t to n and returns now.
func lap(n *atomic.Int64, t time.Time) time.Time {
	now := time.Now()
	n.Add(int64(now.Sub(t)))
	return now
}

func (s *stream) times() Times {
	c := &s.clock
	hungry := time.Duration(s.ahead.hungry.Load())
	return Times{
		Source:  time.Duration(s.ahead.source.Load()),
		Hungry:  hungry,
		Inflate: max(0, time.Duration(c.inflate.Load())-hungry), // it waits on the way
		Blocked: time.Duration(c.blocked.Load()),
		Hash:    time.Duration(c.hash.Load()),
		Starved: c.starved,
		Emit:    max(0, time.Since(c.begun)-c.starved),
	}
}
