package native

import (
	"testing"

	"github.com/holdfast-dev/holdfast/internal/linux/mount/mounttest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/snapshottest"
)

func TestMain(m *testing.M) { mounttest.Main(m) }

var subject = snapshottest.Subject{
	Open: func(root string) (snapshot.Driver, error) { return Open(root, Options{}) },
	Bare: func(i snapshot.Info) bool { return !holds(i.Kind, i.Parent) },
}

func TestDriver(t *testing.T) { snapshottest.Suite(t, subject) }
