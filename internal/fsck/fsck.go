// Package fsck compares every record with the bytes it promises, and repairs what it can.
//
// It may run beside writers, so the order of reading matters. The simple way
// is to read the records and then the files: but a blob that is removed in
// between, record first (inv 2), then looks lost. So the records are read a
// second time when something looks wrong. A record that was there before the
// files were looked at and is there afterwards, unchanged, promised its bytes
// all the time (inv 1): what it misses is damage.
//
// Two things remain. Bytes without a record may be about to get one. And when
// an active snapshot is committed, the driver gives it its name before its record
// goes. Both pass by themselves, so what was found is looked for again, after
// a pause, before it is reported. A store in which nothing looks wrong is read once.
package fsck

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Class is a kind of disagreement. The words stay the same from release to
// release.
type Class string

// The classes. Those of damage break a promise that a record makes; those of
// garbage cost room only, and the next collection or start removes them.
const (
	BlobMissing       Class = "blob-missing"        // damage: a record without its file
	BlobSize          Class = "blob-size"           // damage: the file has another size than the record
	BlobDigest        Class = "blob-digest"         // damage: the file's bytes are others (deep checks only)
	SnapshotMissing   Class = "snapshot-missing"    // damage: a record that the driver doesn't know
	SnapshotDirectory Class = "snapshot-directory"  // damage: the driver knows the snapshot, its directory is gone
	SnapshotParent    Class = "snapshot-parent"     // damage: record and driver name different parents
	ImageIncomplete   Class = "image-incomplete"    // damage: a listed image can't be run
	BlobUnrecorded    Class = "blob-unrecorded"     // garbage: a file that nothing names
	BlobStray         Class = "blob-stray"          // garbage: a file that is neither a blob nor part of an ingest
	IngestUnrecorded  Class = "ingest-unrecorded"   // garbage: a half-written blob that nothing names
	SnapshotUnnamed   Class = "snapshot-unrecorded" // garbage: a driver's key that no record names
)

// Damage reports whether findings of the class break a record's promise.
func (c Class) Damage() bool {
	switch c {
	case BlobUnrecorded, BlobStray, IngestUnrecorded, SnapshotUnnamed:
		return false
	}
	return true
}

// Finding is one disagreement.
type Finding struct {
	Class     Class
	Namespace string // "" when the finding is about a file and no record
	Subject   string // digest, image name, ingest ref, path, or `driver/key`
	Detail    string
	Repair    string // what puts it right
}

// Store is what is checked. Its parts belong to the caller and must stay open.
type Store struct {
	DB      *meta.DB
	Content *content.Store
	Drivers map[string]snapshot.Driver
}

// Options of a check. The zero value checks without reading layers.
type Options struct {
	Deep bool // read every blob and verify its digest

	// Patience is for how long, at least, something must look wrong before it
	// is reported. Default: 2 s.
	Patience time.Duration

	// Settle, if set, runs a collection and waits for it. It is called once,
	// when there is garbage: what is due to be collected is then not reported, and
	// what is reported has escaped the collector.
	Settle func(context.Context) error
}

// Report is the outcome of a check.
type Report struct {
	Findings                 []Finding // by class, namespace and subject
	Images, Blobs, Snapshots int       // records looked at
	Bytes                    int64     // of blob files, verified if deep
}

// looks is how often something must look wrong.
const looks = 3

// Check compares the store's records with its files. It may run beside
// writers, and then reports nothing that is merely on its way. It repairs
// nothing by itself: each repair that it names is made by the daemon's start, by a
// collection or by a pull. It holds every record in memory, twice at most,
// and one MiB of a blob.
func Check(ctx context.Context, s Store, opts Options) (Report, error) {
	if opts.Patience <= 0 {
		opts.Patience = 2 * time.Second
	}
	first, err := s.look(ctx)
	if err != nil {
		return Report{}, err
	}
	if err := s.insist(ctx, first.wrong, opts); err != nil {
		return Report{}, err
	}
	rep := first.rep
	rep.Findings = slices.Collect(maps.Values(first.wrong))
	if opts.Deep {
		bad, err := s.digests(ctx, first.files)
		if err != nil {
			return Report{}, err
		}
		rep.Findings = append(rep.Findings, bad...)
	}
	slices.SortFunc(rep.Findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Subject, b.Subject))
	})
	return rep, nil
}

// insist looks again for what was found wrong, and leaves what was there each
// time.
func (s Store) insist(ctx context.Context, wrong map[identity]Finding, opts Options) error {
	for id := range wrong {
		if !id.class.Damage() && opts.Settle != nil {
			if err := opts.Settle(ctx); err != nil {
				return fmt.Errorf("collect before the second look: %w", err)
			}
			break
		}
	}
	for n := 1; n < looks && len(wrong) > 0; n++ {
		select {
		case <-time.After(opts.Patience / (looks - 1)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		again, err := s.look(ctx)
		if err != nil {
			return err
		}
		maps.DeleteFunc(wrong, func(id identity, _ Finding) bool {
			_, still := again.wrong[id]
			return !still
		})
	}
	return nil
}

// identity is what makes findings of two looks the same. record is the one
// that makes the promise: a record that went and came back is another.
type identity struct {
	class              Class
	namespace, subject string
	record             promise
}

// promise is a record as far as it matters here; zero for findings about files.
type promise struct {
	kind, ns, id string // of a snapshot `driver/key`
	created      time.Time
	value        string // what it promises: a size, a backend key, a target
}

// look compares once. What it finds wrong is so at this moment, but for what
// the package comment says remains.
func (s Store) look(ctx context.Context) (*pass, error) {
	p := &pass{store: s, wrong: make(map[identity]Finding)}
	var err error
	if p.dump, err = s.DB.Dump(ctx); err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	p.rep = Report{Images: len(p.dump.Images), Blobs: len(p.dump.Blobs), Snapshots: len(p.dump.Snapshots)}
	if err := p.list(ctx); err != nil {
		return nil, err
	}
	p.blobs()
	p.snapshots()
	if err := p.images(ctx); err != nil {
		return nil, err
	}
	p.garbage(p.dump)
	if len(p.wrong) == 0 {
		return p, nil
	}
	after, err := s.DB.Dump(ctx)
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	p.confirm(after)
	return p, nil
}

// pass is one look at everything.
type pass struct {
	store  Store
	dump   meta.Dump // as of before the files
	files  map[digest.Digest]int64
	refs   []string                            // of ingests on disk
	strays []string                            // paths
	keys   map[string]map[string]snapshot.Info // driver -> backend key
	gone   map[string]string                   // `driver/backend key` -> what its directory lacks
	wrong  map[identity]Finding
	rep    Report
}

func (p *pass) found(by promise, f Finding) {
	p.wrong[identity{f.Class, f.Namespace, f.Subject, by}] = f
}

// confirm keeps of what was found what the records of after don't explain:
// damage whose record went is none, nor is garbage that got a record.
func (p *pass) confirm(after meta.Dump) {
	stays := promises(after)
	maps.DeleteFunc(p.wrong, func(id identity, _ Finding) bool {
		return id.class.Damage() && !stays[id.record]
	})
	before := p.wrong
	p.wrong = make(map[identity]Finding)
	p.garbage(after)
	maps.DeleteFunc(before, func(id identity, _ Finding) bool {
		_, still := p.wrong[id]
		return !id.class.Damage() && !still
	})
	p.wrong = before
}

func promises(d meta.Dump) map[promise]bool {
	all := make(map[promise]bool, len(d.Blobs)+len(d.Snapshots)+len(d.Images))
	for _, b := range d.Blobs {
		all[blobPromise(b)] = true
	}
	for _, s := range d.Snapshots {
		all[snapshotPromise(s)] = true
	}
	for _, img := range d.Images {
		all[imagePromise(img)] = true
	}
	return all
}

func blobPromise(b meta.DumpBlob) promise {
	return promise{"blob", b.Namespace, b.Digest.String(), b.Created, fmt.Sprint(b.Size)}
}

func snapshotPromise(s meta.DumpSnapshot) promise {
	return promise{"snapshot", s.Namespace, s.Driver + "/" + s.Key, s.Created, s.Backend}
}

func imagePromise(img meta.DumpImage) promise {
	return promise{"image", img.Namespace, img.Name, img.Updated, img.Target.Digest.String()}
}

// digests reads every blob.
func (s Store) digests(ctx context.Context, files map[digest.Digest]int64) (bad []Finding, err error) {
	buf := make([]byte, 1<<20)
	for _, dgst := range slices.Sorted(maps.Keys(files)) {
		r, err := s.Content.Reader(dgst)
		if err != nil {
			continue // removed meanwhile; a record that misses it is a finding of its own
		}
		v := dgst.Verifier()
		_, err = io.CopyBuffer(struct{ io.Writer }{v}, interruptible{ctx, io.NewSectionReader(r, 0, r.Size())}, buf)
		r.Close()
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			bad = append(bad, Finding{Class: BlobDigest, Subject: dgst.String(),
				Detail: "reading it: " + err.Error(), Repair: "look at the disk's health; remove the image and pull it again"})
		case !v.Verified():
			bad = append(bad, Finding{Class: BlobDigest, Subject: dgst.String(),
				Detail: "its bytes are not what its name says", Repair: "remove the images that need it, then pull them again"})
		}
	}
	return bad, nil
}

// interruptible is a reader that ends with ctx.
type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i interruptible) Read(p []byte) (int, error) {
	if err := context.Cause(i.ctx); err != nil {
		return 0, err
	}
	return i.r.Read(p)
}
