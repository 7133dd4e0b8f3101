package api

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

const (
	stat   = contentapi.WriteAction_STAT
	write  = contentapi.WriteAction_WRITE
	commit = contentapi.WriteAction_COMMIT
)

// put uploads a blob as clients do and returns its digest.
func put(t *testing.T, f *fixture, ctx context.Context, ref string, data []byte) digest.Digest {
	t.Helper()
	dgst := digest.FromBytes(data)
	s, err := f.content.Write(ctx)
	check(t, err)
	check(t, s.Send(&contentapi.WriteContentRequest{Action: write, Ref: ref, Total: int64(len(data)), Data: data}))
	_, err = s.Recv()
	check(t, err)
	check(t, s.Send(&contentapi.WriteContentRequest{Action: commit, Ref: ref, Total: int64(len(data)), Offset: int64(len(data)), Expected: dgst.String()}))
	_, err = s.Recv()
	check(t, err)
	if _, err := s.Recv(); err != io.EOF {
		t.Fatalf("after a commit comes %v", err)
	}
	return dgst
}

type msg = contentapi.WriteContentRequest

// step is one message of a Write stream and what the server makes of it.
type step struct {
	send   *msg
	offset int64      // of the answer
	digest string     // of the answer's bytes so far; "" = don't look
	code   codes.Code // OK: an answer comes
	text   string     // in the error
}

// The state machine of containerd's Content.Write, case by case.
func TestContentWrite(t *testing.T) {
	const ab = "ab"
	sum := func(s string) string { return digest.FromString(s).String() }
	tests := []struct {
		name  string
		steps []step
		blob  string // what the namespace has afterwards
		keeps int64  // the ingest "r" has so many bytes afterwards; -1 = there is none
	}{
		{"no reference", []step{
			{send: &msg{Action: stat}, code: codes.InvalidArgument, text: "first message must have a reference"},
		}, "", -1},
		{"stat only", []step{
			{send: &msg{Ref: "r", Action: stat, Total: 7}, digest: ""},
		}, "", 0},
		{"write and commit", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("a")}, offset: 1, digest: "a"},
			{send: &msg{Action: write, Offset: 1, Data: []byte("b")}, offset: 2, digest: ab},
			{send: &msg{Action: commit, Offset: 2, Total: 2, Expected: sum(ab)}, offset: 2, digest: ab},
		}, ab, -1},
		{"one message does all", []step{
			{send: &msg{Ref: "r", Action: commit, Data: []byte(ab), Total: 2, Expected: sum(ab)}, offset: 2, digest: ab},
		}, ab, -1},
		{"commit without size and digest", []step{
			{send: &msg{Ref: "r", Action: commit, Data: []byte(ab)}, offset: 2, digest: ab},
		}, ab, -1},
		{"stat between writes", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("a")}, offset: 1},
			{send: &msg{Action: stat}, offset: 1, digest: "a"},
			{send: &msg{Action: commit, Offset: 1, Data: []byte("b")}, offset: 2, digest: ab},
		}, ab, -1},
		{"gap", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("a")}, offset: 1},
			{send: &msg{Action: write, Offset: 2, Data: []byte("b")}, code: codes.OutOfRange, text: "write @2 must occur at current offset 1"},
		}, "", 1},
		{"overlap", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("abc")}, offset: 3},
			{send: &msg{Action: write, Offset: 2, Data: []byte("c")}, code: codes.OutOfRange},
		}, "", 3},
		{"negative offset", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("a")}, offset: 1},
			{send: &msg{Action: write, Offset: -1, Data: []byte("b")}, code: codes.OutOfRange},
		}, "", 1},
		{"offset 0 starts again", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("wrong")}, offset: 5},
			{send: &msg{Action: write, Data: []byte(ab)}, offset: 2, digest: ab},
			{send: &msg{Action: commit, Offset: 2}, offset: 2},
		}, ab, -1},
		{"a commit without its offset wipes", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte(ab)}, offset: 2},
			{send: &msg{Action: commit, Expected: sum(ab)}, code: codes.FailedPrecondition},
		}, "", 0},
		{"wrong digest", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte(ab)}, offset: 2},
			{send: &msg{Action: commit, Offset: 2, Expected: sum("else")}, code: codes.FailedPrecondition},
		}, "", 2},
		{"wrong size", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte(ab)}, offset: 2},
			{send: &msg{Action: commit, Offset: 2, Total: 3}, code: codes.FailedPrecondition},
		}, "", 2},
		{"the last total counts", []step{
			{send: &msg{Ref: "r", Action: write, Total: 9, Data: []byte(ab)}, offset: 2},
			{send: &msg{Action: commit, Offset: 2, Total: 2}, offset: 2},
		}, ab, -1},
		{"an earlier total counts at commit", []step{
			{send: &msg{Ref: "r", Action: write, Total: 9, Data: []byte(ab)}, offset: 2},
			{send: &msg{Action: commit, Offset: 2}, code: codes.FailedPrecondition},
		}, "", 2},
		{"negative total", []step{
			{send: &msg{Ref: "r", Action: stat, Total: -1}, code: codes.InvalidArgument},
		}, "", -1},
		{"no digest at all", []step{
			{send: &msg{Ref: "r", Action: stat, Expected: "sha256:abc"}, code: codes.InvalidArgument},
		}, "", -1},
		{"unknown action", []step{
			{send: &msg{Ref: "r", Action: 9}, code: codes.InvalidArgument},
		}, "", 0},
		{"there already, said first", []step{
			{send: &msg{Ref: "r", Action: stat, Expected: sum("there")}, code: codes.AlreadyExists, text: ""},
		}, "there", -1},
		{"there already, said later", []step{
			{send: &msg{Ref: "r", Action: write, Data: []byte("the")}, offset: 3},
			{send: &msg{Action: write, Offset: 3, Data: []byte("re"), Expected: sum("there")}, code: codes.AlreadyExists, text: "blob with expected digest " + sum("there") + " exists"},
		}, "there", -1},
		{"there already, found at commit", []step{
			{send: &msg{Ref: "r", Action: commit, Data: []byte("there")}, code: codes.AlreadyExists},
		}, "there", -1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := start(t)
			ctx := in(t, "default")
			put(t, f, ctx, "before", []byte("there"))
			runSteps(t, f, ctx, tt.steps)
			if tt.blob != "" {
				if got := string(get(t, f, ctx, digest.FromString(tt.blob))); got != tt.blob {
					t.Errorf("the blob is %q, want %q", got, tt.blob)
				}
			}
			st, err := f.content.Status(ctx, &contentapi.StatusRequest{Ref: "r"})
			if tt.keeps < 0 {
				wantCode(t, err, codes.NotFound, `could not get status for ref "r"`)
			} else if err != nil || st.Status.Offset != tt.keeps {
				t.Errorf("the ingest has %v (%v), want %d bytes", st, err, tt.keeps)
			}
		})
	}
}

func runSteps(t *testing.T, f *fixture, ctx context.Context, steps []step) {
	t.Helper()
	s, err := f.content.Write(ctx)
	check(t, err)
	ended := false
	for i, st := range steps {
		check(t, s.Send(st.send))
		resp, err := s.Recv()
		if st.code != codes.OK {
			wantCode(t, err, st.code, st.text)
			ended = true
			continue
		}
		if err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		if resp.Action != st.send.Action || resp.Offset != st.offset {
			t.Errorf("step %d: answer %v, want offset %d", i, resp, st.offset)
		}
		if st.digest != "" && resp.Digest != digest.FromString(st.digest).String() {
			t.Errorf("step %d: digest %s is not that of %q", i, resp.Digest, st.digest)
		}
		if st.send.Action == stat && (resp.StartedAt == nil || resp.UpdatedAt == nil || resp.Total != st.send.Total) {
			t.Errorf("step %d: a stat answers %v", i, resp)
		}
		ended = st.send.Action == commit
	}
	check(t, s.CloseSend())
	if _, err := s.Recv(); !ended && err != io.EOF {
		t.Errorf("the stream ends with %v", err)
	}
}

// get reads a blob whole.
func get(t *testing.T, f *fixture, ctx context.Context, dgst digest.Digest) []byte {
	t.Helper()
	data, _, err := read(f, ctx, &contentapi.ReadContentRequest{Digest: dgst.String()})
	check(t, err)
	return data
}

func read(f *fixture, ctx context.Context, req *contentapi.ReadContentRequest) (data []byte, messages []int, err error) {
	s, err := f.content.Read(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	for {
		resp, err := s.Recv()
		if err == io.EOF {
			return data, messages, nil
		}
		if err != nil {
			return nil, nil, err
		}
		if resp.Offset != int64(len(data)) {
			return nil, nil, fmt.Errorf("a message at %d comes after %d bytes", resp.Offset, len(data))
		}
		data = append(data, resp.Data...)
		messages = append(messages, len(resp.Data))
	}
}

func TestContentRead(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	big := bytes.Repeat([]byte("0123456789abcdef"), 160<<10) // 2.5 MiB
	dgst := put(t, f, ctx, "big", big)
	tests := []struct {
		name         string
		offset, size int64
		from, to     int
	}{
		{"all", 0, 0, 0, len(big)},
		{"from the middle", 1 << 20, 0, 1 << 20, len(big)},
		{"a part", 5, 10, 5, 15},
		{"past the end", 5, int64(len(big)), 5, len(big)},
		{"a size that overflows", 5, math.MaxInt64, 5, len(big)},
		{"negative size", 5, -1, 5, len(big)},
		{"negative offset", -5, 3, 0, 3},
		{"at the end", int64(len(big)), 4, len(big), len(big)},
	}
	for _, tt := range tests {
		data, sizes, err := read(f, ctx, &contentapi.ReadContentRequest{Digest: dgst.String(), Offset: tt.offset, Size: tt.size})
		check(t, err)
		if !bytes.Equal(data, big[tt.from:tt.to]) {
			t.Errorf("%s: other bytes come", tt.name)
		}
		if len(sizes) > 0 && slices.Max(sizes) > 1<<20 {
			t.Errorf("%s: messages of %v bytes", tt.name, sizes)
		}
	}
	_, _, err := read(f, ctx, &contentapi.ReadContentRequest{Digest: dgst.String(), Offset: int64(len(big)) + 1})
	wantCode(t, err, codes.OutOfRange, "read past object length")
	_, _, err = read(f, ctx, &contentapi.ReadContentRequest{Digest: digest.FromString("none").String()})
	wantCode(t, err, codes.NotFound, "")
	_, _, err = read(f, in(t, "other"), &contentapi.ReadContentRequest{Digest: dgst.String()})
	wantCode(t, err, codes.NotFound, "")
	_, _, err = read(f, ctx, &contentapi.ReadContentRequest{Digest: "../../etc/passwd"})
	wantCode(t, err, codes.InvalidArgument, "failed validation")

	empty := put(t, f, ctx, "empty", nil)
	if data := get(t, f, ctx, empty); len(data) != 0 {
		t.Errorf("an empty blob has %d bytes", len(data))
	}
}

func TestContentRecords(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	before := time.Now()
	dgst := put(t, f, ctx, "r", []byte("data"))
	info := func(ctx context.Context) (*contentapi.Info, error) {
		resp, err := f.content.Info(ctx, &contentapi.InfoRequest{Digest: dgst.String()})
		return resp.GetInfo(), err
	}
	i, err := info(ctx)
	check(t, err)
	if i.Digest != dgst.String() || i.Size != 4 || i.CreatedAt.AsTime().Before(before.Add(-time.Minute)) {
		t.Errorf("info is %v", i)
	}
	_, err = info(in(t, "other"))
	wantCode(t, err, codes.NotFound, "")

	update := func(labels map[string]string, mask ...string) (*contentapi.Info, error) {
		req := &contentapi.UpdateRequest{Info: &contentapi.Info{Digest: dgst.String(), Labels: labels}}
		if mask != nil {
			req.UpdateMask = &fieldmaskpb.FieldMask{Paths: mask}
		}
		resp, err := f.content.Update(ctx, req)
		return resp.GetInfo(), err
	}
	i, err = update(map[string]string{"a": "1", "b": "2"})
	check(t, err)
	sameLabels(t, i.Labels, map[string]string{"a": "1", "b": "2"})
	i, err = update(map[string]string{"a": "3", "b": "ignored"}, "labels.a")
	check(t, err)
	sameLabels(t, i.Labels, map[string]string{"a": "3", "b": "2"})
	i, err = update(map[string]string{"a": ""}, "labels.a")
	check(t, err)
	sameLabels(t, i.Labels, map[string]string{"b": "2"})
	i, err = update(map[string]string{"c": "4"}, "labels")
	check(t, err)
	sameLabels(t, i.Labels, map[string]string{"c": "4"})
	_, err = update(nil, "size")
	wantCode(t, err, codes.InvalidArgument, "")
	_, err = update(map[string]string{"k": strings.Repeat("v", 4096)})
	wantCode(t, err, codes.InvalidArgument, "")

	_, err = f.content.Delete(ctx, &contentapi.DeleteContentRequest{Digest: dgst.String()})
	check(t, err)
	_, err = info(ctx)
	wantCode(t, err, codes.NotFound, "")
	_, err = f.content.Delete(ctx, &contentapi.DeleteContentRequest{Digest: dgst.String()})
	wantCode(t, err, codes.NotFound, "")
	for _, bad := range []string{"", "sha256:", "md5:00"} {
		_, err = f.content.Delete(ctx, &contentapi.DeleteContentRequest{Digest: bad})
		wantCode(t, err, codes.InvalidArgument, "")
	}
}

func TestContentCommitLabels(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	runSteps(t, f, ctx, []step{
		{send: &msg{Ref: "r", Action: write, Data: []byte("x"), Labels: map[string]string{"early": "1"}}, offset: 1},
		{send: &msg{Action: commit, Offset: 1, Labels: map[string]string{"late": "1"}}, offset: 1},
	})
	resp, err := f.content.Info(ctx, &contentapi.InfoRequest{Digest: digest.FromString("x").String()})
	check(t, err)
	sameLabels(t, resp.Info.Labels, map[string]string{"late": "1"})
}

func TestContentList(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	const n = 2*chunk + 1
	for i := range n {
		runSteps(t, f, ctx, []step{{send: &msg{Ref: "r", Action: commit, Data: fmt.Append(nil, i), Labels: map[string]string{"odd": fmt.Sprint(i % 2)}}, offset: int64(len(fmt.Sprint(i)))}})
	}
	list := func(ctx context.Context, filters ...string) (digests []string, messages []int) {
		s, err := f.content.List(ctx, &contentapi.ListContentRequest{Filters: filters})
		check(t, err)
		for {
			resp, err := s.Recv()
			if err == io.EOF {
				return digests, messages
			}
			check(t, err)
			messages = append(messages, len(resp.Info))
			for _, i := range resp.Info {
				digests = append(digests, i.Digest)
			}
		}
	}
	all, messages := list(ctx)
	slices.Sort(all)
	if len(slices.Compact(all)) != n || !slices.Equal(messages, []int{chunk, chunk, 1}) {
		t.Errorf("%d digests come in messages of %v", len(all), messages)
	}
	if odd, _ := list(ctx, `labels.odd==1`); len(odd) != n/2 {
		t.Errorf("%d are odd", len(odd))
	}
	if other, messages := list(in(t, "other")); len(other) != 0 || messages != nil {
		t.Errorf("another namespace lists %v in %v", other, messages)
	}
	s, err := f.content.List(ctx, &contentapi.ListContentRequest{Filters: []string{"labels.odd=="}})
	check(t, err)
	_, err = s.Recv()
	wantCode(t, err, codes.InvalidArgument, "")
}

// An upload whose client goes away stays, locked no longer, and is resumed.
func TestContentResume(t *testing.T) {
	f := start(t)
	ctx, cancel := context.WithCancel(in(t, "default"))
	defer cancel()
	s, err := f.content.Write(ctx)
	check(t, err)
	check(t, s.Send(&contentapi.WriteContentRequest{Ref: "r", Action: write, Total: 4, Data: []byte("ab")}))
	_, err = s.Recv()
	check(t, err)

	open := func() (contentapi.Content_WriteClient, *contentapi.WriteContentResponse, error) {
		s, err := f.content.Write(in(t, "default"))
		check(t, err)
		check(t, s.Send(&contentapi.WriteContentRequest{Ref: "r", Action: stat}))
		resp, err := s.Recv()
		return s, resp, err
	}
	_, _, err = open()
	wantCode(t, err, codes.Unavailable, "")

	cancel()
	var resp *contentapi.WriteContentResponse
	eventually(t, "unlocked", func() bool {
		s, resp, err = open()
		return status.Code(err) != codes.Unavailable
	})
	check(t, err)
	if resp.Offset != 2 || resp.Digest != digest.FromString("ab").String() {
		t.Fatalf("the ingest resumes with %v", resp)
	}
	check(t, s.Send(&contentapi.WriteContentRequest{Action: commit, Offset: 2, Total: 4, Data: []byte("cd"), Expected: digest.FromString("abcd").String()}))
	_, err = s.Recv()
	check(t, err)
	if got := string(get(t, f, in(t, "default"), digest.FromString("abcd"))); got != "abcd" {
		t.Errorf("the blob is %q", got)
	}
}

func TestContentIngests(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	for _, ref := range []string{"layer-1", "layer-2", "config"} {
		runSteps(t, f, ctx, []step{{send: &msg{Ref: ref, Action: write, Total: 9, Data: []byte("abc")}, offset: 3}})
	}
	refs := func(ctx context.Context, filters ...string) (refs []string) {
		resp, err := f.content.ListStatuses(ctx, &contentapi.ListStatusesRequest{Filters: filters})
		check(t, err)
		for _, st := range resp.Statuses {
			if st.Offset != 3 || st.Total != 9 || st.StartedAt == nil || st.UpdatedAt == nil {
				t.Errorf("status is %v", st)
			}
			refs = append(refs, st.Ref)
		}
		slices.Sort(refs)
		return refs
	}
	if got := refs(ctx); !slices.Equal(got, []string{"config", "layer-1", "layer-2"}) {
		t.Errorf("ingests are %v", got)
	}
	if got := refs(ctx, `ref~=/^layer-/`); !slices.Equal(got, []string{"layer-1", "layer-2"}) {
		t.Errorf("filtered ingests are %v", got)
	}
	if got := refs(in(t, "other")); got != nil {
		t.Errorf("another namespace has %v", got)
	}
	_, err := f.content.Abort(ctx, &contentapi.AbortRequest{Ref: "config"})
	check(t, err)
	_, err = f.content.Status(ctx, &contentapi.StatusRequest{Ref: "config"})
	wantCode(t, err, codes.NotFound, `could not get status for ref "config"`)
	_, err = f.content.Abort(ctx, &contentapi.AbortRequest{Ref: "config"})
	wantCode(t, err, codes.NotFound, "")
}

// A blob that another namespace has needs no bytes: the client just commits.
func TestContentShared(t *testing.T) {
	f := start(t)
	dgst := put(t, f, in(t, "one"), "r", []byte("shared"))
	two := in(t, "two")
	runSteps(t, f, two, []step{
		{send: &msg{Ref: "r", Action: stat, Total: 6, Expected: dgst.String()}, offset: 6},
		{send: &msg{Action: commit, Offset: 6, Total: 6, Expected: dgst.String()}, offset: 6, digest: "shared"},
	})
	if got := string(get(t, f, two, dgst)); got != "shared" {
		t.Errorf("the blob is %q", got)
	}
}

// What a client finds to exist already is held by its lease, although it got
// an error: it relies on the blob.
func TestContentExistingIsLeased(t *testing.T) {
	f := start(t)
	plain := in(t, "default")
	_, err := f.leases.Create(plain, &leasesapi.CreateRequest{ID: "l"})
	check(t, err)
	leased := in(t, "default", "l")
	tests := []struct {
		data  string
		steps []step
	}{
		{"first", []step{{send: &msg{Ref: "r", Action: stat, Expected: digest.FromString("first").String()}, code: codes.AlreadyExists}}},
		{"later", []step{
			{send: &msg{Ref: "r", Action: stat}},
			{send: &msg{Action: stat, Expected: digest.FromString("later").String()}, code: codes.AlreadyExists},
		}},
		{"last", []step{{send: &msg{Ref: "r", Action: commit, Data: []byte("last")}, code: codes.AlreadyExists}}},
	}
	for _, tt := range tests {
		dgst := put(t, f, plain, "r", []byte(tt.data))
		runSteps(t, f, leased, tt.steps)
		resp, err := f.leases.ListResources(plain, &leasesapi.ListResourcesRequest{ID: "l"})
		check(t, err)
		if !slices.ContainsFunc(resp.Resources, func(r *leasesapi.Resource) bool { return r.Type == "content" && r.ID == dgst.String() }) {
			t.Errorf("%s: the lease holds %v", tt.data, resp.Resources)
		}
	}
}

func TestContentUnknownLease(t *testing.T) {
	f := start(t)
	runSteps(t, f, in(t, "default", "nobody"), []step{
		{send: &msg{Ref: "r", Action: write, Data: []byte("x")}, code: codes.NotFound},
	})
}

// Deleting a record leaves the bytes until a collection, and a blob that an
// image needs survives that.
func TestContentCollected(t *testing.T) {
	f := start(t)
	ctx := in(t, "default")
	kept := put(t, f, ctx, "kept", []byte("kept"))
	lost := put(t, f, ctx, "lost", []byte("lost"))
	_, err := f.images.Create(ctx, &imagesapi.CreateImageRequest{Image: &imagesapi.Image{
		Name: "img", Target: &types.Descriptor{MediaType: "text/plain", Digest: kept.String(), Size: 4},
	}})
	check(t, err)
	_, err = f.images.Create(ctx, &imagesapi.CreateImageRequest{Image: &imagesapi.Image{
		Name: "gone", Target: &types.Descriptor{MediaType: "text/plain", Digest: lost.String(), Size: 4},
	}})
	check(t, err)
	_, err = f.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: "gone", Sync: true})
	check(t, err)
	if f.collections != 1 {
		t.Errorf("%d collections", f.collections)
	}
	get(t, f, ctx, kept)
	_, _, err = read(f, ctx, &contentapi.ReadContentRequest{Digest: lost.String()})
	wantCode(t, err, codes.NotFound, "")
}
