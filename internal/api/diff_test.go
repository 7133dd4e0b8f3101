package api

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/api/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func archive(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, data := range files {
		check(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}))
		_, err := w.Write([]byte(data))
		check(t, err)
	}
	check(t, w.Close())
	return buf.Bytes()
}

func TestDiff(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	plain := archive(t, map[string]string{"hello": "world"})
	dgst := put(t, f, ctx, "layer", plain)
	desc := &types.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: dgst.String(), Size: int64(len(plain))}

	dir := t.TempDir()
	applied, err := f.diff.Apply(ctx, &diffapi.ApplyRequest{Diff: desc, Mounts: bind(dir), SyncFs: true})
	check(t, err)
	if applied.Applied.Digest != dgst.String() || applied.Applied.Size != int64(len(plain)) || applied.Applied.MediaType != ocispec.MediaTypeImageLayer {
		t.Errorf("applied %v", applied)
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "hello")); string(data) != "world" {
		t.Errorf("the file holds %q", data)
	}
	_, err = f.diff.Apply(ctx, &diffapi.ApplyRequest{Diff: &types.Descriptor{MediaType: "application/x-unheard-of", Digest: dgst.String(), Size: desc.Size}, Mounts: bind(dir)})
	wantCode(t, err, codes.Unimplemented, "media type")
	_, err = f.diff.Apply(ctx, &diffapi.ApplyRequest{Diff: target("nothing"), Mounts: bind(dir)})
	wantCode(t, err, codes.Unimplemented, "media type")
	_, err = f.diff.Apply(in(t, "other"), &diffapi.ApplyRequest{Diff: desc, Mounts: bind(dir)})
	wantCode(t, err, codes.NotFound, "")

	made, err := f.diff.Diff(ctx, &diffapi.DiffRequest{Left: bind(t.TempDir()), Right: bind(dir), Labels: map[string]string{"k": "v"}, SourceDateEpoch: timestamppb.New(time.Unix(1e9, 0))})
	check(t, err)
	if made.Diff.MediaType != ocispec.MediaTypeImageLayerGzip {
		t.Errorf("made %v", made)
	}
	info, err := f.content.Info(ctx, &contentapi.InfoRequest{Digest: made.Diff.Digest})
	check(t, err)
	if info.Info.Size != made.Diff.Size || info.Info.Labels["k"] != "v" {
		t.Errorf("made %v, with the record %v", made, info)
	}
	other := t.TempDir()
	applied, err = f.diff.Apply(ctx, &diffapi.ApplyRequest{Diff: made.Diff, Mounts: bind(other)})
	check(t, err)
	if applied.Applied.Digest != info.Info.Labels["containerd.io/uncompressed"] {
		t.Errorf("the DiffID is %s and the labels are %v", applied.Applied.Digest, info.Info.Labels)
	}
	if data, _ := os.ReadFile(filepath.Join(other, "hello")); string(data) != "world" {
		t.Errorf("there and back the file holds %q", data)
	}
	_, err = f.diff.Diff(ctx, &diffapi.DiffRequest{MediaType: "application/x-unheard-of", Left: bind(dir), Right: bind(dir)})
	wantCode(t, err, codes.Unimplemented, "unsupported diff media type")
	_, err = f.diff.Diff(ctx, &diffapi.DiffRequest{SourceDateEpoch: &timestamppb.Timestamp{Nanos: -1}})
	wantCode(t, err, codes.InvalidArgument, "source_date_epoch")
	status, err := f.content.ListStatuses(ctx, &contentapi.ListStatusesRequest{})
	check(t, err)
	if len(status.Statuses) != 0 {
		t.Errorf("ingests are left: %v", status)
	}
	if entries, err := os.ReadDir(filepath.Join(f.root, "tmpmounts")); err != nil || len(entries) != 0 {
		t.Errorf("mounts are left: %v, %v", entries, err)
	}
}

func TestDiffAbsent(t *testing.T) {
	f := start(t, func(o *Options) { o.Diff = nil })
	_, err := f.diff.Apply(in(t, "default"), &diffapi.ApplyRequest{})
	wantCode(t, err, codes.Unimplemented, "")
	_, err = f.diff.Diff(in(t, "default"), &diffapi.DiffRequest{})
	wantCode(t, err, codes.Unimplemented, "")
}
