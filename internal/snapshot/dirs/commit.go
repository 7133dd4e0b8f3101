package dirs

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/fault"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/index"
)

// CommitChain finishes the directories of active snapshots, bottom first, and
// commits all in one transaction.
func (s *Store) CommitChain(ctx context.Context, steps ...snapshot.Commit) error {
	unlock, err := s.lock(ctx, steps)
	if err != nil {
		return fmt.Errorf("commit snapshots: %w", err)
	}
	defer unlock()
	plan, err := s.plan(steps)
	if err != nil {
		return err
	}
	var committals []index.Committal
	for _, p := range plan {
		usage, err := s.layout.Finish(ctx, s.Path(p.record.ID), p.step, p.parents, p.rebased)
		if err != nil {
			return fmt.Errorf("commit %s: %w", p.step.Key, err)
		}
		committals = append(committals, index.Committal{
			Key: p.step.Key, Name: p.step.Name, Parent: p.step.Parent, Labels: p.step.Labels, Usage: usage,
		})
		if err := fault.Point("snapshot.dirs.commit.finished"); err != nil {
			return err
		}
	}
	return s.index.CommitChain(committals...)
}

// lock takes the keys of all steps, in an order that is everybody's.
func (s *Store) lock(ctx context.Context, steps []snapshot.Commit) (unlock func(), err error) {
	var keys []string
	for _, step := range steps {
		keys = append(keys, step.Key)
	}
	slices.Sort(keys)
	if len(slices.Compact(slices.Clone(keys))) < len(keys) {
		return nil, fmt.Errorf("a snapshot is committed twice in one chain: %w", errdefs.ErrInvalidArgument)
	}
	var held []func()
	unlock = func() {
		for _, u := range held {
			u()
		}
	}
	for _, key := range keys {
		u, err := s.busy.Lock(ctx, key)
		if err != nil {
			unlock()
			return nil, err
		}
		held = append(held, u)
	}
	return unlock, nil
}

type planned struct {
	step    snapshot.Commit
	record  index.Record
	parents []string
	rebased bool
}

// plan finds the parents of every step, which may be earlier steps.
func (s *Store) plan(steps []snapshot.Commit) ([]planned, error) {
	earlier := make(map[string]planned)
	var out []planned
	for _, step := range steps {
		p, err := s.planStep(step, earlier)
		if err != nil {
			return nil, fmt.Errorf("commit %s: %w", step.Key, err)
		}
		earlier[step.Name] = p
		out = append(out, p)
	}
	return out, nil
}

func (s *Store) planStep(step snapshot.Commit, earlier map[string]planned) (planned, error) {
	r, parents, err := s.Chain(step.Key)
	if err != nil {
		return planned{}, err
	}
	p := planned{step: step, record: r, parents: parents}
	if _, err := s.index.Get(step.Name); err == nil {
		return p, fmt.Errorf("snapshot %s: %w", step.Name, errdefs.ErrAlreadyExists)
	}
	if r.Kind != snapshot.KindActive {
		return p, fmt.Errorf("snapshot is not active but %s: %w", r.Kind, errdefs.ErrFailedPrecondition)
	}
	if step.Parent == "" || step.Parent == r.Parent {
		return p, nil
	}
	if r.Parent != "" || !s.layout.Rebase {
		return p, fmt.Errorf("its parent is %q and can't become %q: %w", r.Parent, step.Parent, errdefs.ErrInvalidArgument)
	}
	p.rebased = true
	if e, ok := earlier[step.Parent]; ok {
		p.parents = append([]string{s.Path(e.record.ID)}, e.parents...)
		return p, nil
	}
	parent, above, err := s.Chain(step.Parent)
	if err != nil {
		return p, fmt.Errorf("parent: %w", err)
	}
	if parent.Kind != snapshot.KindCommitted {
		return p, fmt.Errorf("parent %s is not committed: %w", step.Parent, errdefs.ErrFailedPrecondition)
	}
	p.parents = append([]string{s.Path(parent.ID)}, above...)
	return p, nil
}
