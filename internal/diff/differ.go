// Package diff applies layers to mounts and makes layers from them, through stream processors where asked.
package diff

import (
	"github.com/holdfast-dev/holdfast/internal/layer"
	"github.com/holdfast-dev/holdfast/internal/linux/mount"
)

// Options of a Differ. The zero value works, but for a daemon Temp should be
// the directory that it cleans when it starts.
type Options struct {
	Temp   mount.Temp   // where trees are mounted that can't be reached directly; default: the system's directory for temporary files
	Limits layer.Limits // bounds on what one archive may cost
}

// Differ applies layers to mounts and makes layers from what two mounts
// differ in. Its methods may be called at once from several goroutines.
type Differ struct {
	opts Options
}

// New makes a Differ.
func New(opts Options) *Differ {
	if opts.Temp.Dir == "" {
		opts.Temp.Dir = defaultTemp()
	}
	return &Differ{opts}
}
