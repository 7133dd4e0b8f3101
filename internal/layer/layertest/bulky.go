package layertest

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// Bulky returns an image whose layers are made of files of all sizes around
// those that buffers have, up to some megabytes, half of them compressible: it
// takes the bytes through every stage of a pipeline many times. It is the same
// for the same seed.
func Bulky(seed uint64) Image {
	rnd := rand.New(rand.NewPCG(seed, 3))
	img := Image{Name: fmt.Sprintf("bulky-%d", seed)}
	for round := range 3 {
		var entries []Entry
		for i, around := range []int{0, 1, 512, 4 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20, 2 << 20} {
			for _, size := range []int{around - 1, around, around + 1} {
				if size < 0 || rnd.IntN(3) == 0 {
					continue
				}
				e := File(fmt.Sprintf("d%d/%d/f%d", rnd.IntN(2), i, size), text(rnd, size))
				if round > 0 && rnd.IntN(8) == 0 {
					e = Whiteout(e.Name)
				}
				entries = append(entries, e)
			}
		}
		rnd.Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
		img.Layers = append(img.Layers, Archive(entries...))
	}
	return img
}

func text(rnd *rand.Rand, size int) string {
	var b strings.Builder
	b.Grow(size + 64)
	noise := rnd.IntN(2) == 0
	for b.Len() < size {
		if noise {
			b.WriteByte(byte(rnd.Uint32()))
		} else {
			fmt.Fprintf(&b, "line %d of %x\n", b.Len(), rnd.IntN(1<<16))
		}
	}
	return b.String()[:size]
}
