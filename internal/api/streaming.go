package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/stream"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// Patience with the clients of streams (inv 10).
const (
	streamInitTimeout = time.Minute     // until the first message says which stream it is
	streamLinger      = 5 * time.Second // for the client to take the last messages of a stream that is closed
)

// streamingService lets a client lend a stream to another of its calls. The
// call lasts as long as the stream:
//
//	client -> Any(StreamInit{id})    opens it
//	       <- Any(Empty)             it can be used now
//	      <-> Any, ...               what it carries; only the two ends know
//
// Source: containerd plugins/services/streaming.
type streamingService struct {
	streamingapi.UnimplementedStreamingServer
	door
	streams *stream.Manager
}

func (s *streamingService) Stream(srv streamingapi.Streaming_StreamServer) error {
	if s.streams == nil {
		return s.UnimplementedStreamingServer.Stream(srv)
	}
	sp, err := s.space(srv.Context())
	if err != nil {
		return wire.Error(err)
	}
	id, err := streamID(srv)
	if err != nil {
		return wire.Error(err)
	}
	end, err := s.streams.Open(sp.Namespace(), id)
	if err != nil {
		return wire.Error(err)
	}
	defer end.Close()
	ready, err := wireMessage(&emptypb.Empty{})
	if err != nil {
		return wire.Error(err)
	}
	if err := srv.Send(ready.Proto()); err != nil {
		return err
	}
	return wire.Error(serveStream(srv, end))
}

// streamID reads the message by which a stream begins.
func streamID(srv streamingapi.Streaming_StreamServer) (string, error) {
	type first struct {
		msg *anypb.Any
		err error
	}
	came := make(chan first, 1)
	go func() { // ends with the call at the latest
		msg, err := srv.Recv()
		came <- first{msg, err}
	}()
	select {
	case f := <-came:
		if errors.Is(f.err, io.EOF) {
			f.err = nil // and no message: said below
		}
		if f.err != nil {
			return "", f.err
		}
		var begin streamingapi.StreamInit
		if typeName(f.msg.GetTypeUrl()) != string(begin.ProtoReflect().Descriptor().FullName()) {
			return "", fmt.Errorf("a stream begins with a StreamInit, not with %q: %w", f.msg.GetTypeUrl(), errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(f.msg.GetValue(), &begin); err != nil {
			return "", fmt.Errorf("read StreamInit: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		return begin.GetID(), nil
	case <-time.After(streamInitTimeout):
		return "", fmt.Errorf("no StreamInit within %s: %w", streamInitTimeout, context.DeadlineExceeded)
	}
}

// serveStream moves messages both ways until either side ends. The two
// goroutines end with the call.
func serveStream(srv streamingapi.Streaming_StreamServer, end *stream.End) error {
	ctx := srv.Context()
	received, sent := make(chan error, 1), make(chan error, 1)
	go func() { received <- receiveAll(ctx, srv, end) }()
	go func() { sent <- sendAll(ctx, srv, end) }()
	over := end.Over()
	var linger <-chan time.Time
	for {
		select {
		case err := <-received:
			if err != nil && end.Err() == nil {
				return err
			}
			received = nil // it sends no more, but may want to hear more
		case err := <-sent:
			return err
		case <-over:
			over, linger = nil, time.After(streamLinger)
		case <-linger:
			return end.Err()
		}
	}
}

func receiveAll(ctx context.Context, srv streamingapi.Streaming_StreamServer, end *stream.End) error {
	for {
		msg, err := srv.Recv()
		if errors.Is(err, io.EOF) {
			end.CloseSend()
			return nil
		}
		if err != nil {
			return err
		}
		err = end.Send(ctx, wire.FromAny(msg))
		if errdefs.IsAborted(err) {
			return nil // the other end is closed, which the sender tells
		}
		if err != nil {
			return err
		}
	}
}

func sendAll(ctx context.Context, srv streamingapi.Streaming_StreamServer, end *stream.End) error {
	for {
		msg, err := end.Recv(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := srv.Send(msg.Proto()); err != nil {
			return err
		}
	}
}

// wireMessage packs a message as containerd's clients expect it: the type's
// bare name is its URL.
func wireMessage(m proto.Message) (stream.Message, error) {
	url := string(m.ProtoReflect().Descriptor().FullName())
	data, err := proto.Marshal(m)
	if err != nil {
		return stream.Message{}, fmt.Errorf("encode %s: %w: %w", url, err, errdefs.ErrInvalidArgument)
	}
	return stream.Message{TypeURL: url, Value: data}, nil
}

// typeName is the type that a URL stands for, with or without a host.
func typeName(url string) string { return url[strings.LastIndexByte(url, '/')+1:] }
