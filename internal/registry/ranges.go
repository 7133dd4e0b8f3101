package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// Ranges says when several ranges of one blob are fetched at once. The zero value is the default.
type Ranges struct {
	Connections int   // to one blob; default 4, less than 2 after that: never more than one
	Least       int64 // bytes that a blob must have left; default 32 MiB
	First       int64 // bytes that are asked for at first, to see whether the network is what bounds it; default 8 MiB
	Segment     int64 // bytes of each range after that; default 4 MiB
	Buffers     int   // segments that all blobs of a Client have in memory; default 4
}

func (r Ranges) orDefaults() Ranges {
	if r.Connections == 0 {
		r.Connections = 4
	}
	if r.Least == 0 {
		r.Least = 32 << 20
	}
	if r.First == 0 {
		r.First = 8 << 20
	}
	if r.Segment == 0 {
		r.Segment = 4 << 20
	}
	if r.Buffers == 0 {
		r.Buffers = 4
	}
	return r
}

const (
	// slowEnough is how long the first part must take at least: a network that is faster has no need of more connections.
	slowEnough = 100 * time.Millisecond
	// later is how many times the first part is asked for where the network is slow and no buffers are free.
	later = 4
	// segmentStall bounds the wait for a byte of a segment: who serves no second connection often just doesn't answer.
	segmentStall = 10 * time.Second
)

// A large blob comes over several connections where one doesn't use up the network: over long ways, and from servers
// that give each connection its share. The simple version asks for ranges at once from the start. It costs requests,
// which registries count, and memory, since what comes early has to wait: files grow only at their end. So the first
// part of a blob is asked for alone. If the reader has waited for the network most of the time until it is here, the
// rest is fetched in segments, several at once, as far as the Client has buffers left; otherwise in one request.
//
// All segments of a blob come from the source that has sent the part before. Any trouble with one ends all, and the blob
// goes on as it does without them: at the first byte that is missing, by one request, with all the care of resume.

// pool lends the buffers for segments, which bounds what all blobs of a Client take.
type pool struct {
	Ranges
	mu   sync.Mutex
	lent int
	idle [][]byte // kept while any is lent
}

func newPool(r Ranges) *pool { return &pool{Ranges: r.orDefaults()} }

// first yields how much of a blob with so much left is asked for at first; 0 for all.
func (p *pool) first(left int64) int64 {
	if p.Connections < 2 || p.Buffers < 2 || left < p.Least {
		return 0
	}
	return p.First
}

func (p *pool) take() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lent == p.Buffers {
		return nil
	}
	p.lent++
	if n := len(p.idle); n > 0 {
		buf := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return buf
	}
	return make([]byte, p.Segment)
}

func (p *pool) put(buf []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lent--
	p.idle = append(p.idle, buf)
	if p.lent == 0 {
		p.idle = nil
	}
}

// onward opens what follows a part that has come whole.
func (b *Blob) onward() error {
	slow := b.waited > slowEnough && b.waited > time.Since(b.begun)/2
	var extra [1]byte
	io.ReadFull(b.body, extra[:]) // its end, so that the connection can be used again
	b.drop()
	src, p := b.sources[b.at], b.repo.client.pool
	b.part = 0
	if slow && !b.repo.isSingle(src.host()) {
		if f := b.fan(src); f != nil {
			b.body, b.end = f, b.desc.Size
			return nil
		}
		b.part = later * p.First // and then see whether there are buffers
	}
	return b.connect()
}

func (r *Repository) isSingle(host string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.single[host]
}

func (r *Repository) setSingle(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.single[host] = true
}

// fan reads what is left of a blob over several connections, in order.
type fan struct {
	repo   *Repository
	desc   string // the digest
	src    source
	accept string
	eager  bool  // another source can be asked
	size   int64 // of the blob
	next   int64 // offset of the first byte that no segment has

	ctx    context.Context
	cancel context.CancelCauseFunc
	queue  []*segment // in order
	all    sync.WaitGroup
}

// segment is one range on its way into a buffer.
type segment struct {
	buf        []byte // of the pool
	start, end int64
	filled     atomic.Int64  // bytes that have come
	given      int64         // bytes that were read
	more       chan struct{} // holds a token when filled has grown
	done       chan struct{} // closed when err is set
	err        error
}

// trouble is why a segment did not come. It is no reason to think badly of its source, which gets its chance alone.
type trouble struct{ err error }

func (t *trouble) Error() string { return "one of several ranges at once: " + t.err.Error() }

// fan begins to fetch the rest of b from src, or returns nil when there are not enough buffers.
func (b *Blob) fan(src source) *fan {
	if b.desc.Size-b.next <= b.repo.client.pool.Segment {
		return nil
	}
	f := &fan{repo: b.repo, desc: b.desc.Digest.String(), src: src, accept: b.accept(), eager: b.others(), size: b.desc.Size, next: b.next}
	f.ctx, f.cancel = context.WithCancelCause(b.ctx)
	first := f.repo.client.pool.take()
	if first == nil {
		f.cancel(nil)
		return nil
	}
	second := f.repo.client.pool.take()
	if second == nil {
		f.repo.client.pool.put(first)
		f.cancel(nil)
		return nil
	}
	f.start(first)
	f.start(second)
	f.widen()
	return f
}

// widen starts further segments as far as there are connections and buffers for them.
func (f *fan) widen() {
	p := f.repo.client.pool
	for f.next < f.size && len(f.queue) < p.Connections {
		buf := p.take()
		if buf == nil {
			return
		}
		f.start(buf)
	}
}

func (f *fan) start(buf []byte) {
	s := &segment{buf: buf, start: f.next, end: min(f.next+int64(len(buf)), f.size), more: make(chan struct{}, 1), done: make(chan struct{})}
	f.next = s.end
	f.queue = append(f.queue, s)
	f.all.Go(func() {
		defer close(s.done)
		if err := f.fetch(s); err != nil {
			s.err = err
		}
	})
}

// fetch fills a segment.
func (f *fan) fetch(s *segment) error {
	q := query{method: http.MethodGet, path: f.src.path, object: f.desc, accept: f.accept, offset: s.start, end: s.end, part: true, eager: f.eager, stall: segmentStall}
	a, err := f.repo.exchange(f.ctx, f.src.ep, q)
	if err != nil {
		return err
	}
	defer a.Close()
	if a.StatusCode != http.StatusPartialContent || !a.isRange(s.start, s.end, f.size) {
		return fmt.Errorf("status %d, Content-Range %q of %d bytes: %w", a.StatusCode, printable(a.Header.Get("Content-Range")), a.ContentLength, errdefs.ErrDataLoss)
	}
	for n := int64(0); n < s.end-s.start; {
		m, err := a.body.Read(s.buf[n : s.end-s.start])
		n += int64(m)
		s.filled.Store(n)
		select {
		case s.more <- struct{}{}:
		default:
		}
		if err != nil && n < s.end-s.start {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	var extra [1]byte
	io.ReadFull(a.body, extra[:]) // the end, so that the connection can be used again
	return nil
}

// isRange reports whether a brings exactly the bytes from start to end of a blob of that size.
func (a *answer) isRange(start, end, size int64) bool {
	from, of, err := contentRange(a.Header.Get("Content-Range"))
	return err == nil && from == start && (of == size || of < 0) && a.ContentLength == end-start
}

// Read implements io.Reader.
func (f *fan) Read(p []byte) (int, error) {
	for len(f.queue) > 0 {
		s := f.queue[0]
		if s.given == s.end-s.start {
			<-s.done
			f.queue = f.queue[1:]
			if f.next < f.size {
				f.start(s.buf)
				f.widen()
			} else {
				f.repo.client.pool.put(s.buf)
			}
			continue
		}
		if filled := s.filled.Load(); s.given < filled {
			n := copy(p, s.buf[s.given:filled])
			s.given += int64(n)
			return n, nil
		}
		select {
		case <-s.more:
		case <-s.done:
			if s.err != nil && s.given == s.filled.Load() {
				if f.ctx.Err() == nil {
					f.repo.setSingle(f.src.host())
				}
				return 0, &trouble{s.err}
			}
		}
	}
	return 0, io.EOF
}

var errFanClosed = errors.New("the blob is closed")

// Close implements io.Closer. It waits for every segment, since others get their buffers.
func (f *fan) Close() error {
	f.cancel(errFanClosed)
	f.all.Wait()
	for _, s := range f.queue {
		f.repo.client.pool.put(s.buf)
	}
	f.queue = nil
	return nil
}
