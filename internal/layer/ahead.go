package layer

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// slotSize is what the decoder takes at once, if it is there.
	slotSize = 128 << 10
	slots    = 3
	// leastRead is the room that a Read of the source is offered at least.
	leastRead = 32 << 10
	// maxEmptyReads is how often in a row a source may return nothing at all.
	maxEmptyReads = 100
)

// slot holds compressed bytes. The source fills it behind to while the decoder
// empties it from from.
type slot struct {
	buf      [slotSize]byte
	from, to int
}

// ahead reads a source ahead of the decoder. What a Read of the source has
// brought can be had at once, also while the next Read is under way; and while
// both sides are busy they meet once for every slot.
type ahead struct {
	r          io.Reader
	source     atomic.Int64 // ns in Read of r
	hungry     atomic.Int64 // ns that the decoder waited
	compressed atomic.Int64 // bytes that the decoder has taken

	mu                sync.Mutex
	change            sync.Cond // never awaited by both sides at once
	slots             *[slots]slot
	filling, emptying int   // of all slots so far, modulo their number
	err               error // why there won't be more
	stopped           bool
	ended             chan struct{} // closed when r is not read any more
}

func newAhead(r io.Reader, mem *[slots]slot) *ahead {
	a := &ahead{r: r, slots: mem, ended: make(chan struct{})}
	a.change.L = &a.mu
	mem[0].from, mem[0].to = 0, 0
	return a
}

// run reads until an error, which is io.EOF at the end, or until stop.
func (a *ahead) run() {
	defer close(a.ended)
	for empty := 0; ; {
		s := a.room()
		if s == nil {
			return
		}
		begun := time.Now()
		n, err := a.r.Read(s.buf[s.to:])
		lap(&a.source, begun)
		if empty++; n > 0 {
			empty = 0
		}
		if err == nil && empty > maxEmptyReads {
			err = io.ErrNoProgress
		}
		a.mu.Lock()
		s.to += n
		a.err = err
		a.change.Signal()
		a.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// room waits for room to read into; nil means stop.
func (a *ahead) room() *slot {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.slots[a.filling%slots]
	if len(s.buf)-s.to < leastRead {
		for a.filling-a.emptying == slots-1 && !a.stopped {
			a.change.Wait()
		}
		a.filling++
		s = &a.slots[a.filling%slots]
		s.from, s.to = 0, 0
	}
	if a.stopped {
		return nil
	}
	return s
}

// stop ends run, after a Read that is under way, and all waiting.
func (a *ahead) stop() {
	a.mu.Lock()
	a.stopped = true
	a.change.Broadcast()
	a.mu.Unlock()
}

// Read is the decoder's. It takes all that is there, and waits only for the
// first byte.
func (a *ahead) Read(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		n := 0
		for n < len(p) && !a.stopped {
			s := &a.slots[a.emptying%slots]
			if s.from == s.to {
				if a.emptying == a.filling {
					break
				}
				a.emptying++
				a.change.Signal()
				continue
			}
			m := copy(p[n:], s.buf[s.from:s.to])
			s.from += m
			n += m
		}
		if n > 0 || len(p) == 0 {
			a.compressed.Add(int64(n))
			return n, nil
		}
		if err := a.wait(); err != nil {
			return 0, err
		}
	}
}

// peek waits for the first n bytes, at most leastRead, before any Read. Fewer
// come with the error that ended the source.
func (a *ahead) peek(n int) ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.slots[0]
	for s.to < n {
		if err := a.wait(); err != nil {
			return s.buf[:s.to], err
		}
	}
	return s.buf[:n], nil
}

// wait waits for more, with the lock held, unless there can't be more.
func (a *ahead) wait() error {
	if a.stopped {
		return context.Canceled
	}
	if a.err != nil {
		return a.err
	}
	begun := time.Now()
	a.change.Wait()
	lap(&a.hungry, begun)
	return nil
}
