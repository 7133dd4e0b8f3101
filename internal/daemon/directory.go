package daemon

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfast-dev/holdfast/internal/config"
	"github.com/holdfast-dev/holdfast/internal/durable"
)

// The directories of a root, by containerd's names (source: the seed note and
// containerd's plugin ids). What is ours has `io.holdfast` in its name. An old
// root may hold others, such as `io.containerd.runtime.v1.linux`; they are
// left alone.
//
//	<root>/                                     0700
//	    io.containerd.content.v1.content/       0755  content
//	    io.containerd.grpc.v1.introspection/    0700  the daemon's uuid, made when asked for
//	    io.containerd.metadata.v1.bolt/         0711  meta
//	    io.containerd.runtime.v2.task/          0711  nothing yet
//	    io.containerd.snapshotter.v1.<driver>/  0700  snapshot drivers
//	    io.holdfast.v1.trace/                   0700  trace
//	    io.holdfast.v1.trash/                   0700  blobs on their way out
//	    tmpmounts/                              0700  emptied at start
//	<state>/                                    0711  locked, as the root is, while a daemon runs
//	    io.containerd.runtime.v2.task/          0711  nothing yet
//	<opt.path>/{bin,lib}/                       0711
const (
	dirContent       = "io.containerd.content.v1.content"
	dirIntrospection = "io.containerd.grpc.v1.introspection"
	dirMetadata      = "io.containerd.metadata.v1.bolt"
	dirTask          = "io.containerd.runtime.v2.task"
	dirSnapshotter   = "io.containerd.snapshotter.v1."
	dirTrace         = "io.holdfast.v1.trace"
	dirTrash         = "io.holdfast.v1.trash"
	dirTempMounts    = "tmpmounts"
)

// makeDirectories makes, durably, what the rooms don't make themselves, and tightens the
// modes of what an older daemon has left open.
func makeDirectories(cfg *config.Config) error {
	dirs := []struct {
		path string
		mode os.FileMode
	}{
		{cfg.Root, 0o700},
		{cfg.State, 0o711},
		{filepath.Join(cfg.Root, dirMetadata), 0o711},
		{filepath.Join(cfg.Root, dirTask), 0o711},
		{filepath.Join(cfg.State, dirTask), 0o711},
		{filepath.Join(cfg.Root, dirTempMounts), 0o700},
	}
	for _, d := range dirs {
		if err := makeDirectory(d.path, d.mode); err != nil {
			return err
		}
	}
	for _, dir := range []string{cfg.Root, filepath.Dir(cfg.Root)} {
		if err := durable.SyncDir(dir); err != nil {
			return err
		}
	}
	if cfg.OptPath == "" {
		return nil
	}
	for _, sub := range []string{"bin", "lib"} {
		dir := filepath.Join(cfg.OptPath, sub)
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("opt.path: %w", err)
		}
	}
	return nil
}

func makeDirectory(path string, mode os.FileMode) error {
	if err := os.MkdirAll(path, mode); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Mode().Perm() != mode {
		return os.Chmod(path, mode)
	}
	return nil
}
