// Package config reads the daemon's TOML into one typed value, and says where each value came from.
//
// It reads containerd's own config.toml as it is: documents of version 1 to
// 4, with their imports. Each document is turned into version 4 by itself
// (migrate.go), the documents are laid over the defaults in the order in which they
// import one another (merge.go), the flags over them, and the keys that Holdfast
// honours are decoded into Config. What remains is not dropped: Check names
// every key that has no effect, with the reason (keys.txt).
//
// Source of the format: containerd 2.4.2's config loader and its manual page
// containerd-config.toml(5).
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
)

// DefaultPath is the config file that is read when no other is named. It
// may be absent.
const DefaultPath = "/etc/containerd/config.toml"

// Config is everything that the daemon can be told. Load makes it; its
// fields are for reading. The TOML key of each is given in bindings.
type Config struct {
	Root     string // where the store lies; absolute
	State    string // where sockets and run-time files lie; absolute, not Root
	Temp     string // directory for temporary files, or "" for the system's
	OOMScore int    // the daemon's own oom_score_adj; 0 leaves it alone

	Log       Log
	GRPC      GRPC
	Metadata  Metadata
	GC        GC
	Overlay   Overlay
	Native    Native
	Pull      Pull
	Registry  Registry
	CRI       CRI
	OptPath   string        // where `ctr install` puts bin and lib
	BoltOpen  time.Duration // how long to wait for another holder of the store; 0 leaves it to the daemon
	Disabled  []string      // plugin URIs that must not be offered; see Offers
	Required  []string      // plugin URIs without which the daemon must not start; see Refuse
	Documents []string      // the files that were read, in order; the later ones override

	tree  *value    // the merged documents, version 4, with the honoured keys and all others
	noted []Finding // what was noticed while merging
}

// Log says what is logged to standard error, and how.
type Log struct {
	Level  string // trace, debug, info, warn, error, fatal, panic, or "" for info
	Format string // text, json, or "" for text
}

// GRPC is the socket that clients connect to.
type GRPC struct {
	Address        string // path of the Unix socket, at most 104 bytes
	UID, GID       int    // owner of the socket, which has mode 0660
	MaxRecvMessage int    // bytes
	MaxSendMessage int    // bytes
}

// Metadata tunes meta.db.
type Metadata struct {
	ContentSharing string // "shared" or "isolated": may a namespace adopt a blob that another one holds?
}

// GC decides when garbage is collected.
type GC struct {
	PauseThreshold    float64       // share of time that collections may take, 0 to 0.5
	DeletionThreshold int           // collect after so many deletions; 0 = don't count them
	MutationThreshold int           // skip a scheduled run after fewer mutations
	ScheduleDelay     time.Duration // wait after a trigger
	StartupDelay      time.Duration // wait before the first run; 0 = no first run
}

// Overlay configures the overlayfs snapshotter.
type Overlay struct {
	RootPath      string   // "" = <root>/io.containerd.snapshotter.v1.overlayfs
	UpperdirLabel bool     // show the upper directory as a snapshot label
	SlowChown     bool     // allow that files are copied to change their owners
	MountOptions  []string // replace the options that are found by probing
}

// Native configures the native snapshotter.
type Native struct {
	RootPath string // "" = <root>/io.containerd.snapshotter.v1.native
}

// Pull bounds pulls.
type Pull struct {
	MaxConcurrentDownloads int // layers of one pull that are fetched at once; 0 = no bound
}

// Registry says where the per-registry hosts.toml files lie.
type Registry struct {
	// TransferPath and CRIPath are the config_path of the transfer plugin
	// and of the CRI image plugin: directories separated by colons.
	TransferPath, CRIPath string
}

// defaultRegistryDirs is searched when neither config_path is set.
const defaultRegistryDirs = "/etc/containerd/certs.d:/etc/docker/certs.d"

// Dirs lists the directories to search for a registry's folder, in order:
// those of the transfer plugin, else those of the CRI image plugin, else
// containerd's two defaults.
func (r Registry) Dirs() []string {
	for _, list := range []string{r.TransferPath, r.CRIPath} {
		if dirs := filepath.SplitList(list); len(dirs) > 0 {
			return dirs
		}
	}
	return filepath.SplitList(defaultRegistryDirs)
}

// CRI configures what the kubelet is served.
type CRI struct {
	Snapshotter            string            // for images whose runtime handler names none
	Snapshotters           map[string]string // by runtime handler
	MaxConcurrentDownloads int               // see Downloads
	PullProgressTimeout    time.Duration     // a pull that gets no byte for so long ends; 0 = it doesn't
	PinnedImages           map[string]string // references that the kubelet must not remove, by what they are for
}

// defaultDownloads is the default of CRI.MaxConcurrentDownloads.
const defaultDownloads = 3

// CRIDownloads bounds the layers of one of the kubelet's pulls that are fetched
// at once; 0 = no bound. As in containerd, the kubelet's own setting
// counts if it is not the default, and else the one for all pulls.
func (c *Config) CRIDownloads() int {
	if c.CRI.MaxConcurrentDownloads != defaultDownloads {
		return max(c.CRI.MaxConcurrentDownloads, 0)
	}
	return c.Pull.MaxConcurrentDownloads
}

// Flags are the values given on the command line; they override the
// documents. An empty one was not given.
type Flags struct {
	Root, State, Address, LogLevel string
}

// Load reads the document at path, or at DefaultPath if path is "", with all
// that it imports, and lays flags over it. Only the default document may be
// absent. The errors name file, row and column; a key that has no effect is
// not an error (see Check).
func Load(path string, flags Flags) (*Config, error) {
	l, err := newLoader()
	if err != nil {
		return nil, err
	}
	if path == "" {
		err = l.load(DefaultPath)
		if errors.Is(err, fs.ErrNotExist) && len(l.documents) == 0 {
			err = nil
		}
	} else {
		err = l.load(path)
	}
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	if err := l.override(flags); err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	c := &Config{tree: l.tree, noted: l.noted, Documents: l.documents}
	if err := c.decode(); err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	return c, nil
}

// Origin says where the value of a version-4 key was set, such as
// Origin("plugins", "io.containerd.internal.v1.opt", "path").
func (c *Config) Origin(key ...string) Origin {
	if v := c.tree.lookup(key...); v != nil {
		return v.from
	}
	return Origin{}
}
