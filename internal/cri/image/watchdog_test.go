package image

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

func event(layer string, stage pull.Stage, offset int64) pull.Event {
	return pull.Event{Stage: stage, Desc: oci.Descriptor{Digest: digest.FromString(layer)}, Offset: offset}
}

// TestWatchdog plays pulls against the clock. Each step waits and then hears
// an event; the pull must live until the end, or be ended before it.
func TestWatchdog(t *testing.T) {
	type step struct {
		wait time.Duration
		pull.Event
	}
	const minute = time.Minute
	for _, c := range []struct {
		name    string
		timeout time.Duration
		steps   []step
		rest    time.Duration // of silence after the last step
		ends    bool
	}{
		{"bytes in time", 5 * minute, []step{
			{0, event("a", pull.StageFetching, 0)}, {4 * minute, event("a", pull.StageFetching, 1)}, {4 * minute, event("a", pull.StageFetching, 2)},
		}, 4 * minute, false},
		{"silence", 5 * minute, []step{{0, event("a", pull.StageFetching, 0)}}, 5*minute + maxTick, true},
		{"events without bytes", 5 * minute, []step{
			{0, event("a", pull.StageFetching, 7)}, {3 * minute, event("a", pull.StageFetching, 7)}, {3 * minute, event("a", pull.StageFetching, 7)},
		}, 0, true},
		{"another layer begins", 5 * minute, []step{
			{0, event("a", pull.StageFetching, 0)}, {3 * minute, event("b", pull.StageFetching, 0)},
		}, 3 * minute, true},
		{"another layer's bytes", 5 * minute, []step{
			{0, event("a", pull.StageFetching, 0)}, {3 * minute, event("b", pull.StageFetching, 0)}, {minute, event("b", pull.StageFetching, 1)},
		}, 4 * minute, false},
		{"idle", 5 * minute, []step{{0, event("", pull.StageResolving, 0)}, {minute, event("a", pull.StageWaiting, 0)}}, time.Hour, false},
		{"idle again", 5 * minute, []step{{0, event("a", pull.StageFetching, 0)}, {minute, event("a", pull.StageCommit, 9)}}, time.Hour, false},
		{"active again", 5 * minute, []step{
			{0, event("a", pull.StageFetching, 0)}, {minute, event("a", pull.StageComplete, 9)}, {time.Hour, event("b", pull.StageFetching, 0)},
		}, 4 * minute, false},
		{"begun anew", 5 * minute, []step{
			{0, event("a", pull.StageFetching, 9)}, {4 * minute, event("a", pull.StageFetching, 0)},
		}, 4 * minute, false},
		{"short", time.Second, []step{{0, event("a", pull.StageFetching, 0)}}, 1500 * time.Millisecond, true},
		{"short, in time", time.Second, []step{{0, event("a", pull.StageFetching, 0)}}, 900 * time.Millisecond, false},
		{"off", 0, []step{{0, event("a", pull.StageFetching, 0)}}, 24 * time.Hour, false},
		{"one nanosecond", 1, []step{{0, event("a", pull.StageFetching, 0)}}, time.Microsecond, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, w := newWatchdog(t.Context(), c.timeout)
				for _, s := range c.steps {
					time.Sleep(s.wait)
					w.hear(s.Event)
				}
				time.Sleep(c.rest)
				synctest.Wait()
				if ended := ctx.Err() != nil; ended != c.ends {
					t.Errorf("ended %t, want %t: %v", ended, c.ends, context.Cause(ctx))
				}
				if err := context.Cause(ctx); c.ends && (!errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), c.timeout.String())) {
					t.Errorf("ended with %v", err)
				}
				w.stop()
			})
		})
	}
}
