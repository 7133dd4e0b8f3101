package cli

import (
	"os"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

// bars is the display for a terminal: a bar for each layer, with its stage.
type bars struct {
	progress *mpb.Progress
	layers   map[string]*bar
}

type bar struct {
	*mpb.Bar
	stage atomic.Value // string
}

func newBars(out *os.File) *bars {
	return &bars{
		progress: mpb.New(mpb.WithOutput(out), mpb.WithWidth(40), mpb.WithRefreshRate(100*time.Millisecond)),
		layers:   make(map[string]*bar),
	}
}

func (p *bars) layer(l *holdfastv1.PullLayer) {
	d := l.Descriptor_.GetDigest()
	b := p.layers[d]
	if b == nil {
		b = &bar{}
		b.stage.Store("")
		// One more than the size: the bar is complete when the layer is, and not when its last byte has come.
		b.Bar = p.progress.AddBar(l.Descriptor_.GetSize()+1,
			mpb.PrependDecorators(
				decor.Name(shortDigest(d), decor.WC{W: 20, C: decor.DindentRight}),
				decor.Any(func(decor.Statistics) string { return b.stage.Load().(string) }, decor.WC{W: 17, C: decor.DindentRight}),
			),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")))
		p.layers[d] = b
	}
	b.stage.Store(stageWord(l.Stage))
	b.SetCurrent(l.Offset)
	if l.Stage == holdfastv1.PullLayer_COMPLETE || l.Stage == holdfastv1.PullLayer_EXISTS {
		b.SetTotal(l.Descriptor_.GetSize(), true)
	}
}

// close leaves the bars as they are and gives the terminal back.
func (p *bars) close() {
	for _, b := range p.layers {
		b.Abort(false)
	}
	p.progress.Wait()
}
