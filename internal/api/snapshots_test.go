package api

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc/codes"

	"github.com/containerd/containerd/api/types"
)

func TestSnapshots(t *testing.T) {
	for _, driver := range []string{"native", "overlayfs"} {
		t.Run(driver, func(t *testing.T) { testSnapshots(t, driver) })
	}
}

func testSnapshots(t *testing.T, driver string) {
	f := start(t)
	ctx := in(t, "default")
	prepared, err := f.snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: driver, Key: "work", Labels: map[string]string{"k": "v"}})
	check(t, err)
	if len(prepared.Mounts) != 1 || prepared.Mounts[0].Type != "bind" || !slices.Contains(prepared.Mounts[0].Options, "rw") {
		t.Fatalf("mounts of a first snapshot: %v", prepared.Mounts)
	}
	check(t, os.WriteFile(filepath.Join(prepared.Mounts[0].Source, "file"), []byte("data"), 0o644))
	again, err := f.snapshots.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: driver, Key: "work"})
	check(t, err)
	if again.Mounts[0].Source != prepared.Mounts[0].Source {
		t.Errorf("mounts are %v and then %v", prepared.Mounts, again.Mounts)
	}
	info := stats(t, f, ctx, driver, "work")
	if info.Name != "work" || info.Kind != snapshotsapi.Kind_ACTIVE || info.Parent != "" || info.CreatedAt == nil || info.UpdatedAt == nil {
		t.Errorf("an active snapshot is %v", info)
	}
	sameLabels(t, info.Labels, map[string]string{"k": "v"})
	_, err = f.snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: driver, Key: "work"})
	wantCode(t, err, codes.AlreadyExists, "")

	_, err = f.snapshots.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: driver, Name: "base", Key: "work", Labels: map[string]string{"base": "1"}})
	check(t, err)
	info = stats(t, f, ctx, driver, "base")
	if info.Kind != snapshotsapi.Kind_COMMITTED {
		t.Errorf("a committed snapshot is %v", info)
	}
	_, err = f.snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: driver, Key: "work"})
	wantCode(t, err, codes.NotFound, "")
	usage, err := f.snapshots.Usage(ctx, &snapshotsapi.UsageRequest{Snapshotter: driver, Key: "base"})
	check(t, err)
	if usage.Inodes != 2 || usage.Size < 4 {
		t.Errorf("usage is %v", usage)
	}
	_, err = f.snapshots.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: driver, Name: "base2", Key: "work"})
	wantCode(t, err, codes.NotFound, "")
	_, err = f.snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: driver, Key: "work", Parent: "base"})
	check(t, err)
	_, err = f.snapshots.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: driver, Name: "base", Key: "work"})
	wantCode(t, err, codes.AlreadyExists, "")
	_, err = f.snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: driver, Key: "work"})
	check(t, err)
	testView(t, f, ctx, driver)
	testSnapshotUpdate(t, f, ctx, driver)

	_, err = f.snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: driver, Key: "base"})
	wantCode(t, err, codes.FailedPrecondition, "")
	for _, key := range []string{"look", "base"} {
		_, err = f.snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: driver, Key: key})
		check(t, err)
	}
	_, err = f.snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: driver, Key: "base"})
	wantCode(t, err, codes.NotFound, "")
	_, err = f.snapshots.Cleanup(ctx, &snapshotsapi.CleanupRequest{Snapshotter: driver})
	check(t, err)
}

func stats(t *testing.T, f *fixture, ctx context.Context, driver, key string) *snapshotsapi.Info {
	t.Helper()
	resp, err := f.snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: driver, Key: key})
	check(t, err)
	return resp.Info
}

func testView(t *testing.T, f *fixture, ctx context.Context, driver string) {
	view, err := f.snapshots.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: driver, Key: "look", Parent: "base"})
	check(t, err)
	if len(view.Mounts) != 1 || !slices.Contains(view.Mounts[0].Options, "ro") {
		t.Fatalf("mounts of a view: %v", view.Mounts)
	}
	if data, err := os.ReadFile(filepath.Join(view.Mounts[0].Source, "file")); string(data) != "data" {
		t.Errorf("the view shows %q (%v)", data, err)
	}
	if info := stats(t, f, ctx, driver, "look"); info.Kind != snapshotsapi.Kind_VIEW || info.Parent != "base" {
		t.Errorf("a view is %v", info)
	}
	_, err = f.snapshots.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: driver, Key: "none", Parent: "nobody"})
	wantCode(t, err, codes.NotFound, "")
	_, err = f.snapshots.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: driver, Name: "x", Key: "look"})
	wantCode(t, err, codes.FailedPrecondition, "")
}

func testSnapshotUpdate(t *testing.T, f *fixture, ctx context.Context, driver string) {
	update := func(labels map[string]string, paths ...string) (*snapshotsapi.Info, error) {
		req := &snapshotsapi.UpdateSnapshotRequest{Snapshotter: driver, Info: &snapshotsapi.Info{Name: "base", Labels: labels}}
		if paths != nil {
			req.UpdateMask = mask(paths...)
		}
		resp, err := f.snapshots.Update(ctx, req)
		return resp.GetInfo(), err
	}
	info, err := update(map[string]string{"a": "1", "b": "2"})
	check(t, err)
	sameLabels(t, info.Labels, map[string]string{"a": "1", "b": "2"})
	info, err = update(map[string]string{"a": "3"}, "labels.a")
	check(t, err)
	sameLabels(t, info.Labels, map[string]string{"a": "3", "b": "2"})
	_, err = update(nil, "parent")
	wantCode(t, err, codes.InvalidArgument, "")
}

func TestSnapshotDrivers(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	_, err := f.snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: "k"})
	wantCode(t, err, codes.InvalidArgument, "snapshotter argument missing")
	_, err = f.snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: "zfs", Key: "k"})
	wantCode(t, err, codes.InvalidArgument, "snapshotter not loaded: zfs")
	// Drivers don't share keys.
	_, err = f.snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: "native", Key: "k"})
	check(t, err)
	_, err = f.snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: "overlayfs", Key: "k"})
	wantCode(t, err, codes.NotFound, "")
}

func TestSnapshotList(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	const n = chunk + 3
	for i := range n {
		_, err := f.snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: "overlayfs", Key: fmt.Sprint("k", i), Labels: map[string]string{"odd": fmt.Sprint(i % 2)}})
		check(t, err)
	}
	list := func(ctx context.Context, filters ...string) (names []string, messages []int) {
		s, err := f.snapshots.List(ctx, &snapshotsapi.ListSnapshotsRequest{Snapshotter: "overlayfs", Filters: filters})
		check(t, err)
		for {
			resp, err := s.Recv()
			if err == io.EOF {
				return names, messages
			}
			check(t, err)
			messages = append(messages, len(resp.Info))
			for _, info := range resp.Info {
				names = append(names, info.Name)
			}
		}
	}
	all, messages := list(ctx)
	slices.Sort(all)
	if len(slices.Compact(all)) != n || !slices.Equal(messages, []int{chunk, 3}) {
		t.Errorf("%d snapshots come in messages of %v", len(all), messages)
	}
	if odd, _ := list(ctx, "labels.odd==1", "name==k0"); len(odd) != n/2+1 {
		t.Errorf("%d snapshots are odd or k0", len(odd))
	}
	if other, _ := list(in(t, "other")); other != nil {
		t.Errorf("another namespace lists %v", other)
	}
}

// A snapshot that is there already under the name that a client would give
// its own is leased, and the client is told.
func TestSnapshotTarget(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	_, err := f.snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: "overlayfs", Key: "work"})
	check(t, err)
	_, err = f.snapshots.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: "overlayfs", Key: "work", Name: "sha256:chain"})
	check(t, err)
	_, err = f.leases.Create(ctx, &leasesapi.CreateRequest{ID: "l"})
	check(t, err)
	_, err = f.snapshots.Prepare(in(t, "default", "l"), &snapshotsapi.PrepareSnapshotRequest{
		Snapshotter: "overlayfs", Key: "work2", Labels: map[string]string{"containerd.io/snapshot.ref": "sha256:chain"}})
	wantCode(t, err, codes.AlreadyExists, "")
	resp, err := f.leases.ListResources(ctx, &leasesapi.ListResourcesRequest{ID: "l"})
	check(t, err)
	if len(resp.Resources) != 1 || resp.Resources[0].ID != "sha256:chain" || resp.Resources[0].Type != "snapshots/overlayfs" {
		t.Errorf("the lease holds %v", resp.Resources)
	}
}

// bind is a mount as a client would send it for a plain directory.
func bind(dir string) []*types.Mount {
	return []*types.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "rw"}}}
}
