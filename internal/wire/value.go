package wire

import (
	"maps"
	"slices"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/holdfast-dev/holdfast/internal/linux/mount"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// Mounts encodes mount descriptions, in their order.
func Mounts(mounts []mount.Mount) []*types.Mount {
	out := make([]*types.Mount, len(mounts))
	for i, m := range mounts {
		out[i] = &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: slices.Clone(m.Options)}
	}
	return out
}

// FromMounts decodes mount descriptions. It judges none of them: whoever
// mounts them does.
func FromMounts(mounts []*types.Mount) []mount.Mount {
	out := make([]mount.Mount, len(mounts))
	for i, m := range mounts {
		out[i] = mount.Mount{
			Type: m.GetType(), Source: m.GetSource(), Target: m.GetTarget(), Options: slices.Clone(m.GetOptions()),
		}
	}
	return out
}

// Time encodes a moment. The zero Time becomes the year 1, as containerd
// sends it, and is zero again in FromTime.
func Time(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

// FromTime decodes a moment, in UTC. A missing one is the zero Time.
func FromTime(ts *timestamppb.Timestamp) time.Time {
	if ts == nil {
		return time.Time{}
	}
	return ts.AsTime()
}

// Descriptor encodes what containerd's API knows of a descriptor: media type,
// digest, size and annotations.
func Descriptor(d oci.Descriptor) *types.Descriptor {
	return &types.Descriptor{
		MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size, Annotations: maps.Clone(d.Annotations),
	}
}

// FromDescriptor decodes a descriptor, unchecked: see oci.Check. A missing one
// is the zero Descriptor.
func FromDescriptor(d *types.Descriptor) oci.Descriptor {
	return oci.Descriptor{
		MediaType: d.GetMediaType(), Digest: digest.Digest(d.GetDigest()), Size: d.GetSize(), Annotations: maps.Clone(d.GetAnnotations()),
	}
}

// Any is a value of a type that only its sender and its final reader know: in
// between it is stored and passed on as it is.
type Any struct {
	TypeURL string // the type's name in containerd's typeurl registry, or of the protobuf message
	Value   []byte // JSON or protobuf, as the type has it
}

// Proto encodes the value. The zero Any becomes nil.
func (a Any) Proto() *anypb.Any {
	if a.TypeURL == "" && a.Value == nil {
		return nil
	}
	return &anypb.Any{TypeUrl: a.TypeURL, Value: slices.Clone(a.Value)}
}

// FromAny decodes a value. A missing one is the zero Any.
func FromAny(a *anypb.Any) Any {
	return Any{TypeURL: a.GetTypeUrl(), Value: slices.Clone(a.GetValue())}
}
