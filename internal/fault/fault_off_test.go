//go:build !fault

package fault

import "testing"

func TestPointIsNothing(t *testing.T) {
	t.Setenv("HOLDFAST_FAULT", "a.b.c=error")
	if err := Point("a.b.c"); err != nil {
		t.Errorf("a build without the tag fails on purpose: %v", err)
	}
}
