// Package layer reads layer archives into an emitter (directory, overlay upper, EROFS), and produces them from differences.
//
// A layer is a tar archive, often compressed, of what it adds, with names that
// mean deletions: `d/.wh.x` deletes x from d, and `d/.wh..wh..opq` deletes all
// that lower layers put into d (https://github.com/opencontainers/image-spec/blob/main/layer.md).
// What comes out is what containerd makes of it, entry by entry; where
// containerd fails or hides a file, the comment at the place says what we do
// instead:
//
//   - a hard link into a lower layer works on overlay too (overlay.go);
//   - a directory that replaces a deleted one does not bring the deleted
//     content back (overlay.go);
//   - a file followed by its own whiteout is deleted on overlay too, as on a
//     plain directory;
//   - a whiteout in a directory that no lower layer has leaves no device behind,
//     and an opaque root hides what is below (complete.go);
//   - GNU sparse files of the old format are files (entry.go).
package layer

import (
	"io"

	"github.com/opencontainers/go-digest"
)

// Usage is what files take: the inodes they have, and bytes of the disk by
// st_blocks.
type Usage struct{ Inodes, Size int64 }

// Link is something that is left to do when the parents of an overlay layer
// are known; Complete does it. With a Target, Name is to be a hard link to a
// file of a lower layer. Without one, Name is a directory of the layer with
// whiteouts in it, or an opaque root, for which the parents matter.
type Link struct {
	Name, Target string

	// attrs are those of the archive's entry for the link, which apply to the
	// file as they would if it lay in the same layer.
	attrs *attributes
}

// Result says what an Apply wrote.
type Result struct {
	DiffID digest.Digest // sha256 of the uncompressed archive, read to its end
	Size   int64         // uncompressed bytes
	// Usage is counted while writing. For an overlay it is all that the upper
	// directory holds, with the directory itself, as containerd counts by
	// walking. For a directory it is what the layer added less what it
	// removed, and may be negative.
	Usage Usage
	Files int   // regular files written
	Bytes int64 // bytes written to them

	// Implied names the directories that were made without an entry, and Links
	// what else waits for the parents: pass both to Complete, as soon as
	// either is not empty. Only an overlay without parents has them.
	Implied []string
	Links   []Link

	Times Times // what it spent its time on; also set when it failed
}

// Limits bound what a hostile archive can cost (inv 10). A field that is zero
// means the default given here.
type Limits struct {
	// Entries bounds entries and implied directories together: 4,194,304.
	Entries int
	// Depth bounds the components of a name: 1024.
	Depth int
	// HeaderBytes bounds all headers of one entry (PAX records, GNU long
	// names): 1 MiB.
	HeaderBytes int64
	// XattrBytes bounds the names and values of the extended attributes of one
	// entry: 256 KiB.
	XattrBytes int64
	// NameBytes bounds the memory for names that have to be kept until the
	// archive ends: 256 MiB.
	NameBytes int64
	// Size bounds the uncompressed archive, with its sparse files in full
	// length: 1 TiB.
	Size int64
	// Ratio bounds how many times larger than the compressed archive the
	// uncompressed one may be, once it is larger than RatioFloor: 200 times
	// beyond 8 GiB. (An image of a mostly empty disk compresses 1000 times.)
	Ratio      int64
	RatioFloor int64
}

func (l Limits) orDefaults() Limits {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	if l.Entries == 0 {
		l.Entries = 4 << 20
	}
	if l.Depth == 0 {
		l.Depth = 1024
	}
	def(&l.HeaderBytes, 1<<20)
	def(&l.XattrBytes, 256<<10)
	def(&l.NameBytes, 256<<20)
	def(&l.Size, 1<<40)
	def(&l.Ratio, 200)
	def(&l.RatioFloor, 8<<30)
	return l
}

// Emitter receives the entries of one layer, in order. Directory and Overlay
// are Emitters; each serves one Apply.
type Emitter interface {
	// begin opens what is written to; end closes it, also after an error.
	begin(limits Limits) error
	end()
	// put adds an entry, replacing what its name was.
	put(e *entry, body io.Reader) error
	// whiteout deletes what lower layers, and this one so far, call name.
	whiteout(name string) error
	// opaque deletes all that lower layers put into the directory dir.
	opaque(dir string) error
	// finish does what must come last, and fills in what it knows of res.
	finish(res *Result) error
}
