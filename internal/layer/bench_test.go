package layer

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
)

// benchArchive is about what layers are made of: 4000 files in 400 directories,
// most of some kilobytes and a few of megabytes, of words that repeat, and a
// link for every ten files; 70 MB.
func benchArchive() []byte {
	rnd := rand.New(rand.NewPCG(1, 1))
	words := make([]string, 5000)
	for i := range words {
		words[i] = fmt.Sprintf("%x ", rnd.Uint64N(1<<(8+rnd.IntN(40))))
	}
	var entries []layertest.Entry
	for i := range 4000 {
		dir := fmt.Sprintf("usr/share/package-%d/part-%d", i/40, i/10)
		if i%40 == 0 {
			entries = append(entries, layertest.Dir(filepath.Dir(dir), 0o755))
		}
		if i%10 == 0 {
			entries = append(entries, layertest.Dir(dir, 0o755), layertest.Symlink(dir+"/link", "file"))
		}
		size := int(math.Exp(rnd.NormFloat64()*1.8 + 8.3))
		var body strings.Builder
		for body.Len() < min(size, 8<<20) {
			body.WriteString(words[int(math.Pow(rnd.Float64(), 3)*float64(len(words)))])
		}
		entries = append(entries, layertest.File(fmt.Sprintf("%s/file-%d", dir, i), body.String()))
	}
	return layertest.Archive(entries...)
}

// BenchmarkApply unpacks one layer onto a tmpfs; as root, else to the disk.
// HOLDFAST_LAYER=file takes another one. cpu-ns/op counts all cores.
func BenchmarkApply(b *testing.B) {
	layers := make(map[string][]byte)
	if name := os.Getenv("HOLDFAST_LAYER"); name != "" {
		data, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		layers[filepath.Base(name)] = data
	} else {
		layers["plain"] = benchArchive()
		var buf bytes.Buffer
		z := gzip.NewWriter(&buf)
		if _, err := z.Write(layers["plain"]); err != nil {
			b.Fatal(err)
		}
		if err := z.Close(); err != nil {
			b.Fatal(err)
		}
		layers["gzip"] = buf.Bytes()
		layers["small"] = gzipped(b, layertest.Archive(layertest.File("f", "f")))
	}
	for name, data := range layers {
		b.Run(name, func(b *testing.B) {
			dir := b.TempDir()
			if os.Geteuid() == 0 {
				if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
					b.Fatal(err)
				}
				defer func() {
					if err := unix.Unmount(dir, 0); err != nil {
						b.Error(err)
					}
				}()
			}
			b.ReportAllocs()
			var cpu int64
			for i := 0; b.Loop(); i++ {
				to := filepath.Join(dir, fmt.Sprint(i))
				if err := os.Mkdir(to, 0o755); err != nil {
					b.Fatal(err)
				}
				o, err := NewOverlay(to, nil, OverlayOptions{})
				if err != nil {
					b.Fatal(err)
				}
				before := cpuTime(b)
				res, err := Apply(b.Context(), bytes.NewReader(data), "", o, Limits{})
				if err != nil {
					b.Fatal(err)
				}
				cpu += cpuTime(b) - before
				b.SetBytes(res.Size)
				b.StopTimer()
				if err := os.RemoveAll(to); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
		})
	}
}

// cpuTime is what the process has used of all cores so far, in nanoseconds.
func cpuTime(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
