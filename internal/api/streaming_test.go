package api

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/holdfast-dev/holdfast/internal/stream"
)

// clientStream is a stream as containerd's client opens it.
type clientStream struct {
	streamingapi.Streaming_StreamClient
	cancel context.CancelFunc
}

func (f *fixture) openStream(t *testing.T, ns, id string) (clientStream, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(in(t, ns))
	t.Cleanup(cancel)
	s, err := f.streaming.Stream(ctx)
	check(t, err)
	check(t, s.Send(pack(t, &streamingapi.StreamInit{ID: id})))
	ready, err := s.Recv()
	if err == nil && ready.GetTypeUrl() != "google.protobuf.Empty" {
		t.Errorf("the stream begins with %v", ready)
	}
	return clientStream{s, cancel}, err
}

func (f *fixture) mustOpenStream(t *testing.T, ns, id string) clientStream {
	t.Helper()
	s, err := f.openStream(t, ns, id)
	check(t, err)
	return s
}

// pack is typeurl.MarshalAny for a protobuf message.
func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	msg, err := wireMessage(m)
	check(t, err)
	return msg.Proto()
}

func streams(t *testing.T, opts stream.Options) (*fixture, *stream.Manager) {
	m := stream.New(opts)
	return start(t, func(o *Options) { o.Streams = m }), m
}

func TestStreaming(t *testing.T) {
	f, m := streams(t, stream.Options{PerNamespace: 2})
	s := f.mustOpenStream(t, "ns", "s")
	_, err := f.openStream(t, "ns", "s")
	wantCode(t, err, codes.AlreadyExists, "s")
	f.mustOpenStream(t, "other", "s")
	if _, err := m.Take("third", "s"); !errdefs.IsNotFound(err) {
		t.Errorf("the stream of another namespace is taken with %v", err)
	}
	far, err := m.Take("ns", "s")
	check(t, err)
	check(t, s.Send(&anypb.Any{TypeUrl: "x", Value: []byte("ping")}))
	if msg, err := far.Recv(t.Context()); err != nil || msg.TypeURL != "x" || string(msg.Value) != "ping" {
		t.Errorf("received %v, %v", msg, err)
	}
	check(t, far.Send(t.Context(), stream.Message{TypeURL: "y", Value: []byte("pong")}))
	check(t, s.CloseSend())
	if _, err := far.Recv(t.Context()); err != io.EOF {
		t.Errorf("after the client's end comes %v", err)
	}
	check(t, far.Send(t.Context(), stream.Message{TypeURL: "z"}))
	far.Close()
	for _, want := range []string{"y", "z"} {
		if msg, err := s.Recv(); err != nil || msg.GetTypeUrl() != want {
			t.Errorf("received %v, %v, want %s", msg, err, want)
		}
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("the stream ends with %v", err)
	}
	<-far.Gone()
	f.mustOpenStream(t, "ns", "s") // the id is free again

	f.mustOpenStream(t, "ns", "two")
	_, err = f.openStream(t, "ns", "three")
	wantCode(t, err, codes.ResourceExhausted, "close some")
	_, err = f.openStream(t, "fourth", "")
	wantCode(t, err, codes.InvalidArgument, "")
}

func TestStreamingBeginsWithInit(t *testing.T) {
	f, _ := streams(t, stream.Options{})
	for _, first := range []*anypb.Any{
		{}, {TypeUrl: "containerd.types.transfer.Progress"},
		{TypeUrl: "containerd.services.streaming.v1.StreamInit", Value: []byte{0xff}},
	} {
		s, err := f.streaming.Stream(in(t, "ns"))
		check(t, err)
		check(t, s.Send(first))
		_, err = s.Recv()
		wantCode(t, err, codes.InvalidArgument, "StreamInit")
	}
	s, err := f.streaming.Stream(in(t, "ns"))
	check(t, err)
	check(t, s.CloseSend())
	_, err = s.Recv()
	wantCode(t, err, codes.InvalidArgument, "StreamInit")
}

// The daemon's end hears of a client that goes away, and of one that sends too much.
func TestStreamingEnds(t *testing.T) {
	f, m := streams(t, stream.Options{})
	s := f.mustOpenStream(t, "ns", "s")
	far, err := m.Take("ns", "s")
	check(t, err)
	s.cancel()
	<-far.Over()
	if err := far.Send(t.Context(), stream.Message{}); !errdefs.IsAborted(err) {
		t.Errorf("sending to a client that has gone gives %v", err)
	}
	far.Close()

	s = f.mustOpenStream(t, "ns", "s")
	check(t, s.Send(&anypb.Any{TypeUrl: "x", Value: make([]byte, stream.MaxMessage)}))
	_, err = s.Recv()
	wantCode(t, err, codes.ResourceExhausted, "more than")

	s = f.mustOpenStream(t, "ns", "s")
	check(t, m.Close())
	_, err = s.Recv()
	wantCode(t, err, codes.Unavailable, "stopping")
}

// pipeServer is the server's side of a call whose client neither sends nor reads.
type pipeServer struct {
	grpc.ServerStream
	ctx     context.Context
	blocked chan struct{} // closed by the first Send
}

func (p pipeServer) Context() context.Context { return p.ctx }

func (p pipeServer) Send(*anypb.Any) error {
	close(p.blocked)
	<-p.ctx.Done()
	return p.ctx.Err()
}

func (p pipeServer) Recv() (*anypb.Any, error) {
	<-p.ctx.Done()
	return nil, p.ctx.Err()
}

// A client that never says anything, or never reads, does not hold a stream for ever.
func TestStreamingPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		srv := pipeServer{ctx: ctx, blocked: make(chan struct{})}
		begun := time.Now()
		if _, err := streamID(srv); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) != streamInitTimeout {
			t.Errorf("a silent client: %v after %s", err, time.Since(begun))
		}
		m := stream.New(stream.Options{})
		near, err := m.Open("ns", "s")
		check(t, err)
		far, err := m.Take("ns", "s")
		check(t, err)
		served := make(chan error)
		go func() { served <- serveStream(srv, near) }()
		check(t, far.Send(ctx, stream.Message{TypeURL: "x"}))
		<-srv.blocked
		begun = time.Now()
		far.Close()
		if err := <-served; err != nil || time.Since(begun) != streamLinger {
			t.Errorf("a client that doesn't read: %v after %s", err, time.Since(begun))
		}
		near.Close()
		cancel()
	})
}
