package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	content "github.com/containerd/containerd/api/services/content/v1"
	images "github.com/containerd/containerd/api/services/images/v1"
	leases "github.com/containerd/containerd/api/services/leases/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/metadata"
)

// Where a root keeps things, as containerd has it.
const (
	BlobsDir    = "io.containerd.content.v1.content/blobs"
	IngestDir   = "io.containerd.content.v1.content/ingest"
	OverlayDir  = "io.containerd.snapshotter.v1.overlayfs/snapshots"
	NativeDir   = "io.containerd.snapshotter.v1.native/snapshots"
	TrashDir    = "io.holdfast.v1.trash"
	TmpmountDir = "tmpmounts"
)

// Namespace is the one that tests work in unless they say otherwise.
const Namespace = "default"

// LeasePrefix begins the ids of leases that tests make, as opposed to those of pulls.
const LeasePrefix = "test-"

// Context returns the context of calls to the daemon in Namespace.
func Context(t testing.TB) context.Context {
	return metadata.AppendToOutgoingContext(t.Context(), "containerd-namespace", Namespace)
}

// Pull pulls ref over plain HTTP, with the command line.
func (d *Daemon) Pull(ref string, flags ...string) error {
	_, err := d.Ctl(append(append([]string{"-n", Namespace, "pull", "--plain-http"}, flags...), ref)...)
	return err
}

// Check runs the whole consistency check; the error holds its findings.
func (d *Daemon) Check() error {
	_, err := d.Ctl("store", "check", "--json")
	return err
}

// Images returns the digest that each image name stands for.
func (d *Daemon) Images(t testing.TB) map[string]digest.Digest {
	t.Helper()
	reply, err := images.NewImagesClient(d.Conn).List(Context(t), new(images.ListImagesRequest))
	if err != nil {
		t.Fatalf("list images: %v", err)
	}
	names := make(map[string]digest.Digest)
	for _, img := range reply.Images {
		names[img.Name] = digest.Digest(img.Target.Digest)
	}
	return names
}

// Blobs returns the size of every blob that Namespace has a record of, in bytes.
func (d *Daemon) Blobs(t testing.TB) map[digest.Digest]int64 {
	t.Helper()
	stream, err := content.NewContentClient(d.Conn).List(Context(t), new(content.ListContentRequest))
	if err != nil {
		t.Fatalf("list content: %v", err)
	}
	sizes := make(map[digest.Digest]int64)
	for {
		reply, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return sizes
		} else if err != nil {
			t.Fatalf("list content: %v", err)
		}
		for _, info := range reply.Info {
			sizes[digest.Digest(info.Digest)] = info.Size
		}
	}
}

// VerifyBlobs reads the file of every blob that Namespace has a record of.
func (d *Daemon) VerifyBlobs(t testing.TB) error {
	t.Helper()
	for dgst, size := range d.Blobs(t) {
		body, err := os.ReadFile(filepath.Join(d.Root, BlobsDir, dgst.Algorithm().String(), dgst.Encoded()))
		if err != nil {
			return fmt.Errorf("blob %s has a record: %w", dgst, err)
		}
		if int64(len(body)) != size || digest.FromBytes(body) != dgst {
			return fmt.Errorf("blob %s is wrong on disk: %d bytes of %d", dgst, len(body), size)
		}
	}
	return nil
}

// Snapshots returns the names and keys that Namespace has records of.
func (d *Daemon) Snapshots(t testing.TB, snapshotter string) (names []string) {
	t.Helper()
	stream, err := snapshots.NewSnapshotsClient(d.Conn).List(Context(t), &snapshots.ListSnapshotsRequest{Snapshotter: snapshotter})
	if err != nil {
		t.Fatalf("list snapshots: %v", err)
	}
	for {
		reply, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return names
		} else if err != nil {
			t.Fatalf("list snapshots: %v", err)
		}
		for _, info := range reply.Info {
			names = append(names, info.Name)
		}
	}
}

// RemoveImage removes an image and waits for the collection.
func (d *Daemon) RemoveImage(ctx context.Context, name string) error {
	_, err := images.NewImagesClient(d.Conn).Delete(ctx, &images.DeleteImageRequest{Name: name, Sync: true})
	return err
}

// Leases returns the leases of Namespace.
func (d *Daemon) Leases(t testing.TB) []*leases.Lease {
	t.Helper()
	reply, err := leases.NewLeasesClient(d.Conn).List(Context(t), new(leases.ListRequest))
	if err != nil {
		t.Fatalf("list leases: %v", err)
	}
	return reply.Leases
}

// Collect runs a collection and waits for it.
func (d *Daemon) Collect(ctx context.Context) error {
	_, end, err := d.Leased(ctx)
	if err != nil {
		return err
	}
	return end()
}

// Ingests returns the writes in progress or interrupted.
func (d *Daemon) Ingests(t testing.TB) []*content.Status {
	t.Helper()
	reply, err := content.NewContentClient(d.Conn).ListStatuses(Context(t), new(content.ListStatusesRequest))
	if err != nil {
		t.Fatalf("list ingests: %v", err)
	}
	return reply.Statuses
}

// Leased returns a context under a new lease, and a func that ends the lease and collects.
func (d *Daemon) Leased(ctx context.Context) (context.Context, func() error, error) {
	client := leases.NewLeasesClient(d.Conn)
	reply, err := client.Create(ctx, &leases.CreateRequest{ID: LeasePrefix + strconv.FormatUint(rand.Uint64(), 36)})
	if err != nil {
		return nil, nil, fmt.Errorf("create a lease: %w", err)
	}
	end := func() error {
		_, err := client.Delete(ctx, &leases.DeleteRequest{ID: reply.Lease.ID, Sync: true})
		if err != nil {
			return fmt.Errorf("delete a lease: %w", err)
		}
		return nil
	}
	return metadata.AppendToOutgoingContext(ctx, "containerd-lease", reply.Lease.ID), end, nil
}

// Tree mounts a committed snapshot as a container would see it, and reads it.
func (d *Daemon) Tree(t testing.TB, snapshotter, name string) (tree Tree, err error) {
	t.Helper()
	ctx, end, err := d.Leased(Context(t))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, end()) }()
	client := snapshots.NewSnapshotsClient(d.Conn)
	key := LeasePrefix + strconv.FormatUint(rand.Uint64(), 36)
	reply, err := client.View(ctx, &snapshots.ViewSnapshotRequest{Snapshotter: snapshotter, Key: key, Parent: name})
	if err != nil {
		return nil, fmt.Errorf("view snapshot %s: %w", name, err)
	}
	if tree, err = readMounted(reply.Mounts); err != nil {
		return nil, fmt.Errorf("read snapshot %s: %w", name, err)
	}
	if _, err := client.Remove(ctx, &snapshots.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: key}); err != nil {
		return nil, fmt.Errorf("remove the view of snapshot %s: %w", name, err)
	}
	return tree, nil
}

func readMounted(mounts []*types.Mount) (Tree, error) {
	if len(mounts) != 1 {
		return nil, fmt.Errorf("%d mounts, want one", len(mounts))
	}
	dir, err := os.MkdirTemp(scratch, "view-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(dir)
	flags, data := mountOptions(mounts[0])
	if err := unix.Mount(mounts[0].Source, dir, mounts[0].Type, flags, data); err != nil {
		return nil, fmt.Errorf("mount %v: %w", mounts[0], err)
	}
	defer unix.Unmount(dir, 0)
	return ReadTree(dir)
}

// mountOptions separates flags from data, as far as snapshot drivers use flags.
func mountOptions(m *types.Mount) (flags uintptr, data string) {
	var rest []string
	for _, option := range m.Options {
		switch option {
		case "ro":
			flags |= unix.MS_RDONLY
		case "rw":
		case "bind":
			flags |= unix.MS_BIND
		case "rbind":
			flags |= unix.MS_BIND | unix.MS_REC
		default:
			rest = append(rest, option)
		}
	}
	return flags, strings.Join(rest, ",")
}
