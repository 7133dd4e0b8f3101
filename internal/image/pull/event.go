package pull

import "github.com/holdfast-dev/holdfast/internal/oci"

// Stage is a step of a pull or of one of its layers.
type Stage string

// The stages in their order. The first two and StageDone are of the pull, with
// the image's target as descriptor, and the others of a layer.
const (
	StageResolving Stage = "resolving"
	StageResolved  Stage = "resolved"
	StageWaiting   Stage = "waiting"    // for a free download slot
	StageExists    Stage = "exists"     // already unpacked: neither fetched nor applied
	StageFetching  Stage = "fetching"   // bytes arrive and are unpacked as they do
	StageUnpacking Stage = "unpacking"  // all bytes are here
	StageCommit    Stage = "committing" // waiting to be durable
	StageComplete  Stage = "complete"
	StageDone      Stage = "done"
)

// Event tells of one step, or of bytes that have come.
type Event struct {
	Stage  Stage
	Desc   oci.Descriptor
	Offset int64 // compressed bytes of Desc that are here
}

func (r *run) report(e Event) {
	if r.req.Progress != nil {
		r.req.Progress(e)
	}
}
