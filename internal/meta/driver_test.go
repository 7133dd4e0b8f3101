package meta

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// memory is a driver without a disk: what meta sees of a driver, and faults
// where a real one meets the machine.
type memory struct {
	mu       sync.Mutex
	all      map[string]snapshot.Info
	traits   snapshot.Traits
	supplies map[string]string // target -> backend key that Create gives instead, as a remote snapshotter
	broken   error             // Remove fails with it
	cleanups int
}

func newMemory() *memory {
	return &memory{all: make(map[string]snapshot.Info), traits: snapshot.Traits{Rebase: true}}
}

func (m *memory) Traits() snapshot.Traits { return m.traits }

func (m *memory) get(key string) (snapshot.Info, error) {
	in, ok := m.all[key]
	if !ok {
		return in, fmt.Errorf("driver key %s: %w", key, errdefs.ErrNotFound)
	}
	in.Labels = maps.Clone(in.Labels)
	return in, nil
}

func (m *memory) Stat(_ context.Context, key string) (snapshot.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.get(key)
}

func (m *memory) Update(_ context.Context, key string, labels map[string]string, fields ...string) (snapshot.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	in, err := m.get(key)
	if err != nil {
		return in, err
	}
	if in.Labels, err = updateLabels(in.Labels, labels, fields); err != nil {
		return in, err
	}
	m.all[key] = in
	return in, nil
}

func (m *memory) Usage(_ context.Context, key string) (snapshot.Usage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, err := m.get(key)
	return snapshot.Usage{Inodes: 1, Size: 42}, err
}

func (m *memory) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, err := m.get(key)
	return []mount.Mount{{Type: "bind", Source: "/" + key}}, err
}

func (m *memory) Create(_ context.Context, news ...snapshot.New) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range news {
		if backend := m.supplies[n.Labels[labelSnapshotRef]]; backend != "" {
			m.all[backend] = snapshot.Info{Key: backend, Parent: n.Parent, Kind: snapshot.KindCommitted, Labels: n.Labels}
			return fmt.Errorf("supplied: %w", errdefs.ErrAlreadyExists)
		}
		if _, ok := m.all[n.Key]; ok {
			return fmt.Errorf("driver key %s: %w", n.Key, errdefs.ErrAlreadyExists)
		}
		if n.Parent != "" && m.all[n.Parent].Kind != snapshot.KindCommitted {
			return fmt.Errorf("driver parent %s: %w", n.Parent, errdefs.ErrNotFound)
		}
		m.all[n.Key] = snapshot.Info{Key: n.Key, Parent: n.Parent, Kind: n.Kind, Labels: n.Labels, Created: time.Now()}
	}
	return nil
}

func (m *memory) Dir(_ context.Context, key string) (string, error) { return "/" + key, nil }

func (m *memory) Parents(_ context.Context, key string) (parents []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for p := m.all[key].Parent; p != ""; p = m.all[p].Parent {
		parents = append(parents, "/"+p)
	}
	return parents, nil
}

func (m *memory) CommitChain(_ context.Context, steps ...snapshot.Commit) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range steps {
		in, err := m.get(s.Key)
		if err != nil {
			return err
		}
		if s.Parent != "" {
			if in.Parent != "" || !m.traits.Rebase || m.all[s.Parent].Kind != snapshot.KindCommitted {
				return fmt.Errorf("rebase %s: %w", s.Key, errdefs.ErrInvalidArgument)
			}
			in.Parent = s.Parent
		}
		delete(m.all, s.Key)
		in.Key, in.Kind, in.Labels = s.Name, snapshot.KindCommitted, s.Labels
		m.all[s.Name] = in
	}
	return nil
}

func (m *memory) Remove(_ context.Context, key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken != nil {
		return m.broken
	}
	if _, err := m.get(key); err != nil {
		return err
	}
	for _, in := range m.all {
		if in.Parent == key {
			return fmt.Errorf("driver key %s has a child: %w", key, errdefs.ErrFailedPrecondition)
		}
	}
	delete(m.all, key)
	return nil
}

func (m *memory) Walk(context.Context) iter.Seq2[snapshot.Info, error] {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := maps.Clone(m.all)
	return func(yield func(snapshot.Info, error) bool) {
		for _, key := range slices.Sorted(maps.Keys(all)) {
			if !yield(all[key], nil) {
				return
			}
		}
	}
}

func (m *memory) Cleanup(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cleanups++
	return nil
}

func (m *memory) Close() error { return nil }

// keys lists what the driver holds.
func (m *memory) keys() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.all))
}

// put is what a crash left, or took.
func (m *memory) put(key, parent string, kind snapshot.Kind) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all[key] = snapshot.Info{Key: key, Parent: parent, Kind: kind}
}

func (m *memory) lose(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.all, key)
}

func (m *memory) breakRemove(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.broken = err
}

var errBroken = errors.New("the disk is broken")
