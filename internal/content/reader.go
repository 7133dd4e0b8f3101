package content

import (
	"fmt"
	"io"
	"io/fs"
	"os"
)

// Reader reads a blob, or the bytes so far of an ingest. Its size is fixed
// when it is opened.
type Reader struct {
	f *os.File
	r *io.SectionReader
}

// openReader opens a regular file; anything else counts as absent.
func openReader(path string) (*Reader, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|openFlags, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file: %w", path, fs.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Reader{f: f, r: io.NewSectionReader(f, 0, fi.Size())}, nil
}

// ReadAt implements io.ReaderAt.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) { return r.r.ReadAt(p, off) }

// Size is the number of bytes that can be read.
func (r *Reader) Size() int64 { return r.r.Size() }

// Close frees the file.
func (r *Reader) Close() error { return r.f.Close() }
