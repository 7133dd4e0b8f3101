package trace

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/durable"
)

// Options of a Recorder. The zero value works.
type Options struct {
	Records int          // that are kept; default 256
	Bytes   int64        // that they may take together; default 16 MiB
	Log     *slog.Logger // default: discard
}

// maxPending bounds the records that wait to be written.
const maxPending = 64

// Recorder keeps the newest records on disk:
//
//	<dir>/            0700
//	    <id>.json     0600  one record, by the tags of Record; ids sort by time
//	    <id>.json.tmp       what a crash has left; removed at Open
//
// Files of other names are left alone, and those that can't be read are passed
// over: they take their place in the ring and go when their time comes.
//
// A record is written after its operation has ended, by a goroutine of the
// Recorder: no operation waits for the disk or fails with it.
type Recorder struct {
	dir  string
	opts Options

	mu      sync.Mutex
	live    map[string]*Operation // not on disk yet: under way, or about to be written
	pending chan *Operation
	closed  bool
	written chan struct{} // closed when the goroutine has ended
}

// Open opens the ring in dir, which it makes if it has to.
func Open(dir string, opts Options) (*Recorder, error) {
	if opts.Records <= 0 {
		opts.Records = 256
	}
	if opts.Bytes <= 0 {
		opts.Bytes = 16 << 20
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	r := &Recorder{dir: dir, opts: opts, live: map[string]*Operation{}, pending: make(chan *Operation, maxPending), written: make(chan struct{})}
	if err := r.sweep(); err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	go r.write()
	return r, nil
}

// sweep removes what a crash has left.
func (r *Recorder) sweep() error {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json.tmp"); ok && idForm.MatchString(id) {
			if err := os.Remove(filepath.Join(r.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close writes the records of the operations that have ended. Those that go on
// leave none.
func (r *Recorder) Close() error {
	r.mu.Lock()
	if !r.closed {
		r.closed = true
		close(r.pending)
	}
	r.mu.Unlock()
	<-r.written
	return nil
}

// write writes the records of ended operations until Close.
func (r *Recorder) write() {
	defer close(r.written)
	for op := range r.pending {
		if err := r.save(op.snapshot()); err != nil {
			r.opts.Log.Warn("the trace of an operation is lost", "id", op.id, "error", err)
		}
		r.mu.Lock()
		delete(r.live, op.id)
		r.mu.Unlock()
	}
}

// save writes a record, and first removes old ones to make room. A power cut
// in between costs old records, which is what they are for.
func (r *Recorder) save(rec Record) error {
	data, err := encode(rec)
	if err != nil {
		return err
	}
	if err := r.makeRoom(int64(len(data))); err != nil {
		return err
	}
	return durable.WriteFile(r.file(rec.ID), data, 0o600)
}

func (r *Recorder) file(id string) string { return filepath.Join(r.dir, id+".json") }

// makeRoom removes the oldest records until one more of size bytes fits.
func (r *Recorder) makeRoom(size int64) error {
	ids, err := r.ids()
	if err != nil {
		return err
	}
	kept := 1
	for _, id := range ids { // newest first
		info, err := os.Stat(r.file(id))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		size += info.Size()
		if kept++; kept <= r.opts.Records && size <= r.opts.Bytes {
			continue
		}
		if err := os.Remove(r.file(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// ids lists the records on disk, newest first.
func (r *Recorder) ids() ([]string, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok && idForm.MatchString(id) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	slices.Reverse(ids)
	return ids, nil
}

// load reads a record from disk.
func (r *Recorder) load(id string) (Record, error) {
	info, err := os.Lstat(r.file(id))
	if err != nil {
		return Record{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return Record{}, fmt.Errorf("%s is no record of ours: %w", r.file(id), errdefs.ErrDataLoss)
	}
	data, err := os.ReadFile(r.file(id))
	if err != nil {
		return Record{}, err
	}
	return decode(id, data)
}

func encode(rec Record) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // nobody puts it on a web page as it is, and it would grow sixfold
	err := enc.Encode(rec)
	return b.Bytes(), err
}

// decode reads a record.
func decode(id string, data []byte) (rec Record, err error) {
	if err := json.Unmarshal(data, &rec); err != nil {
		return Record{}, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if rec.ID != id {
		return Record{}, fmt.Errorf("the record names itself %q: %w", clip(rec.ID, maxText), errdefs.ErrDataLoss)
	}
	return rec, nil
}

// Get returns one record; of an operation that is under way, as far as it is.
// errdefs.ErrNotFound says that there is none of that ID, or no more.
func (r *Recorder) Get(id string) (Record, error) {
	r.mu.Lock()
	op := r.live[id]
	r.mu.Unlock()
	if op != nil {
		return op.snapshot(), nil
	}
	var rec Record
	err := fs.ErrNotExist
	if idForm.MatchString(id) {
		rec, err = r.load(id)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, fmt.Errorf("trace %q: there is none, or no more; `holdfast trace ls` lists them: %w", clip(id, maxText), errdefs.ErrNotFound)
	}
	if err != nil {
		return Record{}, fmt.Errorf("trace %s: %w", id, err)
	}
	return rec, nil
}

// All yields the records, newest first, with the operations that are under
// way. Those that can't be read are left out.
func (r *Recorder) All(ctx context.Context) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		r.mu.Lock()
		ids := make([]string, 0, len(r.live))
		for id := range r.live {
			ids = append(ids, id)
		}
		r.mu.Unlock()
		saved, err := r.ids()
		if err != nil {
			yield(Record{}, fmt.Errorf("traces: %w", err))
			return
		}
		ids = append(ids, saved...)
		slices.Sort(ids)
		slices.Reverse(ids)
		for _, id := range slices.Compact(ids) {
			if err := context.Cause(ctx); err != nil {
				yield(Record{}, err)
				return
			}
			rec, err := r.Get(id)
			if err != nil {
				continue // gone since, or damaged
			}
			if !yield(rec, nil) {
				return
			}
		}
	}
}
