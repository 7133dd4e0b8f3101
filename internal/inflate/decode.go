package inflate

import "encoding/binary"

// status says why decoding stopped.
type status int

const (
	more        status = iota // nothing stops it but a limit of the loop
	blockEnd                  // the block is over
	needInput                 // what is buffered ends within something indivisible
	needRoom                  // the output is full
	corrupt                   // no DEFLATE stream goes on like this
	badHeader                 // no member begins like this
	badChecksum               // the member's content isn't what was packed
)

const (
	inputSize = 1 << 17 // bytes of compressed data buffered at most
	inputMask = inputSize - 1

	// fastInput is how much input one turn of the fast loop may look at: two
	// refills of at most 7 bytes, the last of which loads 8.
	fastInput = 32

	maxLength = 258
)

// A decoder decodes one DEFLATE stream (RFC 1951) after another from its
// buffer of input. Between steps ip is the next byte of in not yet in bits,
// and fewer than 8 bits are left there, the last of in[ip-1]: so bytes are
// given back to the buffer, and whoever refills it keeps in[ip:iend].
type decoder struct {
	in       [inputSize + 8]byte
	ip, iend int
	bits     uint64 // the next bits of the stream, lowest first
	nbits    uint   // how many of them count

	last   bool // the current block is the last of its stream
	fixed  bool // the tables hold the fixed codes
	stored int  // bytes left in the current block, if it is stored

	litLen   [litLenSize]uint32
	distance [distanceSize]uint32
	lengths  [numLitLen + numDistance]uint8
}

// symbols decodes symbols of the current block into out from op on, until the
// block ends, room at roomEnd, or the input. Bytes of out from low on are the
// history that distances may reach. It returns the new op.
func (d *decoder) symbols(out *[bufferSize]byte, op, low int) (int, status) {
	for {
		st := more
		if d.iend-d.ip > fastInput && op < roomEnd {
			if op, st = d.fast(out, op, low); st != more {
				return op, st
			}
		}
		if op >= roomEnd {
			return op, needRoom
		}
		if op, st = d.careful(out, op, low); st != more {
			return op, st
		}
	}
}

// fast decodes while at least fastInput bytes of input remain and op is below
// roomEnd, from where the longest match still fits. Everything it needs is in
// registers; indexes are masked to the size of their array, which is a power
// of two, rather than checked: where this code is right the mask changes
// nothing, and where it were wrong nothing outside the array is touched.
//
// A turn takes up to three literals of codes that need no subtable, 33 bits,
// and after a refill a length and a distance, 48 bits. Of nbits only the low
// byte means anything until then: subtracting a whole entry subtracts its
// total there, and anything above. It is long, since a call would cost the
// registers, and even an inlined one where literals are taken 3 % of speed.
func (d *decoder) fast(out *[bufferSize]byte, at, low int) (int, status) {
	_ = *out // checks for nil here, and nowhere in the loop
	op, lowest, last := uint(at), uint(low), uint(d.iend-fastInput)
	bits, ip, nbits := refill(&d.in, d.bits, uint(d.ip), d.nbits)
	entry := d.litLen[bits&litLenMask]
	st := more
	for op < roomEnd && ip < last {
		if entry&entryLiteral != 0 {
			i := op & outMask
			bits >>= entry & totalMask
			nbits -= uint(entry)
			out[i] = byte(entry >> valueShift)
			op++
			entry = d.litLen[bits&litLenMask]
			if entry&entryLiteral != 0 {
				bits >>= entry & totalMask
				nbits -= uint(entry)
				out[i+1] = byte(entry >> valueShift)
				op++
				entry = d.litLen[bits&litLenMask]
				if entry&entryLiteral != 0 {
					bits >>= entry & totalMask
					nbits -= uint(entry)
					out[i+2] = byte(entry >> valueShift)
					op++
					entry = d.litLen[bits&litLenMask]
				}
			}
			bits, ip, nbits = refill(&d.in, bits, ip, nbits)
			if entry&entryLiteral != 0 {
				continue
			}
		}
		before := bits
		bits >>= entry & totalMask
		nbits -= uint(entry)
		if entry&entrySpecial != 0 {
			if entry&entrySubtable != 0 {
				entry = d.litLen[subIndex(entry, bits)&(litLenSize-1)]
				before = bits
				bits >>= entry & totalMask
				nbits -= uint(entry)
				if entry&entryLiteral != 0 {
					out[op&outMask] = byte(entry >> valueShift)
					op++
					bits, ip, nbits = refill(&d.in, bits, ip, nbits)
					entry = d.litLen[bits&litLenMask]
					continue
				}
			}
			if entry&entryEnd != 0 {
				st = blockEnd
				break
			}
			if entry&entrySpecial != 0 {
				st = corrupt
				break
			}
		}
		length := value(entry, before)
		entry = d.distance[bits&distanceMask]
		before = bits
		bits >>= entry & totalMask
		nbits -= uint(entry)
		if entry&entrySpecial != 0 {
			if entry&entrySubtable != 0 {
				entry = d.distance[subIndex(entry, bits)&(distanceSize-1)]
				before = bits
				bits >>= entry & totalMask
				nbits -= uint(entry)
			}
			if entry&entrySpecial != 0 {
				st = corrupt
				break
			}
		}
		distance := value(entry, before)
		if distance > op-lowest {
			st = corrupt
			break
		}
		// The next entry is on its way from the table while the match is copied.
		bits, ip, nbits = refill(&d.in, bits, ip, nbits)
		entry = d.litLen[bits&litLenMask]

		end := op + length
		switch {
		case distance >= 16:
			copyFar(out, op, op-distance, end)
		case distance == 1:
			repeat(out, op, end)
		default:
			copyNear(out, op, distance, end)
		}
		op = end
	}
	d.giveBack(int(ip), bits, nbits&63)
	return int(op), st
}

// refill loads 8 bytes behind the nbits that count and moves on by those that
// fit whole. The bits above are right as well, and loading them again changes
// nothing. Afterwards nbits is 56 to 63.
func refill(in *[inputSize + 8]byte, bits uint64, ip, nbits uint) (uint64, uint, uint) {
	bits |= binary.LittleEndian.Uint64(in[ip&inputMask:]) << (nbits & 63)
	return bits, ip + ^nbits>>3&7, nbits | 56
}

// subIndex is where the subtable that entry points to continues with bits.
func subIndex(entry uint32, bits uint64) uint64 {
	return uint64(entry>>valueShift) + bits&(1<<(entry>>codeShift&codeMask)-1)
}

// value returns the length or distance of entry, with its extra bits, which
// follow the code that bits begin with.
func value(entry uint32, bits uint64) uint {
	return uint(entry>>valueShift) + uint(bits&(1<<(entry&totalMask)-1)>>(entry>>codeShift&codeMask))
}

// copyFar copies a match from at least 16 bytes before. Like the other two it
// may write beyond end, as roomEnd allows for.
func copyFar(out *[bufferSize]byte, to, from, end uint) {
	for {
		*(*[16]byte)(out[to&outMask:]) = *(*[16]byte)(out[from&outMask:])
		to += 16
		from += 16
		if to >= end {
			return
		}
	}
}

// copyNear copies a match from fewer than 16 bytes before. Of each word at
// least the first step bytes are right, and the next word begins behind those.
func copyNear(out *[bufferSize]byte, to, distance, end uint) {
	step := min(distance, 8)
	for {
		word := binary.LittleEndian.Uint64(out[(to-distance)&outMask:])
		binary.LittleEndian.PutUint64(out[to&outMask:], word)
		to += step
		if to >= end {
			return
		}
	}
}

// repeat copies a match of the last byte.
func repeat(out *[bufferSize]byte, to, end uint) {
	word := uint64(out[(to-1)&outMask]) * 0x0101010101010101
	for {
		binary.LittleEndian.PutUint64(out[to&outMask:], word)
		to += 8
		if to >= end {
			return
		}
	}
}

// careful decodes like fast, but takes no bit that isn't there, and stops when
// fast could go on.
func (d *decoder) careful(out *[bufferSize]byte, op, low int) (int, status) {
	ip, bits, n := d.ip, d.bits, d.nbits
	st := more
	for {
		for n <= 56 && ip < d.iend {
			bits |= uint64(d.in[ip]) << n
			ip++
			n += 8
		}
		if op >= roomEnd || d.iend-ip > 2*fastInput {
			break
		}
		rest, left := bits, n
		entry := lookup(d.litLen[:], litLenBits, rest)
		if total := uint(entry & totalMask); total > left {
			st = needInput
			break
		}
		if entry&entryLiteral != 0 {
			bits, n = rest>>(entry&totalMask), left-uint(entry&totalMask)
			out[op] = byte(entry >> valueShift)
			op++
			continue
		}
		if entry&entrySpecial != 0 {
			bits, n = rest>>(entry&totalMask), left-uint(entry&totalMask)
			st = corrupt
			if entry&entryEnd != 0 {
				st = blockEnd
			}
			break
		}
		length := int(value(entry, rest))
		rest, left = rest>>(entry&totalMask), left-uint(entry&totalMask)
		entry = lookup(d.distance[:], distanceBits, rest)
		if uint(entry&totalMask) > left {
			st = needInput
			break
		}
		if entry&entrySpecial != 0 {
			st = corrupt
			break
		}
		dist := int(value(entry, rest))
		if dist > op-low {
			st = corrupt
			break
		}
		bits, n = rest>>(entry&totalMask), left-uint(entry&totalMask)
		for end := op + length; op < end; op++ {
			out[op] = out[op-dist]
		}
	}
	d.giveBack(ip, bits, n)
	return op, st
}

// lookup returns the entry of the code that bits begin with, as if table had
// no subtables: code and total count the whole code.
func lookup(table []uint32, width uint, bits uint64) uint32 {
	entry := table[bits&(1<<width-1)]
	if entry&entrySubtable == 0 {
		return entry
	}
	return table[subIndex(entry, bits>>width)] + uint32(width)*perBit
}

// giveBack ends a step that has moved bytes before ip into the n bits.
func (d *decoder) giveBack(ip int, bits uint64, n uint) {
	d.ip = ip - int(n>>3)
	d.nbits = n & 7
	d.bits = bits & (1<<d.nbits - 1)
}
