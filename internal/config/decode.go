package config

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// binding ties a version-4 key to the field of Config that it sets.
type binding struct {
	path  []string
	field func(*Config) any // a pointer to string, int, float64, bool, time.Duration or []string
}

func plugin(uri string, key ...string) []string {
	return append([]string{"plugins", uri}, key...)
}

// bindings are the keys that Holdfast honours, in the order of default.toml.
var bindings = []binding{
	{[]string{"root"}, func(c *Config) any { return &c.Root }},
	{[]string{"state"}, func(c *Config) any { return &c.State }},
	{[]string{"temp"}, func(c *Config) any { return &c.Temp }},
	{[]string{"oom_score"}, func(c *Config) any { return &c.OOMScore }},
	{[]string{"disabled_plugins"}, func(c *Config) any { return &c.Disabled }},
	{[]string{"required_plugins"}, func(c *Config) any { return &c.Required }},
	{[]string{"debug", "level"}, func(c *Config) any { return &c.Log.Level }},
	{[]string{"debug", "format"}, func(c *Config) any { return &c.Log.Format }},
	{[]string{"timeouts", "io.containerd.timeout.bolt.open"}, func(c *Config) any { return &c.BoltOpen }},
	{plugin(grpcServer, "address"), func(c *Config) any { return &c.GRPC.Address }},
	{plugin(grpcServer, "uid"), func(c *Config) any { return &c.GRPC.UID }},
	{plugin(grpcServer, "gid"), func(c *Config) any { return &c.GRPC.GID }},
	{plugin(grpcServer, "max_recv_message_size"), func(c *Config) any { return &c.GRPC.MaxRecvMessage }},
	{plugin(grpcServer, "max_send_message_size"), func(c *Config) any { return &c.GRPC.MaxSendMessage }},
	{plugin(metaBolt, "content_sharing_policy"), func(c *Config) any { return &c.Metadata.ContentSharing }},
	{plugin(gcScheduler, "pause_threshold"), func(c *Config) any { return &c.GC.PauseThreshold }},
	{plugin(gcScheduler, "deletion_threshold"), func(c *Config) any { return &c.GC.DeletionThreshold }},
	{plugin(gcScheduler, "mutation_threshold"), func(c *Config) any { return &c.GC.MutationThreshold }},
	{plugin(gcScheduler, "schedule_delay"), func(c *Config) any { return &c.GC.ScheduleDelay }},
	{plugin(gcScheduler, "startup_delay"), func(c *Config) any { return &c.GC.StartupDelay }},
	{plugin(overlay, "root_path"), func(c *Config) any { return &c.Overlay.RootPath }},
	{plugin(overlay, "upperdir_label"), func(c *Config) any { return &c.Overlay.UpperdirLabel }},
	{plugin(overlay, "slow_chown"), func(c *Config) any { return &c.Overlay.SlowChown }},
	{plugin(overlay, "mount_options"), func(c *Config) any { return &c.Overlay.MountOptions }},
	{plugin(native, "root_path"), func(c *Config) any { return &c.Native.RootPath }},
	{plugin(optService, "path"), func(c *Config) any { return &c.OptPath }},
	{plugin(transfer, "max_concurrent_downloads"), func(c *Config) any { return &c.Pull.MaxConcurrentDownloads }},
	{plugin(transfer, "config_path"), func(c *Config) any { return &c.Registry.TransferPath }},
	{plugin(criImages, "snapshotter"), func(c *Config) any { return &c.CRI.Snapshotter }},
	{plugin(criImages, "max_concurrent_downloads"), func(c *Config) any { return &c.CRI.MaxConcurrentDownloads }},
	{plugin(criImages, "image_pull_progress_timeout"), func(c *Config) any { return &c.CRI.PullProgressTimeout }},
	{plugin(criImages, "registry", "config_path"), func(c *Config) any { return &c.Registry.CRIPath }},
}

// family ties keys with one part of the document's choosing, written as *, to
// a map from that part to the value, a string.
type family struct {
	path  []string
	field func(*Config) *map[string]string
}

// families are the others that Holdfast honours. A map that two of them fill
// keeps what the first one says.
var families = []family{
	{plugin(criImages, "pinned_images", "*"), func(c *Config) *map[string]string { return &c.CRI.PinnedImages }},
	{plugin(criImages, "runtime_platforms", "*", "snapshotter"), func(c *Config) *map[string]string { return &c.CRI.Snapshotters }},
	{plugin(criRuntime, "containerd", "runtimes", "*", "snapshotter"), func(c *Config) *map[string]string { return &c.CRI.Snapshotters }},
}

// members yields the leaves of a family, each with its name and its path.
func (c *Config) members(f family) iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		star := slices.Index(f.path, "*")
		for path := range c.tree.leaves(nil) {
			if matches(f.path, path) && !yield(path[star], path) {
				return
			}
		}
	}
}

// decodeFamily fills a map. An empty string says nothing.
func (c *Config) decodeFamily(f family) error {
	all := f.field(c)
	if *all == nil {
		*all = map[string]string{}
	}
	for name, path := range c.members(f) {
		var s string
		if err := decodeLeaf(c.tree.lookup(path...).leaf, &s); err != nil {
			return fmt.Errorf("%s: %s %w", c.Origin(path...), dotted(path), err)
		}
		if _, taken := (*all)[name]; !taken && s != "" {
			(*all)[name] = s
		}
	}
	return nil
}

// decode fills the typed fields from the tree.
func (c *Config) decode() error {
	for _, b := range bindings {
		v, err := c.tree.leafAt(b.path)
		if err == nil {
			err = decodeLeaf(v.leaf, b.field(c))
		}
		if err != nil {
			return fmt.Errorf("%s: %s %w", c.Origin(b.path...), dotted(b.path), err)
		}
	}
	for _, f := range families {
		if err := c.decodeFamily(f); err != nil {
			return err
		}
	}
	return nil
}

// leafAt finds the leaf at path. The defaults have one at every bound path;
// a document may have put something else there, or above it.
func (v *value) leafAt(path []string) (*value, error) {
	for i, part := range path {
		if v.table == nil {
			return nil, fmt.Errorf("can't be set, because %s (%s) is not a table", dotted(path[:i]), v.from)
		}
		if v = v.table[part]; v == nil {
			return nil, errors.New("has no default") // a test sees to it that this doesn't happen
		}
	}
	if v.table != nil {
		return nil, errors.New("must be a value and not a table")
	}
	return v, nil
}

func decodeLeaf(leaf, field any) error {
	switch field := field.(type) {
	case *string:
		s, ok := leaf.(string)
		if !ok {
			return errors.New("must be a string")
		}
		*field = s
	case *bool:
		b, ok := leaf.(bool)
		if !ok {
			return errors.New("must be true or false")
		}
		*field = b
	case *int:
		n, ok := leaf.(int64)
		if !ok || n > math.MaxInt32 || n < math.MinInt32 {
			return errors.New("must be a whole number of 32 bits")
		}
		*field = int(n)
	case *float64:
		switch n := leaf.(type) {
		case float64:
			*field = n
		case int64:
			*field = float64(n)
		default:
			return errors.New("must be a number")
		}
	case *time.Duration:
		s, ok := leaf.(string)
		if !ok {
			return errors.New("must be a duration in quotes, such as '10s'")
		}
		d, err := time.ParseDuration(s)
		if err != nil {
			return fmt.Errorf("must be a duration such as '10s': %w", err)
		}
		*field = d
	case *[]string:
		list, err := stringList(leaf)
		if err != nil {
			return err
		}
		*field = list
	default:
		return fmt.Errorf("has a field of the unknown kind %T", field)
	}
	return nil
}

func stringList(leaf any) ([]string, error) {
	list, ok := leaf.([]any)
	if !ok {
		return nil, errors.New("must be a list of strings")
	}
	out := make([]string, 0, len(list))
	for _, item := range list {
		s, ok := item.(string)
		if !ok {
			return nil, errors.New("must be a list of strings")
		}
		out = append(out, s)
	}
	return out, nil
}

// maxSocketPath is the longest path of a Unix socket, in bytes, that
// containerd accepts.
const maxSocketPath = 104

// validate refuses values that no daemon could start with. Each error names
// the key and where it was set.
func (c *Config) validate() error {
	bad := func(reason string, path ...string) error {
		v := c.tree.lookup(path...)
		return fmt.Errorf("%s: %s = %s: %s", v.from, dotted(path), literal(v.leaf), reason)
	}
	oneOf := func(value string, allowed ...string) bool { return slices.Contains(allowed, value) }
	switch {
	case !filepath.IsAbs(c.Root):
		return bad("must be an absolute path", "root")
	case !filepath.IsAbs(c.State):
		return bad("must be an absolute path", "state")
	case filepath.Clean(c.Root) == filepath.Clean(c.State):
		return bad("must be another directory than root", "state")
	case c.Temp != "" && !filepath.IsAbs(c.Temp):
		return bad("must be an absolute path, or empty", "temp")
	case c.OOMScore < -1000 || c.OOMScore > 1000:
		return bad("must be from -1000 to 1000", "oom_score")
	case !oneOf(c.Log.Level, "", "trace", "debug", "info", "warn", "warning", "error", "fatal", "panic"):
		return bad("must be one of trace, debug, info, warn, error, fatal, panic", "debug", "level")
	case !oneOf(c.Log.Format, "", "text", "json"):
		return bad("must be text or json", "debug", "format")
	case !filepath.IsAbs(c.GRPC.Address):
		return bad("must be an absolute path", plugin(grpcServer, "address")...)
	case len(c.GRPC.Address) > maxSocketPath:
		return bad(fmt.Sprintf("must have at most %d bytes", maxSocketPath), plugin(grpcServer, "address")...)
	case c.GRPC.MaxRecvMessage <= 0:
		return bad("must be positive", plugin(grpcServer, "max_recv_message_size")...)
	case c.GRPC.MaxSendMessage <= 0:
		return bad("must be positive", plugin(grpcServer, "max_send_message_size")...)
	case !oneOf(c.Metadata.ContentSharing, "shared", "isolated"):
		return bad("must be shared or isolated", plugin(metaBolt, "content_sharing_policy")...)
	case math.IsNaN(c.GC.PauseThreshold):
		return bad("must be a number", plugin(gcScheduler, "pause_threshold")...)
	case c.BoltOpen < 0:
		return bad("must not be negative", "timeouts", "io.containerd.timeout.bolt.open")
	case c.CRI.PullProgressTimeout < 0:
		return bad("must not be negative", plugin(criImages, "image_pull_progress_timeout")...)
	}
	for _, key := range []string{"disabled_plugins", "required_plugins"} {
		list, _ := stringList(c.tree.lookup(key).leaf) // decoded before
		for _, uri := range list {
			if !strings.Contains(uri, ".") {
				return bad(fmt.Sprintf("%q must be a whole plugin URI such as io.containerd.snapshotter.v1.native", uri), key)
			}
		}
	}
	return nil
}
