package forgetful

import (
	"context"
	"fmt"
	"os"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// serveEnv makes a process of the test binary the server of one disk; its
// value is the directory to mount on.
const serveEnv = "HOLDFAST_FORGETFUL_DISK"

// What the server inherits, as descriptor numbers.
const (
	fdImage = 3 // the disk's present content
	fdLog   = 4
	fdReady = 5 // closed by the server once the file system is mounted
	fdStop  = 6 // reaches its end when the test is done with the disk
)

// Main is to be called first in TestMain by every test binary that opens a
// disk. In a process that Open started it serves the disk and doesn't return;
// in any other it does nothing.
//
// The server is a process of its own because the test must never wait for
// itself: a page fault, a fork or a stop of the garbage collector on one side of the loop
// device, while the other side is needed to finish it, would be the end.
func Main() {
	dir := os.Getenv(serveEnv)
	if dir == "" {
		return
	}
	if err := serve(dir); err != nil {
		fmt.Fprintln(os.Stderr, "forgetful disk:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(dir string) error {
	image := os.NewFile(fdImage, "image")
	st, err := image.Stat()
	if err != nil {
		return err
	}
	root := &root{disk: &diskFile{
		image: image,
		size:  uint64(st.Size()),
		log:   appender{file: os.NewFile(fdLog, "log")},
	}}
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{
			DirectMountStrict: true,
			MaxWrite:          1 << 20,
			FsName:            "forgetful",
			Name:              "forgetful",
			DisableXAttrs:     true,
		},
	})
	if err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	os.NewFile(fdReady, "ready").Close()
	go func() {
		os.NewFile(fdStop, "stop").Read(make([]byte, 1))
		if err := server.Unmount(); err != nil {
			fmt.Fprintf(os.Stderr, "forgetful disk: unmount %s: %v\n", dir, err)
			os.Exit(1) // ends the connection, and every request with it
		}
	}()
	server.Wait()
	return nil
}

// diskName is the one file of the file system.
const diskName = "disk"

type root struct {
	fs.Inode
	disk *diskFile
}

func (r *root) OnAdd(ctx context.Context) {
	node := r.NewPersistentInode(ctx, r.disk, fs.StableAttr{Mode: syscall.S_IFREG})
	r.AddChild(diskName, node, false)
}

// diskFile is the file below the loop device. It has no Allocate: the kernel
// then turns discards off and writes its zeros out, where the log sees them.
type diskFile struct {
	fs.Inode
	image *os.File
	size  uint64
	log   appender
}

var (
	_ fs.NodeGetattrer = (*diskFile)(nil)
	_ fs.NodeOpener    = (*diskFile)(nil)
	_ fs.NodeReader    = (*diskFile)(nil)
	_ fs.NodeWriter    = (*diskFile)(nil)
	_ fs.NodeFsyncer   = (*diskFile)(nil)
)

func (d *diskFile) Getattr(ctx context.Context, f fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = syscall.S_IFREG | 0o600
	out.Size = d.size
	return 0
}

// Open asks for direct I/O: no page cache stands between the loop device and the log.
func (d *diskFile) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (d *diskFile) Read(ctx context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	dest = dest[:min(int64(len(dest)), max(0, int64(d.size)-off))]
	n, err := d.image.ReadAt(dest, off)
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func (d *diskFile) Write(ctx context.Context, f fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if uint64(off)+uint64(len(data)) > d.size {
		return 0, syscall.ENOSPC
	}
	d.log.mu.Lock()
	defer d.log.mu.Unlock()
	if err := d.log.append(Write, off, data); err != nil {
		return 0, fs.ToErrno(err)
	}
	n, err := d.image.WriteAt(data, off)
	return uint32(n), fs.ToErrno(err)
}

// Fsync is what the loop driver makes of a flush, and the block layer of a
// write that must be on the platter (FUA) when it ends.
func (d *diskFile) Fsync(ctx context.Context, f fs.FileHandle, flags uint32) syscall.Errno {
	d.log.mu.Lock()
	defer d.log.mu.Unlock()
	return fs.ToErrno(d.log.append(Flush, 0, nil))
}
