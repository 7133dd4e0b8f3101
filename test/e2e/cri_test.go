package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-dev/holdfast/test/harness"
)

// kubelet is the kubelet's connection to a daemon.
type kubelet struct {
	t *testing.T
	runtimeapi.ImageServiceClient
	d *harness.Daemon
}

func newKubelet(t *testing.T, d *harness.Daemon) kubelet {
	return kubelet{t, runtimeapi.NewImageServiceClient(d.Conn), d}
}

func (k kubelet) pull(name string) string {
	k.t.Helper()
	resp, err := k.PullImage(k.t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: name}})
	if err != nil {
		k.t.Fatal(err)
	}
	return resp.ImageRef
}

func (k kubelet) remove(name string) error {
	_, err := k.RemoveImage(k.t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: name}})
	return err
}

func (k kubelet) list() []*runtimeapi.Image {
	k.t.Helper()
	resp, err := k.ListImages(k.t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		k.t.Fatal(err)
	}
	return resp.Images
}

// names are those that containerd's clients see in the kubelet's namespace.
func (k kubelet) names() (names []string) {
	k.t.Helper()
	ctx := metadata.AppendToOutgoingContext(k.t.Context(), "containerd-namespace", "k8s.io")
	resp, err := imagesapi.NewImagesClient(k.d.Conn).List(ctx, &imagesapi.ListImagesRequest{})
	if err != nil {
		k.t.Fatal(err)
	}
	for _, img := range resp.Images {
		names = append(names, img.Name)
	}
	return names
}

// TestKubelet does with one daemon, and with it again after a restart, what
// the kubelet's image manager does.
func TestKubelet(t *testing.T) {
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(7, 3)...)
	ref := reg.Push(img, "pod")
	opts := harness.Options{Root: harness.TempDir(t)}
	d := harness.Start(t, opts)
	k := newKubelet(t, d)
	runtime := runtimeapi.NewRuntimeServiceClient(d.Conn)
	if v, err := runtime.Version(t.Context(), &runtimeapi.VersionRequest{}); err != nil || v.RuntimeName != "containerd" || !strings.HasPrefix(v.RuntimeVersion, "v2.4.2+holdfast.") {
		t.Errorf("version %v, %v", v, err)
	}
	if s, err := runtime.Status(t.Context(), &runtimeapi.StatusRequest{}); err != nil || len(s.GetStatus().GetConditions()) != 3 {
		t.Errorf("status %v, %v", s, err)
	}
	id := k.pull(ref)
	byDigest := strings.TrimSuffix(ref, ":latest") + "@" + img.Target.Digest.String()
	want := slices.Sorted(slices.Values([]string{ref, byDigest, id}))
	if got := k.names(); !slices.Equal(got, want) {
		t.Errorf("names %v, want %v", got, want)
	}
	d.Stop(t)

	d = harness.Start(t, opts)
	k = newKubelet(t, d)
	list := k.list()
	if len(list) != 1 || list[0].Id != id || !slices.Equal(list[0].RepoTags, []string{ref}) || !slices.Equal(list[0].RepoDigests, []string{byDigest}) {
		t.Fatalf("after a restart there is %v", list)
	}
	info, err := k.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(info.ImageFilesystems) != 1 {
		t.Fatalf("file systems %v, %v", info, err)
	}
	fs := info.ImageFilesystems[0]
	if fs.FsId.Mountpoint != filepath.Join(opts.Root, "io.containerd.snapshotter.v1.overlayfs") {
		t.Errorf("images are in %s", fs.FsId.Mountpoint)
	}
	if blobs := uint64(len(img.Blobs)); fs.InodesUsed.Value <= blobs || fs.UsedBytes.Value < uint64(img.LayerBytes()) {
		t.Errorf("%d bytes, %d inodes", fs.UsedBytes.Value, fs.InodesUsed.Value)
	}
	whole(t, d)
	if err := k.remove(id); err != nil {
		t.Fatal(err)
	}
	if left := append(k.names(), blobFiles(t, opts.Root)...); len(left) > 0 || len(k.list()) > 0 {
		t.Errorf("after removal there are %v, %v", left, k.list())
	}
	whole(t, d)
	d.Stop(t)
}

func blobFiles(t *testing.T, root string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, harness.BlobsDir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestRemoveKilled kills the daemon around the commit of a removal: afterwards
// all of the image's names are there, or none.
func TestRemoveKilled(t *testing.T) {
	for moment, want := range map[string]int{"meta.commit.before": 3, "meta.commit.after": 0} {
		t.Run(moment, func(t *testing.T) {
			reg := harness.NewRegistry(t)
			ref := reg.Push(harness.NewImage(t, harness.Random(8, 2)...), "pod")
			opts := harness.Options{Root: harness.TempDir(t)}
			d := harness.Start(t, opts)
			id := newKubelet(t, d).pull(ref)
			d.Stop(t)

			faulty := opts
			faulty.Fault = moment + "=kill"
			d = harness.Start(t, faulty)
			if err := newKubelet(t, d).remove(ref); err == nil {
				t.Error("the removal succeeded without its daemon")
			}
			<-d.Done()

			d = harness.Start(t, opts)
			k := newKubelet(t, d)
			if names := k.names(); len(names) != want {
				t.Errorf("names %v, want %d", names, want)
			}
			if n := len(k.list()); n != min(want, 1) {
				t.Errorf("%d images", n)
			}
			if err := k.remove(id); err != nil {
				t.Error(err)
			}
			soon(t, "the collection at the start", func() bool { return len(blobFiles(t, opts.Root)) == 0 })
			whole(t, d)
			d.Stop(t)
		})
	}
}

// TestKubeletKilled kills the daemon during a pull: none of the image's names
// is there, and the next pull makes it whole.
func TestKubeletKilled(t *testing.T) {
	reg := harness.NewRegistry(t)
	img := harness.NewImage(t, harness.Random(9, 3)...)
	ref := reg.Push(img, "pod")
	opts := harness.Options{Root: harness.TempDir(t)}
	d := harness.Start(t, opts)
	reached := reg.Hold(img.LayerBytes() / 2)
	ended := make(chan error, 1)
	go func() {
		_, err := newKubelet(t, d).PullImage(context.Background(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
		ended <- err
	}()
	select {
	case <-reached:
	case <-time.After(20 * time.Second):
		t.Fatal("the pull gets nowhere")
	}
	d.Kill()
	reg.Release()
	if err := <-ended; err == nil {
		t.Error("the pull succeeded without its daemon")
	}
	d = harness.Start(t, opts)
	k := newKubelet(t, d)
	if names := k.names(); len(names) > 0 {
		t.Errorf("names %v", names)
	}
	id := k.pull(ref)
	if list := k.list(); len(list) != 1 || list[0].Id != id {
		t.Errorf("images %v", list)
	}
	whole(t, d)
	d.Stop(t)
}

// TestKubeletConfig: the keys of the CRI image plugin, and its absence.
func TestKubeletConfig(t *testing.T) {
	reg := harness.NewRegistry(t)
	ref := reg.Push(harness.NewImage(t, harness.Random(10, 1)...), "pause")
	root := harness.TempDir(t)
	d := harness.Start(t, harness.Options{Root: root, Config: fmt.Sprintf(`version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  max_concurrent_downloads = 1
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
[plugins."io.containerd.internal.v1.opt"]
  path = %q
`, ref, root)})
	k := newKubelet(t, d)
	k.pull(ref)
	if list := k.list(); len(list) != 1 || !list[0].Pinned {
		t.Errorf("images %v", list)
	}
	if dirs, err := os.ReadDir(filepath.Join(root, "io.containerd.snapshotter.v1.native", "snapshots")); err != nil || len(dirs) != 1 {
		t.Errorf("native has %v, %v", dirs, err)
	}
	d.Stop(t)

	d = harness.Start(t, harness.Options{Config: "version = 1\ndisabled_plugins = ['cri']\n[plugins.opt]\npath = '" + root + "'\n"})
	if _, err := newKubelet(t, d).ListImages(t.Context(), &runtimeapi.ListImagesRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("without the plugin: %v", err)
	}
	d.Stop(t)
}
