package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"github.com/holdfast-dev/holdfast/internal/inflate"
)

// maxWindow bounds the memory that a zstd frame may ask for: what the zstd
// program itself accepts unless told otherwise.
const maxWindow = 128 << 20

// decoder makes the plain archive of the compressed one.
type decoder struct {
	// next decodes into b, as much as can be had without waiting for more than
	// the first byte. The bytes lie in b; the last ones may come with an error,
	// which is io.EOF at the end.
	next  func(b *inflate.Buffer) ([]byte, error)
	close func()
}

// decompress chooses the decoder. The media type must be one of a tar
// archive; how that is compressed is told by its first bytes, since registries
// hold layers whose type is wrong (the diffID, taken of what comes out, keeps
// this honest). z is memory to decode gzip with.
func decompress(r *ahead, z *inflate.Reader, mediaType string) (decoder, error) {
	if !isTar(mediaType) {
		return decoder{}, fmt.Errorf("media type %q is not a tar archive that can be unpacked here: %w", mediaType, errdefs.ErrNotImplemented)
	}
	head, err := r.peek(512)
	if err != nil && err != io.EOF {
		return decoder{}, fmt.Errorf("read layer: %w", err)
	}
	switch {
	case len(head) >= 262 && string(head[257:262]) == "ustar":
		return plain(r, func() {}), nil
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gunzip(r, z)
	case isZstd(head):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return decoder{}, fmt.Errorf("read zstd header: %w", err)
		}
		return plain(z, z.Close), nil
	}
	return plain(r, func() {}), nil
}

// plain takes what r returns.
func plain(r io.Reader, close func()) decoder {
	return decoder{
		next: func(b *inflate.Buffer) ([]byte, error) {
			n, err := r.Read(b.Bytes())
			return b.Bytes()[:n], err
		},
		close: close,
	}
}

func gunzip(r io.Reader, z *inflate.Reader) (decoder, error) {
	if err := z.Reset(r); err != nil {
		z.Close()
		return decoder{}, fmt.Errorf("read gzip header: %w", err)
	}
	return decoder{
		next: func(b *inflate.Buffer) ([]byte, error) {
			data, err := z.NextInto(b)
			if errors.Is(err, inflate.ErrHeader) {
				err = fmt.Errorf("behind the gzip content: %w", err)
			}
			return data, err
		},
		close: func() { z.Close() },
	}, nil
}

// isZstd knows a zstd frame, and a skippable one, which may come first.
func isZstd(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.HasPrefix(head[1:], []byte{0x2a, 0x4d, 0x18})
}

// isTar reports whether a media type is that of a tar archive, plain or
// compressed: `application/vnd.oci.image.layer.v1.tar+gzip`,
// `application/vnd.docker.image.rootfs.diff.tar.gzip`, `application/x-tar` and
// so on. None at all passes too.
func isTar(mediaType string) bool {
	if mediaType == "" {
		return true
	}
	t, _, err := mime.ParseMediaType(mediaType)
	if err != nil {
		return false
	}
	t = t[strings.LastIndexByte(t, '/')+1:]
	for _, suffix := range []string{"+gzip", ".gzip", "+zstd", ".zstd"} {
		if rest, ok := strings.CutSuffix(t, suffix); ok {
			t = rest
			break
		}
	}
	return t == "tar" || t == "x-tar" || strings.HasSuffix(t, ".tar")
}
