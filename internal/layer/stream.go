package layer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	chunkSize = 256 << 10
	// chunks is how many chunks are between the decompressor and the writer.
	chunks = 4
)

// stream is the uncompressed archive. One goroutine decompresses ahead, into a
// few chunks that go round; whoever reads hashes and counts.
type stream struct {
	ctx    context.Context // of the one Apply that it serves; Read has no parameter for it
	limits Limits

	compressed atomic.Int64 // bytes that the decompressor has taken
	clock      clock
	full, free chan []byte
	failed     chan error    // why the goroutine ended, io.EOF if all is well
	stop       chan struct{} // closed when no more is wanted
	ended      chan struct{} // closed when the goroutine no longer reads

	chunk, rest []byte // being read
	err         error
	sum         hash.Hash
	size        int64
	sparse      int64 // bytes of holes, which cost as if they were there
	header      int64 // bytes of the current entry's headers; -1 outside of them
}

// openStream begins to decompress r.
func openStream(ctx context.Context, r io.Reader, mediaType string, limits Limits) *stream {
	s := &stream{
		ctx:    ctx,
		limits: limits,
		full:   make(chan []byte, chunks),
		free:   make(chan []byte, chunks),
		failed: make(chan error, 1),
		stop:   make(chan struct{}),
		ended:  make(chan struct{}),
		sum:    sha256.New(),
		header: -1,
	}
	s.clock.begun = time.Now()
	for range chunks {
		s.free <- make([]byte, chunkSize)
	}
	go s.run(r, mediaType)
	return s
}

func (s *stream) run(r io.Reader, mediaType string) {
	defer close(s.ended)
	begun := time.Now()
	z, err := decompress(timed{r, &s.compressed, &s.clock.source}, mediaType)
	lap(&s.clock.inflate, begun)
	if err == nil {
		err = s.fill(z)
		z.Close()
	}
	s.failed <- err
	close(s.full)
}

// fill decompresses until an error, which is io.EOF at the end.
func (s *stream) fill(z io.Reader) error {
	for {
		var buf []byte
		t := time.Now()
		select {
		case buf = <-s.free:
		case <-s.stop:
			return context.Canceled
		}
		t = lap(&s.clock.blocked, t)
		n := 0
		var err error
		for n < len(buf) && err == nil {
			var m int
			m, err = z.Read(buf[n:])
			n += m
		}
		lap(&s.clock.inflate, t)
		if n > 0 {
			s.full <- buf[:n] // has room for every chunk
		}
		if err != nil {
			return err
		}
	}
}

// Read reads the uncompressed archive.
func (s *stream) Read(p []byte) (int, error) {
	if len(s.rest) == 0 && s.err == nil {
		s.err = s.next()
	}
	if len(s.rest) == 0 {
		return 0, s.err
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	if s.header >= 0 {
		if s.header += int64(n); s.header > s.limits.HeaderBytes {
			return 0, exceeded("headers of more than %d bytes", s.limits.HeaderBytes)
		}
	}
	return n, nil
}

// next takes the next chunk.
func (s *stream) next() error {
	if s.chunk != nil {
		s.free <- s.chunk[:cap(s.chunk)]
		s.chunk = nil
	}
	if err := s.ctx.Err(); err != nil {
		return err
	}
	begun := time.Now()
	select {
	case <-s.ctx.Done():
		return s.ctx.Err()
	case chunk, ok := <-s.full:
		arrived := time.Now()
		s.clock.starved += arrived.Sub(begun)
		if !ok {
			return <-s.failed
		}
		s.chunk, s.rest = chunk, chunk
		s.sum.Write(chunk)
		s.clock.hash += time.Since(arrived)
		s.size += int64(len(chunk))
		return s.check(0)
	}
}

// check fails when the archive, with more bytes, is larger than is allowed.
func (s *stream) check(more int64) error {
	total := s.size + s.sparse + more
	if total > s.limits.Size {
		return exceeded("layer is larger than %d bytes uncompressed", s.limits.Size)
	}
	if total > s.limits.RatioFloor && total/s.limits.Ratio > s.compressed.Load() {
		return exceeded("layer has more than %d times its compressed size of %d bytes so far", s.limits.Ratio, s.compressed.Load())
	}
	return nil
}

// hole counts the holes of a sparse file before it is written.
func (s *stream) hole(size int64) error {
	if err := s.check(size); err != nil {
		return err
	}
	s.sparse += size
	return nil
}

// drain reads what follows the archive's end: it belongs to the diffID.
func (s *stream) drain() error {
	for {
		s.rest = nil
		if s.err == nil {
			s.err = s.next()
		}
		if s.err == io.EOF {
			return nil
		}
		if s.err != nil {
			return fmt.Errorf("after the end of the archive: %w", s.err)
		}
	}
}

func (s *stream) diffID() digest.Digest {
	return digest.NewDigest(digest.SHA256, s.sum)
}

// close ends the goroutine. It waits for a Read that is under way, so that the
// caller has r for itself again, but not when the context has ended.
func (s *stream) close() {
	close(s.stop)
	select {
	case <-s.ended:
	case <-s.ctx.Done():
	}
}
