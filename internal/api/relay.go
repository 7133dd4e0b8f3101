package api

import (
	"sync"
	"time"
)

// relayPause is how long a relay waits after it has sent what there was. An
// eye sees no more than twenty steps a second.
const relayPause = 50 * time.Millisecond

// relay carries news from a pull, which must not wait, to a client, which
// may be slow. It keeps the latest under each key and forgets what was before
// it, so it holds no more than the pull has blobs and documents; and news are
// sent in the order of the first change of their keys.
type relay[T any] struct {
	mu      sync.Mutex
	latest  map[string]T
	changed []string // keys of latest that were not sent yet
	closed  bool

	wake chan struct{} // holds a token when changed is not empty
	end  chan struct{} // closed by close
}

func newRelay[T any]() *relay[T] {
	return &relay[T]{
		latest: make(map[string]T),
		wake:   make(chan struct{}, 1),
		end:    make(chan struct{}),
	}
}

// add takes news. After close they are dropped: layers that are shared with
// another pull go on without this one.
func (r *relay[T]) add(key string, news T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	if _, unsent := r.latest[key]; !unsent {
		r.changed = append(r.changed, key)
	}
	r.latest[key] = news
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// take returns the news that were not sent yet.
func (r *relay[T]) take() []T {
	r.mu.Lock()
	defer r.mu.Unlock()
	news := make([]T, 0, len(r.changed))
	for _, key := range r.changed {
		news = append(news, r.latest[key])
	}
	clear(r.latest)
	r.changed = r.changed[:0]
	return news
}

// close ends run once it has sent everything.
func (r *relay[T]) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	close(r.end)
}

// run sends news until close, or until sending fails.
func (r *relay[T]) run(send func(T) error) error {
	for ended := false; !ended; {
		select {
		case <-r.wake:
		case <-r.end:
			ended = true
		}
		for _, news := range r.take() {
			if err := send(news); err != nil {
				return err
			}
		}
		select {
		case <-time.After(relayPause):
		case <-r.end:
		}
	}
	return nil
}
