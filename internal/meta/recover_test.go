package meta

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/opencontainers/go-digest"
)

func (h *house) blobFile(dgst digest.Digest) string {
	return filepath.Join(h.dir, "content", "blobs", dgst.Algorithm().String(), dgst.Encoded())
}

// loseBlob leaves size bytes of a blob, as a power cut may; -1 removes it.
func (h *house) loseBlob(dgst digest.Digest, size int64) {
	h.t.Helper()
	if size < 0 {
		ok(h.t, os.Remove(h.blobFile(dgst)))
		return
	}
	ok(h.t, os.Chmod(h.blobFile(dgst), 0o644))
	ok(h.t, os.Truncate(h.blobFile(dgst), size))
}

// said looks for each word among the lines of Recovered.
func (h *house) said(words ...string) {
	h.t.Helper()
	all := strings.Join(h.Recovered(), "\n")
	for _, w := range words {
		if !strings.Contains(all, w) {
			h.t.Errorf("not a word of %q in %q", w, all)
		}
	}
	if len(words) == 0 && all != "" {
		h.t.Errorf("recovered %q", all)
	}
}

// TestBytesWithoutRecord: each way to crash between the bytes and the record.
func TestBytesWithoutRecord(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	kept := write(t, sp, "kept", nil)
	chain(t, mem(t, sp), "base")
	open(t, sp, "ref", WriterOptions{}).Close()
	var sealed Sealed
	h.reopen(func() {
		// The process died with these in its hands: none has a record.
		blobs := h.openContent()
		w := must[*content.Writer](t)(blobs.Writer(t.Context(), "ns/1/lost", content.WriterOptions{}))
		must[int](t)(w.Write([]byte("blob without record")))
		ok(t, w.Commit(t.Context(), 0, "", content.CommitOptions{}))
		sealed.Digest = w.Digest()
		w = must[*content.Writer](t)(blobs.Writer(t.Context(), "ns/1/ingest without record", content.WriterOptions{}))
		ok(t, w.Close())
		ok(t, blobs.Close())
		d := h.drivers["mem"]
		d.put("ns/7/extract", "ns/2/base", snapshot.KindCommitted)
		d.put("ns/8/above", "ns/7/extract", snapshot.KindCommitted)
		d.put("ns/9/active", "ns/8/above", snapshot.KindActive)
	})
	h.said(string(sealed.Digest), "ns/1/ingest without record", "ns/7/extract", "ns/8/above", "ns/9/active")
	equalStrings(t, h.files(), string(kept))
	equalStrings(t, refs(t, h), "ns/1/ref")
	equalStrings(t, h.drivers["mem"].keys(), "ns/2/base")
	if len(h.Recovered()) != 5 {
		t.Errorf("%q", h.Recovered())
	}
	h.reopen(nil)
	h.said()
}

// TestSealedWithoutRecord: a blob in its place whose record didn't come is an
// ingest again, for whoever was writing it.
func TestSealedWithoutRecord(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	body := []byte("all of it")
	dgst := digest.FromBytes(body)
	ref := oci.Key(oci.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: dgst})
	w := open(t, sp, ref, WriterOptions{Total: int64(len(body)), Expected: dgst})
	must[int](t)(w.Write(body))
	_, release, err := w.Seal(t.Context(), int64(len(body)), dgst, content.CommitOptions{})
	ok(t, err)
	release()
	equalStrings(t, h.files(), string(dgst))

	h.reopen(nil)
	h.said("blob " + string(dgst) + ": was about to be recorded")
	equalStrings(t, h.files())
	equalStrings(t, refs(t, h), "ns/1/"+ref)
	sp = h.Space("ns").Leased("l")
	w = open(t, sp, ref, WriterOptions{Total: int64(len(body)), Expected: dgst})
	if st := must[content.Status](t)(w.Status()); st.Offset != int64(len(body)) {
		t.Errorf("%d bytes are left of %d", st.Offset, len(body))
	}
	ok(t, w.Commit(t.Context(), int64(len(body)), dgst, nil))
	equalStrings(t, h.files(), string(dgst))
	h.reopen(nil)
	h.said()
}

// TestRecordWithoutBytes: what was promised and is gone.
func TestRecordWithoutBytes(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	whole, gone, short := write(t, sp, "whole", nil), write(t, sp, "gone", nil), write(t, sp, "short", nil)
	for name, dgst := range map[string]digest.Digest{"whole": whole, "gone": gone, "short": short, "never": digest.FromString("never")} {
		must[Image](t)(sp.CreateImage(t.Context(), image(name, dgst, nil)))
	}
	must[Blob](t)(sp.UpdateBlob(t.Context(), Blob{Digest: whole, Labels: map[string]string{labelPrefix + "ref.content.l.0": string(gone)}}))
	other := h.Space("other")
	for _, dgst := range []digest.Digest{whole, gone} {
		w := open(t, other, "ref"+string(dgst), WriterOptions{Expected: dgst})
		w.Close()
	}
	w := open(t, h.Space("third"), "ref", WriterOptions{Expected: gone})
	ok(t, w.Commit(t.Context(), 0, gone, map[string]string{labelRoot: "x"}))
	s := mem(t, sp)
	chain(t, s, "one", "two", "three")
	chain(t, s, "apart")
	h.reopen(func() {
		h.loseBlob(gone, -1)
		h.loseBlob(short, 2)
		h.drivers["mem"].lose("ns/4/two")
	})
	h.said("image gone", "image short", "blob "+string(gone)+" in ns", "blob "+string(gone)+" in third", "blob "+string(short),
		"2 bytes and not 5", "ingest ref"+string(gone), "snapshot two", "snapshot three", "ns/6/three")
	sp = h.Space("ns").Leased("l")
	s = mem(t, sp)
	var names []string
	for _, img := range must[[]Image](t)(sp.Images(t.Context())) {
		names = append(names, img.Name)
	}
	equalStrings(t, names, "never", "whole")
	equalStrings(t, h.files(), string(whole))
	d := must[Dump](t)(h.Dump(t.Context()))
	if len(d.Blobs) != 1 || len(d.Ingests) != 1 {
		t.Errorf("%+v", d)
	}
	equalStrings(t, h.drivers["mem"].keys(), "ns/2/one", "ns/8/apart")
	ok(t, s.Remove(t.Context(), "one")) // has no child any more
	write(t, sp, "gone", nil)           // and can be had again
	h.reopen(nil)
	h.said("ns/2/one")
}

// TestActiveSnapshotCommittedWithoutRecord: the driver renamed it and the
// record didn't come.
func TestActiveSnapshotCommittedWithoutRecord(t *testing.T) {
	h := newHouse(t, Options{})
	s := mem(t, lease(t, h.Space("ns"), "l"))
	prepare(t, s, "key", "", nil)
	_, release, err := s.CommitChain(t.Context(), snapshot.Commit{Key: "key", Name: "name"})
	ok(t, err)
	defer release()
	h.DB.Close()
	h.DB = nil
	h.open()
	h.said("snapshot key", "ns/2/name")
	equalStrings(t, h.drivers["mem"].keys())
	is(t, errdefs.IsNotFound, errOf(mem(t, h.Space("ns")).Stat(t.Context(), "key")))
}

// TestIngestWithoutBytes stays: its writer may come yet.
func TestIngestWithoutBytes(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	ok(t, sp.Update(t.Context(), func(tx *Tx) error { return tx.AddIngest("ref", "") }))
	h.reopen(nil)
	h.said()
	equalStrings(t, held(t, h.Space("ns").Leased("l")), "ingests ref")
	is(t, errdefs.IsNotFound, errOf(h.Space("ns").Ingest(t.Context(), "ref")))
	open(t, h.Space("ns"), "ref", WriterOptions{}).Close()
}

// TestSharedBlobIsLost: a blob that only an `expected` names survives a
// restart, so it must have been synced before that was recorded. What is left
// short by a power cut is found by its size.
func TestSharedBlobIsLost(t *testing.T) {
	h := newHouse(t, Options{})
	w := open(t, h.Space("ns"), "first", WriterOptions{})
	must[int](t)(w.Write([]byte("blob")))
	s, release, err := w.Seal(t.Context(), 4, "", content.CommitOptions{Unsynced: true})
	ok(t, err)
	defer release()
	open(t, h.Space("other"), "second", WriterOptions{Expected: s.Digest}).Close()
	h.reopen(nil)
	h.said() // `first` is recorded and has no bytes; the blob is expected
	equalStrings(t, h.files(), string(s.Digest))
	h.reopen(func() { h.loseBlob(s.Digest, -1) })
	h.said("ingest second")
	open(t, h.Space("other"), "second", WriterOptions{Expected: s.Digest}).Close()
}

// TestLostDatabase: an empty one over full stores is refused, and leaves
// nothing.
func TestLostDatabase(t *testing.T) {
	for _, c := range []struct {
		name string
		fill func(h *house)
		lose func(path string) error
		word string
	}{
		{"blobs, no file", func(h *house) { write(t, h.Space("ns"), "blob", nil) }, os.Remove, "the content store"},
		{"blobs, empty file", func(h *house) { write(t, h.Space("ns"), "blob", nil) }, func(p string) error { return os.Truncate(p, 0) }, "the content store"},
		{"snapshots, no file", func(h *house) { chain(t, mem(t, h.Space("ns")), "base") }, os.Remove, "the mem snapshotter"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHouse(t, Options{})
			c.fill(h)
			h.close()
			saved, err := os.ReadFile(h.path())
			ok(t, err)
			ok(t, c.lose(h.path()))
			for range 2 { // the second time as the first
				err := h.tryOpen()
				is(t, errdefs.IsFailedPrecondition, err)
				if !strings.Contains(err.Error(), c.word) {
					t.Errorf("%v", err)
				}
				if info, err := os.Stat(h.path()); err == nil && info.Size() > 0 {
					t.Error("made a file")
				}
			}
			ok(t, os.WriteFile(h.path(), saved, 0o644))
			h.open()
			h.said()
		})
	}
}

// TestFileThatIsNoDatabase: an error that says which.
func TestFileThatIsNoDatabase(t *testing.T) {
	h := &house{t: t, dir: t.TempDir()}
	ok(t, os.WriteFile(h.path(), []byte(strings.Repeat("not a database\n", 1000)), 0o644))
	if err := h.tryOpen(); err == nil || !strings.Contains(err.Error(), h.path()) {
		t.Errorf("got %v", err)
	}
}

// TestRemovalFailsAtOpen: that is no reason not to serve.
func TestRemovalFailsAtOpen(t *testing.T) {
	h := newHouse(t, Options{})
	chain(t, mem(t, lease(t, h.Space("ns"), "l")), "base")
	h.reopen(func() {
		h.drivers["mem"].put("ns/9/garbage", "", snapshot.KindActive)
		h.drivers["mem"].breakRemove(errBroken)
	})
	h.said()
	h.drivers["mem"].breakRemove(nil)
	h.collect() // remembers
	equalStrings(t, h.drivers["mem"].keys(), "ns/2/base")
}

// TestStrayFiles in the content store are nobody's, and stop nothing.
func TestStrayFiles(t *testing.T) {
	h := newHouse(t, Options{})
	dgst := write(t, h.Space("ns"), "blob", nil)
	stray := filepath.Join(filepath.Dir(h.blobFile(dgst)), "README")
	h.reopen(func() { ok(t, os.WriteFile(stray, nil, 0o644)) })
	h.said()
	if c := h.collect(); c.Blobs != 1 || c.Left != 0 {
		t.Errorf("%+v", c)
	}
	equalStrings(t, h.files())
	if _, err := os.Stat(stray); err != nil {
		t.Error(err)
	}
}

func TestDamagedBlobIsNotRead(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	dgst := write(t, sp, "blob", nil)
	ok(t, os.Chmod(h.blobFile(dgst), 0o644))
	ok(t, os.WriteFile(h.blobFile(dgst), []byte("blub"), 0o644))
	_, err := sp.ReadBlob(t.Context(), oci.Descriptor{Digest: dgst}, 100)
	is(t, errdefs.IsDataLoss, err)
}
