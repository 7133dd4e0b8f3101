package inflate

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"
)

const layerSize = 32 << 20

// goroot is where the Go that runs the benchmark lies.
func goroot() string {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "/usr/local/go"
	}
	return strings.TrimSpace(string(out))
}

// layers are archives of what this machine has, packed as image builders do,
// made once when first asked for.
var layers = []struct {
	name string
	get  func() []byte
}{
	{"programs", sync.OnceValue(func() []byte { return tarOf("/usr/bin", filepath.Join(goroot(), "bin")) })},
	{"libraries", sync.OnceValue(func() []byte { return tarOf("/usr/lib") })},
	{"share", sync.OnceValue(func() []byte { return tarOf("/usr/share") })},
	{"sources", sync.OnceValue(func() []byte { return tarOf(filepath.Join(goroot(), "src")) })},
	{"noise", sync.OnceValue(func() []byte {
		noise := make([]byte, layerSize)
		rand.NewChaCha8([32]byte{}).Read(noise)
		return gzipped(noise)
	})},
}

// tarOf returns the packed archive of the first layerSize bytes of the files
// below dirs.
func tarOf(dirs ...string) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, dir := range dirs {
		filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if out.Len() >= layerSize {
				return fs.SkipAll
			}
			if err != nil || !entry.Type().IsRegular() {
				return nil
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			w.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(data))})
			w.Write(data[:min(len(data), layerSize)])
			return nil
		})
	}
	w.Flush()
	return gzipped(out.Bytes())
}

func gzipped(content []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(content)
	w.Close()
	return out.Bytes()
}

// decoders read a whole stream, each as its library is used best.
var decoders = []struct {
	name string
	open func(r io.Reader) (io.Reader, error)
}{
	{"ours", func(r io.Reader) (io.Reader, error) { return NewReader(r) }},
	{"klauspost", func(r io.Reader) (io.Reader, error) { return kgzip.NewReader(r) }},
	{"stdlib", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
}

func decodeAll(b *testing.B, open func(r io.Reader) (io.Reader, error), packed []byte) int64 {
	z, err := open(bytes.NewReader(packed))
	if err != nil {
		b.Fatal(err)
	}
	n, err := io.Copy(io.Discard, z)
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// BenchmarkGzip gives MB/s of decoded bytes.
func BenchmarkGzip(b *testing.B) {
	for _, decoder := range decoders {
		b.Run(decoder.name, func(b *testing.B) {
			for _, layer := range layers {
				b.Run(layer.name, func(b *testing.B) {
					packed := layer.get()
					for b.Loop() {
						b.SetBytes(decodeAll(b, decoder.open, packed))
					}
				})
			}
		})
	}
}

// BenchmarkRatio runs the decoders in turn and compares the CPU time of their
// thread, so that a busy machine disturbs it little. It reports the median of
// how many times as fast as the others we are, and of our MB of decoded bytes
// per second.
func BenchmarkRatio(b *testing.B) {
	for _, layer := range layers {
		b.Run(layer.name, func(b *testing.B) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			packed := layer.get()
			var speed, klauspost, stdlib []float64
			for b.Loop() {
				var took [3]float64
				for i, decoder := range decoders {
					start := threadTime()
					n := decodeAll(b, decoder.open, packed)
					took[i] = float64(threadTime()-start) / float64(n)
				}
				speed = append(speed, 1e3/took[0])
				klauspost = append(klauspost, took[1]/took[0])
				stdlib = append(stdlib, took[2]/took[0])
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(median(speed), "MB/s")
			b.ReportMetric(median(klauspost), "x-klauspost")
			b.ReportMetric(median(stdlib), "x-stdlib")
		})
	}
}

func median(values []float64) float64 {
	slices.Sort(values)
	return values[len(values)/2]
}

func threadTime() int64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now); err != nil {
		panic(err)
	}
	return now.Nano()
}

// BenchmarkNextInto is BenchmarkGzip/ours by NextInto, from buffer to buffer.
func BenchmarkNextInto(b *testing.B) {
	for _, layer := range layers {
		b.Run(layer.name, func(b *testing.B) {
			packed := layer.get()
			for b.Loop() {
				z, err := NewReader(bytes.NewReader(packed))
				n := int64(0)
				for turn := 0; err == nil; turn++ {
					var chunk []byte
					chunk, err = z.NextInto(&buffers[turn%3])
					n += int64(len(chunk))
				}
				if err != io.EOF {
					b.Fatal(err)
				}
				b.SetBytes(n)
			}
		})
	}
}

// BenchmarkChecksum is the part of decoding that could be done elsewhere.
func BenchmarkChecksum(b *testing.B) {
	chunk := make([]byte, MaxChunk)
	b.SetBytes(MaxChunk)
	for b.Loop() {
		crc32.ChecksumIEEE(chunk)
	}
}
