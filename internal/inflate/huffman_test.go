package inflate

import (
	"math/rand/v2"
	"testing"
)

func TestSymbolsAreThoseOfRFC1951(t *testing.T) {
	lengths := [29]uint32{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	for i, base := range lengths {
		extra := uint32(0)
		if i >= 8 && i < 28 {
			extra = uint32(i)/4 - 1
		}
		if want := base<<valueShift | extra; litLenSymbols[257+i] != want {
			t.Errorf("length symbol %d: %#x, want %#x", 257+i, litLenSymbols[257+i], want)
		}
	}
	distances := [30]uint32{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577}
	for i, base := range distances {
		extra := uint32(0)
		if i >= 4 {
			extra = uint32(i)/2 - 1
		}
		if want := base<<valueShift | extra; distanceSymbols[i] != want {
			t.Errorf("distance symbol %d: %#x, want %#x", i, distanceSymbols[i], want)
		}
	}
}

// Every index of the table finds the code that its bits begin with, whatever
// an earlier block left in the table.
func TestBuildFindsEveryCode(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var litLen [litLenSize]uint32
	var distance [distanceSize]uint32
	for range 300 {
		deep := rnd.IntN(2) == 0
		checkTable(t, litLen[:], litLenBits, randomLengths(rnd, 286, 2+rnd.IntN(285), 256, deep), litLenSymbols[:])
		checkTable(t, distance[:], distanceBits, randomLengths(rnd, 30, 2+rnd.IntN(29), 0, deep), distanceSymbols[:])
	}
	litLens, distances := fixedLengths()
	checkTable(t, litLen[:], litLenBits, litLens, litLenSymbols[:])
	checkTable(t, distance[:], distanceBits, distances, distanceSymbols[:])
}

func checkTable(t *testing.T, table []uint32, width uint, lengths []uint8, symbols []uint32) {
	t.Helper()
	if !build(table, width, lengths, symbols) {
		t.Fatalf("build refuses the code %d", lengths)
	}
	for s, code := range codes(lengths) {
		n := lengths[s]
		if n == 0 {
			continue
		}
		want := symbols[s] + uint32(n)*perBit
		for rest := range uint64(1) << (maxCode - n) {
			if got := lookup(table, width, code|rest<<n); got != want {
				t.Fatalf("code %0*b of symbol %d in %d: entry %#x, want %#x", n, code, s, lengths, got, want)
			}
		}
	}
}

func TestBuildRefusesWhatIsNoCode(t *testing.T) {
	lone := func(n uint8) []uint8 {
		l := make([]uint8, 30)
		l[7] = n
		return l
	}
	for _, c := range []struct {
		name    string
		lengths []uint8
		ok      bool
	}{
		{"empty", lone(0), true},
		{"one code of one bit", lone(1), true},
		{"one code of two bits", lone(2), false},
		{"one code longer than the table", lone(13), false},
		{"complete", []uint8{1, 2, 3, 3}, true},
		{"incomplete", []uint8{1, 2, 3, 4}, false},
		{"incomplete beyond the table", []uint8{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}, false},
		{"two codes of two bits", []uint8{2, 2}, false},
		{"three codes of one bit", []uint8{1, 1, 1}, false},
		{"full and one more", []uint8{1, 1, 15}, false},
		{"overfull, then room again", []uint8{1, 1, 1, 2}, false},
	} {
		var table [distanceSize]uint32
		if ok := build(table[:], distanceBits, c.lengths, distanceSymbols[:]); ok != c.ok {
			t.Errorf("%s: %v, want %v", c.name, ok, c.ok)
		}
	}
}

// The bits that a lone code leaves over must not find an older code.
func TestBuildLeavesNothingOfAnEarlierCode(t *testing.T) {
	var table [distanceSize]uint32
	long := []uint8{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15}
	for _, lengths := range [][]uint8{{0, 0, 0}, {0, 1, 0}} {
		if !build(table[:], distanceBits, long, distanceSymbols[:]) || !build(table[:], distanceBits, lengths, distanceSymbols[:]) {
			t.Fatal("build refuses a code")
		}
		for bits := range uint64(1 << maxCode) {
			entry := lookup(table[:], distanceBits, bits)
			if used := lengths[1] == 1 && bits&1 == 0; used != (entry&entrySpecial == 0) {
				t.Fatalf("lengths %d, bits %015b: entry %#x", lengths, bits, entry)
			}
		}
	}
}
