package undo

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestUnwindRunsNewestFirstAndJoinsErrors(t *testing.T) {
	broken, stuck := errors.New("broken"), errors.New("stuck")
	var done []string
	op := func() (err error) {
		var u Stack
		defer u.Unwind(&err)
		u.Add("one", func(context.Context) error { done = append(done, "one"); return nil })
		u.Add("two", func(context.Context) error { done = append(done, "two"); return stuck })
		return broken
	}
	err := op()
	if !errors.Is(err, broken) || !errors.Is(err, stuck) {
		t.Errorf("err = %v, want both the failure and the failed undo", err)
	}
	if !slices.Equal(done, []string{"two", "one"}) {
		t.Errorf("undone %v, want newest first", done)
	}
}

func TestUnwindKeepsASuccess(t *testing.T) {
	op := func() (err error) {
		var u Stack
		defer u.Unwind(&err)
		u.Add("one", func(context.Context) error { t.Error("undone after success"); return nil })
		return nil
	}
	if err := op(); err != nil {
		t.Fatal(err)
	}
}

func TestKeepForgetsEarlierSteps(t *testing.T) {
	op := func() (err error) {
		var u Stack
		defer u.Unwind(&err)
		u.Add("one", func(context.Context) error { t.Error("undone after Keep"); return nil })
		u.Keep()
		return errors.New("later")
	}
	if err := op(); err == nil {
		t.Fatal("error lost")
	}
}
