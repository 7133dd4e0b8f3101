// Package keylock serialises work per key and honours the context while waiting.
package keylock

import (
	"context"
	"sync"
)

// Locks is a set of mutexes, one per key, that exist only while held or
// waited for. The zero value is ready to use.
type Locks[K comparable] struct {
	mu   sync.Mutex
	held map[K]*lock
}

type lock struct {
	users int           // the holder and all who wait
	free  chan struct{} // holds one token when the lock is free
}

// Lock waits until key is free and takes it, or returns the context's error.
// The returned func frees the key; it must be called exactly once.
func (l *Locks[K]) Lock(ctx context.Context, key K) (unlock func(), err error) {
	k := l.join(key)
	select {
	case <-k.free:
		return func() { k.free <- struct{}{}; l.leave(key, k) }, nil
	default:
	}
	select {
	case <-k.free:
		return func() { k.free <- struct{}{}; l.leave(key, k) }, nil
	case <-ctx.Done():
		l.leave(key, k)
		return nil, context.Cause(ctx)
	}
}

// TryLock takes key if nobody holds it, and reports whether it did.
func (l *Locks[K]) TryLock(key K) (unlock func(), ok bool) {
	k := l.join(key)
	select {
	case <-k.free:
		return func() { k.free <- struct{}{}; l.leave(key, k) }, true
	default:
		l.leave(key, k)
		return nil, false
	}
}

func (l *Locks[K]) join(key K) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == nil {
		l.held = make(map[K]*lock)
	}
	k := l.held[key]
	if k == nil {
		k = &lock{free: make(chan struct{}, 1)}
		k.free <- struct{}{}
		l.held[key] = k
	}
	k.users++
	return k
}

func (l *Locks[K]) leave(key K, k *lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.users--; k.users == 0 {
		delete(l.held, key)
	}
}
