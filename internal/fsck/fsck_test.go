package fsck

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// TestWhole has one of everything that may lie in a store that is all right.
func TestWhole(t *testing.T) {
	h := newHouse(t)
	h.finds(Options{Deep: true})

	one, two := layer("one"), layer("two")
	img := h.push("demo", one, two)
	h.push("packed", one)
	h.pull("demo", pull.Request{Snapshotter: "overlayfs"})
	h.pull("demo", pull.Request{Snapshotter: "native"})
	h.pull("packed", pull.Request{NoUnpack: true})
	for _, driver := range []string{"overlayfs", "native"} {
		h.create(driver, snapshot.New{Key: "container", Parent: chain(one, two)[1], Kind: snapshot.KindActive})
		h.create(driver, snapshot.New{Key: "view", Parent: chain(one)[0], Kind: snapshot.KindView})
		h.create(driver, snapshot.New{Key: "bare-view", Kind: snapshot.KindView})
	}
	w, err := h.sp().OpenWriter(t.Context(), "half", meta.WriterOptions{})
	h.must(err)
	defer w.Close()
	_, err = w.Write([]byte("half a blob"))
	h.must(err)

	rep := h.check(Options{Deep: true, Patience: time.Millisecond})
	if len(rep.Findings) > 0 {
		t.Errorf("findings: %+v", rep.Findings)
	}
	// Two manifests, two configs, two layers; per driver two layers and three snapshots of our own.
	want := Report{Images: 2, Blobs: 6, Snapshots: 10}
	for _, d := range []ocispec.Descriptor{img.Descriptor, img.Config, img.Layers[0], img.Layers[1]} {
		want.Bytes += d.Size
	}
	if rep.Bytes <= want.Bytes || rep.Images != want.Images || rep.Blobs != want.Blobs || rep.Snapshots != want.Snapshots {
		t.Errorf("looked at %+v, want %+v and two documents more", rep, want)
	}
}

func (h *house) create(driver string, n snapshot.New) {
	h.t.Helper()
	snaps, err := h.sp().Snapshots(driver)
	h.must(err)
	made, release, err := snaps.Create(h.t.Context(), n)
	h.must(err)
	defer release()
	h.must(h.sp().Update(h.t.Context(), func(tx *meta.Tx) error { return tx.RecordSnapshot(made[0]) }))
}

// TestDamage breaks a store with one image by hand, in every way that has a class.
func TestDamage(t *testing.T) {
	one, two := layer("one"), layer("two")
	names := chain(one, two)
	dgst := digest.FromBytes(two.Data).String()
	deep := Options{Deep: true, Patience: time.Millisecond}
	unpacked := func(driver string) pull.Request { return pull.Request{Snapshotter: driver} }
	for _, test := range []struct {
		name string
		req  pull.Request
		opts Options
		harm func(h *house, img registrytest.Image)
		want func(h *house, img registrytest.Image) []string
	}{
		{"blob deleted", unpacked("overlayfs"), soon, func(h *house, img registrytest.Image) {
			h.must(os.Remove(h.blobFile(img.Layers[1].Digest)))
		}, func(*house, registrytest.Image) []string { return []string{"blob-missing default " + dgst} }},

		{"blob truncated", unpacked("overlayfs"), soon, func(h *house, img registrytest.Image) {
			h.must(os.Chmod(h.blobFile(img.Layers[1].Digest), 0o600))
			h.must(os.Truncate(h.blobFile(img.Layers[1].Digest), 3))
		}, func(*house, registrytest.Image) []string { return []string{"blob-size default " + dgst} }},

		{"byte flipped, deep", unpacked("overlayfs"), deep, func(h *house, img registrytest.Image) {
			h.flip(img.Layers[1].Digest)
		}, func(*house, registrytest.Image) []string { return []string{"blob-digest  " + dgst} }},

		{"byte flipped, not deep", unpacked("overlayfs"), soon, func(h *house, img registrytest.Image) {
			h.flip(img.Layers[1].Digest)
		}, nil},

		{"byte of a document flipped", unpacked("overlayfs"), soon, func(h *house, img registrytest.Image) {
			h.flip(img.Config.Digest)
		}, func(h *house, _ registrytest.Image) []string {
			return []string{"image-incomplete default " + h.ref("demo")}
		}},

		{"strays", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			h.must(os.WriteFile(h.path("content", "blobs", "sha256", "README"), nil, 0o600))
			h.must(os.Mkdir(h.path("content", "ingest", "old"), 0o700))
		}, func(h *house, _ registrytest.Image) []string {
			return []string{"blob-stray  " + h.path("content", "blobs", "sha256", "README"), "blob-stray  " + h.path("content", "ingest", "old")}
		}},

		{"orphan ingest", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			w, err := h.Content.Writer(h.t.Context(), "default/99/orphan", content.WriterOptions{})
			h.must(err)
			_, err = w.Write([]byte("x"))
			h.must(errors.Join(err, w.Close()))
		}, func(*house, registrytest.Image) []string { return []string{"ingest-unrecorded  default/99/orphan"} }},

		{"orphan blob", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			h.must(os.WriteFile(h.blobFile(digest.FromString("orphan")), []byte("orphan"), 0o444))
		}, func(*house, registrytest.Image) []string {
			return []string{"blob-unrecorded  " + digest.FromString("orphan").String()}
		}},

		{"directory gone, overlayfs", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			h.must(os.RemoveAll(filepath.Dir(h.dirOf("overlayfs", names[1]))))
		}, func(*house, registrytest.Image) []string {
			return []string{"snapshot-directory default overlayfs/" + names[1]}
		}},

		{"upper directory gone, overlayfs", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			h.must(os.RemoveAll(h.dirOf("overlayfs", names[1])))
		}, func(*house, registrytest.Image) []string {
			return []string{"snapshot-directory default overlayfs/" + names[1]}
		}},

		{"directory gone, native", unpacked("native"), soon, func(h *house, _ registrytest.Image) {
			h.must(os.RemoveAll(h.dirOf("native", names[0])))
		}, func(*house, registrytest.Image) []string {
			return []string{"snapshot-directory default native/" + names[0]}
		}},

		{"driver's key removed", unpacked("native"), soon, func(h *house, _ registrytest.Image) {
			h.must(h.Drivers["native"].Remove(h.t.Context(), h.record("native", names[1]).Backend))
		}, func(*house, registrytest.Image) []string {
			return []string{"snapshot-missing default native/" + names[1]}
		}},

		{"driver's key without record", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			h.must(h.Drivers["overlayfs"].Create(h.t.Context(), snapshot.New{Key: "default/99/lost", Kind: snapshot.KindActive}))
		}, func(*house, registrytest.Image) []string {
			return []string{"snapshot-unrecorded  overlayfs/default/99/lost"}
		}},

		{"another parent", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			h.rewrite(func(ns *bolt.Bucket) error {
				return sub(ns, "snapshots", "overlayfs", names[1]).Delete([]byte("parent"))
			})
		}, func(*house, registrytest.Image) []string {
			return []string{"snapshot-parent default overlayfs/" + names[1]}
		}},

		{"a parent without record", unpacked("overlayfs"), soon, func(h *house, _ registrytest.Image) {
			h.rewrite(func(ns *bolt.Bucket) error {
				return sub(ns, "snapshots", "overlayfs", names[0]).Put([]byte("parent"), []byte("nobody"))
			})
		}, func(*house, registrytest.Image) []string {
			return []string{"snapshot-parent default overlayfs/" + names[0]}
		}},

		{"image without target", unpacked("overlayfs"), soon, func(h *house, img registrytest.Image) {
			h.forget(img.Descriptor.Digest)
		}, func(h *house, _ registrytest.Image) []string {
			return []string{"image-incomplete default " + h.ref("demo")}
		}},

		{"image without config", unpacked("overlayfs"), soon, func(h *house, img registrytest.Image) {
			h.forget(img.Config.Digest)
		}, func(h *house, _ registrytest.Image) []string {
			return []string{"image-incomplete default " + h.ref("demo")}
		}},

		{"image without a layer", pull.Request{NoUnpack: true}, soon, func(h *house, img registrytest.Image) {
			h.forget(img.Layers[0].Digest)
		}, func(h *house, _ registrytest.Image) []string {
			return []string{"image-incomplete default " + h.ref("demo")}
		}},

		{"layers discarded once unpacked", unpacked("overlayfs"), soon, func(h *house, img registrytest.Image) {
			h.forget(img.Layers[0].Digest)
			h.forget(img.Layers[1].Digest)
		}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHouse(t)
			img := h.push("demo", one, two)
			h.pull("demo", test.req)
			test.harm(h, img)
			var want []string
			if test.want != nil {
				want = test.want(h, img)
			}
			h.finds(test.opts, want...)
		})
	}
}

// flip changes one bit of a blob.
func (h *house) flip(dgst digest.Digest) {
	h.t.Helper()
	data, err := os.ReadFile(h.blobFile(dgst))
	h.must(err)
	data[len(data)/2] ^= 1
	h.must(os.Chmod(h.blobFile(dgst), 0o600))
	h.must(os.WriteFile(h.blobFile(dgst), data, 0o600))
}

// forget drops a blob, as clients may at any time: record and file.
func (h *house) forget(dgst digest.Digest) {
	h.t.Helper()
	h.must(h.sp().DeleteBlob(h.t.Context(), dgst))
	_, err := h.DB.Collect(h.t.Context())
	h.must(err)
}

// rewrite changes the namespace's records behind the back of a closed store.
func (h *house) rewrite(change func(ns *bolt.Bucket) error) {
	h.t.Helper()
	h.close()
	db, err := bolt.Open(h.path("meta.db"), 0o600, nil)
	h.must(err)
	h.must(db.Update(func(tx *bolt.Tx) error { return change(sub(tx.Bucket([]byte("v1")), "default")) }))
	h.must(db.Close())
	h.open()
}

func sub(b *bolt.Bucket, path ...string) *bolt.Bucket {
	for _, name := range path {
		b = b.Bucket([]byte(name))
	}
	return b
}

// TestPlatforms has images of which not every platform is here.
func TestPlatforms(t *testing.T) {
	shared, own, foreign := layer("shared"), layer("own"), layer("foreign")
	for _, test := range []struct {
		name   string
		layers []registrytest.Layer // that are here of the foreign manifest
		lose   registrytest.Layer   // that is lost of our own
		want   string
	}{
		{"none of the other", nil, registrytest.Layer{}, ""},
		{"the other has what we share", []registrytest.Layer{shared}, registrytest.Layer{}, ""},
		{"half of the other", []registrytest.Layer{foreign}, registrytest.Layer{}, "image-incomplete"},
		{"ours is broken", nil, own, "image-incomplete"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHouse(t)
			ours := h.push("ours", shared, own)
			theirs := h.srv.PushFormat("theirs", "1", registrytest.Format{Platform: ocispec.Platform{OS: "linux", Architecture: "s390x"}},
				shared, foreign, layer("never here"))
			index := h.srv.PushIndex("ours", "1", ours, theirs)
			h.pull("ours", pull.Request{NoUnpack: true})

			// What clients of containerd fetch of the other platforms.
			var puts [][]byte
			puts = append(puts, encode(t, theirs.Manifest), h.config(theirs))
			for _, l := range test.layers {
				puts = append(puts, l.Data)
			}
			h.put(index.Digest, puts...)
			if test.lose.Data != nil {
				h.forget(digest.FromBytes(test.lose.Data))
			}
			rep := h.check(soon)
			if got := classes(rep); got != test.want {
				t.Errorf("found %q, want %q: %+v", got, test.want, rep.Findings)
			}
		})
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func classes(rep Report) string {
	var all []string
	for _, f := range rep.Findings {
		all = append(all, string(f.Class))
	}
	return strings.Join(all, " ")
}

// config is the config document of an image, by its own words.
func (h *house) config(img registrytest.Image) []byte {
	doc := ocispec.Image{Platform: *img.Descriptor.Platform, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range []registrytest.Layer{layer("shared"), layer("foreign"), layer("never here")} {
		doc.RootFS.DiffIDs = append(doc.RootFS.DiffIDs, l.DiffID)
	}
	data := encode(h.t, doc)
	if digest.FromBytes(data) != img.Config.Digest {
		h.t.Fatal("the registry makes another config")
	}
	return data
}

// put makes blobs that a document, which is here, keeps.
func (h *house) put(keeper digest.Digest, blobs ...[]byte) {
	h.t.Helper()
	labels := map[string]string{}
	for _, data := range blobs {
		dgst := digest.FromBytes(data)
		w, err := h.sp().OpenWriter(h.t.Context(), "put-"+dgst.String(), meta.WriterOptions{Expected: dgst})
		if errdefs.IsAlreadyExists(err) {
			continue
		}
		h.must(err)
		_, err = w.Write(data)
		h.must(err)
		h.must(w.Commit(h.t.Context(), int64(len(data)), dgst, nil))
		h.must(w.Close())
		labels["containerd.io/gc.ref.content.test."+dgst.Encoded()[:8]] = dgst.String()
	}
	h.must(h.sp().Update(h.t.Context(), func(tx *meta.Tx) error { return tx.SetBlobLabels(keeper, labels) }))
}

// TestRemovedMeanwhile removes an image between the moments at which a check
// reads the records and the files.
func TestRemovedMeanwhile(t *testing.T) {
	h := newHouse(t)
	h.push("demo", layer("one"))
	h.pull("demo", pull.Request{Snapshotter: "native"})
	p := &pass{store: h.Store, wrong: make(map[identity]Finding)}
	var err error
	p.dump, err = h.DB.Dump(t.Context())
	h.must(err)
	h.must(h.sp().DeleteImage(t.Context(), h.ref("demo"), ""))
	_, err = h.DB.Collect(t.Context())
	h.must(err)

	// And pulled once more: records of the same names are others.
	again := func() {
		h.must(p.list(t.Context()))
		h.pull("demo", pull.Request{Snapshotter: "native"})
	}
	again()
	p.blobs()
	p.snapshots()
	h.must(p.images(t.Context()))
	p.garbage(p.dump)
	if len(p.wrong) < 3 {
		t.Fatalf("the files were looked at in vain: %v", p.wrong)
	}
	after, err := h.DB.Dump(t.Context())
	h.must(err)
	p.confirm(after)
	if len(p.wrong) > 0 {
		t.Errorf("found %+v", p.wrong)
	}
}

// TestSealed holds a blob at the moment when it has its place and no record.
func TestSealed(t *testing.T) {
	h := newHouse(t)
	data := []byte("a layer whose snapshot takes long to commit")
	dgst := digest.FromBytes(data)
	desc := oci.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: dgst, Size: int64(len(data))}
	w, err := h.sp().OpenWriter(t.Context(), oci.Key(desc), meta.WriterOptions{Expected: dgst})
	h.must(err)
	defer w.Close()
	_, err = w.Write(data)
	h.must(err)
	sealed, release, err := w.Seal(t.Context(), desc.Size, dgst, content.CommitOptions{})
	h.must(err)
	defer release()
	if _, err := os.Stat(h.blobFile(dgst)); err != nil {
		t.Fatal(err)
	}
	h.finds(soon)
	h.must(h.sp().Update(t.Context(), func(tx *meta.Tx) error { return tx.RecordBlob(sealed, nil) }))
	h.finds(soon)
}

// TestBesideWriters checks a store that pulls, removals, commits and
// collections change all the time.
func TestBesideWriters(t *testing.T) {
	h := newHouse(t)
	base := layer("base")
	images := []string{"a", "b", "c"}
	for _, name := range images {
		h.push(name, base, layer(name), layer(name+"-top"))
	}
	ctx := t.Context()
	var enough atomic.Bool
	var writers sync.WaitGroup
	churn := func(f func() error) {
		writers.Go(func() {
			for !enough.Load() {
				if err := f(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i, driver := range []string{"overlayfs", "native"} {
		sp := h.DB.Space("ns" + string(rune('0'+i)))
		churn(func() error {
			name := h.ref(images[rand.IntN(len(images))])
			if _, err := h.puller.Pull(ctx, sp, name, pull.Request{Snapshotter: driver}); err != nil && !errdefs.IsNotFound(err) {
				return err // not found: a snapshot that it was about to lease was collected
			}
			if err := sp.DeleteImage(ctx, name, ""); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			return nil
		})
		churn(func() error {
			return commitAndRemove(ctx, sp, driver)
		})
	}
	collect := func(ctx context.Context) error {
		_, err := h.DB.Collect(ctx)
		return err
	}
	churn(func() error { return collect(ctx) })
	defer writers.Wait()
	defer enough.Store(true)
	deadline := time.Now().Add(3 * time.Second)
	checks := 0
	for ; checks < 3 || time.Now().Before(deadline) && checks < 50; checks++ {
		if rep := h.check(Options{Deep: checks%2 == 0, Patience: time.Second, Settle: collect}); len(rep.Findings) > 0 {
			t.Fatalf("check %d: %+v", checks, rep.Findings)
		}
	}
	t.Logf("%d checks", checks)
	enough.Store(true)
	writers.Wait()
	h.must(collect(ctx))
	h.finds(Options{Deep: true, Patience: time.Millisecond})
}

// TestSettle tells what the next collection removes from what escapes it.
func TestSettle(t *testing.T) {
	h := newHouse(t)
	h.push("demo", layer("one"))
	h.pull("demo", pull.Request{Snapshotter: "native"})
	h.must(os.WriteFile(h.blobFile(digest.FromString("orphan")), []byte("orphan"), 0o444))
	collections := 0
	opts := Options{Patience: time.Millisecond, Settle: func(ctx context.Context) error {
		collections++
		return nil
	}}
	orphan := "blob-unrecorded  " + digest.FromString("orphan").String()
	h.finds(opts, orphan)
	opts.Settle = func(ctx context.Context) error {
		collections++
		return os.Remove(h.blobFile(digest.FromString("orphan")))
	}
	h.finds(opts)
	h.finds(opts)
	if collections != 2 {
		t.Errorf("%d collections, want one for each check that finds garbage", collections)
	}
}

// commitAndRemove makes a snapshot, commits it and removes it.
func commitAndRemove(ctx context.Context, sp meta.Space, driver string) error {
	lease, err := sp.CreateLease(ctx, meta.Lease{})
	if err != nil {
		return err
	}
	leased := sp.Leased(lease.ID)
	snaps, err := leased.Snapshots(driver)
	if err != nil {
		return err
	}
	key := "active-" + lease.ID
	made, release, err := snaps.Create(ctx, snapshot.New{Key: key, Kind: snapshot.KindActive})
	if err != nil {
		return err
	}
	err = leased.Update(ctx, func(tx *meta.Tx) error { return tx.RecordSnapshot(made[0]) })
	release()
	if err != nil {
		return err
	}
	if err := snaps.Commit(ctx, "done-"+lease.ID, key, "", nil); err != nil {
		return err
	}
	return sp.DeleteLease(ctx, lease.ID)
}

func TestCancelled(t *testing.T) {
	h := newHouse(t)
	h.push("demo", layer("one"))
	h.pull("demo", pull.Request{})
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if _, err := Check(ctx, h.Store, Options{Deep: true}); !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
}

// TestClasses keeps the words that scripts look for.
func TestClasses(t *testing.T) {
	damage := []Class{BlobMissing, BlobSize, BlobDigest, SnapshotMissing, SnapshotDirectory, SnapshotParent, ImageIncomplete}
	garbage := []Class{BlobUnrecorded, BlobStray, IngestUnrecorded, SnapshotUnnamed}
	want := "blob-missing blob-size blob-digest snapshot-missing snapshot-directory snapshot-parent image-incomplete " +
		"blob-unrecorded blob-stray ingest-unrecorded snapshot-unrecorded"
	var got []string
	for _, c := range slices.Concat(damage, garbage) {
		got = append(got, string(c))
		if c.Damage() != slices.Contains(damage, c) {
			t.Errorf("%s: damage is %v", c, c.Damage())
		}
	}
	if strings.Join(got, " ") != want {
		t.Errorf("classes %q, want %q", got, want)
	}
}
