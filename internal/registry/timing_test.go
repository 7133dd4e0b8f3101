package registry_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// TestExchange reads a blob of a registry with TLS and a slow token server: the session hears of a refusal, of the
// login, and of the answer, and a later session needs no login.
func TestExchange(t *testing.T) {
	srv := registrytest.NewTLS(t)
	img := srv.Push("demo", "latest", registrytest.Layer{Data: make([]byte, 1000)})
	srv.Require(registrytest.Auth{User: "me", Password: "secret", Slow: 50 * time.Millisecond})
	layer := img.Layers[0]
	opts := options()
	opts.Hosts = func(context.Context, string) ([]hosts.Host, error) {
		return []hosts.Host{hosts.Host{Scheme: "https", Host: srv.Host(), Path: "/v2", Capabilities: hosts.Everything, CA: []string{srv.CA(t, t.TempDir())}}}, nil
	}
	var mu sync.Mutex
	var all, own []registry.Exchange
	note := func(to *[]registry.Exchange) func(registry.Exchange) {
		return func(e registry.Exchange) {
			mu.Lock()
			defer mu.Unlock()
			*to = append(*to, e)
		}
	}
	opts.Hooks.Exchange = note(&all)
	opts.Credentials = auth.For(srv.Host(), auth.Credential{Username: "me", Password: "secret"})
	client := registry.New(opts)
	s := registry.Session{Hooks: registry.Hooks{Exchange: note(&own)}}
	begun := time.Now()
	if _, _, err := read(t, begin(t, client, srv.Host(), s), layer, 0); err != nil {
		t.Fatal(err)
	}
	if len(own) != 3 || len(all) != 3 {
		t.Fatalf("the session hears of %+v, the client of %+v", own, all)
	}
	for i, e := range own {
		if e.Host != srv.Host() || e.Object != layer.Digest.String() || e.Err != nil || e.Start.Before(begun) || e.End().After(time.Now()) {
			t.Errorf("exchange %d: %+v", i, e)
		}
	}
	refused, found, answered := own[0], own[1], own[2]
	if refused.Status != 401 || refused.Connect <= 0 || refused.TLS <= 0 || refused.Wait <= 0 {
		t.Errorf("refused: %+v", refused)
	}
	if found.Status != 0 || found.Login <= 0 {
		t.Errorf("credentials: %+v", found)
	}
	if answered.Status != 200 || answered.Login < 50*time.Millisecond || answered.Connect != 0 || answered.TLS != 0 || answered.Wait <= 0 {
		t.Errorf("answered: %+v", answered)
	}
	if _, _, err := read(t, begin(t, client, srv.Host(), registry.Session{}), layer, 0); err != nil {
		t.Fatal(err)
	}
	if last := all[len(all)-1]; len(all) != 4 || len(own) != 3 || last.Login > 50*time.Millisecond {
		t.Errorf("%d exchanges, %d of the first session; the last is %+v", len(all), len(own), last)
	}
}

// TestExchangeWithoutAnswer times the wait for a connection that doesn't come.
func TestExchangeWithoutAnswer(t *testing.T) {
	_, img, _ := demo(t)
	hole := registrytest.BlackHole(t)
	opts := options()
	opts.Dial = 100 * time.Millisecond
	opts.Hosts = mirrors(hole)
	var got []registry.Exchange
	opts.Hooks.Exchange = func(e registry.Exchange) { got = append(got, e) }
	if _, _, err := read(t, session(t, opts, hole, registry.Session{}), img.Layers[0], 0); err == nil {
		t.Fatal("a black hole answers")
	}
	if len(got) != 1 || got[0].Status != 0 || got[0].Err == nil || got[0].Connect < 50*time.Millisecond || got[0].Wait != 0 {
		t.Errorf("%+v", got)
	}
}
