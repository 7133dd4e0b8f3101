package inflate

// A prefix code is decoded through a table indexed by the next bits of the
// stream, lowest bit first. Codes longer than the index go on in a subtable
// behind the main one. An entry is one word:
//
//	 31 30          16 15 14 13 12         8 7           0
//	+--+--------------+--+--+--+------------+-------------+
//	|L |     value    |X |S |E |    code    |    total    |
//	+--+--------------+--+--+--+------------+-------------+
//
//	L      the symbol is a literal byte, and value holds it
//	X      neither literal, length nor distance: S and E say what; without
//	       either, no code of this block begins with these bits
//	S      a subtable: it begins at value and is indexed by `code` more bits
//	E      the end of the block
//	value  else the smallest length or distance that the symbol stands for
//	code   bits of the code, in a subtable only those after the main table's
//	total  bits of the code and of the extra bits that follow it
//
// The total stands lowest because it is used most: a shift by an entry needs
// no mask (the machine takes the count modulo 64), and subtracting a whole
// entry from a count kept modulo 256 subtracts its total.
const (
	entryLiteral  = 1 << 31
	entrySpecial  = 1 << 15
	entrySubtable = 1 << 14
	entryEnd      = 1 << 13

	valueShift = 16
	codeShift  = 8
	codeMask   = 63
	totalMask  = 63
)

const (
	maxCode = 15 // the longest code, RFC 1951 section 3.2.7

	numLitLen   = 288 // literals, the end, lengths, and two that may not occur
	numDistance = 32  // distances, and two that may not occur

	litLenBits   = 11
	distanceBits = 10
	clenBits     = 7

	// A subtable of 2^k entries holds at least k+1 codes, so 288 symbols fill
	// at most 288*16/5 = 922 entries of subtables of at most 2^4, and 32
	// symbols at most 32*32/6 = 171 of at most 2^5. The sizes are the next
	// powers of two, so that a mask bounds every index.
	litLenSize   = 1 << (litLenBits + 1)
	distanceSize = 1 << (distanceBits + 1)
	clenSize     = 1 << clenBits

	litLenMask   = 1<<litLenBits - 1
	distanceMask = 1<<distanceBits - 1
)

// litLenSymbols, distanceSymbols and clenSymbols hold the entry of each symbol
// for a code of no bits: build adds the bits.
var (
	litLenSymbols   = makeLitLenSymbols()
	distanceSymbols = makeDistanceSymbols()
	clenSymbols     = makeClenSymbols()
)

// makeLitLenSymbols computes the lengths of RFC 1951 section 3.2.5: after the
// first eight, four symbols in a row share a number of extra bits, and each
// begins where the one before ends. The last is an exception: 258, no bits.
func makeLitLenSymbols() (symbols [numLitLen]uint32) {
	for b := range uint32(256) {
		symbols[b] = entryLiteral | b<<valueShift
	}
	symbols[256] = entrySpecial | entryEnd
	base := uint32(3)
	for i := range uint32(28) {
		extra := max(i/4, 1) - 1
		symbols[257+i] = base<<valueShift | extra
		base += 1 << extra
	}
	symbols[285] = 258 << valueShift
	symbols[286] = entrySpecial
	symbols[287] = entrySpecial
	return symbols
}

// makeDistanceSymbols computes the distances of RFC 1951 section 3.2.5: as for
// lengths, but two symbols share a number of extra bits.
func makeDistanceSymbols() (symbols [numDistance]uint32) {
	base := uint32(1)
	for i := range uint32(30) {
		extra := max(i/2, 1) - 1
		symbols[i] = base<<valueShift | extra
		base += 1 << extra
	}
	symbols[30] = entrySpecial
	symbols[31] = entrySpecial
	return symbols
}

// makeClenSymbols is the alphabet in which a block's code lengths are written;
// its extra bits are read by hand, as they are no part of the value.
func makeClenSymbols() (symbols [19]uint32) {
	for i := range symbols {
		symbols[i] = uint32(i) << valueShift
	}
	return symbols
}

// build fills table for the canonical prefix code whose lengths are given, one
// for each symbol, 0 for a symbol without a code, indexed by the next `width`
// bits. It reports whether the lengths are a code: complete, or empty, or a
// single code of one bit. The latter two leave bits that stand for nothing,
// and their entries say so, as does every entry an earlier block left behind.
func build(table []uint32, width uint, lengths []uint8, symbols []uint32) bool {
	var count [maxCode + 1]int
	for _, n := range lengths {
		count[n&maxCode]++
	}
	count[0] = 0
	used, room := 0, 1 // room: codes of the current length not yet given away
	var first [maxCode + 2]int
	for n := 1; n <= maxCode; n++ {
		room = room<<1 - count[n]
		if room < 0 {
			return false
		}
		first[n] = used
		used += count[n]
	}
	if room > 0 {
		if used > 1 || used != count[1] {
			return false
		}
		for i := range table[:1<<width] {
			table[i] = entrySpecial
		}
		for s, n := range lengths {
			for i := 0; n == 1 && i < 1<<width; i += 2 {
				table[i] = symbols[s] + perBit
			}
		}
		return true
	}
	var sorted [numLitLen]uint16 // symbols by length of code, then by value
	for s, n := range lengths {
		if n != 0 {
			sorted[first[n&maxCode]] = uint16(s)
			first[n&maxCode]++
		}
	}
	rest, code := fillMain(table, width, &count, sorted[:used], symbols)
	fillSubtables(table, width, &count, rest, symbols, code)
	return true
}

// perBit is what each bit of a code adds to the entry of its symbol.
const perBit = 1<<codeShift + 1

// fillMain enters the codes of at most width bits, shortest first, and returns
// the symbols left over and the first of their codes. The part of the table
// that n bits can index is complete, but for longer codes, once those of n
// bits are entered; the part that n+1 bits can index is that part twice.
func fillMain(table []uint32, width uint, count *[maxCode + 1]int, sorted []uint16, symbols []uint32) (rest []uint16, code uint32) {
	for n := uint(1); ; n++ {
		for _, s := range sorted[:count[n]] {
			table[code] = symbols[s] + uint32(n)*perBit
			code = nextCode(code, n)
		}
		sorted = sorted[count[n]:]
		if n == width {
			return sorted, code
		}
		copy(table[1<<n:2<<n], table[:1<<n])
	}
}

// fillSubtables enters the codes longer than width bits. Codes that share their
// first width bits follow each other, and the first of them opens a subtable,
// as large as the longest of them needs.
func fillSubtables(table []uint32, width uint, count *[maxCode + 1]int, sorted []uint16, symbols []uint32, code uint32) {
	end := uint32(1) << width // of the entries in use
	prefix := end             // of the open subtable; none
	var sub []uint32
	n := width + 1
	for _, s := range sorted {
		for count[n] == 0 {
			n++
		}
		if p := code & (1<<width - 1); p != prefix {
			prefix = p
			bits := n - width
			for used := count[n]; used < 1<<bits; used = used<<1 + count[width+bits] {
				bits++
			}
			table[p] = entrySpecial | entrySubtable | end<<valueShift | uint32(bits)<<codeShift | uint32(width)
			sub = table[end : end+1<<bits]
			end += 1 << bits
		}
		for i := int(code >> width); i < len(sub); i += 1 << (n - width) {
			sub[i] = symbols[s] + uint32(n-width)*perBit
		}
		count[n]--
		code = nextCode(code, n)
	}
}

// nextCode counts in n bits with the first bit of the code lowest, as the
// stream has it, so the carry runs downward. After the last code comes 0.
func nextCode(code uint32, n uint) uint32 {
	bit := uint32(1) << (n - 1)
	for code&bit != 0 {
		code ^= bit
		bit >>= 1
	}
	return code | bit
}
