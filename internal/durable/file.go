// Package durable writes files so that a crash leaves the old one or the new one.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/fault"
)

// WriteFile replaces path so that a crash leaves the old content or the new,
// never a mix, and returns once the new content would survive a power cut.
// perm counts before the umask, and applies to a file that stood there too.
//
// The bytes pass through path+".tmp", which a crash may leave behind and the
// next WriteFile of path replaces. Callers see to it that nobody else writes
// path at the same time.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	tmp := path + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := writeNew(tmp, data, perm); err != nil {
		os.Remove(tmp) // best effort: the first error says what is wrong
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := fault.Point("durable.write.synced"); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := fault.Point("durable.write.renamed"); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// writeNew creates path, which must not exist, with data already synced.
func writeNew(path string, data []byte, perm fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// SyncDir makes the entries of a directory durable: names that were added,
// renamed or removed before the call survive a power cut.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

// StartWriteback asks the kernel to begin writing what an open file holds in
// memory, and does not wait. It is a hint that makes a later sync shorter:
// errors show there, and file systems without the call are no worse off.
func StartWriteback(fd int) {
	_ = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE)
}
