package layer

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/inflate"
)

// chunks is how many chunks there are between the decoder and those who take
// what it has decoded, at most.
const chunks = 4

// stream is the uncompressed archive. The simple way, one goroutine that
// reads, decodes, digests and writes in turn, leaves all cores but one idle
// when an image is one large layer. So bytes pass through four:
//
//	ahead.run   reads; the network, the digest and the file of the blob are behind its Reads
//	run         decodes into chunks
//	digest      takes the diffID of the chunks
//	Read        the emitter's own
//
// A chunk goes to digest and Read at once, and is free again when both are
// done with it. The channels have room for all chunks, so only the decoder
// ever waits for anybody behind it, and the memory is bounded: about 2 MiB.
type stream struct {
	ctx    context.Context // of the one Apply that it serves; Read has no parameter for it
	limits Limits

	mem            *memory
	ahead          *ahead
	clock          clock
	full, unhashed chan *chunk
	free           chan *chunk
	failed         chan error    // why the decoder ended, io.EOF if all is well
	stop           chan struct{} // closed when no more is wanted
	hashed         chan struct{} // closed when the decoder and digest have ended
	sum            hash.Hash     // digest's until then

	chunk  *chunk // being read
	rest   []byte
	sink   io.Writer // what Read passes the bytes to, if not nil
	sunk   int64     // how many it has passed there
	err    error
	size   int64
	sparse int64 // bytes of holes, which cost as if they were there
	header int64 // bytes of the current entry's headers; -1 outside of them
}

// chunk is a piece of the archive.
type chunk struct {
	buf   inflate.Buffer
	data  []byte
	users atomic.Int32 // who still reads it
}

// memory is what the stages of one Apply work in: 1.8 MiB, and less for a
// small layer, since chunks are made when they are needed.
type memory struct {
	slots  [slots]slot
	gzip   inflate.Reader
	chunks []*chunk
}

var memories = sync.Pool{New: func() any { return new(memory) }}

// openStream begins to read and decode r.
func openStream(ctx context.Context, r io.Reader, mediaType string, limits Limits) *stream {
	mem := memories.Get().(*memory)
	s := &stream{
		ctx:      ctx,
		limits:   limits,
		mem:      mem,
		ahead:    newAhead(r, &mem.slots),
		full:     make(chan *chunk, chunks),
		unhashed: make(chan *chunk, chunks),
		free:     make(chan *chunk, chunks),
		failed:   make(chan error, 1),
		stop:     make(chan struct{}),
		hashed:   make(chan struct{}),
		sum:      sha256.New(),
		header:   -1,
	}
	s.clock.begun = time.Now()
	for _, c := range mem.chunks {
		s.free <- c
	}
	go s.ahead.run()
	go s.run(mediaType)
	go s.digest()
	return s
}

// run decodes.
func (s *stream) run(mediaType string) {
	begun := time.Now()
	d, err := decompress(s.ahead, &s.mem.gzip, mediaType)
	lap(&s.clock.inflate, begun)
	if err == nil {
		err = s.fill(d)
		d.close()
	}
	s.failed <- err
	close(s.full)
	close(s.unhashed)
}

// fill decodes until an error, which is io.EOF at the end.
func (s *stream) fill(d decoder) error {
	for {
		t := time.Now()
		c := s.room()
		if c == nil {
			return context.Canceled
		}
		t = lap(&s.clock.blocked, t)
		data, err := d.next(&c.buf)
		lap(&s.clock.inflate, t)
		if len(data) > 0 {
			c.data = data
			c.users.Store(2)
			s.full <- c
			s.unhashed <- c
		} else {
			s.free <- c
		}
		if err != nil {
			return err
		}
	}
}

// room waits for a chunk to decode into; nil means stop.
func (s *stream) room() *chunk {
	select {
	case c := <-s.free:
		return c
	default:
	}
	if len(s.mem.chunks) < chunks {
		c := new(chunk)
		s.mem.chunks = append(s.mem.chunks, c)
		return c
	}
	select {
	case c := <-s.free:
		return c
	case <-s.stop:
		return nil
	}
}

func (s *stream) digest() {
	defer close(s.hashed)
	for c := range s.unhashed {
		begun := time.Now()
		s.sum.Write(c.data)
		lap(&s.clock.hash, begun)
		s.release(c)
	}
}

// release lets go of a chunk for one of its users.
func (s *stream) release(c *chunk) {
	if c.users.Add(-1) == 0 {
		s.free <- c
	}
}

// Read reads the uncompressed archive. With a sink the bytes go there, and p
// only says how many.
func (s *stream) Read(p []byte) (n int, err error) {
	if len(s.rest) == 0 && s.err == nil {
		s.err = s.next()
	}
	if len(s.rest) == 0 {
		return 0, s.err
	}
	if s.sink != nil {
		n, err = s.sink.Write(s.rest[:min(len(p), len(s.rest))])
		s.sunk += int64(n)
	} else {
		n = copy(p, s.rest)
	}
	s.rest = s.rest[n:]
	if s.header >= 0 {
		if s.header += int64(n); s.header > s.limits.HeaderBytes {
			return 0, exceeded("headers of more than %d bytes", s.limits.HeaderBytes)
		}
	}
	return n, err
}

// next takes the next chunk.
func (s *stream) next() error {
	if s.chunk != nil {
		s.release(s.chunk)
		s.chunk = nil
	}
	if err := s.ctx.Err(); err != nil {
		return err
	}
	begun := time.Now()
	select {
	case <-s.ctx.Done():
		return s.ctx.Err()
	case c, ok := <-s.full:
		s.clock.starved += time.Since(begun)
		if !ok {
			return <-s.failed
		}
		s.chunk, s.rest = c, c.data
		s.size += int64(len(c.data))
		return s.check(0)
	}
}

// check fails when the archive, with more bytes, is larger than is allowed.
func (s *stream) check(more int64) error {
	total := s.size + s.sparse + more
	if total > s.limits.Size {
		return exceeded("layer is larger than %d bytes uncompressed", s.limits.Size)
	}
	if total > s.limits.RatioFloor && total/s.limits.Ratio > s.ahead.compressed.Load() {
		return exceeded("layer has more than %d times its compressed size of %d bytes so far", s.limits.Ratio, s.ahead.compressed.Load())
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

// diffID waits for the digest of all that was decoded; drain comes first.
func (s *stream) diffID() digest.Digest {
	begun := time.Now()
	<-s.hashed
	s.clock.starved += time.Since(begun)
	return digest.NewDigest(digest.SHA256, s.sum)
}

// close ends the goroutines. It waits for a Read that is under way, so that the
// caller has r for itself again, but not when the context has ended.
func (s *stream) close() {
	close(s.stop)
	s.ahead.stop()
	for _, ended := range []chan struct{}{s.ahead.ended, s.hashed} {
		select {
		case <-ended:
		case <-s.ctx.Done():
			return
		}
	}
	memories.Put(s.mem)
}
