package api

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

func TestPlugins(t *testing.T) {
	f := start(t, func(o *Options) {
		o.Plugins = append(o.Plugins, Plugin{Type: TypeSnapshotter, ID: "btrfs", Err: fmt.Errorf("no btrfs here: %w", errdefs.ErrFailedPrecondition)})
	})
	plugins := func(filters ...string) (out []*introspectionapi.Plugin) {
		resp, err := f.introspection.Plugins(t.Context(), &introspectionapi.PluginsRequest{Filters: filters})
		check(t, err)
		return resp.Plugins
	}
	var all []string
	for _, p := range plugins() {
		all = append(all, p.Type+"."+p.ID)
	}
	for _, want := range []string{
		"io.containerd.content.v1.content", "io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.native",
		"io.containerd.metadata.v1.bolt", "io.containerd.gc.v1.scheduler", "io.containerd.lease.v1.manager",
		"io.containerd.differ.v1.walking", "io.containerd.grpc.v1.content", "io.containerd.grpc.v1.version",
		"io.containerd.transfer.v1.local", "io.containerd.streaming.v1.manager", "io.containerd.grpc.v1.transfer", "io.containerd.grpc.v1.streaming",
	} {
		if !slices.Contains(all, want) {
			t.Errorf("%s is not among %v", want, all)
		}
	}
	if slices.Contains(all, "io.containerd.grpc.v1.tasks") {
		t.Error("a service is listed that is not there")
	}
	// As clients ask for a snapshotter.
	found := plugins("type==io.containerd.snapshotter.v1, id==overlayfs")
	if len(found) != 1 || found[0].Exports["root"] != filepath.Join(f.root, "overlayfs") || len(found[0].Platforms) != 1 || found[0].Platforms[0].OS != "linux" {
		t.Fatalf("found %v", found)
	}
	if slices.Contains(found[0].Capabilities, "rebase") {
		t.Error("clients are invited to unpack layers without their parents")
	}
	if p := plugins("id==btrfs"); len(p) != 1 || codes.Code(p[0].InitErr.GetCode()) != codes.FailedPrecondition {
		t.Errorf("a part that failed is shown as %v", p)
	}
	_, err := f.introspection.Plugins(t.Context(), &introspectionapi.PluginsRequest{Filters: []string{"id=="}})
	wantCode(t, err, codes.InvalidArgument, "")
}

func TestCapabilities(t *testing.T) {
	got := capabilities(snapshot.Traits{Rebase: true, RemapIDs: true, OnlyRemapIDs: true})
	if !slices.Equal(got, []string{"remap-ids", "only-remap-ids"}) {
		t.Errorf("got %v", got)
	}
}

func TestPluginInfo(t *testing.T) {
	f := start(t, func(o *Options) {
		o.Plugins = append(o.Plugins, Plugin{Type: TypeSnapshotter, ID: "btrfs", Err: errors.New("no btrfs here")})
	})
	info := func(typ, id string, opts *anypb.Any) (*introspectionapi.PluginInfoResponse, error) {
		return f.introspection.PluginInfo(t.Context(), &introspectionapi.PluginInfoRequest{Type: typ, ID: id, Options: opts})
	}
	resp, err := info(TypeSnapshotter, "native", nil)
	check(t, err)
	if resp.Plugin.ID != "native" || resp.Plugin.Exports["root"] == "" {
		t.Errorf("got %v", resp)
	}
	_, err = info(TypeSnapshotter, "zfs", nil)
	wantCode(t, err, codes.NotFound, "io.containerd.snapshotter.v1.zfs not found")
	_, err = info(TypeSnapshotter, "native", &anypb.Any{})
	wantCode(t, err, codes.Unimplemented, "")
	_, err = info(TypeSnapshotter, "btrfs", &anypb.Any{})
	wantCode(t, err, codes.FailedPrecondition, "no btrfs here")
}

func TestServerIdentity(t *testing.T) {
	f := start(t)
	dir := filepath.Join(f.root, "io.containerd.grpc.v1.introspection")
	if _, err := os.Stat(dir); err == nil {
		t.Error("the identity exists before anyone asked")
	}
	old := syscall.Umask(0o022)
	defer syscall.Umask(old)
	first, err := f.introspection.Server(t.Context(), &emptypb.Empty{})
	check(t, err)
	if uuid.Validate(first.UUID) != nil || first.Pid != uint64(os.Getpid()) || first.Pidns == 0 {
		t.Errorf("the server is %v", first)
	}
	data, err := os.ReadFile(filepath.Join(dir, "uuid"))
	check(t, err)
	if string(data) != first.UUID {
		t.Errorf("the file says %q, the server %q", data, first.UUID)
	}
	for path, mode := range map[string]os.FileMode{dir: os.ModeDir | 0o700, filepath.Join(dir, "uuid"): 0o644} {
		if fi, err := os.Stat(path); err != nil || fi.Mode() != mode {
			t.Errorf("%s has the mode %v (%v), want %v", path, fi.Mode(), err, mode)
		}
	}
	again, err := f.introspection.Server(t.Context(), &emptypb.Empty{})
	check(t, err)
	if again.UUID != first.UUID {
		t.Error("the identity changes")
	}
	check(t, os.WriteFile(filepath.Join(dir, "uuid"), nil, 0o644)) // as after a power cut
	again, err = f.introspection.Server(t.Context(), &emptypb.Empty{})
	check(t, err)
	if uuid.Validate(again.UUID) != nil {
		t.Errorf("an empty file gives %q", again.UUID)
	}
	check(t, os.WriteFile(filepath.Join(dir, "uuid"), []byte("nonsense"), 0o644))
	_, err = f.introspection.Server(t.Context(), &emptypb.Empty{})
	wantCode(t, err, codes.Unknown, "remove it to get a new one")
}
