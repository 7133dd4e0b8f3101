package layer

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/holdfast-dev/holdfast/internal/fault"
)

// Apply decompresses r, an archive of that media type (tar, plain or with gzip
// or zstd; what the bytes say counts), reads it to its very end, and emits its
// entries. Errors name the entry; the caller knows the layer.
//
// A malformed archive is errdefs.ErrInvalidArgument or an error of archive/tar
// or of the decompressor, one beyond the limits errdefs.ErrResourceExhausted,
// another media type errdefs.ErrNotImplemented. After an error the emitter's
// directory holds some part of the layer and must be thrown away.
//
// When ctx ends, Apply returns at once, though a Read of r may still be under
// way in another goroutine: the caller then closes r, or what it reads from.
// Otherwise nobody reads r any more when Apply returns.
func Apply(ctx context.Context, r io.Reader, mediaType string, to Emitter, limits Limits) (res Result, err error) {
	limits = limits.orDefaults()
	s := openStream(ctx, r, mediaType, limits)
	defer func() {
		s.close()
		res.Times = s.times()
	}()
	if err := to.begin(limits); err != nil {
		return Result{}, err
	}
	defer to.end()
	if err := emit(s, to); err != nil {
		return Result{}, err
	}
	if err := s.drain(); err != nil {
		return Result{}, err
	}
	if err := fault.Point("layer.apply.read"); err != nil {
		return Result{}, err
	}
	res = Result{DiffID: s.diffID(), Size: s.size}
	if err := to.finish(&res); err != nil {
		return Result{}, err
	}
	return res, nil
}

// emit hands the archive's entries to the emitter.
func emit(s *stream, to Emitter) error {
	archive := tar.NewReader(s)
	body := &content{s: s, archive: archive}
	last := ""
	for n := 1; ; n++ {
		s.header = 0
		hdr, err := archive.Next()
		s.header = -1
		if err == io.EOF {
			return nil
		}
		if err != nil && last == "" {
			return fmt.Errorf("layer archive: %w", err)
		}
		if err != nil {
			return fmt.Errorf("layer archive after entry %q: %w", last, err)
		}
		last = brief(hdr.Name)
		if n > s.limits.Entries {
			return fmt.Errorf("layer entry %q: %w", last, exceeded("more than %d entries", s.limits.Entries))
		}
		if err := emitOne(s, hdr, body, to); err != nil {
			return fmt.Errorf("layer entry %q: %w", last, err)
		}
	}
}

func emitOne(s *stream, hdr *tar.Header, body *content, to Emitter) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name, s.limits)
	if err != nil {
		return err
	}
	if name == "." {
		return nil // the root's attributes are not a layer's to set
	}
	dir, base := path.Split(name)
	switch {
	case base == whiteoutOpaque && !hasMeta(dir):
		return to.opaque(path.Clean(dir))
	case hasMeta(name):
		return nil
	case strings.HasPrefix(base, whiteoutPrefix):
		deleted, err := whiteoutTarget(dir, base)
		if err != nil {
			return err
		}
		return to.whiteout(deleted)
	}
	e, err := newEntry(hdr, name, s.limits)
	if err != nil {
		return err
	}
	if (e.kind == tar.TypeChar || e.kind == tar.TypeBlock) && inUserNamespace() {
		return nil // the kernel allows no device nodes there
	}
	if body.sparse = e.sparse; e.sparse {
		if err := s.hole(e.size); err != nil {
			return err
		}
	}
	return to.put(e, body)
}

// content is what the archive holds of the current entry.
type content struct {
	s       *stream
	archive *tar.Reader
	sparse  bool
}

func (c *content) Read(p []byte) (int, error) { return c.archive.Read(p) }

// uncopied is what WriteTo has the archive read into. Nobody writes to it, so
// it costs no memory.
var uncopied [1 << 20]byte

// WriteTo writes what is left to w, straight from the chunks: the archive's
// reader thinks that it reads, but gets only the count. That works since for a
// file without holes it hands its Read down as it is; of one with holes it
// makes up a part itself, so that is copied.
func (c *content) WriteTo(w io.Writer) (int64, error) {
	if c.sparse {
		return io.CopyBuffer(onlyWriter{w}, onlyReader{c.archive}, make([]byte, 64<<10))
	}
	c.s.sink, c.s.sunk = w, 0
	defer func() { c.s.sink = nil }()
	for n := int64(0); ; {
		m, err := c.archive.Read(uncopied[:])
		if n += int64(m); n != c.s.sunk {
			return c.s.sunk, fmt.Errorf("%d bytes written where the archive has %d", c.s.sunk, n)
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// onlyWriter and onlyReader keep io.CopyBuffer to the buffer that it is given.
type (
	onlyWriter struct{ io.Writer }
	onlyReader struct{ io.Reader }
)

// brief keeps a hostile name from filling a log.
func brief(name string) string {
	const most = 200
	if len(name) <= most {
		return name
	}
	return name[:most] + "..."
}
