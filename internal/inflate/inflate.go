// Package inflate decodes gzip streams at the speed of the machine.
//
// It reads what compress/gzip reads, two to three times as fast as the
// libraries at hand, in plain Go: no unsafe, no assembly, and no memory beyond
// what NewReader allocates, whatever the stream says.
package inflate

import (
	"errors"
	"fmt"
	"io"
	"os"
)

const (
	// Window is how far back a DEFLATE stream may refer, in bytes.
	Window = 1 << 15

	// MaxChunk is the most that Next and NextInto return at once, in bytes.
	MaxChunk = bufferSize - Window

	outSize    = 1 << 18
	outMask    = outSize - 1
	bufferSize = outSize + 16

	// roomEnd is where decoding into a buffer stops: before the size to which
	// indexes are masked by one turn of the fast loop, which is three
	// literals, a match, and the rest of the last 16 bytes copied.
	roomEnd = outSize - (3 + maxLength + 16)

	// maxEmptyReads is how often in a row the reader may return nothing at all.
	maxEmptyReads = 100
)

var (
	// ErrHeader is returned for a member that doesn't begin as RFC 1952 says,
	// and so for anything but another member after the last one, zeros too.
	ErrHeader = errors.New("not a gzip header")

	// ErrChecksum is returned for a member whose content doesn't have the
	// CRC-32 or the size that follows it.
	ErrChecksum = errors.New("gzip content differs from its checksum")
)

// A CorruptError reports a member whose content is no DEFLATE stream.
type CorruptError struct {
	Offset int64 // bytes of the compressed stream before the fault, or a few more
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("corrupt gzip content near byte %d", e.Offset)
}

// A Buffer is memory for a Reader to decode into. It holds a window, so that
// matches can be copied within it, and a chunk behind.
type Buffer struct {
	mem [bufferSize]byte
}

// Bytes returns all of the memory, for whoever has another use for it.
func (b *Buffer) Bytes() []byte { return b.mem[:] }

// A Reader decodes a gzip stream: one member or several, one after the other,
// whose contents follow each other. It has the checksum of each member
// verified when it has delivered the last of its bytes, so these are tentative
// until io.EOF follows.
//
// A Reader is not safe for concurrent use. It holds about 410 KiB, and never
// more: input, a Buffer and tables. It reads beyond the end of the stream,
// since it fills its input buffer, and it delivers all it can decode from what
// it has before it reads again, so what has arrived never waits for what
// hasn't. After an error it returns the same error until Reset.
type Reader struct {
	decoder
	r       io.Reader
	readErr error // what r said after the last byte of in
	loaded  int64 // bytes read from r
	phase   phase
	member  member
	whole   bool // a whole member has been read

	own    *Buffer // holds the history between calls, as far as op
	op     int     // where decoding goes on
	low    int     // where the history begins
	summed int     // where begins what the member's checksum doesn't cover yet
	rest   []byte  // decoded, and not yet taken by Read
	err    error
}

// NewReader returns a Reader that decodes r, once it has read the header of the
// first member. It returns ErrHeader, io.ErrUnexpectedEOF if r ends before the
// header does, also if r is empty, or the error of r.
func NewReader(r io.Reader) (*Reader, error) {
	z := new(Reader)
	if err := z.Reset(r); err != nil {
		return nil, err
	}
	return z, nil
}

// Reset makes z as NewReader(r) would return it, with the same memory. The zero
// Reader may be Reset too.
func (z *Reader) Reset(r io.Reader) error {
	if z.own == nil {
		z.own = new(Buffer)
	}
	z.r, z.readErr, z.loaded = r, nil, 0
	z.ip, z.iend, z.bits, z.nbits = 0, 0, 0, 0
	z.phase, z.whole = atMember, false
	z.op, z.low, z.summed = Window, Window, Window
	z.rest, z.err = nil, nil
	for z.phase < atBlock && z.err == nil {
		z.advance(z.own, z.op)
	}
	return z.err
}

// Close makes z forget its reader, which it doesn't close. To read z then is an
// error, until Reset, which finds the memory that z had.
func (z *Reader) Close() error {
	z.r, z.rest = nil, nil
	z.err = fmt.Errorf("read gzip stream: %w", os.ErrClosed)
	return nil
}

// Read reads decoded bytes into p. At the end of the last member, which must be
// the end of r, it returns io.EOF. It returns ErrHeader, ErrChecksum, a
// *CorruptError, io.ErrUnexpectedEOF for a stream cut off, or the error of r.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	chunk, err := z.Next()
	if err != nil {
		return 0, err
	}
	n := copy(p, chunk)
	z.rest = chunk[n:]
	return n, nil
}

// WriteTo writes all that is left to w, without copying it first.
func (z *Reader) WriteTo(w io.Writer) (int64, error) {
	var written int64
	for {
		chunk, err := z.Next()
		if err == io.EOF {
			return written, nil
		}
		if err != nil {
			return written, err
		}
		n, err := w.Write(chunk)
		written += int64(n)
		if err != nil {
			return written, err
		}
		if n < len(chunk) {
			return written, io.ErrShortWrite
		}
	}
}

// Next returns the next decoded bytes, at least one and at most MaxChunk of
// them. They are z's own and stay valid until the next call of a method of z.
// Errors are those of Read, and come without bytes.
func (z *Reader) Next() ([]byte, error) {
	if chunk := z.rest; len(chunk) > 0 {
		z.rest = nil
		return chunk, nil
	}
	if z.err != nil {
		return nil, z.err
	}
	if z.op >= roomEnd {
		z.keepWindow(z.own)
	}
	return z.decode(z.own)
}

// NextInto is Next with the caller's memory: the bytes returned lie in b, and
// stay valid until b is used again. So decoding goes on while others work on
// what has been decoded. It costs two copies of a window more than Next.
func (z *Reader) NextInto(b *Buffer) ([]byte, error) {
	if chunk := z.rest; len(chunk) > 0 {
		z.rest = nil
		n := copy(b.mem[Window:], chunk)
		return b.mem[Window : Window+n], nil
	}
	if z.err != nil {
		return nil, z.err
	}
	z.keepWindow(z.own)
	copy(b.mem[:Window], z.own.mem[:Window])
	chunk, err := z.decode(b)
	z.keepWindow(b)
	return chunk, err
}

// keepWindow moves the history, which ends at op in b, to the front of z.own.
func (z *Reader) keepWindow(b *Buffer) {
	from := z.op - Window
	copy(z.own.mem[:Window], b.mem[from:z.op])
	z.low = max(0, z.low-from)
	z.op = Window
}

// decode decodes into b, in which the history ends at op, until it has bytes to
// deliver and neither input nor room to go on with.
func (z *Reader) decode(b *Buffer) ([]byte, error) {
	start := z.op
	z.summed = start
	for z.err == nil && z.advance(b, start) {
	}
	z.sum(b)
	if z.op == start {
		return nil, z.err
	}
	return b.mem[start:z.op], nil
}

// advance does the next step into b, and what that asks for, and reports
// whether to go on. Bytes of b from start on haven't been delivered.
func (z *Reader) advance(b *Buffer, start int) bool {
	switch z.step(b) {
	case needRoom:
		return false
	case needInput:
		if z.op > start {
			return false
		}
		z.err = z.load()
	case badHeader:
		z.err = ErrHeader
	case badChecksum:
		z.err = ErrChecksum
	case corrupt:
		z.err = &CorruptError{Offset: z.loaded - int64(z.iend-z.ip)}
	}
	return true
}

// step goes on with the stream by what the current phase is about, as far as
// input and room reach.
func (z *Reader) step(b *Buffer) (st status) {
	switch z.phase {
	case atBlock:
		var stored bool
		if stored, st = z.blockHeader(); st == more {
			z.phase = inSymbols
			if stored {
				z.phase = inStored
			}
		}
		return st
	case inSymbols:
		z.op, st = z.symbols(&b.mem, z.op, z.low)
	case inStored:
		z.op, st = z.copyStored(&b.mem, z.op)
	case atTrailer:
		return z.trailer(b)
	default:
		return z.memberHeader()
	}
	if st != blockEnd {
		return st
	}
	z.phase = atBlock
	if z.last {
		z.phase = atTrailer
		z.bits, z.nbits = 0, 0
	}
	return more
}

// load reads more input behind what is left of it.
func (z *Reader) load() error {
	z.iend = copy(z.in[:], z.in[z.ip:z.iend])
	z.ip = 0
	for tries := 0; z.readErr == nil; tries++ {
		room := z.in[z.iend:inputSize]
		n, err := z.r.Read(room)
		if n < 0 || n > len(room) {
			return fmt.Errorf("read gzip stream: reader returned %d bytes for %d", n, len(room))
		}
		z.iend += n
		z.loaded += int64(n)
		z.readErr = err
		if n > 0 {
			return nil
		}
		if tries == maxEmptyReads {
			z.readErr = io.ErrNoProgress
		}
	}
	if z.readErr == io.EOF && !(z.whole && z.phase == atMember && z.iend == 0) {
		return io.ErrUnexpectedEOF
	}
	return z.readErr
}
