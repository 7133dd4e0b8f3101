package api

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func mask(paths ...string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: paths} }

func target(data string) *types.Descriptor {
	return &types.Descriptor{MediaType: "application/vnd.oci.image.manifest.v1+json", Digest: digest.FromString(data).String(), Size: int64(len(data))}
}

func TestImages(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	create := func(img *imagesapi.Image) (*imagesapi.Image, error) {
		resp, err := f.images.Create(ctx, &imagesapi.CreateImageRequest{Image: img})
		return resp.GetImage(), err
	}
	long := time.Unix(1e9, 0)
	img, err := create(&imagesapi.Image{Name: "docker.io/library/a:1", Target: target("a"), Labels: map[string]string{"k": "v"}, CreatedAt: timestamppb.New(long)})
	check(t, err)
	if img.Name != "docker.io/library/a:1" || img.Target.Digest != target("a").Digest || img.Target.Size != 1 || img.CreatedAt.AsTime().Equal(long) {
		t.Errorf("created %v", img)
	}
	_, err = create(&imagesapi.Image{Name: "docker.io/library/a:1", Target: target("b")})
	wantCode(t, err, codes.AlreadyExists, "")
	_, err = create(&imagesapi.Image{Target: target("b")})
	wantCode(t, err, codes.InvalidArgument, "Image.Name required")
	for _, bad := range []*types.Descriptor{
		nil,
		{MediaType: "x", Size: 1},
		{MediaType: "x", Digest: "sha256:abc", Size: 1},
		{MediaType: "x", Digest: digest.FromString("").String()},
		{MediaType: "x", Digest: digest.FromString("").String(), Size: -1},
		{Digest: digest.FromString("").String(), Size: 1},
	} {
		_, err = create(&imagesapi.Image{Name: "bad", Target: bad})
		wantCode(t, err, codes.InvalidArgument, "")
	}

	got, err := f.images.Get(ctx, &imagesapi.GetImageRequest{Name: "docker.io/library/a:1"})
	check(t, err)
	if got.Image.Target.Digest != target("a").Digest || got.Image.Labels["k"] != "v" {
		t.Errorf("got %v", got)
	}
	_, err = f.images.Get(in(t, "other"), &imagesapi.GetImageRequest{Name: "docker.io/library/a:1"})
	wantCode(t, err, codes.NotFound, "")
	testImageUpdate(t, f, ctx)

	_, err = create(&imagesapi.Image{Name: "b", Target: target("b")})
	check(t, err)
	names := func(filters ...string) (names []string) {
		resp, err := f.images.List(ctx, &imagesapi.ListImagesRequest{Filters: filters})
		check(t, err)
		for _, img := range resp.Images {
			names = append(names, img.Name)
		}
		slices.Sort(names)
		return names
	}
	if got := names(); !slices.Equal(got, []string{"b", "docker.io/library/a:1"}) {
		t.Errorf("list: %v", got)
	}
	if got := names("name==b", "name==c"); !slices.Equal(got, []string{"b"}) {
		t.Errorf("filtered list: %v", got)
	}

	_, err = f.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "b", Target: target("else")})
	wantCode(t, err, codes.NotFound, "")
	_, err = f.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "b", Target: &types.Descriptor{}})
	wantCode(t, err, codes.InvalidArgument, "")
	_, err = f.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "b", Target: target("b")})
	check(t, err)
	_, err = f.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "b"})
	wantCode(t, err, codes.NotFound, "")
	if f.collections != 0 {
		t.Error("a deletion collected without being asked")
	}
	_, err = f.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "docker.io/library/a:1", Sync: true})
	check(t, err)
	if f.collections != 1 {
		t.Error("a synchronous deletion didn't collect")
	}
}

// What each mask changes of the image docker.io/library/a:1, and what not.
func testImageUpdate(t *testing.T, f *fixture, ctx context.Context) {
	update := func(labels map[string]string, tgt *types.Descriptor, paths ...string) (*imagesapi.Image, error) {
		req := &imagesapi.UpdateImageRequest{Image: &imagesapi.Image{Name: "docker.io/library/a:1", Labels: labels, Target: tgt}}
		if paths != nil {
			req.UpdateMask = mask(paths...)
		}
		resp, err := f.images.Update(ctx, req)
		return resp.GetImage(), err
	}
	img, err := update(map[string]string{"x": "1", "k": "new"}, target("ignored"), "labels.x")
	check(t, err)
	sameLabels(t, img.Labels, map[string]string{"k": "v", "x": "1"})
	if img.Target.Digest != target("a").Digest {
		t.Error("a mask of labels changed the target")
	}
	img, err = update(nil, target("a2"), "target")
	check(t, err)
	sameLabels(t, img.Labels, map[string]string{"k": "v", "x": "1"})
	if img.Target.Digest != target("a2").Digest {
		t.Error("the target did not change")
	}
	img, err = update(map[string]string{"only": "1"}, target("a"))
	check(t, err)
	sameLabels(t, img.Labels, map[string]string{"only": "1"})
	_, err = update(nil, target("a"), "name")
	wantCode(t, err, codes.InvalidArgument, "")
	_, err = f.images.Update(ctx, &imagesapi.UpdateImageRequest{Image: &imagesapi.Image{}})
	wantCode(t, err, codes.InvalidArgument, "Image.Name required")
	_, err = f.images.Update(ctx, &imagesapi.UpdateImageRequest{Image: &imagesapi.Image{Name: "none", Target: target("a")}})
	wantCode(t, err, codes.NotFound, "")
}

func TestImageSourceDateEpoch(t *testing.T) {
	epoch := time.Unix(1e9, 0)
	img, err := imageFromWire(&imagesapi.Image{Name: "a", Target: target("a"), CreatedAt: timestamppb.Now()}, timestamppb.New(epoch))
	check(t, err)
	if !img.Created.Equal(epoch) || !img.Updated.Equal(epoch) {
		t.Errorf("created at %v, updated at %v", img.Created, img.Updated)
	}
	img, err = imageFromWire(&imagesapi.Image{Name: "a", Target: target("a"), CreatedAt: timestamppb.Now()}, nil)
	check(t, err)
	if !img.Created.IsZero() {
		t.Error("the client sets the time")
	}
	f := start(t)
	_, err = f.images.Create(in(t, "default"), &imagesapi.CreateImageRequest{
		Image: &imagesapi.Image{Name: "b", Target: target("b")}, SourceDateEpoch: &timestamppb.Timestamp{Nanos: -1}})
	wantCode(t, err, codes.InvalidArgument, "source_date_epoch")
}

func TestNamespaces(t *testing.T) {
	f := start(t)
	ctx := t.Context() // no header
	list := func() map[string]map[string]string {
		resp, err := f.namespaces.List(ctx, &namespacesapi.ListNamespacesRequest{})
		check(t, err)
		all := make(map[string]map[string]string)
		for _, ns := range resp.Namespaces {
			all[ns.Name] = ns.Labels
		}
		return all
	}
	if all := list(); len(all) != 0 {
		t.Errorf("a new store has the namespaces %v", all)
	}
	resp, err := f.namespaces.Create(ctx, &namespacesapi.CreateNamespaceRequest{Namespace: &namespacesapi.Namespace{Name: "a", Labels: map[string]string{"k": "v"}}})
	check(t, err)
	if resp.Namespace.Name != "a" || resp.Namespace.Labels["k"] != "v" {
		t.Errorf("created %v", resp)
	}
	_, err = f.namespaces.Create(ctx, &namespacesapi.CreateNamespaceRequest{Namespace: &namespacesapi.Namespace{Name: "a"}})
	wantCode(t, err, codes.AlreadyExists, "")
	for _, bad := range []string{"", "a/b", "-a", strings.Repeat("a", 77)} {
		_, err = f.namespaces.Create(ctx, &namespacesapi.CreateNamespaceRequest{Namespace: &namespacesapi.Namespace{Name: bad}})
		wantCode(t, err, codes.InvalidArgument, "")
	}
	unknown, err := f.namespaces.Get(ctx, &namespacesapi.GetNamespaceRequest{Name: "unknown"})
	check(t, err)
	if unknown.Namespace.Name != "unknown" || len(unknown.Namespace.Labels) != 0 {
		t.Errorf("an unknown namespace is %v", unknown)
	}
	testNamespaceUpdate(t, f)

	// The first write makes a namespace; what it holds keeps it.
	_, err = f.images.Create(in(t, "b"), &imagesapi.CreateImageRequest{Image: &imagesapi.Image{Name: "i", Target: target("i")}})
	check(t, err)
	if all := list(); !slices.Equal(slices.Sorted(maps.Keys(all)), []string{"a", "b"}) {
		t.Errorf("the namespaces are %v", all)
	}
	_, err = f.namespaces.Delete(ctx, &namespacesapi.DeleteNamespaceRequest{Name: "b"})
	wantCode(t, err, codes.FailedPrecondition, "")
	_, err = f.images.Delete(in(t, "b"), &imagesapi.DeleteImageRequest{Name: "i"})
	check(t, err)
	_, err = f.leases.Create(in(t, "b"), &leasesapi.CreateRequest{ID: "l"})
	check(t, err)
	_, err = f.namespaces.Delete(ctx, &namespacesapi.DeleteNamespaceRequest{Name: "b"}) // a lease doesn't keep it
	check(t, err)
	_, err = f.namespaces.Delete(ctx, &namespacesapi.DeleteNamespaceRequest{Name: "b"})
	wantCode(t, err, codes.NotFound, "")
	if all := list(); len(all) != 1 {
		t.Errorf("the namespaces are %v", all)
	}
}

func testNamespaceUpdate(t *testing.T, f *fixture) {
	update := func(labels map[string]string, paths ...string) error {
		req := &namespacesapi.UpdateNamespaceRequest{Namespace: &namespacesapi.Namespace{Name: "a", Labels: labels}}
		if paths != nil {
			req.UpdateMask = mask(paths...)
		}
		_, err := f.namespaces.Update(t.Context(), req)
		return err
	}
	labels := func() map[string]string {
		resp, err := f.namespaces.Get(t.Context(), &namespacesapi.GetNamespaceRequest{Name: "a"})
		check(t, err)
		return resp.Namespace.Labels
	}
	check(t, update(map[string]string{"x": "1"}, "labels.x"))
	sameLabels(t, labels(), map[string]string{"k": "v", "x": "1"})
	check(t, update(nil, "labels.x"))
	sameLabels(t, labels(), map[string]string{"k": "v"})
	check(t, update(map[string]string{"y": "2"}))
	sameLabels(t, labels(), map[string]string{"y": "2"})
	wantCode(t, update(map[string]string{"z": "3"}, "labels"), codes.InvalidArgument, `field "labels"`)
	wantCode(t, update(nil, "name"), codes.InvalidArgument, `field "name"`)
	sameLabels(t, labels(), map[string]string{"y": "2"})
}

func TestLeases(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	resp, err := f.leases.Create(ctx, &leasesapi.CreateRequest{ID: "l", Labels: map[string]string{"k": "v"}})
	check(t, err)
	if resp.Lease.ID != "l" || resp.Lease.Labels["k"] != "v" || resp.Lease.CreatedAt == nil {
		t.Errorf("created %v", resp)
	}
	_, err = f.leases.Create(ctx, &leasesapi.CreateRequest{ID: "l"})
	wantCode(t, err, codes.AlreadyExists, "")
	random, err := f.leases.Create(ctx, &leasesapi.CreateRequest{})
	check(t, err)
	if random.Lease.ID == "" {
		t.Error("a lease without an ID got none")
	}
	ids := func(ctx context.Context, filters ...string) (ids []string) {
		resp, err := f.leases.List(ctx, &leasesapi.ListRequest{Filters: filters})
		check(t, err)
		for _, l := range resp.Leases {
			ids = append(ids, l.ID)
		}
		slices.Sort(ids)
		return ids
	}
	want := []string{"l", random.Lease.ID}
	slices.Sort(want)
	if got := ids(ctx); !slices.Equal(got, want) {
		t.Errorf("list: %v", got)
	}
	if got := ids(ctx, "labels.k==v"); !slices.Equal(got, []string{"l"}) {
		t.Errorf("filtered list: %v", got)
	}
	if got := ids(in(t, "other")); got != nil {
		t.Errorf("another namespace has %v", got)
	}
	_, err = f.leases.Delete(ctx, &leasesapi.DeleteRequest{ID: "l"})
	check(t, err)
	_, err = f.leases.Delete(ctx, &leasesapi.DeleteRequest{ID: "l"})
	wantCode(t, err, codes.NotFound, "")
	if f.collections != 0 {
		t.Error("a deletion collected without being asked")
	}
	_, err = f.leases.Delete(ctx, &leasesapi.DeleteRequest{ID: random.Lease.ID, Sync: true})
	check(t, err)
	if f.collections != 1 {
		t.Error("a synchronous deletion didn't collect")
	}
}

func TestLeaseResources(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	_, err := f.leases.Create(ctx, &leasesapi.CreateRequest{ID: "l"})
	check(t, err)
	dgst := put(t, f, ctx, "r", []byte("data"))
	add := func(id, typ string) error {
		_, err := f.leases.AddResource(ctx, &leasesapi.AddResourceRequest{ID: "l", Resource: &leasesapi.Resource{ID: id, Type: typ}})
		return err
	}
	remove := func(id, typ string) error {
		_, err := f.leases.DeleteResource(ctx, &leasesapi.DeleteResourceRequest{ID: "l", Resource: &leasesapi.Resource{ID: id, Type: typ}})
		return err
	}
	list := func() (rs []string) {
		resp, err := f.leases.ListResources(ctx, &leasesapi.ListResourcesRequest{ID: "l"})
		check(t, err)
		for _, r := range resp.Resources {
			rs = append(rs, r.Type+" "+r.ID)
		}
		slices.Sort(rs)
		return rs
	}
	check(t, add(dgst.String(), "content"))
	check(t, add("some-ref", "ingests"))
	check(t, add("img", "images"))
	check(t, add("key", "snapshots/native"))
	want := []string{"content " + dgst.String(), "images img", "ingests some-ref", "snapshots/native key"}
	if got := list(); !slices.Equal(got, want) {
		t.Errorf("the lease holds %q, want %q", got, want)
	}
	wantCode(t, add("x", "containers"), codes.Unimplemented, "")
	wantCode(t, add("x", "snapshots"), codes.InvalidArgument, "")
	wantCode(t, add("no digest", "content"), codes.InvalidArgument, "")
	check(t, remove("some-ref", "ingests"))
	check(t, remove("some-ref", "ingests")) // what is not held can be let go
	wantCode(t, remove("x", "containers"), codes.Unimplemented, "")
	if got := list(); len(got) != 3 {
		t.Errorf("the lease holds %q", got)
	}
	_, err = f.leases.ListResources(ctx, &leasesapi.ListResourcesRequest{ID: "none"})
	wantCode(t, err, codes.NotFound, "")
	_, err = f.leases.AddResource(ctx, &leasesapi.AddResourceRequest{ID: "none", Resource: &leasesapi.Resource{ID: "x", Type: "images"}})
	wantCode(t, err, codes.NotFound, "")

	// What a lease holds outlives a collection, and not the lease.
	_, err = f.leases.Create(ctx, &leasesapi.CreateRequest{ID: "short"})
	check(t, err)
	_, err = f.leases.Delete(ctx, &leasesapi.DeleteRequest{ID: "short", Sync: true})
	check(t, err)
	get(t, f, ctx, dgst)
	_, err = f.leases.Delete(ctx, &leasesapi.DeleteRequest{ID: "l", Sync: true})
	check(t, err)
	_, _, err = read(f, ctx, &contentapi.ReadContentRequest{Digest: dgst.String()})
	wantCode(t, err, codes.NotFound, "")
}
