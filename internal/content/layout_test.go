package content

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// The ingests that containerd made while it pulled alpine:3.20.1 for
// Kubernetes, as seen by inotifywait.
func TestIngestNamesAreContainerds(t *testing.T) {
	for ref, want := range map[string]string{
		"k8s.io/1/index-sha256:b89d9c93e9ed3597455c90a0b88a8bbb5cb7188438f70953fede212a0c4394e0":    "e76113e3d92727912318f58eacdb1bbfc27d096139e55134d703135afc9cb426",
		"k8s.io/1/manifest-sha256:dabf91b69c191a1a0a1628fd6bdd029c0c4018041c7f052870bb13c5a222ae76": "eb37adc8510dc1eee844e94c64c18ab6e05c501b228bd7f7580ed744e24b1ec9",
		"k8s.io/1/config-sha256:a606584aa9aa875552092ec9e1d62cb98d486f51f389609914039aabd9414687":   "813901937ca45648ac5dddb49842259a1e6e8be03802caf6a58a307e66b8c6e1",
	} {
		if got := ingestName(ref); got != want {
			t.Errorf("%s: %s, want %s", ref, got, want)
		}
	}
}

// watch is an inotify descriptor that sees what the note's inotifywait saw.
type watch struct {
	fd   int
	dirs map[int32]string
}

func newWatch(t *testing.T) *watch {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &watch{fd, make(map[int32]string)}
}

func (w *watch) add(t *testing.T, name, dir string) {
	t.Helper()
	wd, err := unix.InotifyAddWatch(w.fd, dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO)
	if err != nil {
		t.Fatal(err)
	}
	w.dirs[int32(wd)] = name
}

// events returns what has happened since the last call: the kernel queues an
// event before the call that causes it returns.
func (w *watch) events(t *testing.T) []string {
	t.Helper()
	var got []string
	buf := make([]byte, 64<<10)
	n, err := unix.Read(w.fd, buf)
	if err == unix.EAGAIN {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	for b := buf[:n]; len(b) > 0; {
		wd, mask := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
		size := binary.NativeEndian.Uint32(b[12:])
		name := unix.ByteSliceToString(b[16 : 16+size])
		b = b[16+size:]
		for bit, word := range map[uint32]string{
			unix.IN_CREATE: "create", unix.IN_DELETE: "delete", unix.IN_MOVED_FROM: "from", unix.IN_MOVED_TO: "to",
		} {
			if mask&bit != 0 {
				got = append(got, fmt.Sprintf("%s %s/%s", word, w.dirs[wd], name))
			}
		}
	}
	return got
}

var creation = []string{
	"create in/ref",
	"create in/startedat.tmp", "from in/startedat.tmp", "to in/startedat",
	"create in/updatedat.tmp", "from in/updatedat.tmp", "to in/updatedat",
	"create in/total",
	"create in/data",
}

// The drawing in layout.go is true, and so is the order it gives.
func TestFilesComeAndGoInOrder(t *testing.T) {
	s := open(t, t.TempDir())
	put(t, s, "so that blobs/sha256 is there")
	in := s.ingest("ref")
	w := newWatch(t)
	w.add(t, "ingest", filepath.Join(s.dir, ingestDir))
	w.add(t, "blobs", filepath.Join(s.dir, blobsDir, "sha256"))
	begin := func() *Writer {
		t.Helper()
		if err := os.Mkdir(string(in), 0o755); err != nil { // early, so that nothing in it is missed
			t.Fatal(err)
		}
		w.add(t, "in", string(in))
		w.events(t)
		wr := writer(t, s, "ref", WriterOptions{Total: 3})
		if got := w.events(t); !slices.Equal(got, creation) {
			t.Errorf("creation:\n%q\nwant\n%q", got, creation)
		}
		write(t, wr, "abc")
		return wr
	}

	wr := begin()
	if err := wr.Commit(t.Context(), 3, digest.FromString("abc"), CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"from in/data", "to blobs/" + digest.FromString("abc").Encoded(),
		"delete in/ref", "delete in/startedat", "delete in/updatedat", "delete in/total",
		"delete ingest/" + ingestName("ref"),
	}
	if got := drop(w.events(t)); !slices.Equal(got, want) {
		t.Errorf("commit:\n%q\nwant\n%q", got, want)
	}

	wr = begin()
	if err := wr.Close(); err != nil {
		t.Fatal(err)
	}
	want = []string{"create in/updatedat.tmp", "from in/updatedat.tmp", "to in/updatedat"}
	if got := w.events(t); !slices.Equal(got, want) {
		t.Errorf("close:\n%q\nwant\n%q", got, want)
	}
	if err := s.Abort("ref"); err != nil {
		t.Fatal(err)
	}
	want = []string{
		"delete in/ref", "delete in/startedat", "delete in/updatedat", "delete in/total", "delete in/data",
		"delete ingest/" + ingestName("ref"),
	}
	if got := drop(w.events(t)); !slices.Equal(got, want) {
		t.Errorf("abort:\n%q\nwant\n%q", got, want)
	}

	wr = writer(t, s, "ref", WriterOptions{})
	if got := w.events(t); len(got) == 0 || got[0] != "create ingest/"+ingestName("ref") {
		t.Errorf("a new ingest begins with %q", got)
	}
	wr.Close()
}

// drop leaves out events on a watched directory itself, which have no name.
func drop(events []string) []string {
	return slices.DeleteFunc(events, func(e string) bool { return e[len(e)-1] == '/' })
}

func TestFilesHoldWhatContainerdReads(t *testing.T) {
	s := open(t, t.TempDir())
	w := writer(t, s, "k8s.io/1/ref", WriterOptions{Total: 1234})
	defer w.Close()
	st, _ := w.Status()
	for file, want := range map[string]string{
		refFile:     "k8s.io/1/ref",
		totalFile:   "1234",
		startedFile: st.StartedAt.Format(time.RFC3339Nano),
		updatedFile: st.UpdatedAt.Format(time.RFC3339Nano),
	} {
		if got, err := os.ReadFile(w.in.path(file)); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", file, got, err, want)
		}
	}
}

// Whatever the files of an ingest hold, a Writer opens, and its digest and
// offset are those of the data that stays.
func FuzzResume(f *testing.F) {
	now, _ := time.Now().MarshalText()
	f.Add([]byte("ref"), now, now, []byte("3"), []byte("abc"))
	f.Add([]byte("ref"), now, now, []byte("2"), []byte("abc"))
	f.Add([]byte("ref"), []byte("yesterday"), now, []byte("-1"), []byte(""))
	f.Add([]byte("fer"), now, []byte(""), []byte("9223372036854775808"), []byte("abc"))
	dir := f.TempDir()
	s := open(f, dir)
	f.Fuzz(func(t *testing.T, ref, started, updated, total, data []byte) {
		in := s.ingest("ref")
		if err := os.Mkdir(string(in), 0o755); err != nil {
			t.Fatal(err)
		}
		for file, b := range map[string][]byte{refFile: ref, startedFile: started, updatedFile: updated, totalFile: total, dataFile: data} {
			if err := os.WriteFile(in.path(file), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		w := writer(t, s, "ref", WriterOptions{})
		st, err := s.Status("ref")
		if err != nil {
			t.Fatal(err)
		}
		if st.Offset != 0 && st.Offset != int64(len(data)) || st.Offset != w.Offset() {
			t.Errorf("offset %d on disk, %d in the writer, of %d bytes", st.Offset, w.Offset(), len(data))
		}
		if st.Total > 0 && st.Offset > st.Total {
			t.Errorf("%d bytes of %d", st.Offset, st.Total)
		}
		if got, want := w.Digest(), digest.FromBytes(data[:st.Offset]); got != want {
			t.Errorf("digest %s, want %s", got, want)
		}
		if err := s.Abort("ref"); err != nil {
			t.Fatal(err)
		}
	})
}
