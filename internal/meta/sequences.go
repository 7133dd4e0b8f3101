package meta

import (
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// A snapshot's key in its driver is <ns>/<seq>/<key>. The driver makes it
// before meta.db records it, and bolt takes NextSequence back when a
// transaction doesn't commit: a crash between the two would hand the same
// number out again. So numbers are reserved durably, in blocks, and handed out
// from memory. What is left of a block at the end is never used; gaps are fine.

// reserveBlock is how many numbers one transaction reserves at least.
const reserveBlock = 64

// maxReserve bounds what one call may reserve.
const maxReserve = 1 << 16

// sequences holds the numbers that are reserved and not used, by namespace
// and driver. The zero value is ready.
type sequences struct {
	mu   sync.Mutex
	free map[pool][]uint64
	high map[pool]uint64 // never hand out below: a deleted namespace begins again at 0
}

type pool struct{ ns, driver string }

// take returns n numbers, or none when there are fewer.
func (s *sequences) take(p pool, n int) []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.free[p]) < n {
		return nil
	}
	taken := s.free[p][:n:n]
	s.free[p] = s.free[p][n:]
	return taken
}

// state returns how many numbers are free, and the highest ever reserved.
func (s *sequences) state(p pool) (free int, high uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.free[p]), s.high[p]
}

// add makes the n numbers after base free.
func (s *sequences) add(p pool, base uint64, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.free == nil {
		s.free = make(map[pool][]uint64)
		s.high = make(map[pool]uint64)
	}
	for i := range uint64(n) {
		s.free[p] = append(s.free[p], base+1+i)
	}
	s.high[p] = base + uint64(n)
}

// forget drops what is reserved in a namespace that is deleted.
func (s *sequences) forget(ns string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.free {
		if p.ns == ns {
			delete(s.free, p)
		}
	}
}

// ReserveKeys sees to it that n snapshots of driver can be created without a
// further transaction, unless others take the numbers first.
func (tx *Tx) ReserveKeys(driver string, n int) error {
	if n > maxReserve {
		return fmt.Errorf("reserve %d snapshot keys: more than %d: %w", n, maxReserve, errdefs.ErrInvalidArgument)
	}
	p := pool{tx.sp.ns, driver}
	free, high := tx.sp.db.sequences.state(p)
	if free >= n {
		return nil
	}
	b, err := tx.v1.create(tx.sp.ns, keySnapshots, driver)
	if err != nil {
		return err
	}
	base := max(b.sequence(), high)
	n = max(n, reserveBlock)
	if err := b.setSequence(base + uint64(n)); err != nil {
		return err
	}
	tx.onCommit(func() { tx.sp.db.sequences.add(p, base, n) })
	return nil
}

// backendKey is the name that a driver or the content store knows a
// namespace's key by.
func backendKey(ns string, seq uint64, key string) string {
	return ns + "/" + strconv.FormatUint(seq, 10) + "/" + key
}

// splitBackendKey takes a backendKey apart.
func splitBackendKey(backend string) (ns, key string, ok bool) {
	ns, rest, ok := strings.Cut(backend, "/")
	if !ok {
		return "", "", false
	}
	seq, key, ok := strings.Cut(rest, "/")
	if _, err := strconv.ParseUint(seq, 10, 64); err != nil {
		return "", "", false
	}
	return ns, key, ok
}
