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
		res.Times = s.clock.times()
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
		if err := emitOne(s, hdr, archive, to); err != nil {
			return fmt.Errorf("layer entry %q: %w", last, err)
		}
	}
}

func emitOne(s *stream, hdr *tar.Header, body io.Reader, to Emitter) error {
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
	if e.sparse {
		if err := s.hole(e.size); err != nil {
			return err
		}
	}
	return to.put(e, body)
}

// brief keeps a hostile name from filling a log.
func brief(name string) string {
	const most = 200
	if len(name) <= most {
		return name
	}
	return name[:most] + "..."
}
