//go:build fault

// Package fault injects failures at named points in builds tagged `fault`, and is nothing otherwise.
package fault

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Env is the environment variable that says what to inject:
// `name=action[,name=action...]` with the actions `kill` (SIGKILL to this
// process), `error`, and `delay:<duration>`. `name#n=action` acts at the n-th
// time (from 1) that the point is passed, and otherwise at every time.
const Env = "HOLDFAST_FAULT"

type rule struct {
	action string
	at     int
	seen   int
}

var (
	once  sync.Once
	mu    sync.Mutex
	rules map[string]*rule
)

func load() {
	rules = make(map[string]*rule)
	for part := range strings.SplitSeq(os.Getenv(Env), ",") {
		name, action, ok := strings.Cut(part, "=")
		if !ok {
			continue
		}
		r := &rule{action: action}
		if n, at, ok := strings.Cut(name, "#"); ok {
			name = n
			r.at, _ = strconv.Atoi(at)
		}
		rules[name] = r
	}
}

// Point does what Env asks for at this name: nothing, an error, a delay, or
// the end of the process as by `kill -9`.
func Point(name string) error {
	once.Do(load)
	mu.Lock()
	r := rules[name]
	if r != nil {
		r.seen++
	}
	act := r != nil && (r.at == 0 || r.at == r.seen)
	mu.Unlock()
	if !act {
		return nil
	}
	switch {
	case r.action == "kill":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case r.action == "error":
		return fmt.Errorf("fault injected at %s", name)
	case strings.HasPrefix(r.action, "delay:"):
		d, _ := time.ParseDuration(strings.TrimPrefix(r.action, "delay:"))
		time.Sleep(d)
	}
	return nil
}
