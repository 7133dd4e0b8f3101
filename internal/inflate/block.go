package inflate

// The order in which a block header gives the lengths of the codes in which
// it gives the lengths of its codes, RFC 1951 section 3.2.7.
var clenOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// The kinds of blocks, RFC 1951 section 3.2.3.
const (
	blockStored = iota
	blockFixed
	blockDynamic
)

// blockHeader reads the header of the next block and makes ready for its content:
// d.stored bytes if it reports that the block is stored, else symbols. A header
// takes at most 564 bytes; while not all of it is there nothing is consumed,
// and the next call begins again.
func (d *decoder) blockHeader() (stored bool, st status) {
	c := cursor{in: d.in[d.ip:d.iend], bits: d.bits, nbits: d.nbits}
	d.last = c.take(1) == 1
	switch kind := c.take(2); {
	case c.short:
	case kind == blockStored:
		stored = true
		st = d.storedHeader(&c)
	case kind == blockFixed:
		d.fixedCodes()
	case kind == blockDynamic:
		st = d.dynamicCodes(&c)
	default:
		st = corrupt
	}
	if c.short {
		return false, needInput
	}
	if st == more {
		d.giveBack(d.iend-len(c.in), c.bits, c.nbits)
	}
	return stored, st
}

func (d *decoder) storedHeader(c *cursor) status {
	c.take(c.nbits & 7)
	n, inverted := c.take(16), c.take(16)
	if n != inverted^0xffff {
		return corrupt
	}
	d.stored = int(n)
	return more
}

// fixedCodes loads the codes of RFC 1951 section 3.2.6.
func (d *decoder) fixedCodes() {
	if d.fixed {
		return
	}
	d.fixed = true
	lengths := &d.lengths
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		case i < numLitLen:
			lengths[i] = 8
		default:
			lengths[i] = 5
		}
	}
	build(d.litLen[:], litLenBits, lengths[:numLitLen], litLenSymbols[:])
	build(d.distance[:], distanceBits, lengths[numLitLen:], distanceSymbols[:])
}

// dynamicCodes reads the block's own codes, RFC 1951 section 3.2.7.
func (d *decoder) dynamicCodes(c *cursor) status {
	numLit, numDist, numClen := int(c.take(5))+257, int(c.take(5))+1, int(c.take(4))+4
	if numLit > 286 || numDist > 30 {
		return corrupt
	}
	var clens [19]uint8
	for _, symbol := range clenOrder[:numClen] {
		clens[symbol] = uint8(c.take(3))
	}
	var table [clenSize]uint32
	if c.short || !build(table[:], clenBits, clens[:], clenSymbols[:]) {
		return corrupt
	}
	d.fixed = false
	lengths := d.lengths[:numLit+numDist]
	for i := 0; i < len(lengths); {
		c.fill()
		entry := table[c.bits&(clenSize-1)]
		if entry&entrySpecial != 0 {
			return corrupt
		}
		c.take(uint(entry & totalMask))
		var value uint8
		var times int
		switch symbol := entry >> valueShift; symbol {
		default:
			lengths[i] = uint8(symbol)
			i++
			continue
		case 16:
			if i == 0 {
				return corrupt
			}
			value = lengths[i-1]
			times = 3 + int(c.take(2))
		case 17:
			times = 3 + int(c.take(3))
		case 18:
			times = 11 + int(c.take(7))
		}
		if c.short || times > len(lengths)-i {
			return corrupt
		}
		for range times {
			lengths[i] = value
			i++
		}
	}
	if c.short || !build(d.litLen[:], litLenBits, lengths[:numLit], litLenSymbols[:]) ||
		!build(d.distance[:], distanceBits, lengths[numLit:], distanceSymbols[:]) {
		return corrupt
	}
	return more
}

// copyStored copies the content of a stored block to out from op on.
func (d *decoder) copyStored(out *[bufferSize]byte, op int) (int, status) {
	n := min(d.stored, d.iend-d.ip, bufferSize-op)
	copy(out[op:], d.in[d.ip:d.ip+n])
	op += n
	d.ip += n
	d.stored -= n
	switch {
	case d.stored == 0:
		return op, blockEnd
	case d.ip == d.iend:
		return op, needInput
	}
	return op, needRoom
}

// A cursor reads bits from in until it is short of them. From then on it
// yields zeros, and what was concluded from them means nothing.
type cursor struct {
	in    []byte
	bits  uint64
	nbits uint
	short bool
}

// fill makes at least 57 bits ready, or all there are.
func (c *cursor) fill() {
	for c.nbits <= 56 && len(c.in) > 0 {
		c.bits |= uint64(c.in[0]) << c.nbits
		c.in = c.in[1:]
		c.nbits += 8
	}
}

// take consumes the next n bits, at most 16.
func (c *cursor) take(n uint) uint64 {
	if c.nbits < n {
		c.fill()
	}
	if c.nbits < n {
		c.short = true
		return 0
	}
	v := c.bits & (1<<n - 1)
	c.bits >>= n
	c.nbits -= n
	return v
}
