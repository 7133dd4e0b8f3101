package inflate

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func Example() {
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	w.Write([]byte("a layer"))
	w.Close()

	z, err := NewReader(&packed)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer z.Close()
	content, err := io.ReadAll(z)
	fmt.Println(string(content), err)
	// Output: a layer <nil>
}

// ways are all the ways to read a stream to its end. Each returns what came
// before the error, and nil for the end of the stream. They share one Reader,
// so that each begins with what the one before left behind.
var ways = map[string]func(r io.Reader) ([]byte, error){
	"Read": func(r io.Reader) ([]byte, error) {
		if err := shared.Reset(r); err != nil {
			return nil, err
		}
		return io.ReadAll(shared)
	},
	"Read 7 bytes": func(r io.Reader) ([]byte, error) {
		p := make([]byte, 7)
		return readInTurns(r, func(int) ([]byte, error) {
			n, err := shared.Read(p)
			return p[:n], err
		})
	},
	"WriteTo": func(r io.Reader) ([]byte, error) {
		if err := shared.Reset(r); err != nil {
			return nil, err
		}
		var out bytes.Buffer
		_, err := shared.WriteTo(&out)
		return out.Bytes(), err
	},
	"NextInto": func(r io.Reader) ([]byte, error) {
		return readInTurns(r, func(turn int) ([]byte, error) {
			return shared.NextInto(&buffers[turn%3])
		})
	},
	"in turns": func(r io.Reader) ([]byte, error) {
		p := make([]byte, 1000)
		return readInTurns(r, func(turn int) ([]byte, error) {
			switch turn % 3 {
			case 0:
				n, err := shared.Read(p)
				return p[:n], err
			case 1:
				return shared.NextInto(&buffers[0])
			}
			return shared.Next()
		})
	},
}

var (
	shared  = new(Reader)
	buffers [3]Buffer
)

func readInTurns(r io.Reader, next func(turn int) ([]byte, error)) (out []byte, err error) {
	err = shared.Reset(r)
	for turn := 0; err == nil; turn++ {
		var chunk []byte
		if chunk, err = next(turn); err == nil && len(chunk) == 0 {
			return out, errors.New("a chunk of nothing")
		}
		out = append(out, chunk...)
	}
	if err == io.EOF {
		err = nil
	}
	return out, err
}

func TestReadsWhatEveryToolPacks(t *testing.T) {
	sample, err := os.ReadFile("testdata/sample")
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob("testdata/*.gz")
	if len(files) < 15 {
		t.Fatalf("only %d packed samples", len(files))
	}
	sources := map[string]func(io.Reader) io.Reader{
		"whole":         func(r io.Reader) io.Reader { return r },
		"byte by byte":  iotest.OneByteReader,
		"halves":        iotest.HalfReader,
		"data with EOF": iotest.DataErrReader,
		"pieces":        func(r io.Reader) io.Reader { return &pieces{r, rand.New(rand.NewPCG(8, 9))} },
	}
	for _, file := range files {
		packed, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for way, read := range ways {
			for source, from := range sources {
				got, err := read(from(bytes.NewReader(packed)))
				if err != nil || !bytes.Equal(got, sample) {
					t.Errorf("%s, %s from %s: %d bytes, %v", file, way, source, len(got), err)
				}
			}
		}
	}
}

// pieces reads a few bytes at a time, and writes noise behind them, as a reader
// may.
type pieces struct {
	r   io.Reader
	rnd *rand.Rand
}

func (s *pieces) Read(p []byte) (int, error) {
	p = p[:min(len(p), 1+s.rnd.IntN(200))]
	n, err := s.r.Read(p[:(len(p)+1)/2])
	for i := range p[n:] {
		p[n+i] = byte(s.rnd.Uint32())
	}
	return n, err
}

// long is content longer than any buffer, with matches of all distances.
func long() []byte {
	rnd := rand.New(rand.NewPCG(5, 6))
	out := make([]byte, 0, 3<<20)
	for len(out) < 3<<20 {
		switch n := 1 + rnd.IntN(600); {
		case rnd.IntN(3) == 0 || len(out) < 1<<16:
			for range n {
				out = append(out, "etaoin shrdlu\x00\xff"[rnd.IntN(15)])
			}
		case rnd.IntN(50) == 0:
			for range n * 100 {
				out = append(out, byte(rnd.Uint32()))
			}
		default:
			from := len(out) - 1 - rnd.IntN(min(1<<rnd.IntN(16), Window))
			for range n {
				out = append(out, out[from])
				from++
			}
		}
	}
	return out
}

func pack(t testing.TB, content []byte, level int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(content)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestReadsLongStreams(t *testing.T) {
	content := long()
	for level := gzip.HuffmanOnly; level <= gzip.BestCompression; level++ {
		packed := pack(t, content, level)
		for way, read := range ways {
			got, err := read(bytes.NewReader(packed))
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("level %d, %s: %d bytes, %v", level, way, len(got), err)
			}
		}
	}
	packed := pack(t, content[:100<<10], 6)
	members := bytes.Repeat(packed, 40)
	got, err := ways["Read"](bytes.NewReader(members))
	if want := bytes.Repeat(content[:100<<10], 40); err != nil || !bytes.Equal(got, want) {
		t.Errorf("40 members: %d bytes, %v", len(got), err)
	}
}

// Random codes, up to the longest, and symbols of equal weight, so that
// subtables, long distances and overlaps of all kinds are common.
func TestReadsWhatNoToolPacks(t *testing.T) {
	for seed := range uint64(400) {
		deflate := randomDeflate(rand.New(rand.NewPCG(seed, 1)))
		want, err := io.ReadAll(flate.NewReader(bytes.NewReader(deflate)))
		if err != nil {
			t.Fatalf("seed %d: the packer is wrong: %v", seed, err)
		}
		packed := gzipMember(deflate, want)
		for _, way := range []string{"Read", "NextInto", "in turns"} {
			got, err := ways[way](bytes.NewReader(packed))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("seed %d, %s: %d bytes, %v; want %d", seed, way, len(got), err, len(want))
			}
		}
		for source, r := range map[string]io.Reader{
			"byte by byte": iotest.OneByteReader(bytes.NewReader(packed)),
			"in pieces":    &pieces{bytes.NewReader(packed), rand.New(rand.NewPCG(seed, 2))},
		} {
			got, err := ways["Read"](r)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("seed %d %s: %d bytes, %v; want %d", seed, source, len(got), err, len(want))
			}
		}
	}
}

// Turns of the fast loop that take as many bits as a turn can, 81, near the end
// of what has arrived, with noise behind.
func TestWidestTurns(t *testing.T) {
	chain := func(n int, symbols ...int) []uint8 {
		lengths := make([]uint8, n)
		for i, s := range symbols {
			lengths[s] = uint8(min(i+1, maxCode))
		}
		return lengths
	}
	litLen := chain(286, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 'a', 11, 12, 13, 256, 284) // 'a' has 11 bits, 284 has 15
	distance := chain(30, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 29)   // 29 has 15 bits
	lits, dists := codes(litLen), codes(distance)
	rnd := rand.New(rand.NewPCG(3, 4))
	var w bitWriter
	w.put(0, 8)
	w.put(Window, 16)
	w.put(Window^0xffff, 16)
	for range Window {
		w.put(uint64(rnd.IntN(256)), 8)
	}
	w.dynamicHeader(true, litLen, distance)
	for range 3000 {
		for range 3 {
			w.put(lits['a'], 11)
		}
		w.put(lits[284], 15)
		w.put(uint64(rnd.IntN(31)), 5)
		w.put(dists[29], 15)
		w.put(uint64(rnd.IntN(1<<13)), 13)
	}
	w.put(lits[256], 15)
	w.align()
	want, err := io.ReadAll(flate.NewReader(bytes.NewReader(w.Bytes())))
	if err != nil {
		t.Fatal(err)
	}
	got, err := ways["Read"](&pieces{bytes.NewReader(gzipMember(w.Bytes(), want)), rnd})
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v; want %d", len(got), err, len(want))
	}
}

func TestRefusesWhatIsNoDeflate(t *testing.T) {
	litLen := make([]uint8, 286) // 'a', the end, and the lengths 3 and 4
	litLen['a'], litLen[256], litLen[257], litLen[258] = 2, 2, 2, 2
	code := codes(litLen)
	dynamic := func(distance []uint8) *bitWriter {
		var w bitWriter
		w.dynamicHeader(true, litLen, distance)
		w.put(code['a'], 2)
		return &w
	}
	fixed := func() *bitWriter {
		var w bitWriter
		w.put(1|blockFixed<<1, 3)
		litLens, _ := fixedLengths()
		w.put(codes(litLens)['a'], 8)
		return &w
	}
	fixedLits, fixedDists := fixedLengths()
	lits, dists := codes(fixedLits), codes(fixedDists)
	for name, build := range map[string]func() *bitWriter{
		"reserved block":            func() *bitWriter { w := new(bitWriter); w.put(7, 3); return w },
		"stored length":             func() *bitWriter { w := new(bitWriter); w.put(1, 8); w.put(5, 16); w.put(5, 16); return w },
		"fixed 286":                 func() *bitWriter { w := fixed(); w.put(lits[286], 8); return w },
		"fixed 287":                 func() *bitWriter { w := fixed(); w.put(lits[287], 8); return w },
		"fixed distance 30":         func() *bitWriter { w := fixed(); w.put(lits[257], 7); w.put(dists[30], 5); return w },
		"fixed distance 31":         func() *bitWriter { w := fixed(); w.put(lits[257], 7); w.put(dists[31], 5); return w },
		"distance before the start": func() *bitWriter { w := fixed(); w.put(lits[257], 7); w.put(dists[1], 5); return w },
		"287 literals and lengths": func() *bitWriter {
			w := new(bitWriter)
			w.dynamicHeader(true, make([]uint8, 287), litLen[256:])
			return w
		},
		"31 distances":             func() *bitWriter { return dynamic([]uint8{30: 1}) },
		"no distance, yet a match": func() *bitWriter { w := dynamic([]uint8{0}); w.put(code[257], 2); return w },
		"the other bit of one distance": func() *bitWriter {
			w := dynamic([]uint8{1})
			w.put(code[257], 2)
			w.put(1, 1)
			return w
		},
		"lone distance of 13 bits": func() *bitWriter { return dynamic([]uint8{13}) },
		"overfull distances":       func() *bitWriter { return dynamic([]uint8{1, 1, 1}) },
		"incomplete distances":     func() *bitWriter { return dynamic([]uint8{2, 2, 2}) },
		"repeat of no length": func() *bitWriter {
			w := new(bitWriter)
			w.put(1|blockDynamic<<1, 3)
			w.put(0, 14)   // 257 and 1 codes, 4 lengths of lengths: of 16, 17, 18, 0
			w.put(0o11, 6) // 16 and 17 have one bit
			w.put(0, 6)
			w.put(0, 3)
			return w
		},
		"no code for lengths": func() *bitWriter { w := new(bitWriter); w.put(1|blockDynamic<<1, 3); w.put(0, 14+12+8); return w },
	} {
		// Zeros behind it send the fast loop over it, and a bare end the careful one.
		for _, tail := range []int{200, 8} {
			w := build()
			w.align()
			w.Write(make([]byte, tail))
			packed := gzipMember(w.Bytes(), nil)
			got, err := ways["Read"](bytes.NewReader(packed))
			var wrong *CorruptError
			if !errors.As(err, &wrong) {
				t.Errorf("%s: %q, %v", name, got, err)
				continue
			}
			if wrong.Offset < 10 || wrong.Offset > int64(len(packed)) {
				t.Errorf("%s: offset %d of %d", name, wrong.Offset, len(packed))
			}
		}
	}
}

// A match may not reach into the member before, wherever that one's content is.
func TestMembersShareNoHistory(t *testing.T) {
	first := pack(t, []byte("the first member"), 6)
	litLens, distances := fixedLengths()
	var w bitWriter
	w.put(1|blockFixed<<1, 3)
	w.put(codes(litLens)[257], 7)
	w.put(codes(distances)[0], 5)
	w.put(codes(litLens)[256], 7)
	w.align()
	for _, tail := range []int{0, 100} {
		second := gzipMember(append(w.Bytes(), make([]byte, tail)...), []byte("rrr"))
		got, err := ways["Read"](bytes.NewReader(append(first[:len(first):len(first)], second...)))
		var wrong *CorruptError
		if string(got) != "the first member" || !errors.As(err, &wrong) {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestOneDistanceIsEnough(t *testing.T) {
	litLen := make([]uint8, 258)
	litLen['a'], litLen[256], litLen[257] = 1, 2, 2
	code := codes(litLen)
	var w bitWriter
	w.dynamicHeader(true, litLen, []uint8{1})
	w.put(code['a'], 1)
	w.put(code[257], 2)
	w.put(0, 1)
	w.put(code[256], 2)
	w.align()
	got, err := ways["Read"](bytes.NewReader(gzipMember(w.Bytes(), []byte("aaaa"))))
	if string(got) != "aaaa" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestHeader(t *testing.T) {
	member := pack(t, []byte("content"), 6)
	with := func(flags byte, fields ...string) []byte {
		out := append([]byte(nil), member[:10]...)
		out[3] = flags
		return append(append(out, strings.Join(fields, "")...), member[10:]...)
	}
	for _, c := range []struct {
		name   string
		packed []byte
		want   error
	}{
		{"plain", member, nil},
		{"reserved flags", with(0xe0), nil},
		{"extra", with(flagExtra, "\x02\x00ab"), nil},
		{"the largest extra", with(flagExtra, "\xff\xff", strings.Repeat("x", 65535)), nil},
		{"name", with(flagName, "layer.tar\x00"), nil},
		{"empty name", with(flagName, "\x00"), nil},
		{"a name of 64 KiB", with(flagName, strings.Repeat("n", maxText-1), "\x00"), nil},
		{"a longer name", with(flagName, strings.Repeat("n", maxText), "\x00"), ErrHeader},
		{"a name without end", with(flagName, strings.Repeat("n", 1<<20)), ErrHeader},
		{"name and comment too long", with(flagName|flagComment, strings.Repeat("n", 40000), "\x00", strings.Repeat("c", 40000), "\x00"), ErrHeader},
		{"wrong check", with(flagHeaderSum, "\x00\x00"), ErrHeader},
		{"no gzip", []byte("\x1f\x8c" + string(member[2:])), ErrHeader},
		{"no deflate", []byte("\x1f\x8b\x07" + string(member[3:])), ErrHeader},
		{"empty", nil, io.ErrUnexpectedEOF},
		{"nine bytes", member[:9], io.ErrUnexpectedEOF},
		{"zeros behind", append(append([]byte(nil), member...), make([]byte, 512)...), ErrHeader},
		{"garbage behind", append(append([]byte(nil), member...), "something else"...), ErrHeader},
		{"a byte behind", append(append([]byte(nil), member...), 0), io.ErrUnexpectedEOF},
	} {
		for way, read := range ways {
			if got, err := read(bytes.NewReader(c.packed)); err != c.want || err == nil && string(got) != "content" {
				t.Errorf("%s, %s: %q, %v; want %v", c.name, way, got, err, c.want)
			}
		}
	}
}

func TestCutAnywhere(t *testing.T) {
	sample, err := os.ReadFile("testdata/sample")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"testdata/header-all.gz", "testdata/members.gz", "testdata/zlib-fixed.gz"} {
		packed, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		ends := memberEnds(t, packed)
		for n := range packed {
			got, err := ways["Read"](bytes.NewReader(packed[:n]))
			want := io.ErrUnexpectedEOF
			if ends[n] {
				want = nil
			}
			if err != want || !bytes.HasPrefix(sample, got) {
				t.Fatalf("%s cut at %d: %d bytes, %v", file, n, len(got), err)
			}
		}
	}
}

// memberEnds finds where members end by the standard library.
func memberEnds(t *testing.T, packed []byte) map[int]bool {
	t.Helper()
	ends := make(map[int]bool)
	r := bytes.NewReader(packed)
	z, err := gzip.NewReader(r)
	for ; err == nil; err = z.Reset(r) {
		z.Multistream(false)
		if _, err := io.Copy(io.Discard, z); err != nil {
			t.Fatal(err)
		}
		ends[len(packed)-r.Len()] = true
	}
	return ends
}

// A flipped bit makes an error, or no difference: it may be a bit that fills up
// a byte, or a field of the header that says nothing about the content.
func TestFlippedAnywhere(t *testing.T) {
	content := []byte(strings.Repeat("the quick brown fox. ", 20) + "jumps over 1234567890 lazy dogs")
	for _, level := range []int{0, 1, 6, gzip.HuffmanOnly} {
		packed := pack(t, content, level)
		for i := range len(packed) * 8 {
			packed[i/8] ^= 1 << (i % 8)
			compareWithStandard(t, packed)
			got, err := ways["Read"](bytes.NewReader(packed))
			if err == nil && !bytes.Equal(got, content) {
				t.Errorf("level %d: bit %d flipped, and no error", level, i)
			}
			packed[i/8] ^= 1 << (i % 8)
		}
	}
}

// Streams damaged in a few places are refused where the standard library
// refuses them.
func TestDamagedLikeTheStandardLibrary(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		packed := gzipMember(randomDeflate(rnd), nil)
		for range 1 + rnd.IntN(3) {
			packed[10+rnd.IntN(len(packed)-10)] ^= 1 << rnd.IntN(8)
		}
		if rnd.IntN(4) == 0 {
			packed = packed[:rnd.IntN(len(packed))]
		}
		compareWithStandard(t, packed)
	}
}

func TestErrorsOfTheReader(t *testing.T) {
	packed := pack(t, long()[:1<<20], 6)
	broken := errors.New("broken")
	for way, read := range ways {
		got, err := read(io.MultiReader(bytes.NewReader(packed[:len(packed)/2]), iotest.ErrReader(broken)))
		if err != broken || len(got) < 1<<18 {
			t.Errorf("%s from a reader that breaks: %d bytes, %v", way, len(got), err)
		}
		if _, err := read(iotest.TimeoutReader(bytes.NewReader(packed))); err != iotest.ErrTimeout {
			t.Errorf("%s from a reader that times out: %v", way, err)
		}
		if _, err := read(iotest.ErrReader(broken)); err != broken {
			t.Errorf("%s from a broken reader: %v", way, err)
		}
		if _, err := read(emptyReader{}); err != io.ErrNoProgress {
			t.Errorf("%s from a reader of nothing: %v", way, err)
		}
		if _, err := read(liar{}); err == nil || !strings.Contains(err.Error(), "returned") {
			t.Errorf("%s from a reader that lies: %v", way, err)
		}
	}
}

type emptyReader struct{}

func (emptyReader) Read(p []byte) (int, error) { return 0, nil }

type liar struct{}

func (liar) Read(p []byte) (int, error) { return len(p) + 1, nil }

func TestErrorsStay(t *testing.T) {
	packed := pack(t, []byte("content"), 6)
	packed[len(packed)-1] ^= 1
	z, err := NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	if chunk, err := z.Next(); string(chunk) != "content" || err != nil {
		t.Fatalf("%q, %v: want the content first", chunk, err)
	}
	for range 2 {
		if _, err := z.Next(); err != ErrChecksum {
			t.Fatalf("Next: %v", err)
		}
		if _, err := z.Read(make([]byte, 9)); err != ErrChecksum {
			t.Fatalf("Read: %v", err)
		}
		if _, err := z.NextInto(new(Buffer)); err != ErrChecksum {
			t.Fatalf("NextInto: %v", err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := z.Read(make([]byte, 9)); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("Read after Close: %v", err)
	}
	packed[len(packed)-1] ^= 1
	if err := z.Reset(bytes.NewReader(packed)); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(z); string(got) != "content" || err != nil {
		t.Fatalf("after Reset: %q, %v", got, err)
	}
}

// What has arrived is delivered before more is asked for.
func TestDeliversBeforeItReads(t *testing.T) {
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	w.Name = "a name"
	var sizes []int
	for i := range 50 {
		fmt.Fprintf(w, "part %d, ", i)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		sizes = append(sizes, packed.Len())
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	parts, delivered := 0, 0
	src := readerFunc(func(p []byte) (int, error) {
		if parts != delivered {
			t.Errorf("%d parts arrived and %d were delivered when more was asked for", parts, delivered)
		}
		end := packed.Len()
		if parts < len(sizes) {
			end = sizes[parts]
		}
		start := 0
		if parts > 0 {
			start = sizes[parts-1]
		}
		parts++
		return copy(p, packed.Bytes()[start:end]), nil
	})
	z, err := NewReader(src)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		chunk, err := z.Next()
		if want := fmt.Sprintf("part %d, ", i); string(chunk) != want || err != nil {
			t.Fatalf("%q, %v; want %q", chunk, err, want)
		}
		delivered++
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestAllocatesOnlyOnce(t *testing.T) {
	packed := bytes.Repeat(pack(t, long(), 1), 2)
	src := bytes.NewReader(packed)
	z, err := NewReader(src)
	if err != nil {
		t.Fatal(err)
	}
	var b Buffer
	if n := testing.AllocsPerRun(3, func() {
		src.Reset(packed)
		err := z.Reset(src)
		for err == nil {
			_, err = z.Next()
			if err == nil {
				_, err = z.NextInto(&b)
			}
		}
		if err != io.EOF {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Fatalf("%v allocations", n)
	}
}
