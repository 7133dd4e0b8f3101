package durable

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// gated opens an FS whose syncfs waits for a result from the test.
func gated(t *testing.T) (f *FS, started *int, results chan<- error) {
	t.Helper()
	f, err := OpenFS(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c, n := make(chan error), 0
	f.syncfs = func() error { n++; return <-c }
	return f, &n, c
}

func TestSyncTouchesTheRealFileSystem(t *testing.T) {
	dir := t.TempDir()
	f, err := OpenFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("a"), 0o644); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if err := f.Sync(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if err := f.Sync(t.Context()); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v, want ErrClosed", err)
	}
	if _, err := OpenFS(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("err = %v, want ErrNotExist", err)
	}
}

func TestSyncJoinsTheNextRoundNotTheRunningOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, started, results := gated(t)
		var returned atomic.Int32
		join := func() {
			go func() {
				if err := f.Sync(t.Context()); err != nil {
					t.Error(err)
				}
				returned.Add(1)
			}()
			synctest.Wait()
		}
		join()
		for range 5 {
			join() // while the first is under way
		}
		if *started != 1 || returned.Load() != 0 {
			t.Fatalf("%d syncs in flight, %d callers returned; want 1 and 0", *started, returned.Load())
		}
		results <- nil
		synctest.Wait()
		if *started != 2 || returned.Load() != 1 {
			t.Fatalf("%d syncs begun, %d callers returned; want 2 and 1", *started, returned.Load())
		}
		results <- nil
		synctest.Wait()
		if *started != 2 || returned.Load() != 6 {
			t.Fatalf("%d syncs begun, %d callers returned; want 2 and 6", *started, returned.Load())
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestFailedSyncFailsAllWhoseBytesMayBeLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _, results := gated(t)
		lost := errors.New("i/o error")
		sync := func(since Mark, result error) error {
			var err error
			done := make(chan struct{})
			go func() { err = f.SyncSince(t.Context(), since); close(done) }()
			results <- result
			<-done
			return err
		}
		before := f.Mark()
		if err := sync(before, lost); !errors.Is(err, lost) {
			t.Errorf("who joined: %v, want the failure", err)
		}
		if err := sync(before, nil); !errors.Is(err, lost) {
			t.Errorf("who began before the failure and joined after it: %v, want the failure", err)
		}
		if err := sync(Mark{}, nil); !errors.Is(err, lost) {
			t.Errorf("who doesn't say when it began: %v, want the failure", err)
		}
		if err := sync(f.Mark(), nil); err != nil {
			t.Errorf("who began after the failure: %v", err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestSyncGivesUpWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, _, results := gated(t)
		cause := errors.New("caller left")
		ctx, cancel := context.WithCancelCause(t.Context())
		var err error
		go func() { err = f.Sync(ctx) }()
		synctest.Wait()
		cancel(cause)
		synctest.Wait()
		if !errors.Is(err, cause) {
			t.Errorf("err = %v, want the cause", err)
		}
		closed := false
		go func() { f.Close(); closed = true }()
		synctest.Wait()
		if closed {
			t.Error("closed under a running sync")
		}
		results <- nil
		synctest.Wait()
		if !closed {
			t.Error("not closed once the sync was over")
		}
	})
}
