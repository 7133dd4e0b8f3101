package pull

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
)

// source reads a layer's compressed bytes from the first to the last: those
// that an earlier pull has left in the ingest, then those that come from the
// registry, which it writes to the ingest as they go by.
type source struct {
	job    *job
	writer *meta.Writer    // nil when the store has the blob already
	kept   *content.Reader // what was there; nil when nothing was
	body   *registry.Blob  // opened when the kept bytes are read
	ctx    context.Context // of the fetch, which outlives the call that opened it
	mu     sync.Mutex      // held by Read
	offset int64           // bytes read so far
	here   int64           // bytes that were kept
	hosts  []string        // that have sent the others, in the order in which they came in
	err    error           // why reading or writing failed

	unpacking bool // what is read goes to the layer's files, too

	spent Pass // on the bytes since the last pass began
}

// lied says that all of a blob has come, and is another one. hosts are those
// to blame.
type lied struct {
	hosts []string
	err   error
}

func (l *lied) Error() string { return l.err.Error() }
func (l *lied) Unwrap() error { return l.err }

// openWriter opens the ingest of desc; errdefs.ErrAlreadyExists says that the
// namespace has it, and that it is leased now.
//
// Somebody else may be writing it: a client, or a pull that has the same blob
// in another place, over other layers. To wait for a blob that somebody holds
// who waits for a layer of ours would be a deadlock, so such a blob is
// written twice, under a name of its own.
func openWriter(ctx context.Context, sp meta.Space, desc oci.Descriptor) (*meta.Writer, error) {
	opts := meta.WriterOptions{Total: desc.Size, Expected: desc.Digest}
	w, err := sp.OpenWriter(ctx, oci.Key(desc), opts)
	if errdefs.IsUnavailable(err) {
		return sp.OpenWriter(ctx, oci.Key(desc)+"-"+strings.ToLower(rand.Text()[:8]), opts)
	}
	return w, err
}

func (j *job) openSource(ctx context.Context) (*source, error) {
	s := &source{job: j, ctx: ctx}
	desc := j.layer.Desc
	w, err := openWriter(ctx, j.by.sp, desc)
	if errdefs.IsAlreadyExists(err) {
		s.kept, err = j.by.sp.Reader(ctx, desc.Digest)
		s.here = desc.Size
		return s, err
	}
	if err != nil {
		return nil, err
	}
	s.writer = w
	st, err := w.Status()
	if err == nil && st.Offset > desc.Size {
		st.Offset, err = 0, w.Truncate(0)
	}
	if err == nil && st.Offset > 0 {
		s.here = st.Offset
		s.kept, err = w.Data()
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	if err := context.Cause(s.ctx); err != nil {
		s.err = err
		return 0, err
	}
	size := s.job.layer.Desc.Size
	if s.offset < s.here {
		begun := time.Now()
		n, err := s.kept.ReadAt(p[:min(int64(len(p)), s.here-s.offset)], s.offset)
		s.offset += int64(n)
		s.spent.Kept += int64(n)
		s.spent.Read += time.Since(begun)
		if n > 0 {
			s.job.account.book(s.offset, int64(n), false, s.unpacking)
			return n, nil
		}
		s.err = fmt.Errorf("read what was fetched earlier: %w", err)
		return 0, s.err
	}
	if s.offset == size {
		return 0, io.EOF
	}
	n, err := s.fetch(p)
	if err != nil && n == 0 {
		s.err = err
		return 0, err
	}
	s.job.account.book(s.offset, int64(n), true, s.unpacking)
	return n, nil
}

// fetch reads the next bytes from the registry and keeps them.
func (s *source) fetch(p []byte) (int, error) {
	desc := s.job.layer.Desc
	begun := time.Now()
	if s.body == nil {
		var err error
		s.body, err = s.job.by.repo.Fetch(s.ctx, desc, s.offset)
		begun = spend(&s.spent.Open, begun)
		if err != nil {
			return 0, err
		}
	}
	n, err := s.body.Read(p[:min(int64(len(p)), desc.Size-s.offset)])
	begun = spend(&s.spent.Network, begun)
	if n > 0 {
		s.spent.Fetched += int64(n)
		s.sentBy(s.body.Host())
		_, err := s.writer.Write(p[:n])
		spend(&s.spent.Keep, begun)
		if err != nil {
			return 0, fmt.Errorf("keep fetched bytes: %w", err)
		}
		s.offset += int64(n)
		s.job.report(Event{Stage: StageFetching, Desc: desc, Offset: s.offset, Kept: s.here})
		return n, nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return 0, fmt.Errorf("%s: %w", s.body.Host(), err)
}

func (s *source) sentBy(host string) {
	s.spent.Host = host
	if host != "" && !slices.Contains(s.hosts, host) {
		s.hosts = append(s.hosts, host)
	}
}

// spend adds the time since begun to d and returns now.
func spend(d *time.Duration, begun time.Time) time.Time {
	now := time.Now()
	*d += now.Sub(begun)
	return now
}

// pass ends a pass that has come to res. Nobody reads s meanwhile.
func (s *source) pass(res layer.Result) *Pass {
	p := s.spent
	p.Unpacked, p.Times = res.Size, res.Times
	s.spent = Pass{}
	return &p
}

// stop waits for a Read that is under way, whose context has ended, and has
// every later one fail.
func (s *source) stop(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// failure is what went wrong on this side, and not with what the bytes mean.
func (s *source) failure() error { return s.err }

// drain reads what is left and verifies the whole blob (inv 8). When the
// bytes are not what the descriptor promises they are thrown away: the error
// is a *lied if it may be worth asking another host.
func (s *source) drain(ctx context.Context) error {
	if _, err := io.Copy(io.Discard, onlyReader{s}); err != nil {
		return err
	}
	desc := s.job.layer.Desc
	s.job.report(Event{Stage: StageUnpacking, Desc: desc, Offset: desc.Size})
	if s.writer == nil {
		return nil // a committed blob is verified
	}
	got := s.writer.Digest()
	if desc.Digest.Algorithm() != got.Algorithm() {
		return nil // the content store checks it when it seals the blob
	}
	if got == desc.Digest {
		return nil
	}
	return s.reject(got)
}

// reject throws the bytes away and says whose they were. If some were here
// before, nobody knows which are the wrong ones, and nobody is blamed. If they
// came from several hosts, those are blamed that broke off in the middle; the
// one that took over is worth asking for all of them.
func (s *source) reject(got digest.Digest) error {
	who, blamed := s.hosts, s.hosts
	if s.here > 0 {
		who, blamed = append([]string{"an earlier, interrupted pull"}, s.hosts...), nil
	} else if len(blamed) > 1 {
		blamed = blamed[:len(blamed)-1]
	}
	err := lie(strings.Join(who, " and "), s.job.layer.Desc.Digest, got)
	if e := s.writer.Truncate(0); e != nil {
		return errors.Join(err, e)
	}
	return &lied{blamed, err}
}

type onlyReader struct{ io.Reader }

// rewind starts again at the first byte of a blob that is all here.
func (s *source) rewind() error {
	if s.kept == nil {
		var err error
		if s.kept, err = s.writer.Data(); err != nil {
			return err
		}
	} else if s.here < s.job.layer.Desc.Size {
		s.kept.Close()
		var err error
		if s.kept, err = s.writer.Data(); err != nil {
			return err
		}
	}
	s.offset, s.here = 0, s.job.layer.Desc.Size
	return nil
}

// release closes everything but the writer, which the committer needs.
func (s *source) release() {
	if s.kept != nil {
		s.kept.Close()
		s.kept = nil
	}
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
}

// close lets go of everything; what was fetched stays for the next pull.
func (s *source) close() error {
	s.release()
	if s.writer == nil {
		return nil
	}
	return s.writer.Close()
}
