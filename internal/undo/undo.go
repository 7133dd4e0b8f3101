// Package undo rolls back a half-done operation, newest step first.
package undo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Timeout bounds everything one Stack undoes.
const Timeout = 30 * time.Second

// Stack collects the inverse of each step that an operation has taken. The
// zero value is ready to use:
//
//	var u undo.Stack
//	defer u.Unwind(&err)
//	... do a step ...
//	u.Add("remove directory", func(context.Context) error { return os.Remove(dir) })
type Stack struct {
	steps []step
}

type step struct {
	name string
	undo func(context.Context) error
}

// Add remembers how to take back the step that has just succeeded. The
// context given to f has a deadline of its own: the caller's cancellation is
// often the very reason for undoing.
func (s *Stack) Add(name string, f func(context.Context) error) {
	s.steps = append(s.steps, step{name, f})
}

// Keep forgets all steps: what was done stays.
func (s *Stack) Keep() { s.steps = nil }

// Unwind does nothing when *err is nil. Otherwise it undoes every step,
// newest first, going on after a step that fails and joining its error to
// *err.
func (s *Stack) Unwind(err *error) {
	if *err == nil {
		s.steps = nil
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	for i := len(s.steps) - 1; i >= 0; i-- {
		if e := s.steps[i].undo(ctx); e != nil {
			*err = errors.Join(*err, fmt.Errorf("undo: %s: %w", s.steps[i].name, e))
		}
	}
	s.steps = nil
}
