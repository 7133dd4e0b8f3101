//go:build fault

package overlay

import (
	"testing"

	"github.com/holdfast-dev/holdfast/internal/snapshot/snapshottest"
)

func TestCrash(t *testing.T) { snapshottest.Crash(t, subject) }
