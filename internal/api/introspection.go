package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/filter"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// maxUUID bounds what is read of the file that names this daemon.
const maxUUID = 128

// introspectionService tells clients what this daemon is made of. It keeps one
// file, in containerd's place and format, so that a machine keeps its identity
// when it moves between the two:
//
//	<root>/io.containerd.grpc.v1.introspection/   0700
//	└── uuid                                      0666 less the umask: 36 characters, no newline
type introspectionService struct {
	introspectionapi.UnimplementedIntrospectionServer
	dir     string
	plugins []Plugin

	mu sync.Mutex // while uuid is read or made
}

func newIntrospection(dir string, plugins []Plugin) *introspectionService {
	all := append(append([]Plugin(nil), plugins...), servicePlugins()...)
	return &introspectionService{dir: dir, plugins: all}
}

func (s *introspectionService) Plugins(_ context.Context, req *introspectionapi.PluginsRequest) (*introspectionapi.PluginsResponse, error) {
	match, err := filter.Parse(req.GetFilters()...)
	if err != nil {
		return nil, wire.Error(err)
	}
	resp := &introspectionapi.PluginsResponse{}
	for _, p := range s.plugins {
		if match.Match(filter.AdaptorFunc(p.field)) {
			resp.Plugins = append(resp.Plugins, pluginToWire(p))
		}
	}
	return resp, nil
}

func (s *introspectionService) PluginInfo(_ context.Context, req *introspectionapi.PluginInfoRequest) (*introspectionapi.PluginInfoResponse, error) {
	for _, p := range s.plugins {
		if p.Type != req.GetType() || p.ID != req.GetID() {
			continue
		}
		switch {
		case req.GetOptions() == nil:
			return &introspectionapi.PluginInfoResponse{Plugin: pluginToWire(p)}, nil
		case p.Err != nil:
			return nil, wire.Error(fmt.Errorf("plugin %s.%s is not in use: %w: %w", p.Type, p.ID, p.Err, errdefs.ErrFailedPrecondition))
		}
		return nil, wire.Error(fmt.Errorf("plugin %s.%s has no further information: %w", p.Type, p.ID, errdefs.ErrNotImplemented))
	}
	return nil, wire.Error(fmt.Errorf("plugin %s.%s not found: %w", req.GetType(), req.GetID(), errdefs.ErrNotFound))
}

func (s *introspectionService) Server(context.Context, *emptypb.Empty) (*introspectionapi.ServerResponse, error) {
	id, err := s.uuid()
	if err != nil {
		return nil, wire.Error(err)
	}
	pidns, err := pidNamespace()
	if err != nil {
		return nil, wire.Error(err)
	}
	return &introspectionapi.ServerResponse{UUID: id, Pid: uint64(os.Getpid()), Pidns: pidns}, nil
}

// uuid returns the daemon's identity, making it at the first question. An
// empty file, which a power cut can leave of containerd's, counts as none.
func (s *introspectionService) uuid() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := filepath.Join(s.dir, "uuid")
	id, err := readUUID(path)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return id, err
	}
	fresh, err := uuid.NewRandom()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return "", err
	}
	if err := durable.WriteFile(path, []byte(fresh.String()), 0o666); err != nil {
		return "", err
	}
	return fresh.String(), durable.SyncDir(filepath.Dir(s.dir))
}

func readUUID(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxUUID))
	if err != nil {
		return "", err
	}
	if len(data) == 0 {
		return "", fs.ErrNotExist
	}
	if err := uuid.Validate(string(data)); err != nil {
		return "", fmt.Errorf("%s holds no UUID; remove it to get a new one: %w", path, err)
	}
	return string(data), nil
}

// pidNamespace is the inode of the daemon's pid namespace.
func pidNamespace() (uint64, error) {
	fi, err := os.Stat("/proc/self/ns/pid")
	if err != nil {
		return 0, err
	}
	return fi.Sys().(*syscall.Stat_t).Ino, nil
}

// field says what filters can ask of a plugin: its type and id.
func (p Plugin) field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "type":
		return p.Type, p.Type != ""
	case "id":
		return p.ID, p.ID != ""
	}
	return "", false
}

func pluginToWire(p Plugin) *introspectionapi.Plugin {
	out := &introspectionapi.Plugin{
		Type:         p.Type,
		ID:           p.ID,
		Requires:     p.Requires,
		Platforms:    types.OCIPlatformToProto(p.Platforms),
		Exports:      p.Exports,
		Capabilities: p.Capabilities,
	}
	if p.Err != nil {
		out.InitErr = status.Convert(wire.Error(p.Err)).Proto()
	}
	return out
}
