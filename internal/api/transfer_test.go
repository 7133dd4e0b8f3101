package api

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/api/types"
	transfertypes "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/stream"
)

// The platforms of the tests' images. None need be the machine's.
var (
	amd64 = &types.Platform{OS: "linux", Architecture: "amd64"}
	s390x = &types.Platform{OS: "linux", Architecture: "s390x"}
	arm   = &types.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}
	win   = &types.Platform{OS: "windows", Architecture: "amd64"}
)

// shop is a registry with images in it.
type shop struct {
	*registrytest.Server
	index        ocispec.Descriptor
	amd64, s390x registrytest.Image
	attest       registrytest.Image
}

// newShop has demo:1, an index of two images that share a layer, and of an attestation.
func newShop(t *testing.T) shop {
	s := shop{Server: registrytest.New(t)}
	plain := func(content string) registrytest.Layer {
		data := archive(t, map[string]string{"file": content})
		return registrytest.Layer{Data: data, DiffID: digest.FromBytes(data), MediaType: ocispec.MediaTypeImageLayer}
	}
	push := func(arch string, layers ...registrytest.Layer) registrytest.Image {
		return s.PushFormat("demo", "", registrytest.Format{Platform: ocispec.Platform{OS: "linux", Architecture: arch}}, layers...)
	}
	s.amd64 = push("amd64", plain("shared"), plain("amd64"))
	s.s390x = push("s390x", plain("shared"), plain("s390x"))
	s.attest = s.PushFormat("demo", "", registrytest.Format{Platform: ocispec.Platform{OS: "unknown", Architecture: "unknown"}},
		registrytest.Layer{Data: []byte(`{"_type":"in-toto"}`), MediaType: "application/vnd.in-toto+json"})
	s.index = s.PushIndex("demo", "1", s.amd64, s.s390x, s.attest)
	return s
}

func (s shop) ref() string { return s.Host() + "/demo:1" }

func (s shop) from() *transfertypes.OCIRegistry {
	return &transfertypes.OCIRegistry{Reference: s.ref(), Resolver: &transfertypes.RegistryResolver{DefaultScheme: "http"}}
}

func unpack(snapshotter string, platforms ...*types.Platform) (list []*transfertypes.UnpackConfiguration) {
	for _, p := range platforms {
		list = append(list, &transfertypes.UnpackConfiguration{Platform: p, Snapshotter: snapshotter})
	}
	return list
}

// move transfers without a progress stream.
func (f *fixture) move(t *testing.T, ctx context.Context, from, to proto.Message) error {
	t.Helper()
	_, err := f.transfer.Transfer(ctx, &transferapi.TransferRequest{Source: pack(t, from), Destination: pack(t, to)})
	return err
}

// moveAloud transfers and returns what the client hears meanwhile.
func (f *fixture) moveAloud(t *testing.T, from, to proto.Message) (heard []*transfertypes.Progress, err error) {
	t.Helper()
	s := f.mustOpenStream(t, "default", "progress")
	all := make(chan []*transfertypes.Progress)
	go func() {
		var list []*transfertypes.Progress
		for {
			msg, err := s.Recv()
			if err != nil {
				if err != io.EOF {
					t.Errorf("the progress stream ends with %v", err)
				}
				all <- list
				return
			}
			m, err := msg.UnmarshalNew()
			if err != nil {
				t.Errorf("unpack %v: %v", msg, err)
				continue
			}
			list = append(list, m.(*transfertypes.Progress))
		}
	}()
	_, err = f.transfer.Transfer(in(t, "default"), &transferapi.TransferRequest{
		Source: pack(t, from), Destination: pack(t, to), Options: &transferapi.TransferOptions{ProgressStream: "progress"},
	})
	return <-all, err
}

// tree is where and how each thing ended.
func tree(heard []*transfertypes.Progress) map[string]string {
	ends := make(map[string]string)
	for _, p := range heard {
		if p.Name != "" {
			ends[p.Name] = fmt.Sprintf("%s %d/%d below %s", p.Event, p.Progress, p.Total, strings.Join(p.Parents, "+"))
		}
	}
	return ends
}

func TestTransferPull(t *testing.T) {
	shop := newShop(t)
	f := pulling(t)
	to := &transfertypes.ImageStore{Name: "my/name", Labels: map[string]string{"k": "v"}, Platforms: []*types.Platform{amd64},
		AllMetadata: true, Unpacks: unpack("", amd64)}
	heard, err := f.moveAloud(t, shop.from(), to)
	check(t, err)
	var transferWide []string
	for _, p := range heard {
		if p.Name == "" {
			transferWide = append(transferWide, p.Event)
		}
	}
	from := "OCI Registry (" + shop.ref() + ")"
	if want := []string{"Resolving from " + from, "Pulling from " + from, "Completed pull from " + from}; !slices.Equal(transferWide, want) {
		t.Errorf("heard %q, want %q", transferWide, want)
	}
	index, manifest := "index-"+shop.index.Digest.String(), "manifest-"+shop.amd64.Descriptor.Digest.String()
	other := "manifest-" + shop.s390x.Descriptor.Digest.String()
	done := func(word string, size int64, below string) string {
		return fmt.Sprintf("%s %d/%d below %s", word, size, size, below)
	}
	ends := tree(heard)
	for name, want := range map[string]string{
		shop.ref(): "fetching image content 0/0 below ",
		"my/name":  "saved 0/0 below ",
		index:      done("complete", shop.index.Size, shop.ref()),
		manifest:   done("complete", shop.amd64.Descriptor.Size, index),
		other:      done("complete", shop.s390x.Descriptor.Size, index),
		"config-" + shop.amd64.Config.Digest.String():          done("complete", shop.amd64.Config.Size, manifest),
		"config-" + shop.s390x.Config.Digest.String():          done("complete", shop.s390x.Config.Size, other),
		"layer-" + shop.amd64.Layers[1].Digest.String():        done("extracted", shop.amd64.Layers[1].Size, manifest),
		"layer-" + shop.s390x.Layers[1].Digest.String():        "",
		"attestation-" + shop.attest.Layers[0].Digest.String(): "",
	} {
		if ends[name] != want {
			t.Errorf("%s ends as %q, want %q", name, ends[name], want)
		}
	}
	ctx := in(t, "default")
	img, err := f.images.Get(ctx, &imagesapi.GetImageRequest{Name: "my/name"})
	if err != nil || img.Image.Target.Digest != shop.index.Digest.String() || img.Image.Labels["k"] != "v" {
		t.Errorf("the image is %v (%v)", img, err)
	}
	f.wantBlobs(t, "the metadata of all platforms is here", true, shop.s390x.Config)
	f.wantBlobs(t, "layers of others are not", false, shop.s390x.Layers[1], shop.attest.Layers[0])
	f.wantSnapshots(t, "overlayfs", 2)

	heard, err = f.moveAloud(t, shop.from(), to)
	check(t, err)
	ends = tree(heard)
	for _, name := range []string{index, manifest, "config-" + shop.amd64.Config.Digest.String(), "layer-" + shop.amd64.Layers[0].Digest.String()} {
		if !strings.HasPrefix(ends[name], "already exists") {
			t.Errorf("pulled again, %s ends as %q", name, ends[name])
		}
	}
}

func (f *fixture) wantBlobs(t *testing.T, why string, here bool, descs ...ocispec.Descriptor) {
	t.Helper()
	for _, d := range descs {
		_, err := f.db.Space("default").Blob(t.Context(), d.Digest)
		if (err == nil) != here {
			t.Errorf("%s, but %s %s: %v", why, d.MediaType, d.Digest, err)
		}
	}
}

func (f *fixture) wantSnapshots(t *testing.T, driver string, n int) {
	t.Helper()
	s, err := f.snapshots.List(in(t, "default"), &snapshotsapi.ListSnapshotsRequest{Snapshotter: driver})
	check(t, err)
	got := 0
	for {
		resp, err := s.Recv()
		if err == io.EOF {
			break
		}
		check(t, err)
		for _, info := range resp.Info {
			if info.Kind != snapshotsapi.Kind_COMMITTED {
				t.Errorf("snapshot %v is left", info)
			}
			got++
		}
	}
	if got != n {
		t.Errorf("%s has %d snapshots, want %d", driver, got, n)
	}
}

// What is fetched and unpacked of an index with two images and an attestation.
func TestTransferPlatforms(t *testing.T) {
	shop := newShop(t)
	for _, c := range []struct {
		name      string
		to        *transfertypes.ImageStore
		code      codes.Code
		text      string // of the error, or of what is heard
		snapshots int
		driver    string // default: overlayfs
		here      []ocispec.Descriptor
		missing   []ocispec.Descriptor
	}{
		{name: "one, packed", to: &transfertypes.ImageStore{Platforms: []*types.Platform{s390x}},
			here: shop.s390x.Layers, missing: append(shop.amd64.Layers[1:], shop.amd64.Config)},
		{name: "another platform is unpacked", to: &transfertypes.ImageStore{Platforms: []*types.Platform{s390x}, Unpacks: unpack("native", s390x)},
			snapshots: 2, driver: "native", here: shop.s390x.Layers},
		{name: "two", to: &transfertypes.ImageStore{Platforms: []*types.Platform{amd64, s390x}, Unpacks: unpack("", amd64, s390x)},
			snapshots: 3, here: slices.Concat(shop.amd64.Layers, shop.s390x.Layers), missing: shop.attest.Layers},
		{name: "two, one packed", to: &transfertypes.ImageStore{Platforms: []*types.Platform{amd64, s390x}, Unpacks: unpack("", s390x)},
			snapshots: 2, here: slices.Concat(shop.amd64.Layers, shop.s390x.Layers)},
		{name: "all", to: &transfertypes.ImageStore{}, snapshots: 0, here: slices.Concat(shop.amd64.Layers, shop.s390x.Layers, shop.attest.Layers, []ocispec.Descriptor{shop.attest.Config})},
		{name: "all, one unpacked", to: &transfertypes.ImageStore{Unpacks: unpack("", amd64)},
			snapshots: 2, here: slices.Concat(shop.amd64.Layers, shop.s390x.Layers, shop.attest.Layers)},
		{name: "all, and one that there is not", to: &transfertypes.ImageStore{Unpacks: unpack("", arm)},
			text: "no image for this platform", here: shop.amd64.Layers},
		{name: "two, of which one is there", to: &transfertypes.ImageStore{Platforms: []*types.Platform{amd64, arm}, Unpacks: unpack("", amd64, arm)},
			text: "no image for this platform", snapshots: 2, here: shop.amd64.Layers},
		{name: "none is there", to: &transfertypes.ImageStore{Platforms: []*types.Platform{arm, win}}, code: codes.NotFound, text: "there are linux/amd64, linux/s390x"},
		{name: "no snapshotter for one", to: &transfertypes.ImageStore{Platforms: []*types.Platform{amd64, s390x},
			Unpacks: append(unpack("native", amd64), unpack("zfs", s390x)...)},
			text: "stays packed", snapshots: 2, driver: "native", here: shop.s390x.Layers},
		{name: "no snapshotter at all", to: &transfertypes.ImageStore{Platforms: []*types.Platform{amd64}, Unpacks: unpack("zfs", amd64)}, code: codes.InvalidArgument, text: "zfs"},
		{name: "windows", to: &transfertypes.ImageStore{Platforms: []*types.Platform{win}, Unpacks: unpack("", win)}, code: codes.InvalidArgument, text: "only images for Linux"},
		{name: "two snapshotters", to: &transfertypes.ImageStore{Platforms: []*types.Platform{amd64, s390x}, Unpacks: append(unpack("native", amd64), unpack("overlayfs", s390x)...)},
			code: codes.Unimplemented, text: "once for each"},
		{name: "a limit that is kept", to: &transfertypes.ImageStore{Platforms: []*types.Platform{amd64}, ManifestLimit: 1}, here: shop.amd64.Layers},
		{name: "a limit that isn't", to: &transfertypes.ImageStore{ManifestLimit: 1}, code: codes.Unimplemented, text: "manifest_limit"},
		{name: "too many", to: &transfertypes.ImageStore{Platforms: slices.Repeat([]*types.Platform{amd64}, maxPlatforms+1)}, code: codes.InvalidArgument, text: "more than"},
		{name: "no platform at all", to: &transfertypes.ImageStore{Platforms: []*types.Platform{{OS: "x y", Architecture: "z"}}}, code: codes.InvalidArgument, text: "x y"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := pulling(t)
			c.to.Name = "name"
			heard, err := f.moveAloud(t, shop.from(), c.to)
			if c.code != codes.OK {
				wantCode(t, err, c.code, c.text)
				return
			}
			check(t, err)
			if !strings.Contains(fmt.Sprint(heard), c.text) {
				t.Errorf("heard %v and not %q", heard, c.text)
			}
			if c.driver == "" {
				c.driver = "overlayfs"
			}
			f.wantSnapshots(t, c.driver, c.snapshots)
			f.wantBlobs(t, "it was asked for", true, c.here...)
			f.wantBlobs(t, "nobody asked for it", false, c.missing...)
			_, err = f.db.Collect(t.Context())
			check(t, err)
			f.wantBlobs(t, "the image holds it", true, c.here...)
		})
	}
}

func TestTransferNames(t *testing.T) {
	shop := newShop(t)
	f := pulling(t)
	ctx := in(t, "default")
	to := &transfertypes.ImageStore{Name: "main", Labels: map[string]string{"k": "v"}, Platforms: []*types.Platform{amd64}, ExtraReferences: []*transfertypes.ImageReference{
		{Name: "extra"}, {Name: "prefix", IsPrefix: true}, {Name: "by", IsPrefix: true, AddDigest: true},
	}}
	byDigest := "by@" + shop.index.Digest.String()
	names := func() (list []string) {
		resp, err := f.images.List(ctx, &imagesapi.ListImagesRequest{})
		check(t, err)
		for _, img := range resp.Images {
			if img.Target.Digest != shop.index.Digest.String() || img.Labels["k"] != "v" {
				t.Errorf("image %v", img)
			}
			list = append(list, img.Name)
		}
		return list
	}
	check(t, f.move(t, ctx, shop.from(), to))
	if got := names(); !slices.Equal(got, []string{byDigest, "extra", "main"}) {
		t.Errorf("images %q", got)
	}
	_, err := f.db.Collect(t.Context())
	check(t, err)
	if len(names()) != 3 {
		t.Errorf("with the main name are left %q", names())
	}
	_, err = f.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "main", Sync: true})
	check(t, err)
	if got := names(); len(got) != 0 {
		t.Errorf("the extra names outlive the main one: %q", got)
	}
	to.Name = ""
	check(t, f.move(t, ctx, shop.from(), to))
	_, err = f.db.Collect(t.Context())
	check(t, err)
	if got := names(); !slices.Equal(got, []string{byDigest, "extra"}) {
		t.Errorf("without a main name there are %q", got)
	}
	to.ExtraReferences = to.ExtraReferences[1:2]
	wantCode(t, f.move(t, ctx, shop.from(), to), codes.NotFound, "no image name")
	wantCode(t, f.move(t, ctx, shop.from(), &transfertypes.ImageStore{Name: "x", ExtraReferences: []*transfertypes.ImageReference{{}}}), codes.InvalidArgument, "no name")
}

// A client's own lease keeps what it has pulled.
func TestTransferLease(t *testing.T) {
	shop := newShop(t)
	f := pulling(t)
	_, err := f.leases.Create(in(t, "default"), &leasesapi.CreateRequest{ID: "mine"})
	check(t, err)
	check(t, f.move(t, in(t, "default", "mine"), shop.from(), &transfertypes.ImageStore{Name: "name", Platforms: []*types.Platform{amd64}}))
	_, err = f.images.Delete(in(t, "default"), &imagesapi.DeleteImageRequest{Name: "name", Sync: true})
	check(t, err)
	f.wantBlobs(t, "the lease holds it", true, append(shop.amd64.Layers, shop.index)...)
	_, err = f.leases.Delete(in(t, "default"), &leasesapi.DeleteRequest{ID: "mine", Sync: true})
	check(t, err)
	f.wantBlobs(t, "nothing holds it", false, append(shop.amd64.Layers, shop.index)...)
}

func TestTransferTag(t *testing.T) {
	shop := newShop(t)
	f := pulling(t)
	ctx := in(t, "default")
	check(t, f.move(t, ctx, shop.from(), &transfertypes.ImageStore{Name: "one", Platforms: []*types.Platform{amd64}, Labels: map[string]string{"a": "1"}}))
	from := &transfertypes.OCIRegistry{Reference: shop.Host() + "/demo@" + shop.s390x.Descriptor.Digest.String(), Resolver: shop.from().Resolver}
	check(t, f.move(t, ctx, from, &transfertypes.ImageStore{Name: "two", Platforms: []*types.Platform{s390x}}))
	target := func(name string) *imagesapi.Image {
		resp, err := f.images.Get(ctx, &imagesapi.GetImageRequest{Name: name})
		check(t, err)
		return resp.Image
	}
	tagged := &transfertypes.ImageStore{Name: "tag", Labels: map[string]string{"b": "2"}, ExtraReferences: []*transfertypes.ImageReference{{Name: "more"}}}
	check(t, f.move(t, ctx, &transfertypes.ImageStore{Name: "one"}, tagged))
	first := target("tag")
	if first.Target.Digest != target("one").Target.Digest || len(first.Labels) != 1 || first.Labels["b"] != "2" || target("more").Labels[labelKeptBy] != "tag" {
		t.Errorf("tagged as %v", first)
	}
	check(t, f.move(t, ctx, &transfertypes.ImageStore{Name: "two"}, &transfertypes.ImageStore{Name: "tag"}))
	second := target("tag")
	if second.Target.Digest != target("two").Target.Digest || len(second.Labels) != 0 || !second.CreatedAt.AsTime().Equal(first.CreatedAt.AsTime()) {
		t.Errorf("a name that was taken is now %v", second)
	}
	wantCode(t, f.move(t, ctx, &transfertypes.ImageStore{Name: "nope"}, &transfertypes.ImageStore{Name: "tag"}), codes.NotFound, "nope")
	wantCode(t, f.move(t, ctx, &transfertypes.ImageStore{Name: "one"}, &transfertypes.ImageStore{}), codes.NotFound, "no image name")
}

func TestTransferRefuses(t *testing.T) {
	f := pulling(t)
	store, reg := pack(t, &transfertypes.ImageStore{Name: "x"}), pack(t, &transfertypes.OCIRegistry{Reference: "127.0.0.1:1/x:1"})
	broken := &anypb.Any{TypeUrl: reg.TypeUrl, Value: []byte{0xff}}
	hosted := &anypb.Any{TypeUrl: "type.googleapis.com/" + store.TypeUrl, Value: store.Value}
	for _, c := range []struct {
		name     string
		from, to *anypb.Any
		progress string
		code     codes.Code
		text     string
	}{
		{"nothing", nil, nil, "", codes.InvalidArgument, "the source is missing"},
		{"no destination", reg, nil, "", codes.InvalidArgument, "the destination is missing"},
		{"unknown type", &anypb.Any{TypeUrl: "example.com/NoSuchType"}, store, "", codes.NotFound, "NoSuchType"},
		{"broken", broken, store, "", codes.InvalidArgument, "read source"},
		{"a type of something else", pack(t, &transfertypes.Progress{}), store, "", codes.Unimplemented, "from containerd.types.transfer.Progress"},
		{"push", store, reg, "", codes.Unimplemented, "not pushed"},
		{"import", pack(t, &transfertypes.ImageImportStream{Stream: "s"}), store, "", codes.Unimplemented, "ImageImportStream"},
		{"export", store, pack(t, &transfertypes.ImageExportStream{}), "", codes.Unimplemented, "ImageExportStream"},
		{"no such progress stream", reg, store, "nope", codes.NotFound, "progress stream"},
		{"a type with a host", hosted, store, "", codes.NotFound, `"x"`}, // understood: there is no such image
		{"bad reference", pack(t, &transfertypes.OCIRegistry{Reference: "://"}), store, "", codes.InvalidArgument, ""},
		{"no reference", pack(t, &transfertypes.OCIRegistry{}), store, "", codes.InvalidArgument, ""},
	} {
		_, err := f.transfer.Transfer(in(t, "default"), &transferapi.TransferRequest{Source: c.from, Destination: c.to,
			Options: &transferapi.TransferOptions{ProgressStream: c.progress}})
		t.Run(c.name, func(t *testing.T) { wantCode(t, err, c.code, c.text) })
	}
	for _, c := range []struct {
		res  *transfertypes.RegistryResolver
		code codes.Code
		text string
	}{
		{&transfertypes.RegistryResolver{DefaultScheme: "ftp"}, codes.InvalidArgument, "ftp"},
		{&transfertypes.RegistryResolver{HostDir: "certs.d"}, codes.InvalidArgument, "full path"},
		{&transfertypes.RegistryResolver{HttpDebug: transfertypes.HTTPDebug_TRACE}, codes.Unimplemented, "TRACE"},
		{&transfertypes.RegistryResolver{AuthStream: "nope"}, codes.NotFound, "auth stream"},
	} {
		err := f.move(t, in(t, "default"), &transfertypes.OCIRegistry{Reference: "127.0.0.1:1/x:1", Resolver: c.res}, &transfertypes.ImageStore{Name: "x"})
		wantCode(t, err, c.code, c.text)
	}
}

// The client says how the registry is to be reached.
func TestTransferResolver(t *testing.T) {
	shop := newShop(t)
	f := pulling(t)
	dir := t.TempDir()
	check(t, os.MkdirAll(filepath.Join(dir, "registry.example"), 0o755))
	check(t, os.WriteFile(filepath.Join(dir, "registry.example", "hosts.toml"), fmt.Appendf(nil, "[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", shop.URL()), 0o644))
	from := &transfertypes.OCIRegistry{Reference: "registry.example/demo:1", Resolver: &transfertypes.RegistryResolver{HostDir: dir, Headers: map[string]string{"X-Test": "yes"}}}
	check(t, f.move(t, in(t, "default"), from, &transfertypes.ImageStore{Name: "x", Platforms: []*types.Platform{amd64}}))
	for _, r := range shop.Requests() {
		if r.Header.Get("X-Test") != "yes" || r.Query != "ns=registry.example" {
			t.Errorf("%s %s came with %q and %q", r.Method, r.Path, r.Header.Get("X-Test"), r.Query)
		}
	}
}

// answer plays a client that is asked for credentials, and returns the questions.
func (f *fixture) answer(t *testing.T, resp proto.Message) (questions chan *transfertypes.AuthRequest) {
	t.Helper()
	s := f.mustOpenStream(t, "default", "auth")
	questions = make(chan *transfertypes.AuthRequest, 100)
	go func() {
		defer close(questions)
		for {
			msg, err := s.Recv()
			if err != nil {
				return
			}
			var q transfertypes.AuthRequest
			if err := msg.UnmarshalTo(&q); err != nil {
				t.Errorf("asked %v: %v", msg, err)
			}
			questions <- &q
			if resp == nil {
				s.CloseSend()
			} else if err := s.Send(pack(t, resp)); err != nil {
				t.Errorf("answer: %v", err)
			}
		}
	}()
	return questions
}

func TestTransferAuth(t *testing.T) {
	type response = transfertypes.AuthResponse
	good := &response{AuthType: transfertypes.AuthType_CREDENTIALS, Username: "me", Secret: "secret"}
	basic := base64.StdEncoding.EncodeToString([]byte("me:secret"))
	for _, c := range []struct {
		name   string
		wants  registrytest.Auth
		answer proto.Message
		code   codes.Code
		text   string
	}{
		{"basic", registrytest.Auth{Basic: true, User: "me", Password: "secret"}, good, codes.OK, ""},
		{"bearer", registrytest.Auth{User: "me", Password: "secret"}, good, codes.OK, ""},
		{"refresh", registrytest.Auth{User: "me", RefreshToken: "r"}, &response{AuthType: transfertypes.AuthType_REFRESH, Secret: "r"}, codes.OK, ""},
		{"header", registrytest.Auth{Basic: true, User: "me", Password: "secret"}, &response{AuthType: transfertypes.AuthType_HEADER, Secret: "Basic " + basic}, codes.OK, ""},
		{"as ctr without a user", registrytest.Auth{}, &response{AuthType: transfertypes.AuthType_REFRESH}, codes.OK, ""},
		{"wrong password", registrytest.Auth{Basic: true, User: "me", Password: "other"}, good, codes.Unauthenticated, ""},
		{"none", registrytest.Auth{Basic: true, User: "me", Password: "secret"}, &response{}, codes.Unauthenticated, ""},
		{"hangs up", registrytest.Auth{Basic: true, User: "me", Password: "secret"}, nil, codes.Unauthenticated, "closed its auth stream"},
		{"nonsense", registrytest.Auth{Basic: true, User: "me", Password: "secret"}, &transfertypes.Progress{}, codes.InvalidArgument, "not with an AuthResponse"},
	} {
		t.Run(c.name, func(t *testing.T) {
			shop := newShop(t)
			shop.Require(c.wants)
			f := pulling(t)
			questions := f.answer(t, c.answer)
			from := shop.from()
			from.Resolver.AuthStream = "auth"
			err := f.move(t, in(t, "default"), from, &transfertypes.ImageStore{Name: "x", Platforms: []*types.Platform{amd64}})
			if c.code == codes.OK {
				check(t, err)
			} else {
				wantCode(t, err, c.code, c.text)
			}
			n := 0
			for q := range questions { // the stream ends with the transfer
				if n++; q.Host != shop.Host() || q.Reference != shop.ref() {
					t.Errorf("asked %v", q)
				}
			}
			if n == 0 {
				t.Error("nobody was asked")
			}
		})
	}
}

func TestCredentialOf(t *testing.T) {
	for _, c := range []struct {
		kind   transfertypes.AuthType
		secret string
		want   auth.Credential
		is     func(error) bool
	}{
		{transfertypes.AuthType_HEADER, "Bearer abc", auth.Credential{RegistryToken: "abc"}, nil},
		{transfertypes.AuthType_HEADER, "basic dTpwOnE=", auth.Credential{Username: "u", Password: "p:q"}, nil},
		{transfertypes.AuthType_HEADER, "Basic !", auth.Credential{}, errdefs.IsInvalidArgument},
		{transfertypes.AuthType_HEADER, "Basic dQ==", auth.Credential{}, errdefs.IsInvalidArgument},
		{transfertypes.AuthType_HEADER, "Negotiate x", auth.Credential{}, errdefs.IsNotImplemented},
		{transfertypes.AuthType_REFRESH, "", auth.Credential{}, nil},
		{77, "", auth.Credential{}, errdefs.IsNotImplemented},
	} {
		got, err := credentialOf(&transfertypes.AuthResponse{AuthType: c.kind, Secret: c.secret})
		if got != c.want || (c.is == nil) != (err == nil) || c.is != nil && !c.is(err) {
			t.Errorf("%v %q: %#v, %v", c.kind, c.secret, got, err)
		}
		if err != nil && c.secret != "" && strings.Contains(err.Error(), c.secret) {
			t.Errorf("%v shows the secret", err)
		}
	}
}

// A client that doesn't answer is not asked for ever, and whoever asks gets the answer to its own question.
func TestCallbackPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := stream.New(stream.Options{})
		client, err := m.Open("ns", "auth")
		check(t, err)
		end, err := m.Take("ns", "auth")
		check(t, err)
		c := newCallback(end, "ref")
		answers := make(chan error)
		ask := func(ctx context.Context) { _, err := c.Credential(ctx, "host"); answers <- err }
		// The first waits for the answer, the second for its turn; the second gives up first, and so never asks.
		for _, patience := range []time.Duration{2 * time.Second, time.Second} {
			ctx, cancel := context.WithCancel(t.Context())
			go ask(ctx)
			synctest.Wait()
			defer cancel()
			time.AfterFunc(patience, cancel)
		}
		for range 2 {
			if err := <-answers; !errors.Is(err, context.Canceled) {
				t.Errorf("whoever doesn't wait gets %v", err)
			}
		}
		reply := func(user string) {
			msg, err := wireMessage(&transfertypes.AuthResponse{AuthType: transfertypes.AuthType_CREDENTIALS, Username: user})
			check(t, err)
			check(t, client.Send(t.Context(), msg))
		}
		reply("to the one who has gone")
		reply("to me")
		if cred, err := c.Credential(t.Context(), "host"); err != nil || cred.Username != "to me" {
			t.Errorf("answered %v, %v", cred, err)
		}
		begun := time.Now()
		for range 3 {
			go ask(t.Context())
		}
		for range 3 {
			if err := <-answers; !errdefs.IsUnauthorized(err) {
				t.Errorf("without an answer comes %v", err)
			}
		}
		if time.Since(begun) != authTimeout {
			t.Errorf("after %s", time.Since(begun))
		}
		end.Close()
		client.Close()
	})
}

// A client that doesn't read its progress waits a little longer for the answer, and no more.
func TestReportPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := stream.New(stream.Options{})
		client, err := m.Open("ns", "p")
		check(t, err)
		r, err := (&transferService{streams: m}).openReport("ns", "p")
		check(t, err)
		r.begin("ref")
		for round := range 100 {
			for i := range 100 {
				e := event(fmt.Sprint(i), pull.StageFetching, int64(round))
				e.Desc.MediaType = ocispec.MediaTypeImageLayer
				r.hear(e)
			}
			time.Sleep(relayPause)
		}
		r.news.mu.Lock()
		if n := len(r.news.latest); n != 100 {
			t.Errorf("%d news wait for a client that doesn't read, want one for each layer", n)
		}
		r.news.mu.Unlock()
		begun := time.Now()
		r.close()
		if d := time.Since(begun); d != reportTimeout {
			t.Errorf("the transfer ends after %s, want %s", d, reportTimeout)
		}
		client.Close()
		if r, err := (&transferService{streams: m}).openReport("ns", ""); err != nil {
			t.Error(err)
		} else {
			r.begin("ref")
			r.hear(event("x", pull.StageFetching, 1))
			r.close()
		}
	})
}

// What a stranger's manifest says can't break a report.
func TestReportHostile(t *testing.T) {
	m := stream.New(stream.Options{})
	client, err := m.Open("ns", "p")
	check(t, err)
	r, err := (&transferService{streams: m}).openReport("ns", "p")
	check(t, err)
	r.begin("ref")
	hear := func(name, mediaType, refName string) {
		e := event(name, pull.StageRead, 0)
		e.Desc.MediaType = mediaType
		e.Desc.Annotations = map[string]string{ocispec.AnnotationRefName: refName}
		r.hear(e)
	}
	hear("bad type", "\xff", "")
	hear("bad name", ocispec.MediaTypeImageLayer, "\xff")
	hear("long name", ocispec.MediaTypeImageLayer, strings.Repeat("x", stream.MaxMessage))
	var children []oci.Descriptor
	for i := range maxParents + 10 {
		children = append(children, oci.Descriptor{Digest: digest.FromString(fmt.Sprint(i)), MediaType: ocispec.MediaTypeImageLayer})
	}
	e := event("wide", pull.StageRead, 0)
	e.Children = children
	r.hear(e)
	if len(r.parents) != maxParents {
		t.Errorf("%d parents are kept", len(r.parents))
	}
	e = event(fmt.Sprint(maxParents+1), pull.StageRead, 0)
	r.hear(e)
	closed := make(chan struct{})
	go func() { r.close(); close(closed) }()
	names := map[string]string{}
	for {
		msg, err := client.Recv(t.Context())
		if err == io.EOF {
			break
		}
		check(t, err)
		var p transfertypes.Progress
		check(t, proto.Unmarshal(msg.Value, &p))
		names[p.Name] = strings.Join(p.Parents, "+")
	}
	client.Close()
	<-closed
	if _, ok := names["layer-\uFFFD@"+digest.FromString("bad name").String()]; !ok || len(names) != 4 {
		t.Errorf("heard of %d things: %q", len(names), slices.Collect(func(yield func(string) bool) {
			for n := range names {
				if !yield(n[:min(len(n), 100)]) {
					return
				}
			}
		}))
	}
	if parents := names["unknown-"+e.Desc.Digest.String()]; parents != "ref" {
		t.Errorf("what is beyond the bound hangs below %q", parents)
	}
}

// A client that goes away takes its pull with it, and the next one succeeds.
func TestTransferCancelled(t *testing.T) {
	shop := newShop(t)
	shop.Fault("blobs/"+shop.amd64.Layers[0].Digest.String(), registrytest.Fault{At: 100, Stall: true})
	w := watched{returned: make(chan error, 2)}
	f := pulling(t, w.before)
	s := f.mustOpenStream(t, "default", "p")
	ctx, cancel := context.WithCancel(in(t, "default"))
	to := &transfertypes.ImageStore{Name: "x", Platforms: []*types.Platform{amd64}, Unpacks: unpack("", amd64)}
	ended := make(chan error)
	go func() {
		_, err := f.transfer.Transfer(ctx, &transferapi.TransferRequest{Source: pack(t, shop.from()), Destination: pack(t, to),
			Options: &transferapi.TransferOptions{ProgressStream: "p"}})
		ended <- err
	}()
	for {
		msg, err := s.Recv()
		check(t, err)
		var p transfertypes.Progress
		check(t, msg.UnmarshalTo(&p))
		if p.Event == "downloading" && p.Progress > 0 {
			break
		}
	}
	cancel()
	wantCode(t, <-ended, codes.Canceled, "")
	if err := <-w.returned; !errors.Is(err, context.Canceled) {
		t.Errorf("the pull ends with %v", err)
	}
	shop.Heal()
	check(t, f.move(t, in(t, "default"), shop.from(), to))
	f.wantSnapshots(t, "overlayfs", 2)
}
