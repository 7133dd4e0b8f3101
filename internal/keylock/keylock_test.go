package keylock

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestLockSerialisesOneKeyOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Locks[string]
		unlock, err := l.Lock(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if free, ok := l.TryLock("b"); !ok {
			t.Error("another key is taken too")
		} else {
			free()
		}
		got := false
		go func() {
			free, err := l.Lock(t.Context(), "a")
			if err != nil {
				t.Error(err)
				return
			}
			got = true
			free()
		}()
		synctest.Wait()
		if got {
			t.Error("second holder before the first let go")
		}
		unlock()
		synctest.Wait()
		if !got {
			t.Error("waiter not woken")
		}
		if len(l.held) != 0 {
			t.Errorf("%d locks left behind", len(l.held))
		}
	})
}

func TestLockGivesUpWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Locks[int]
		unlock, _ := l.Lock(t.Context(), 1)
		cause := errors.New("caller left")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		if _, err := l.Lock(ctx, 1); !errors.Is(err, cause) {
			t.Errorf("err = %v, want the cause", err)
		}
		if _, ok := l.TryLock(1); ok {
			t.Error("lock taken twice")
		}
		unlock()
		if len(l.held) != 0 {
			t.Errorf("%d locks left behind", len(l.held))
		}
	})
}
