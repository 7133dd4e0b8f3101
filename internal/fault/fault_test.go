//go:build fault

package fault

import (
	"testing"
	"time"
)

func TestPoint(t *testing.T) {
	t.Setenv(Env, "a.b.always=error,a.b.second#2=error,a.b.slow=delay:20ms,nonsense")
	for range 2 {
		if Point("a.b.always") == nil {
			t.Error("no error at a point that always fails")
		}
	}
	if Point("a.b.second") != nil || Point("a.b.second") == nil || Point("a.b.second") != nil {
		t.Error("a point fails at another pass than its second")
	}
	if Point("a.b.other") != nil {
		t.Error("a point fails that nobody named")
	}
	begin := time.Now()
	if err := Point("a.b.slow"); err != nil || time.Since(begin) < 20*time.Millisecond {
		t.Errorf("delay: %v after %v", err, time.Since(begin))
	}
}
