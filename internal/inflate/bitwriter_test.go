package inflate

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"math/rand/v2"
	"slices"
)

// A bitWriter writes DEFLATE streams that no packer writes.
type bitWriter struct {
	bytes.Buffer
	bits uint64
	n    int
}

// put writes the low n bits of v, lowest first.
func (w *bitWriter) put(v uint64, n int) {
	w.bits |= v << w.n
	for w.n += n; w.n >= 8; w.n -= 8 {
		w.WriteByte(byte(w.bits))
		w.bits >>= 8
	}
}

// align fills up the last byte.
func (w *bitWriter) align() {
	if w.n > 0 {
		w.put(0, 8-w.n)
	}
}

// codes returns the canonical codes of the given lengths, as put takes them.
func codes(lengths []uint8) []uint64 {
	out := make([]uint64, len(lengths))
	code := uint64(0)
	for n := uint8(1); n <= maxCode; n++ {
		for s, l := range lengths {
			if l == n {
				out[s] = uint64(bits.Reverse16(uint16(code)) >> (16 - n))
				code++
			}
		}
		code <<= 1
	}
	return out
}

// dynamicHeader writes the header of a block with these codes, without runs.
func (w *bitWriter) dynamicHeader(last bool, litLen, distance []uint8) {
	w.put(uint64(b2i(last)), 1)
	w.put(blockDynamic, 2)
	w.put(uint64(len(litLen)-257), 5)
	w.put(uint64(len(distance)-1), 5)
	w.put(19-4, 4)
	clens := make([]uint8, 19)
	for i := range 16 {
		clens[i] = 4
	}
	for _, s := range clenOrder {
		w.put(uint64(clens[s]), 3)
	}
	c := codes(clens)
	for _, l := range slices.Concat(litLen, distance) {
		w.put(c[l], 4)
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// randomLengths returns a complete code for exactly used of n symbols, must
// among them: it splits leaves of a tree at random, deep ones rather if deep.
func randomLengths(rnd *rand.Rand, n, used, must int, deep bool) []uint8 {
	leaves := []uint8{1, 1}
	for len(leaves) < used {
		i := rnd.IntN(len(leaves))
		if deep && rnd.IntN(3) > 0 {
			i = len(leaves) - 1
		}
		if leaves[i] < maxCode {
			leaves[i]++
			leaves = append(leaves, leaves[i])
		}
	}
	symbols := rnd.Perm(n)
	if i := slices.Index(symbols, must); i >= len(leaves) {
		symbols[i], symbols[0] = symbols[0], symbols[i]
	}
	lengths := make([]uint8, n)
	for i, l := range leaves {
		lengths[symbols[i]] = l
	}
	return lengths
}

// randomDeflate returns a valid DEFLATE stream of blocks whose codes, symbols
// and distances are drawn at random.
func randomDeflate(rnd *rand.Rand) []byte {
	var w bitWriter
	size := 0 // of what it decodes to
	blocks := 1 + rnd.IntN(6)
	for b := range blocks {
		last := b == blocks-1
		if rnd.IntN(5) == 0 {
			w.put(uint64(b2i(last)), 3)
			w.align()
			n := rnd.IntN(3000)
			w.put(uint64(n), 16)
			w.put(uint64(n)^0xffff, 16)
			for range n {
				w.put(uint64(rnd.IntN(256)), 8)
			}
			size += n
			continue
		}
		var litLen, distance []uint8
		if rnd.IntN(4) == 0 {
			w.put(uint64(b2i(last)), 1)
			w.put(blockFixed, 2)
			litLen, distance = fixedLengths()
		} else {
			litLen = randomLengths(rnd, 257+rnd.IntN(30), 2+rnd.IntN(256), 256, rnd.IntN(2) == 0)
			n := 2 + rnd.IntN(29)
			distance = randomLengths(rnd, n, 2+rnd.IntN(n-1), rnd.IntN(n), rnd.IntN(2) == 0)
			w.dynamicHeader(last, litLen, distance)
		}
		size = w.randomSymbols(rnd, litLen, distance, size)
	}
	w.align()
	return w.Bytes()
}

func fixedLengths() (litLen, distance []uint8) {
	var d decoder
	d.fixedCodes()
	return d.lengths[:numLitLen], d.lengths[numLitLen:]
}

// randomSymbols writes the content of a block. Its few symbols are drawn so
// that rare ones come as often as common ones.
func (w *bitWriter) randomSymbols(rnd *rand.Rand, litLen, distance []uint8, size int) int {
	used := func(lengths []uint8, limit int) (symbols []int) {
		for s, l := range lengths {
			if l > 0 && s < limit {
				symbols = append(symbols, s)
			}
		}
		return symbols
	}
	lits, dists := used(litLen, 286), used(distance, 30)
	litCodes, distCodes := codes(litLen), codes(distance)
	for range rnd.IntN(4000) {
		s := lits[rnd.IntN(len(lits))]
		if s == 256 {
			continue
		}
		d := dists[rnd.IntN(len(dists))]
		from, extra := int(distanceSymbols[d]>>valueShift), int(distanceSymbols[d]&totalMask)
		if s > 256 && from > size {
			continue
		}
		w.put(litCodes[s], int(litLen[s]))
		if s < 256 {
			size++
			continue
		}
		n := int(litLenSymbols[s] & totalMask)
		more := rnd.IntN(1 << n)
		w.put(uint64(more), n)
		w.put(distCodes[d], int(distance[d]))
		w.put(uint64(rnd.IntN(min(1<<extra, size-from+1))), extra)
		size += int(litLenSymbols[s]>>valueShift) + more
	}
	w.put(litCodes[256], int(litLen[256]))
	return size
}

// gzipMember wraps a DEFLATE stream in the least of a gzip member.
func gzipMember(deflate, content []byte) []byte {
	out := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3}, deflate...)
	out = binary.LittleEndian.AppendUint32(out, crc32.ChecksumIEEE(content))
	return binary.LittleEndian.AppendUint32(out, uint32(len(content)))
}
