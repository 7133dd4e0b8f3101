package gc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/meta"
)

// clinic runs a GC and writes down when it collects, in milliseconds since
// the start of the test.
type clinic struct {
	*GC
	start  func() // Run begins, with the first saw at the latest
	begin  time.Time
	mu     sync.Mutex
	at     []int64
	result func(n int) (meta.Collected, error) // of the n-th collection; nil: a short pause
	takes  time.Duration
}

func inClinic(t *testing.T, opts Options, test func(t *testing.T, c *clinic)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := &clinic{GC: New(opts), begin: time.Now()}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		c.start = sync.OnceFunc(func() {
			go func() {
				c.Run(ctx, c.collect)
				close(done)
			}()
		})
		test(t, c)
		cancel()
		<-done
	})
}

func (c *clinic) collect(context.Context) (meta.Collected, error) {
	c.mu.Lock()
	c.at = append(c.at, time.Since(c.begin).Milliseconds())
	n := len(c.at)
	c.mu.Unlock()
	time.Sleep(c.takes)
	if c.result != nil {
		return c.result(n)
	}
	return meta.Collected{Pause: time.Millisecond}, nil
}

// saw waits until the time is ms after the start, and compares.
func (c *clinic) saw(t *testing.T, ms int64, want ...int64) {
	t.Helper()
	c.start()
	time.Sleep(time.Until(c.begin.Add(time.Duration(ms) * time.Millisecond)))
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if fmt.Sprint(c.at) != fmt.Sprint(want) {
		t.Fatalf("collected at %v, want %v", c.at, want)
	}
}

// The interval after a collection that takes less than 5 ms: 5/0.02 - 5.
const interval = 245

func TestIdle(t *testing.T) {
	inClinic(t, Options{}, func(t *testing.T, c *clinic) {
		c.saw(t, 99)
		c.saw(t, time.Hour.Milliseconds(), 100) // and never again
	})
}

func TestNoStartup(t *testing.T) {
	inClinic(t, Options{StartupDelay: -1}, func(t *testing.T, c *clinic) {
		c.saw(t, 5000)
		c.Changed(false)
		c.saw(t, 6000)
		c.Changed(true)
		c.saw(t, 7000, 6000)
	})
}

func TestDeletions(t *testing.T) {
	inClinic(t, Options{}, func(t *testing.T, c *clinic) {
		c.Changed(true) // before the first
		c.saw(t, 110, 100)
		c.Changed(true) // waits for the interval
		c.saw(t, 100+interval-1, 100)
		c.saw(t, 100+interval, 100, 100+interval)
		c.saw(t, 5000, 100, 100+interval)
		c.Changed(true) // the interval is long over
		c.saw(t, 5000, 100, 100+interval, 5000)
	})
}

func TestMutations(t *testing.T) {
	inClinic(t, Options{MutationThreshold: 3}, func(t *testing.T, c *clinic) {
		c.saw(t, 1000, 100)
		c.Changed(false)
		c.Changed(false)
		c.saw(t, 2000, 100)
		c.Changed(false)
		c.saw(t, 2000, 100, 2000)
	})
	inClinic(t, Options{MutationThreshold: -1}, func(t *testing.T, c *clinic) {
		for range 1000 {
			c.Changed(false)
		}
		c.saw(t, 9000, 100)
	})
}

func TestDeletionThreshold(t *testing.T) {
	inClinic(t, Options{DeletionThreshold: 2, ScheduleDelay: 10 * time.Millisecond}, func(t *testing.T, c *clinic) {
		c.saw(t, 101, 100)
		c.Changed(true)
		c.saw(t, 105, 100)
		c.Changed(true)
		c.saw(t, 115, 100, 115) // sooner than the interval
	})
}

func TestPauseThreshold(t *testing.T) {
	for _, tc := range []struct {
		threshold float64
		pause     time.Duration
		want      int64
	}{
		{0, 20 * time.Millisecond, 980},
		{0.5, 20 * time.Millisecond, 20},
		{0.9, 20 * time.Millisecond, 20},
		{-1, 20 * time.Millisecond, 1000},
	} {
		inClinic(t, Options{PauseThreshold: tc.threshold}, func(t *testing.T, c *clinic) {
			c.result = func(int) (meta.Collected, error) { return meta.Collected{Pause: tc.pause}, nil }
			c.saw(t, 100, 100)
			c.Changed(true)
			c.saw(t, 100+tc.want-1, 100)
			c.saw(t, 100+tc.want, 100, 100+tc.want)
		})
	}
}

// TestScheduleAndWait: the collection begins after the call, also when one is
// running then, and those who wait share it.
func TestScheduleAndWait(t *testing.T) {
	inClinic(t, Options{StartupDelay: -1}, func(t *testing.T, c *clinic) {
		c.takes = 50 * time.Millisecond
		c.result = func(n int) (meta.Collected, error) { return meta.Collected{Blobs: n}, nil }
		c.start()
		results := make(chan int, 3)
		wait := func() {
			got, err := c.ScheduleAndWait(t.Context())
			if err != nil {
				t.Error(err)
			}
			results <- got.Blobs
		}
		go wait()
		time.Sleep(10 * time.Millisecond)
		go wait()
		go wait()
		if a, b, d := <-results, <-results, <-results; a != 1 || b != 2 || d != 2 {
			t.Errorf("waited for %d, %d, %d", a, b, d)
		}
		c.saw(t, 1000, 0, 50)
	})
}

func TestWaiterGivesUp(t *testing.T) {
	inClinic(t, Options{ScheduleDelay: time.Minute, StartupDelay: -1}, func(t *testing.T, c *clinic) {
		c.start()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.ScheduleAndWait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		c.saw(t, time.Hour.Milliseconds(), time.Minute.Milliseconds())
	})
}

func TestTrigger(t *testing.T) {
	inClinic(t, Options{StartupDelay: -1}, func(t *testing.T, c *clinic) {
		c.saw(t, 1000)
		c.Trigger()
		c.Trigger()
		c.saw(t, 2000, 1000)
	})
}

// TestFailure: waiters are told, and it is tried again after the interval and
// a second, without hurry.
func TestFailure(t *testing.T) {
	boom := errors.New("boom")
	told := 0
	inClinic(t, Options{StartupDelay: -1, Collected: func(_ meta.Collected, err error) {
		if errors.Is(err, boom) {
			told++
		}
	}}, func(t *testing.T, c *clinic) {
		c.result = func(n int) (meta.Collected, error) {
			if n <= 2 {
				return meta.Collected{}, boom
			}
			return meta.Collected{}, nil
		}
		c.start()
		c.Changed(true)
		if _, err := c.ScheduleAndWait(t.Context()); !errors.Is(err, boom) {
			t.Errorf("got %v", err)
		}
		c.saw(t, 60_000, 0, 2000, 5000)
	})
	if told != 2 {
		t.Errorf("told %d times", told)
	}
}

// TestLeft: what couldn't be removed is tried again, less and less often.
func TestLeft(t *testing.T) {
	inClinic(t, Options{}, func(t *testing.T, c *clinic) {
		c.result = func(n int) (meta.Collected, error) {
			if n < 5 {
				return meta.Collected{Left: 1}, nil
			}
			return meta.Collected{}, nil
		}
		c.saw(t, time.Hour.Milliseconds(), 100, 1100, 3100, 7100, 15100)
	})
	p := pace{retry: retryMost}
	p.ended(meta.Collected{Left: 1}, nil, 1)
	if p.retry != retryMost {
		t.Errorf("waits %v", p.retry)
	}
}

// TestEnd: nobody waits for what never comes.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Options{ScheduleDelay: time.Hour, StartupDelay: -1})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go g.Run(ctx, func(context.Context) (meta.Collected, error) { return meta.Collected{}, nil })
		go func() {
			_, err := g.ScheduleAndWait(t.Context())
			done <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-done; !errdefs.IsUnavailable(err) {
			t.Errorf("got %v", err)
		}
		if _, err := g.ScheduleAndWait(t.Context()); !errdefs.IsUnavailable(err) {
			t.Errorf("got %v", err)
		}
	})
}
