package meta

import (
	"context"
	"sync"

	"github.com/holdfast-dev/holdfast/internal/keylock"
	"github.com/opencontainers/go-digest"
)

// Bytes and records are made at different times, the bytes first (inv 1). In
// between nothing in the file protects them, so they are pinned in memory:
// removal skips what is pinned.
//
// Removal of one thing is: lock its name, see that it isn't pinned, see in a
// read transaction begun after that that no record in any namespace names it,
// remove it, unlock. That order matters: a pin is released only after the
// record is committed, so what isn't pinned any more is seen in the record.
// Whoever makes a new thing pins it before its first byte. Whoever relies on
// one that is there already locks it, sees that it is still there, pins it, and unlocks.

// pins counts the operations that need a thing which no record names yet.
// The zero value is ready.
type pins struct {
	locks keylock.Locks[string]
	mu    sync.Mutex
	count map[string]int
}

// Names of things. They are keys of pins and of its locks.
func blobPin(dgst digest.Digest) string         { return "content/" + string(dgst) }
func ingestPin(backend string) string           { return "ingest/" + backend }
func snapshotPin(driver, backend string) string { return "snapshot/" + driver + "/" + backend }

// pin holds names until unpin, which may be called more than once.
func (p *pins) pin(names ...string) (unpin func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.count == nil {
		p.count = make(map[string]int)
	}
	for _, name := range names {
		p.count[name]++
	}
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, name := range names {
			if p.count[name]--; p.count[name] == 0 {
				delete(p.count, name)
			}
		}
	})
}

// pinExisting pins what there says is there, under the lock that removal
// takes; when there fails nothing is pinned.
func (p *pins) pinExisting(ctx context.Context, name string, there func() error) (unpin func(), err error) {
	unlock, err := p.locks.Lock(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := there(); err != nil {
		return nil, err
	}
	return p.pin(name), nil
}

func (p *pins) pinned(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count[name] > 0
}
