package layer

import (
	"bufio"
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

type nothingToClose struct{ io.Reader }

func (nothingToClose) Close() error { return nil }

// decompress returns the plain archive. The media type must be one of a tar
// archive; how that is compressed is told by its first bytes, since registries
// hold layers whose type is wrong (the diffID, taken of what comes out, keeps
// this honest).
func decompress(r io.Reader, mediaType string) (io.ReadCloser, error) {
	if !isTar(mediaType) {
		return nil, fmt.Errorf("media type %q is not a tar archive that can be unpacked here: %w", mediaType, errdefs.ErrNotImplemented)
	}
	buffered := bufio.NewReaderSize(r, 64<<10)
	head, err := buffered.Peek(512)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read layer: %w", err)
	}
	switch {
	case len(head) >= 262 && string(head[257:262]) == "ustar":
		return nothingToClose{buffered}, nil
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := inflate.NewReader(buffered)
		if err != nil {
			return nil, fmt.Errorf("read gzip header: %w", err)
		}
		return gzipReader{z}, nil
	case isZstd(head):
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, fmt.Errorf("read zstd header: %w", err)
		}
		return z.IOReadCloser(), nil
	}
	return nothingToClose{buffered}, nil
}

// gzipReader says where it was when no member began where one had to.
type gzipReader struct{ *inflate.Reader }

func (g gzipReader) Read(p []byte) (int, error) {
	n, err := g.Reader.Read(p)
	if errors.Is(err, inflate.ErrHeader) {
		err = fmt.Errorf("behind the gzip content: %w", err)
	}
	return n, err
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
