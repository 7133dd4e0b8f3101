package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

func text(s string) Message { return Message{TypeURL: "text", Value: []byte(s)} }

// open makes a stream and takes its other end.
func open(t *testing.T, m *Manager, id string) (near, far *End) {
	t.Helper()
	near, err := m.Open("ns", id)
	if err != nil {
		t.Fatal(err)
	}
	far, err = m.Take("ns", id)
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}

func send(t *testing.T, e *End, s string) {
	t.Helper()
	if err := e.Send(t.Context(), text(s)); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, e *End, s string) {
	t.Helper()
	if msg, err := e.Recv(t.Context()); err != nil || string(msg.Value) != s {
		t.Errorf("received %q (%v), want %q", msg.Value, err, s)
	}
}

func wantErr(t *testing.T, e *End, kind error) {
	t.Helper()
	if msg, err := e.Recv(t.Context()); !errors.Is(err, kind) {
		t.Errorf("received %q (%v), want %v", msg.Value, err, kind)
	}
}

func TestBothWays(t *testing.T) {
	near, far := open(t, New(Options{}), "s")
	send(t, near, "ping")
	send(t, near, "again")
	want(t, far, "ping")
	send(t, far, "pong")
	want(t, near, "pong")
	want(t, far, "again")
	near.CloseSend()
	wantErr(t, far, io.EOF)
	send(t, far, "half closed")
	want(t, near, "half closed")
	if err := near.Send(t.Context(), text("late")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("sending after CloseSend gives %v", err)
	}
	far.Close()
	wantErr(t, near, io.EOF)
	select {
	case <-far.Gone():
		t.Error("both ends are gone while one is open")
	default:
	}
	near.Close()
	near.Close()
	<-far.Gone()
	if err := near.Err(); err != nil {
		t.Errorf("a stream that was closed in order says %v", err)
	}
}

// What was sent before the end arrives, whichever end closed.
func TestClose(t *testing.T) {
	m := New(Options{})
	near, far := open(t, m, "s")
	send(t, far, "last words")
	far.Close()
	far.Close()
	want(t, near, "last words")
	wantErr(t, near, io.EOF)
	<-near.Over()
	// The queue has room, but nobody will read it.
	if err := near.Send(t.Context(), text("to nobody")); !errdefs.IsAborted(err) {
		t.Errorf("sending to a closed end gives %v", err)
	}
	if _, err := m.Take("ns", "s"); !errdefs.IsNotFound(err) {
		t.Errorf("a closed stream is taken with %v", err)
	}
	near, err := m.Open("ns", "s")
	if err != nil {
		t.Fatalf("its id is not free: %v", err)
	}
	near.Close()
}

func TestNames(t *testing.T) {
	m := New(Options{PerNamespace: 2})
	for _, id := range []string{"", string(make([]byte, maxID+1))} {
		if _, err := m.Open("ns", id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("id of %d bytes: %v", len(id), err)
		}
	}
	a, err := m.Open("ns", "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Open("ns", "a"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second stream of the id: %v", err)
	}
	if _, err := m.Open("other", "a"); err != nil {
		t.Errorf("the id in another namespace: %v", err)
	}
	if _, err := m.Take("third", "a"); !errdefs.IsNotFound(err) {
		t.Errorf("a stream of another namespace: %v", err)
	}
	if _, err := m.Open("ns", "b"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Open("ns", "c"); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a third stream: %v", err)
	}
	a.Close()
	if _, err := m.Open("ns", "c"); err != nil {
		t.Errorf("after one was closed: %v", err)
	}
	if _, err := m.Take("ns", "c"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Take("ns", "c"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second taker: %v", err)
	}
}

// A sender waits when too many messages, or too many bytes, are under way.
func TestBackPressure(t *testing.T) {
	for _, c := range []struct{ size, fit int }{{1, maxQueued}, {maxFlight / 4, 3}, {MaxMessage - 4, 1}} {
		synctest.Test(t, func(t *testing.T) {
			near, far := open(t, New(Options{}), "s")
			msg := Message{TypeURL: "text", Value: bytes.Repeat([]byte("x"), c.size)}
			var sent int
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() {
				for {
					if err := near.Send(ctx, msg); err != nil {
						ended <- err
						return
					}
					sent++
				}
			}()
			synctest.Wait()
			if sent != c.fit {
				t.Errorf("%d messages of %d bytes are under way, want %d", sent, c.size, c.fit)
			}
			if _, err := far.Recv(t.Context()); err != nil {
				t.Error(err)
			}
			synctest.Wait()
			if sent != c.fit+1 {
				t.Errorf("after one was received %d were sent, want %d", sent, c.fit+1)
			}
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("the sender ends with %v", err)
			}
			go func() { ended <- near.Send(t.Context(), msg) }()
			synctest.Wait()
			far.Close()
			if err := <-ended; !errdefs.IsAborted(err) {
				t.Errorf("a sender whose reader has gone gets %v", err)
			}
		})
	}
	near, _ := open(t, New(Options{}), "s")
	if err := near.Send(t.Context(), Message{Value: make([]byte, MaxMessage+1)}); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a message that is too large: %v", err)
	}
}

func TestLifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := New(Options{Unclaimed: time.Minute})
		lonely, err := m.Open("ns", "lonely")
		if err != nil {
			t.Fatal(err)
		}
		near, far := open(t, m, "busy")
		time.Sleep(2 * time.Minute)
		wantErr(t, lonely, context.DeadlineExceeded)
		if lonely.Err() == nil {
			t.Error("it doesn't say why it is over")
		}
		send(t, near, "still here")
		want(t, far, "still here")
		m.Close()
		wantErr(t, far, errdefs.ErrUnavailable)
		if err := near.Err(); !errdefs.IsUnavailable(err) {
			t.Errorf("at the Manager's end a stream says %v", err)
		}
		if _, err := m.Open("ns", "more"); !errdefs.IsUnavailable(err) {
			t.Errorf("a closed Manager opens a stream with %v", err)
		}
		if n := len(m.streams) + len(m.count); n != 0 {
			t.Errorf("%d things are left", n)
		}
	})
}

// Many streams side by side carry what was put in, in order.
func TestConcurrent(t *testing.T) {
	m := New(Options{})
	var all sync.WaitGroup
	for i := range 8 {
		near, far := open(t, m, fmt.Sprint(i))
		all.Go(func() {
			defer near.Close()
			for n := range 1000 {
				if err := near.Send(t.Context(), text(fmt.Sprint(n))); err != nil {
					t.Error(err)
				}
			}
		})
		all.Go(func() {
			defer far.Close()
			for n := 0; ; n++ {
				msg, err := far.Recv(t.Context())
				if err == io.EOF && n == 1000 {
					return
				}
				if err != nil || string(msg.Value) != fmt.Sprint(n) {
					t.Errorf("message %d is %q (%v)", n, msg.Value, err)
					return
				}
			}
		})
	}
	all.Wait()
}
