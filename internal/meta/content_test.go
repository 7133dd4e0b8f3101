package meta

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/opencontainers/go-digest"
)

func open(t *testing.T, sp Space, ref string, opts WriterOptions) *Writer {
	t.Helper()
	w := must[*Writer](t)(sp.OpenWriter(t.Context(), ref, opts))
	t.Cleanup(func() { w.Close() })
	return w
}

func lease(t *testing.T, sp Space, id string) Space {
	t.Helper()
	must[Lease](t)(sp.CreateLease(t.Context(), Lease{ID: id}))
	return sp.Leased(id)
}

func held(t *testing.T, sp Space) []string {
	t.Helper()
	var all []string
	for _, r := range must[[]Resource](t)(sp.LeaseResources(t.Context(), sp.Lease())) {
		all = append(all, r.Type+" "+r.ID)
	}
	return all
}

func TestWriteCommitRead(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	w := open(t, sp, "ref", WriterOptions{Total: 5})
	equalStrings(t, held(t, sp), "ingests ref")
	must[int](t)(w.Write([]byte("hello")))
	st := must[content.Status](t)(w.Status())
	if st.Ref != "ref" || st.Offset != 5 || st.Total != 5 {
		t.Errorf("%+v", st)
	}
	if st := must[content.Status](t)(sp.Ingest(t.Context(), "ref")); st.Ref != "ref" || st.Offset != 5 {
		t.Errorf("%+v", st)
	}
	dgst := digest.FromString("hello")
	ok(t, w.Commit(t.Context(), 5, dgst, map[string]string{"a": "b", "empty": ""}))
	equalStrings(t, held(t, sp), "content "+string(dgst))
	b := must[Blob](t)(sp.Blob(t.Context(), dgst))
	if b.Size != 5 || len(b.Labels) != 1 || b.Labels["a"] != "b" || time.Since(b.Created) > time.Minute {
		t.Errorf("%+v", b)
	}
	p := must[[]byte](t)(sp.ReadBlob(t.Context(), oci.Descriptor{Digest: dgst, Size: 5}, 5))
	if string(p) != "hello" {
		t.Errorf("read %q", p)
	}
	_, err := sp.ReadBlob(t.Context(), oci.Descriptor{Digest: dgst}, 4)
	is(t, errdefs.IsOutOfRange, err)
	_, err = sp.ReadBlob(t.Context(), oci.Descriptor{Digest: dgst, Size: 6}, 9)
	is(t, errdefs.IsFailedPrecondition, err)
	_, err = h.Space("other").Reader(t.Context(), dgst)
	is(t, errdefs.IsNotFound, err)
	_, err = sp.Ingest(t.Context(), "ref")
	is(t, errdefs.IsNotFound, err)
}

// TestWriterOfKnownBlob is the first row of COMPATIBILITY §2.4.
func TestWriterOfKnownBlob(t *testing.T) {
	h := newHouse(t, Options{})
	dgst := write(t, h.Space("ns"), "known", nil)
	sp := lease(t, h.Space("ns"), "l")
	_, err := sp.OpenWriter(t.Context(), "ref", WriterOptions{Expected: dgst})
	is(t, errdefs.IsAlreadyExists, err)
	if !strings.Contains(err.Error(), string(dgst)) {
		t.Errorf("the message hasn't the digest: %v", err)
	}
	equalStrings(t, held(t, sp), "content "+string(dgst))
}

// TestSharedContent: what another namespace has needn't be sent.
func TestSharedContent(t *testing.T) {
	for _, c := range []struct {
		name     string
		isolated bool
		labels   map[string]string
		total    int64
		shared   bool
	}{
		{"shared", false, nil, 0, true},
		{"shared of the right size", false, nil, 6, true},
		{"wrong size", false, nil, 7, false},
		{"isolated", true, nil, 6, false},
		{"isolated and shareable", true, map[string]string{shareable: "true"}, 6, true},
		{"isolated and not shareable", true, map[string]string{shareable: "false"}, 6, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHouse(t, Options{Isolated: c.isolated})
			dgst := write(t, h.Space("owner"), "shared", nil)
			must[Namespace](t)(h.UpdateNamespace(t.Context(), Namespace{Name: "owner", Labels: c.labels}))
			sp := h.Space("ns")
			w := open(t, sp, "ref", WriterOptions{Expected: dgst, Total: c.total})
			st := must[content.Status](t)(w.Status())
			if c.shared != (st.Offset == 6) || c.shared && (st.Total != 6 || st.Expected != dgst || st.Ref != "ref") {
				t.Fatalf("%+v", st)
			}
			if !c.shared {
				must[int](t)(w.Write([]byte("shared")))
			}
			is(t, errdefs.IsNotFound, errOf(sp.Blob(t.Context(), dgst)))
			if c.total == 7 {
				w.Close()
				return
			}
			ok(t, w.Commit(t.Context(), 6, dgst, nil))
			must[Blob](t)(sp.Blob(t.Context(), dgst))
			equalStrings(t, h.files(), string(dgst))
		})
	}
}

func errOf[T any](_ T, err error) error { return err }

// TestSharedWriterUnshares: bytes after the blob's own make it another blob.
func TestSharedWriterUnshares(t *testing.T) {
	h := newHouse(t, Options{})
	dgst := write(t, h.Space("owner"), "shared", nil)
	sp := h.Space("ns")
	w := open(t, sp, "ref", WriterOptions{Expected: dgst})
	must[int](t)(w.Write(nil)) // is nothing
	if w.Digest() != dgst {
		t.Error("unshared by nothing")
	}
	must[int](t)(w.Write([]byte(" and more")))
	if st := must[content.Status](t)(w.Status()); st.Offset != 15 {
		t.Errorf("%+v", st)
	}
	is(t, errdefs.IsFailedPrecondition, w.Commit(t.Context(), 0, dgst, nil))
	w = open(t, sp, "ref", WriterOptions{}) // the ingest stayed
	all := digest.FromString("shared and more")
	if w.Digest() != all {
		t.Error("the ingest didn't stay")
	}
	ok(t, w.Commit(t.Context(), 15, all, nil))
	is(t, errdefs.IsNotFound, errOf(sp.Blob(t.Context(), dgst)))

	w = open(t, sp, "again", WriterOptions{Expected: dgst})
	ok(t, w.Truncate(0))
	must[int](t)(w.Write([]byte("fresh")))
	ok(t, w.Commit(t.Context(), 5, digest.FromString("fresh"), nil))
}

func TestSharedWriterChecks(t *testing.T) {
	h := newHouse(t, Options{})
	dgst := write(t, h.Space("owner"), "shared", nil)
	w := open(t, h.Space("ns"), "ref", WriterOptions{Expected: dgst})
	is(t, errdefs.IsFailedPrecondition, w.Commit(t.Context(), 5, dgst, nil))
	is(t, errdefs.IsFailedPrecondition, w.Commit(t.Context(), 6, digest.FromString("x"), nil))
	is(t, errdefs.IsInvalidArgument, w.Truncate(3))
	r := must[*content.Reader](t)(w.Data())
	defer r.Close()
	if p := must[[]byte](t)(io.ReadAll(io.NewSectionReader(r, 0, r.Size()))); string(p) != "shared" {
		t.Errorf("%q", p)
	}
	ok(t, w.Commit(t.Context(), 6, dgst, nil))
}

// TestSharedIngestProtects: once the ingest is recorded the blob stays, even
// if its owner lets it go; and its abort removes nothing.
func TestSharedIngestProtects(t *testing.T) {
	h := newHouse(t, Options{})
	owner, sp := h.Space("owner"), h.Space("ns")
	dgst := write(t, owner, "shared", nil)
	w := open(t, sp, "ref", WriterOptions{Expected: dgst})
	w.Close()
	ok(t, owner.DeleteBlob(t.Context(), dgst))
	h.collect()
	equalStrings(t, h.files(), string(dgst))
	ok(t, sp.AbortIngest(t.Context(), "ref"))
	equalStrings(t, h.files(), string(dgst))
	h.collect()
	equalStrings(t, h.files())
}

// TestCommitOfKnownBlob: another was faster. The ingest goes, the blob is
// leased, and its labels aren't touched.
func TestCommitOfKnownBlob(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	w := open(t, sp, "slow", WriterOptions{})
	must[int](t)(w.Write([]byte("blob")))
	dgst := write(t, h.Space("ns"), "blob", map[string]string{"a": "b"})
	err := w.Commit(t.Context(), 4, dgst, map[string]string{"a": "c"})
	is(t, errdefs.IsAlreadyExists, err)
	equalStrings(t, held(t, sp), "content "+string(dgst))
	if b := must[Blob](t)(sp.Blob(t.Context(), dgst)); b.Labels["a"] != "b" {
		t.Errorf("labels %v", b.Labels)
	}
	equalStrings(t, refs(t, h))
}

func refs(t *testing.T, h *house) (all []string) {
	t.Helper()
	for ref, err := range h.blobs.Refs() {
		ok(t, err)
		all = append(all, ref)
	}
	slices.Sort(all)
	return all
}

// TestCommitMismatch: the ingest stays and can be resumed.
func TestCommitMismatch(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	for _, commit := range []func(w *Writer) error{
		func(w *Writer) error { return w.Commit(t.Context(), 3, "", nil) },
		func(w *Writer) error { return w.Commit(t.Context(), 0, digest.FromString("x"), nil) },
		func(w *Writer) error {
			return w.Commit(t.Context(), 0, "", map[string]string{"k": strings.Repeat("v", maxLabel)})
		},
	} {
		w := open(t, sp, "ref", WriterOptions{})
		if must[content.Status](t)(w.Status()).Offset == 0 {
			must[int](t)(w.Write([]byte("blob")))
		}
		if err := commit(w); !errdefs.IsFailedPrecondition(err) && !errdefs.IsInvalidArgument(err) {
			t.Fatalf("got %v", err)
		}
	}
	w := open(t, sp, "ref", WriterOptions{})
	ok(t, w.Commit(t.Context(), 4, digest.FromString("blob"), nil))
}

func TestSecondWriterIsLocked(t *testing.T) {
	h := newHouse(t, Options{})
	open(t, h.Space("ns"), "ref", WriterOptions{})
	_, err := h.Space("ns").OpenWriter(t.Context(), "ref", WriterOptions{})
	is(t, errdefs.IsUnavailable, err)
	open(t, h.Space("other"), "ref", WriterOptions{}) // is another ingest
}

func TestAbortIngest(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	is(t, errdefs.IsNotFound, sp.AbortIngest(t.Context(), "ref"))
	w := open(t, sp, "ref", WriterOptions{})
	must[int](t)(w.Write([]byte("blob")))
	ok(t, sp.AbortIngest(t.Context(), "ref")) // under the writer
	equalStrings(t, refs(t, h))
	equalStrings(t, held(t, sp))
	is(t, errdefs.IsAborted, errOf(w.Write([]byte("more"))))
	is(t, errdefs.IsNotFound, sp.AbortIngest(t.Context(), "ref"))
}

// TestAddIngest: OpenWriter needs no transaction after it.
func TestAddIngest(t *testing.T) {
	for _, leased := range []bool{true, false} {
		t.Run(fmt.Sprint("leased ", leased), func(t *testing.T) {
			h := newHouse(t, Options{})
			sp := h.Space("ns")
			known := write(t, sp, "known", nil)
			if leased {
				sp = lease(t, sp, "l")
			}
			unknown := digest.FromString("unknown")
			ok(t, sp.Update(t.Context(), func(tx *Tx) error {
				return errors.Join(tx.AddIngest("a", unknown), tx.AddIngest("b", ""), tx.AddIngest("c", known))
			}))
			before := h.commits.Load()
			open(t, sp, "a", WriterOptions{Expected: unknown})
			open(t, sp, "b", WriterOptions{})
			if n := h.commits.Load() - before; n != 0 {
				t.Errorf("%d commits", n)
			}
			_, err := sp.OpenWriter(t.Context(), "c", WriterOptions{Expected: known})
			is(t, errdefs.IsAlreadyExists, err)
			var all []string
			for _, st := range must[[]content.Status](t)(sp.Ingests(t.Context())) {
				all = append(all, st.Ref)
			}
			equalStrings(t, all, "a", "b")
			all = nil
			for _, st := range must[[]content.Status](t)(sp.Ingests(t.Context(), `ref~="^b"`)) {
				all = append(all, st.Ref)
			}
			equalStrings(t, all, "b")
			h.collect() // holds neither
			equalStrings(t, refs(t, h), "ns/1/a", "ns/1/b")
		})
	}
}

// TestIngestExpires: unleased ones after 24 hours, leased ones with the lease.
func TestIngestExpires(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	w := open(t, sp, "leased", WriterOptions{})
	w.Close()
	d := must[Dump](t)(h.Dump(t.Context()))
	if len(d.Ingests) != 1 || !d.Ingests[0].ExpireAt.IsZero() {
		t.Errorf("%+v", d.Ingests)
	}
	w = open(t, h.Space("ns"), "free", WriterOptions{})
	w.Close()
	d = must[Dump](t)(h.Dump(t.Context()))
	if in := time.Until(d.Ingests[0].ExpireAt); in > 24*time.Hour || in < 23*time.Hour {
		t.Errorf("expires in %v", in)
	}
	ok(t, sp.DeleteLease(t.Context(), "l"))
	if c := h.collect(); c.Ingests != 1 {
		t.Errorf("%+v", c)
	}
	equalStrings(t, refs(t, h), "ns/1/free")
}

// TestIngestIsNotRemovedUnderItsWriter: its record may go with the lease; the
// bytes wait until it is closed.
func TestIngestIsNotRemovedUnderItsWriter(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	w := open(t, sp, "ref", WriterOptions{})
	must[int](t)(w.Write([]byte("blob")))
	ok(t, sp.DeleteLease(t.Context(), "l"))
	if c := h.collect(); c.Left != 1 || c.Ingests != 1 {
		t.Errorf("%+v", c)
	}
	must[int](t)(w.Write([]byte("blob")))
	w.Close()
	if c := h.collect(); c.Left != 0 {
		t.Errorf("%+v", c)
	}
	equalStrings(t, refs(t, h))
}

// TestSeal: several blobs in one transaction, and what gets no record goes.
func TestSeal(t *testing.T) {
	h := newHouse(t, Options{})
	sp := lease(t, h.Space("ns"), "l")
	var sealed []Sealed
	var releases []func()
	for i := range 3 {
		w := open(t, sp, fmt.Sprint("ref", i), WriterOptions{})
		must[int](t)(w.Write(bytes.Repeat([]byte{'a' + byte(i)}, 10)))
		s, release, err := w.Seal(t.Context(), 10, "", content.CommitOptions{Unsynced: true})
		ok(t, err)
		sealed, releases = append(sealed, s), append(releases, release)
	}
	h.DB.leftBehind(keyContent)
	h.collect() // they are pinned
	if n := len(h.files()); n != 3 {
		t.Fatalf("%d files", n)
	}
	before := h.commits.Load()
	ok(t, sp.Update(t.Context(), func(tx *Tx) error {
		return errors.Join(tx.RecordBlob(sealed[0], map[string]string{"a": "1"}), tx.RecordBlob(sealed[1], nil))
	}))
	if n := h.commits.Load() - before; n != 1 {
		t.Errorf("%d commits", n)
	}
	for _, release := range releases {
		release()
	}
	ok(t, sp.Update(t.Context(), func(tx *Tx) error { // again, with more labels
		return tx.RecordBlob(sealed[0], map[string]string{"b": "2"})
	}))
	if b := must[Blob](t)(sp.Blob(t.Context(), sealed[0].Digest)); b.Labels["a"] != "1" || b.Labels["b"] != "2" {
		t.Errorf("%+v", b)
	}
	h.collect()
	if n := len(h.files()); n != 2 {
		t.Errorf("%d files", n)
	}
}

// TestBlobsInBatches: all are seen, in order, without a transaction held.
func TestBlobsInBatches(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	const n = 2*batchSize + 7
	ok(t, sp.Update(t.Context(), func(tx *Tx) error {
		for i := range n {
			s := Sealed{Digest: digest.FromString(fmt.Sprint(i)), Size: 1}
			if err := tx.RecordBlob(s, map[string]string{"odd": fmt.Sprint(i % 2)}); err != nil {
				return err
			}
		}
		return nil
	}))
	defer func() {
		ok(t, sp.Update(t.Context(), func(tx *Tx) error { return tx.ns().sub(keyContent).drop(keyBlob) }))
	}()
	var all []string
	for b, err := range sp.Blobs(t.Context()) {
		ok(t, err)
		if len(all) == 0 {
			must[Blob](t)(sp.UpdateBlob(t.Context(), b)) // would hang in a transaction
		}
		all = append(all, string(b.Digest))
	}
	if len(all) != n || !slices.IsSorted(all) {
		t.Errorf("saw %d, sorted %v", len(all), slices.IsSorted(all))
	}
	odd := 0
	for _, err := range sp.Blobs(t.Context(), "labels.odd==1") {
		ok(t, err)
		odd++
	}
	if odd < n/2-1 || odd > n/2+1 {
		t.Errorf("%d odd", odd)
	}
	for _, err := range sp.Blobs(t.Context(), "labels.odd===") {
		is(t, errdefs.IsInvalidArgument, err)
	}
}

func TestUpdateBlob(t *testing.T) {
	h := newHouse(t, Options{})
	sp := h.Space("ns")
	dgst := write(t, sp, "blob", map[string]string{"a": "1", "b": "2", "containerd.io/x": "3"})
	for _, c := range []struct {
		labels map[string]string
		fields []string
		want   string
		kind   func(error) bool
	}{
		{map[string]string{"a": "9", "b": "9"}, []string{"labels.a"}, "map[a:9 b:2 containerd.io/x:3]", nil},
		{nil, []string{"labels.containerd.io/x"}, "map[a:9 b:2]", nil},
		{map[string]string{"c": "1"}, []string{"labels"}, "map[c:1]", nil},
		{map[string]string{"d": "1", "e": ""}, nil, "map[d:1]", nil},
		{nil, []string{"size"}, "map[d:1]", errdefs.IsInvalidArgument},
		{map[string]string{"k": strings.Repeat("v", maxLabel)}, nil, "map[d:1]", errdefs.IsInvalidArgument},
	} {
		_, err := sp.UpdateBlob(t.Context(), Blob{Digest: dgst, Labels: c.labels}, c.fields...)
		if c.kind != nil {
			is(t, c.kind, err)
		} else {
			ok(t, err)
		}
		if got := fmt.Sprint(must[Blob](t)(sp.Blob(t.Context(), dgst)).Labels); got != c.want {
			t.Errorf("%v: got %s, want %s", c.fields, got, c.want)
		}
	}
	is(t, errdefs.IsNotFound, errOf(sp.UpdateBlob(t.Context(), Blob{Digest: digest.FromString("x")})))
}

// TestUnleasedIngestIsRefreshed: opening it again puts its end off, but not
// with each opening.
func TestUnleasedIngestIsRefreshed(t *testing.T) {
	h := newHouse(t, Options{})
	synctest.Test(t, func(t *testing.T) {
		sp := h.Space("ns")
		reopen := func() time.Time {
			w := must[*Writer](t)(sp.OpenWriter(t.Context(), "ref", WriterOptions{}))
			ok(t, w.Close())
			return must[Dump](t)(h.Dump(t.Context())).Ingests[0].ExpireAt
		}
		first := reopen()
		time.Sleep(ingestFresh / 2)
		if again := reopen(); !again.Equal(first) {
			t.Errorf("refreshed from %v to %v", first, again)
		}
		time.Sleep(ingestFresh)
		if again := reopen(); again.Sub(first) < ingestFresh {
			t.Errorf("not refreshed: from %v to %v", first, again)
		}
	})
}
