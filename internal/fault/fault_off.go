//go:build !fault

// Package fault injects failures at named points in builds tagged `fault`, and is nothing otherwise.
package fault

// Point marks a place where a crash or an error is worth trying. Names are
// `package.step.moment`, constant strings, each used once: test/crash lists
// them from the source and tries every one. Without the build tag the call is
// inlined away.
func Point(name string) error { return nil }
