package wire

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

func TestErrorsKeepKindAndMessage(t *testing.T) {
	for _, c := range []struct {
		kind error
		code codes.Code
	}{
		{errdefs.ErrInvalidArgument, codes.InvalidArgument},
		{errdefs.ErrNotFound, codes.NotFound},
		{errdefs.ErrAlreadyExists, codes.AlreadyExists},
		{errdefs.ErrPermissionDenied, codes.PermissionDenied},
		{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
		{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
		{errdefs.ErrConflict, codes.FailedPrecondition},
		{errdefs.ErrNotModified, codes.FailedPrecondition},
		{errdefs.ErrAborted, codes.Aborted},
		{errdefs.ErrOutOfRange, codes.OutOfRange},
		{errdefs.ErrNotImplemented, codes.Unimplemented},
		{errdefs.ErrInternal, codes.Internal},
		{errdefs.ErrUnavailable, codes.Unavailable},
		{errdefs.ErrDataLoss, codes.DataLoss},
		{errdefs.ErrUnauthenticated, codes.Unauthenticated},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
		{errdefs.ErrUnknown, codes.Unknown},
	} {
		for _, err := range []error{
			fmt.Errorf("commit blob x: %w", c.kind),
			fmt.Errorf("%s: %w", strings.Repeat("commit blob x", MaxMessage), c.kind),
		} {
			sent := Error(err)
			if got := status.Code(sent); got != c.code {
				t.Errorf("%v: code %v, want %v", c.kind, got, c.code)
			}
			if len(status.Convert(sent).Message()) > MaxMessage {
				t.Errorf("%v: a message of %d bytes", c.kind, len(status.Convert(sent).Message()))
			}
			got := FromError(sent)
			if !errors.Is(got, c.kind) {
				t.Errorf("%v came back as %v", c.kind, got)
			}
			if len(err.Error()) < MaxMessage && got.Error() != err.Error() {
				t.Errorf("%q came back as %q", err, got)
			}
		}
	}
	if Error(nil) != nil || FromError(nil) != nil {
		t.Error("nil became an error")
	}
}

func TestErrorsWithoutKind(t *testing.T) {
	plain := Error(errors.New("something"))
	if st, ok := status.FromError(plain); !ok || st.Code() != codes.Unknown || st.Message() != "something" {
		t.Errorf("plain: %v", plain)
	}
	full := &fs.PathError{Op: "write", Path: "/data", Err: syscall.ENOSPC}
	if got := FromError(Error(full)); !errdefs.IsResourceExhausted(got) || !strings.Contains(got.Error(), "write /data: no space left on device") {
		t.Errorf("full disk: %v", got)
	}
	known := fmt.Errorf("%w: %w", os.NewSyscallError("write", syscall.ENOSPC), errdefs.ErrDataLoss)
	if got := FromError(Error(known)); !errdefs.IsDataLoss(got) {
		t.Errorf("a kind that is given: %v", got)
	}
	if st, _ := status.FromError(Error(fmt.Errorf("name \xff: %w", errdefs.ErrNotFound))); st.Message() != "name \uFFFD: not found" || st.Code() != codes.NotFound {
		t.Errorf("no UTF-8: %v", st)
	}
	again := status.Error(codes.DataLoss, "from a driver")
	if got := Error(again); status.Code(got) != codes.DataLoss || status.Convert(got).Message() != "from a driver" {
		t.Errorf("a status: %v", got)
	}
}

func TestJoinedErrorsKeepTheirKinds(t *testing.T) {
	err := errors.Join(fmt.Errorf("first: %w", errdefs.ErrNotFound), fmt.Errorf("undo: %w", errdefs.ErrUnavailable))
	got := FromError(Error(err))
	if !errdefs.IsNotFound(got) || !errdefs.IsUnavailable(got) {
		t.Errorf("came back as %v", got)
	}
}

func TestValuesComeBack(t *testing.T) {
	mounts := []mount.Mount{
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/a:/b", "ro"}},
		{Type: "bind", Source: "/c", Target: "etc/hosts", Options: []string{"rbind"}},
	}
	sent := Mounts(mounts)
	if sent[0].Type != "overlay" || sent[0].Options[1] != "ro" || sent[1].Source != "/c" || sent[1].Target != "etc/hosts" {
		t.Errorf("mounts sent as %v", sent)
	}
	if got := FromMounts(sent); !reflect.DeepEqual(got, mounts) {
		t.Errorf("mounts %+v", got)
	}
	if got := FromMounts([]*types.Mount{nil}); !reflect.DeepEqual(got, []mount.Mount{{}}) {
		t.Errorf("no mount: %+v", got)
	}
	d := oci.Descriptor{MediaType: "m", Digest: digest.FromString("x"), Size: 1, Annotations: map[string]string{"a": "b"}}
	if got := FromDescriptor(Descriptor(d)); !reflect.DeepEqual(got, d) {
		t.Errorf("descriptor %+v", got)
	}
	if got := FromDescriptor(nil); !reflect.DeepEqual(got, oci.Descriptor{}) {
		t.Errorf("no descriptor: %+v", got)
	}
	now := time.Now()
	for _, at := range []time.Time{now, {}, time.Unix(0, 0)} {
		if got := FromTime(Time(at)); !got.Equal(at) || got.IsZero() != at.IsZero() {
			t.Errorf("%v came back as %v", at, got)
		}
	}
	if got := FromTime(nil); !got.IsZero() {
		t.Errorf("no time: %v", got)
	}
	if got := Time(time.Time{}); got.GetSeconds() != (&timestamppb.Timestamp{Seconds: -62135596800}).GetSeconds() {
		t.Errorf("the zero time is sent as %v", got)
	}
	a := Any{"types.containerd.io/opencontainers/runtime-spec/1/Spec", []byte(`{}`)}
	if got := FromAny(a.Proto()); !reflect.DeepEqual(got, a) {
		t.Errorf("any %+v", got)
	}
	if got := FromAny((*anypb.Any)(nil)); !reflect.DeepEqual(got, Any{}) || got.Proto() != nil {
		t.Errorf("no any: %+v", got)
	}
}

// TestHollowError: errors that wrap nil (a name that DNS doesn't know is one) have their kind and message.
func TestHollowError(t *testing.T) {
	hollow := &net.DNSError{Err: "no such host", Name: "registry.invalid"}
	for _, err := range []error{
		hollow,
		fmt.Errorf("pull: %w: %w", hollow, errdefs.ErrUnavailable),
		fmt.Errorf("pull: %w: %w", errdefs.ErrUnavailable, fmt.Errorf("dial: %w", hollow)),
		errors.Join(errdefs.ErrUnavailable, hollow),
	} {
		got := Error(err)
		want := codes.Unavailable
		if err == error(hollow) {
			want = codes.Unknown
		}
		if st, ok := status.FromError(got); !ok || st.Code() != want || st.Message() != err.Error() {
			t.Errorf("%v became %v, want code %s", err, got, want)
		}
	}
}
