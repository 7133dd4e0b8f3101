// Package wire converts errors, mounts, times and Any values to and from protobuf.
//
// It is where kinds of failure become status codes and back, and nothing else
// of ours knows either. The shapes are those of containerd's API.
package wire

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/status"
)

// MaxMessage is the longest message, in bytes, that an error is sent with. It
// travels in an HTTP header, and headers are small.
const MaxMessage = 4 << 10

// Error makes of err what a gRPC server returns: the status code of its kind
// (errdefs, a context's end, a full disk), its message, and the other errors
// that are joined to it as details. Any other error is Unknown; nil is nil.
func Error(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(errdefs.Resolve(err), errdefs.ErrUnknown) && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	if isHollow(err) {
		err = flat{err.Error(), errdefs.Resolve(err)}
	}
	st, _ := status.FromError(errgrpc.ToGRPC(err))
	msg := shorten(strings.ToValidUTF8(st.Message(), "\uFFFD"))
	if msg == st.Message() {
		return st.Err()
	}
	return status.Error(st.Code(), msg) // details repeat parts of the message
}

// isHollow reports whether something in err's tree wraps nil, as net.DNSError
// does for a name that does not exist. errgrpc panics on that when it collects
// details.
func isHollow(err error) bool {
	switch e := err.(type) {
	case nil:
		return true
	case interface{ Unwrap() error }:
		return isHollow(e.Unwrap())
	case interface{ Unwrap() []error }:
		return slices.ContainsFunc(e.Unwrap(), isHollow)
	}
	return false
}

// flat is an error without details: a message and a kind.
type flat struct {
	message string
	kind    error
}

func (f flat) Error() string { return f.message }
func (f flat) Unwrap() error { return f.kind }

// shorten takes the middle out of a long message. The end stays, since clients
// tell some kinds apart by it.
func shorten(msg string) string {
	if len(msg) <= MaxMessage {
		return msg
	}
	const tail, gap = MaxMessage / 4, " ... "
	head := MaxMessage - tail - len(gap)
	return strings.ToValidUTF8(msg[:head], "") + gap + strings.ToValidUTF8(msg[len(msg)-tail:], "")
}

// FromError makes of what a gRPC call returned the error that the server
// meant: it is of errdefs' kind, or context.Canceled or
// context.DeadlineExceeded, and has the server's message. nil is nil.
func FromError(err error) error { return errgrpc.ToNative(err) }
