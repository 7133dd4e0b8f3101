package pull

import "github.com/holdfast-dev/holdfast/internal/oci"

// Stage is a step of a pull or of one of its layers.
type Stage string

// The stages in their order. The first two and StageDone are of the pull, with
// the image's target as descriptor; the others of a layer, or of a document.
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

	StageMissing Stage = "missing" // of the pull: there is no image for Platform
	StageReading Stage = "reading" // of a document: it is asked for
	StageRead    Stage = "read"    // it is here
	StageKnown   Stage = "known"   // it has been here before
)

// OfDocument reports whether the stage is one of a document's.
func (s Stage) OfDocument() bool { return s == StageReading || s == StageRead || s == StageKnown }

// Event tells of one step, or of bytes that have come.
type Event struct {
	Stage  Stage
	Desc   oci.Descriptor
	Offset int64 // compressed bytes of Desc that are here
	Kept   int64 // StageFetching: those of Desc that need not come, as an earlier pull has left them or the store has them

	Packed   bool             // the layer is not unpacked
	Children []oci.Descriptor // what the document, now that it is here, refers to
	Platform string           // that is missing
}

func (r *run) report(e Event) {
	if r.req.Progress != nil {
		r.req.Progress(e)
	}
}
