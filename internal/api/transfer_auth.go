package api

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	transfertypes "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/stream"
)

// authTimeout is how long a client may take to find credentials. It may have
// to ask somebody.
const authTimeout = 2 * time.Minute

// callback asks the client that wants an image for its credentials, over the
// stream that it has opened for that. It implements auth.Credentials.
//
//	AuthRequest{host, reference} -> client -> AuthResponse{type, username, secret}
type callback struct {
	end       *stream.End
	reference string
	turn      chan struct{} // holds a token while somebody asks
	owed      int           // answers to come: more than one if somebody has asked and not waited
	broken    error         // why the client isn't asked any more
}

func newCallback(end *stream.End, reference string) *callback {
	return &callback{end: end, reference: reference, turn: make(chan struct{}, 1)}
}

// Credential implements auth.Credentials.
func (c *callback) Credential(ctx context.Context, host string) (auth.Credential, error) {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return auth.Credential{}, context.Cause(ctx)
	}
	if c.broken != nil {
		return auth.Credential{}, c.broken
	}
	resp, err := c.ask(ctx, host)
	if err != nil {
		err = fmt.Errorf("ask the client for credentials: %w", err)
		if ctx.Err() == nil {
			c.broken = err
		}
		return auth.Credential{}, err
	}
	return credentialOf(resp)
}

func (c *callback) ask(ctx context.Context, host string) (*transfertypes.AuthResponse, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, authTimeout, fmt.Errorf("no answer within %s: %w", authTimeout, errdefs.ErrUnauthenticated))
	defer cancel()
	msg, err := wireMessage(&transfertypes.AuthRequest{Host: host, Reference: c.reference})
	if err != nil {
		return nil, err
	}
	if err := c.end.Send(ctx, msg); err != nil {
		return nil, err
	}
	for c.owed++; c.owed > 0; c.owed-- { // the last answer is this one's
		msg, err = c.end.Recv(ctx)
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("it has closed its auth stream: %w", errdefs.ErrUnauthenticated)
		}
		if err != nil {
			return nil, err
		}
	}
	var resp transfertypes.AuthResponse
	if typeName(msg.TypeURL) != string(resp.ProtoReflect().Descriptor().FullName()) {
		return nil, fmt.Errorf("it answers with %q, not with an AuthResponse: %w", msg.TypeURL, errdefs.ErrInvalidArgument)
	}
	if err := proto.Unmarshal(msg.Value, &resp); err != nil {
		return nil, fmt.Errorf("read AuthResponse: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &resp, nil
}

// credentialOf reads an answer. `ctr` without a user answers with an empty
// refresh token, which is none.
func credentialOf(resp *transfertypes.AuthResponse) (auth.Credential, error) {
	switch resp.GetAuthType() {
	case transfertypes.AuthType_NONE:
		return auth.Credential{}, nil
	case transfertypes.AuthType_CREDENTIALS:
		return auth.Credential{Username: resp.GetUsername(), Password: resp.GetSecret()}, nil
	case transfertypes.AuthType_REFRESH:
		return auth.Credential{IdentityToken: resp.GetSecret()}, nil
	case transfertypes.AuthType_HEADER:
		return credentialOfHeader(resp.GetSecret())
	}
	return auth.Credential{}, fmt.Errorf("the client answers with credentials of type %s: %w", resp.GetAuthType(), errdefs.ErrNotImplemented)
}

// credentialOfHeader reads a value of the Authorization header: a bearer token, or
// user and password.
func credentialOfHeader(value string) (auth.Credential, error) {
	scheme, param, _ := strings.Cut(value, " ")
	switch strings.ToLower(scheme) {
	case "bearer":
		return auth.Credential{RegistryToken: strings.TrimSpace(param)}, nil
	case "basic":
		plain, err := base64.StdEncoding.DecodeString(strings.TrimSpace(param))
		user, password, ok := strings.Cut(string(plain), ":")
		if err != nil || !ok {
			return auth.Credential{}, fmt.Errorf("the client's Basic authorization is malformed: %w", errdefs.ErrInvalidArgument)
		}
		return auth.Credential{Username: user, Password: password}, nil
	}
	return auth.Credential{}, fmt.Errorf("the client's authorization is neither Bearer nor Basic: %w", errdefs.ErrNotImplemented)
}
