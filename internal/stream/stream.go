// Package stream pairs the two ends of a byte stream by its id.
//
// A client opens a stream under an id of its choosing and holds it open; then
// it names the id in another call, whose server takes the other end:
//
//	client ==Stream RPC==> Manager.Open(ns, id) -> End ---- End <- Manager.Take(ns, id) <==other RPC== client
//
// What travels are messages that only the two parties understand. Nothing
// outlives the process.
package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/wire"
)

// Message is one message of a stream.
type Message = wire.Any

// Bounds (inv 10).
const (
	MaxMessage = 1 << 20 // bytes of one message; the parties' own protocol cuts data to 32 KiB
	maxID      = 256     // bytes of an id
	maxQueued  = 64      // messages under way in one direction
	maxFlight  = 1 << 20 // bytes of them, unless it is a single one
)

// Options of a Manager. The zero value works.
type Options struct {
	PerNamespace int           // streams open at a time in one namespace; default 1024
	Unclaimed    time.Duration // how long a stream waits for its second end; default 10 minutes
}

// Manager knows the streams that clients hold open.
type Manager struct {
	opts Options

	mu      sync.Mutex
	streams map[name]*pair
	count   map[string]int // by namespace
	closed  bool
}

type name struct{ namespace, id string }

// New makes a Manager.
func New(opts Options) *Manager {
	if opts.PerNamespace <= 0 {
		opts.PerNamespace = 1024
	}
	if opts.Unclaimed <= 0 {
		opts.Unclaimed = 10 * time.Minute
	}
	return &Manager{opts: opts, streams: make(map[name]*pair), count: make(map[string]int)}
}

// Why a stream ends, for whoever still uses it.
var (
	errOtherEnd  = fmt.Errorf("the other end of the stream is closed: %w", errdefs.ErrAborted)
	errUnclaimed = fmt.Errorf("nobody came for the other end of the stream: %w", context.DeadlineExceeded)
	errStopping  = fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)
	errClosed    = errors.New("this end of the stream is closed")
)

// Open makes a stream and returns the end of the client that holds it open;
// the client's server must close it. errdefs.ErrAlreadyExists if the namespace
// has a stream of that id, ErrResourceExhausted if it has too many,
// ErrInvalidArgument, and ErrUnavailable once the Manager is closed.
func (m *Manager) Open(ns, id string) (*End, error) {
	if id == "" || len(id) > maxID {
		return nil, fmt.Errorf("the id of a stream must have 1 to %d bytes: %w", maxID, errdefs.ErrInvalidArgument)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	key := name{ns, id}
	switch {
	case m.closed:
		return nil, errStopping
	case m.streams[key] != nil:
		return nil, fmt.Errorf("stream %q: %w", id, errdefs.ErrAlreadyExists)
	case m.count[ns] >= m.opts.PerNamespace:
		return nil, fmt.Errorf("namespace %q has %d open streams, which is as many as it may have: close some: %w", ns, m.opts.PerNamespace, errdefs.ErrResourceExhausted)
	}
	p := &pair{over: make(chan struct{}), gone: make(chan struct{})}
	p.ends.Store(2)
	p.forget = func() { m.forget(key, p) }
	p.unclaimed = time.AfterFunc(m.opts.Unclaimed, func() { p.end(errUnclaimed) })
	m.streams[key] = p
	m.count[ns]++
	there, back := newQueue(), newQueue()
	p.free = &End{pair: p, in: there, out: back}
	return &End{pair: p, in: back, out: there}, nil
}

// Take returns the other end of a stream that a client holds open; the caller
// must close it. Only one can have it. errdefs.ErrNotFound,
// ErrFailedPrecondition if it is taken.
func (m *Manager) Take(ns, id string) (*End, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.streams[name{ns, id}]
	if p == nil {
		return nil, fmt.Errorf("stream %q: %w", id, errdefs.ErrNotFound)
	}
	if p.free == nil {
		return nil, fmt.Errorf("stream %q is in use by another call: %w", id, errdefs.ErrFailedPrecondition)
	}
	e := p.free
	p.free = nil
	p.unclaimed.Stop()
	return e, nil
}

func (m *Manager) forget(key name, p *pair) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.unclaimed.Stop()
	delete(m.streams, key)
	if m.count[key.namespace]--; m.count[key.namespace] == 0 {
		delete(m.count, key.namespace)
	}
}

// Close ends all streams, and lets nobody open more.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	var all []*pair
	for _, p := range m.streams {
		all = append(all, p)
	}
	m.mu.Unlock()
	for _, p := range all {
		p.end(errStopping)
	}
	return nil
}

// pair is what the two ends have in common.
//
//	open: one end free --Take--> both in use --either end closes--> over
//	          \_______________ unclaimed for too long, Manager.Close ____/
type pair struct {
	free      *End // the one that nobody has taken; guarded by Manager.mu
	unclaimed *time.Timer
	forget    func()

	once sync.Once
	err  error // why it is over; set before over is closed
	over chan struct{}

	ends atomic.Int32  // that are not closed
	gone chan struct{} // closed when ends is 0
}

func (p *pair) end(err error) {
	p.once.Do(func() {
		p.forget()
		p.err = err
		close(p.over)
	})
}

// End is one end of a stream. One goroutine may send while another receives.
type End struct {
	pair    *pair
	in, out *queue
	closed  sync.Once
}

// Send passes a message to the other end. It waits while too much is under
// way. errdefs.ErrAborted if the other end is closed, ErrResourceExhausted for
// a message that is too large.
func (e *End) Send(ctx context.Context, msg Message) error {
	if n := size(msg); n > MaxMessage {
		return fmt.Errorf("a message of %d bytes, more than %d: %w", n, MaxMessage, errdefs.ErrResourceExhausted)
	}
	select {
	case <-e.pair.over:
		return e.pair.err
	default:
	}
	for {
		room, err := e.out.put(msg)
		if room == nil {
			return err
		}
		select {
		case <-room:
		case <-e.pair.over:
			return e.pair.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Recv returns the next message of the other end, or io.EOF if that has said
// that there will be none. What was sent before the stream ended still comes.
func (e *End) Recv(ctx context.Context) (Message, error) {
	for {
		msg, more, err := e.in.get()
		if more == nil {
			return msg, err
		}
		select {
		case <-more:
		case <-e.pair.over:
			// The last messages may have come while nobody looked.
			if msg, more, err := e.in.get(); more == nil {
				return msg, err
			}
			return Message{}, e.pair.err
		case <-ctx.Done():
			return Message{}, context.Cause(ctx)
		}
	}
}

// CloseSend says that this end sends no more; it can still receive.
func (e *End) CloseSend() { e.out.finish() }

// Close ends the stream in both directions. The other end can still receive
// what is under way, and io.EOF after it if this end was the one that Close
// was called on first.
func (e *End) Close() {
	e.closed.Do(func() {
		e.out.finish()
		e.pair.end(errOtherEnd)
		if e.pair.ends.Add(-1) == 0 {
			close(e.pair.gone)
		}
	})
}

// Over is closed when either end is, or the stream was ended. See Err.
func (e *End) Over() <-chan struct{} { return e.pair.over }

// Gone is closed when both ends are: what was sent has been received, or never
// will be.
func (e *End) Gone() <-chan struct{} { return e.pair.gone }

// Err says why a stream that is over was ended; nil if an end was closed.
func (e *End) Err() error {
	select {
	case <-e.pair.over:
	default:
		return nil
	}
	if e.pair.err == errOtherEnd {
		return nil
	}
	return e.pair.err
}

func size(msg Message) int { return len(msg.TypeURL) + len(msg.Value) }

// queue holds the messages that are under way in one direction.
type queue struct {
	mu       sync.Mutex
	msgs     []Message
	bytes    int
	finished bool
	room     chan struct{} // holds a token when something was taken
	more     chan struct{} // holds a token when something was put
}

func newQueue() *queue {
	return &queue{room: make(chan struct{}, 1), more: make(chan struct{}, 1)}
}

// put adds a message, or returns what to wait for before another try.
func (q *queue) put(msg Message) (room <-chan struct{}, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.finished {
		return nil, fmt.Errorf("send: %w: %w", errClosed, errdefs.ErrFailedPrecondition)
	}
	if len(q.msgs) >= maxQueued || len(q.msgs) > 0 && q.bytes+size(msg) > maxFlight {
		return q.room, nil
	}
	q.msgs = append(q.msgs, msg)
	q.bytes += size(msg)
	signal(q.more)
	return nil, nil
}

// get takes a message out, or returns what to wait for before another try.
func (q *queue) get() (msg Message, more <-chan struct{}, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.msgs) == 0 {
		if q.finished {
			return Message{}, nil, io.EOF
		}
		return Message{}, q.more, nil
	}
	msg = q.msgs[0]
	q.msgs[0] = Message{}
	q.msgs = q.msgs[1:]
	q.bytes -= size(msg)
	signal(q.room)
	return msg, nil, nil
}

// finish says that nothing more is put.
func (q *queue) finish() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.finished = true
	signal(q.more)
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
