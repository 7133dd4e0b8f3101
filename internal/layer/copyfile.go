package layer

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/linux/inroot"
)

// copyFile copies a file's bytes to a new file: by sharing them if the file
// system can, else by copying within the kernel, and holes stay holes.
func copyFile(from *inroot.Root, path string, to *inroot.Root, name string) error {
	in, err := from.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := to.Create(name, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	src := int(in.Fd())
	if unix.IoctlFileClone(out.Fd(), src) == nil {
		return nil
	}
	for at := int64(0); at < st.Size(); {
		data, err := unix.Seek(src, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole to the end
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(src, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := copyRange(src, out, data, hole-data); err != nil {
			return err
		}
		at = hole
	}
	if err := out.Truncate(st.Size()); err != nil {
		return err
	}
	if st.Size() >= writebackFrom {
		durable.StartWriteback(out.Fd())
	}
	return nil
}

func copyRange(src int, out *inroot.File, at, size int64) error {
	to := at
	for size > 0 {
		n, err := unix.CopyFileRange(src, &at, out.Fd(), &to, int(min(size, 1<<30)), 0)
		switch {
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return copyBytes(src, out, at, size)
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		size -= int64(n)
	}
	return nil
}

// copySize is what is copied at once by reading and writing, in bytes.
const copySize = 256 << 10

// copyBytes is for file systems that don't copy within the kernel.
func copyBytes(src int, out *inroot.File, at, size int64) error {
	buf := make([]byte, copySize)
	for size > 0 {
		n, err := unix.Pread(src, buf[:min(size, copySize)], at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		for done := 0; done < n; {
			m, err := unix.Pwrite(out.Fd(), buf[done:n], at+int64(done))
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			done += max(m, 0)
		}
		at += int64(n)
		size -= int64(n)
	}
	return nil
}
