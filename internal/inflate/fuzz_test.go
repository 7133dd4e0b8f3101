package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// FuzzGzip compares us with the standard library on any bytes.
func FuzzGzip(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.gz")
	for _, file := range files {
		packed, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packed)
	}
	for level := gzip.HuffmanOnly; level <= gzip.BestCompression; level += 3 {
		f.Add(pack(f, []byte("small enough to be changed to the point, to the point"), level))
	}
	f.Fuzz(compareWithStandard)
}

// FuzzDeflate compares us with the standard library on a member whose content
// is any bytes, with the right trailer behind them if they are a stream, so
// that a change is not hidden by the checksum.
func FuzzDeflate(f *testing.F) {
	for seed := range uint64(30) {
		f.Add(randomDeflate(rand.New(rand.NewPCG(seed, 7))))
	}
	files, _ := filepath.Glob("testdata/*.gz")
	for _, file := range files {
		packed, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packed[10 : len(packed)-8])
	}
	f.Fuzz(func(t *testing.T, deflate []byte) {
		src := bytes.NewReader(deflate)
		content, err := io.ReadAll(io.LimitReader(flate.NewReader(src), 1<<24))
		if err == nil {
			deflate = deflate[:len(deflate)-src.Len()]
		}
		compareWithStandard(t, gzipMember(deflate, content))
	})
}

// compareWithStandard decodes packed with us, in every way, and with
// compress/gzip: both must take it, with the same content, or both refuse it,
// for the same reason and with the same content before. There are three
// exceptions: an empty stream is to us one cut off; names longer than the
// standard library's 511 bytes are fine; and where the standard library waits
// for as many bits as the end of the block has, before it looks at them, we
// may have seen a shorter symbol in a stream that is cut off there.
func compareWithStandard(t *testing.T, packed []byte) {
	const limit = 1 << 24
	want, wantErr := func() ([]byte, error) {
		z, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(z, limit))
	}()
	if len(want) == limit {
		t.Skip("a bomb")
	}
	if len(packed) == 0 {
		wantErr = io.ErrUnexpectedEOF
	}
	for way, read := range ways {
		got, err := read(bytes.NewReader(packed))
		switch k, wantK := kindOf(err), kindOf(wantErr); {
		case k == wantK && bytes.Equal(got, want):
		case wantK == "header" && len(packed) > 512 && bytes.HasPrefix(got, want):
		case wantK == "cut off" && (k == "cut off" || k == "corrupt") && bytes.HasPrefix(got, want):
		default:
			t.Fatalf("%s: %d bytes, %v; the standard library: %d bytes, %v", way, len(got), err, len(want), wantErr)
		}
	}
}

func kindOf(err error) string {
	var corruptUs *CorruptError
	var corruptThem flate.CorruptInputError
	switch {
	case err == nil:
		return "good"
	case err == ErrHeader, err == gzip.ErrHeader:
		return "header"
	case err == ErrChecksum, err == gzip.ErrChecksum:
		return "checksum"
	case err == io.ErrUnexpectedEOF:
		return "cut off"
	case errors.As(err, &corruptUs), errors.As(err, &corruptThem):
		return "corrupt"
	}
	return err.Error()
}
