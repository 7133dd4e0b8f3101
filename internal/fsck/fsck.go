// Package fsck compares every record with the bytes it promises, and repairs what it can.
package fsck

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Class is a kind of disagreement.
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
	BlobStray         Class = "blob-stray"          // garbage: a file whose name is no digest
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
	Subject   string // digest, image name, ingest ref, or `driver/key`
	Detail    string
	Repair    string // what puts it right
}

// Store is what is checked. Its parts belong to the caller and must stay open.
type Store struct {
	DB      *meta.DB
	Content *content.Store
	Drivers map[string]snapshot.Driver
}

// Options of a check. The zero value checks without reading blobs.
type Options struct {
	Deep bool // read every blob and verify its digest
}

// Report is the outcome of a check.
type Report struct {
	Findings                 []Finding // by class, namespace and subject
	Images, Blobs, Snapshots int       // records looked at
	Bytes                    int64     // of blobs, verified if deep
}

// Check compares the store's records with its files. It may run beside
// writers: what looks wrong is looked at once more, after a second reading of
// the records, before it is reported. It repairs nothing yet: every repair it names is
// one that the store makes by itself or that a pull makes.
func Check(ctx context.Context, s Store, opts Options) (Report, error) {
	first, err := s.look(ctx, opts)
	if err != nil || len(first.Findings) == 0 {
		return first, err
	}
	second, err := s.look(ctx, Options{})
	if err != nil {
		return first, err
	}
	again := make(map[Finding]bool, len(second.Findings))
	for _, f := range second.Findings {
		again[f] = true
	}
	first.Findings = slices.DeleteFunc(first.Findings, func(f Finding) bool {
		return f.Class != BlobDigest && !again[f]
	})
	slices.SortFunc(first.Findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Subject, b.Subject))
	})
	return first, nil
}

// look makes one pass. Files are listed before the records are read: a blob
// that a writer seals and records meanwhile has a record by then.
func (s Store) look(ctx context.Context, opts Options) (Report, error) {
	var p pass
	p.store = s
	if err := p.list(ctx); err != nil {
		return Report{}, err
	}
	var err error
	if p.dump, err = s.DB.Dump(ctx); err != nil {
		return Report{}, fmt.Errorf("read records: %w", err)
	}
	p.rep.Images, p.rep.Blobs, p.rep.Snapshots = len(p.dump.Images), len(p.dump.Blobs), len(p.dump.Snapshots)
	p.blobs()
	p.ingests()
	p.snapshots()
	p.images(ctx)
	if opts.Deep {
		err = p.digests(ctx)
	}
	return p.rep, err
}

// pass is one look at everything.
type pass struct {
	store   Store
	files   map[digest.Digest]content.Info
	refs    []string                            // of ingests on disk
	keys    map[string]map[string]snapshot.Info // driver -> backend key
	missing map[string]error                    // `driver/backend key` -> why its directory can't be used
	dump    meta.Dump
	rep     Report
}

func (p *pass) found(c Class, ns, subject, detail, repair string) {
	p.rep.Findings = append(p.rep.Findings, Finding{c, ns, subject, detail, repair})
}

func (p *pass) list(ctx context.Context) error {
	p.files = make(map[digest.Digest]content.Info)
	for info, err := range p.store.Content.Blobs() {
		if err != nil {
			return fmt.Errorf("list blobs: %w", err)
		}
		p.files[info.Digest] = info
	}
	for name, err := range p.store.Content.Strays() {
		if err != nil {
			return fmt.Errorf("list blobs: %w", err)
		}
		p.found(BlobStray, "", name, "it lies among the blobs and its name is no digest", "look at it and delete it by hand")
	}
	for ref, err := range p.store.Content.Refs() {
		if err != nil {
			return fmt.Errorf("list ingests: %w", err)
		}
		p.refs = append(p.refs, ref)
	}
	p.keys, p.missing = make(map[string]map[string]snapshot.Info), make(map[string]error)
	for name, d := range p.store.Drivers {
		p.keys[name] = make(map[string]snapshot.Info)
		for info, err := range d.Walk(ctx) {
			if err != nil {
				return fmt.Errorf("list snapshots of %s: %w", name, err)
			}
			p.keys[name][info.Key] = info
			// A view may have no directory of its own; the driver says so by FailedPrecondition.
			if _, err := d.Dir(ctx, info.Key); err != nil && !errdefs.IsFailedPrecondition(err) {
				p.missing[name+"/"+info.Key] = err
			}
		}
	}
	return nil
}

const (
	repairBlob     = "restart holdfastd: it drops the record; then pull the image again"
	repairSnapshot = "restart holdfastd: it drops the record; then pull the image again"
	repairGarbage  = "none needed: the next collection or start of holdfastd removes it"
)

func (p *pass) blobs() {
	named := make(map[digest.Digest]bool)
	for _, b := range p.dump.Blobs {
		named[b.Digest] = true
		switch info, ok := p.files[b.Digest]; {
		case !ok:
			p.found(BlobMissing, b.Namespace, b.Digest.String(), "the record has no file", repairBlob)
		case info.Size != b.Size:
			p.found(BlobSize, b.Namespace, b.Digest.String(), fmt.Sprintf("the file has %d bytes and the record says %d", info.Size, b.Size), repairBlob)
		}
	}
	for _, in := range p.dump.Ingests {
		named[in.Expected] = true
	}
	for dgst, info := range p.files {
		p.rep.Bytes += info.Size
		if !named[dgst] {
			p.found(BlobUnrecorded, "", dgst.String(), fmt.Sprintf("%d bytes that nothing names", info.Size), repairGarbage)
		}
	}
}

func (p *pass) ingests() {
	named := make(map[string]bool)
	for _, in := range p.dump.Ingests {
		named[in.Backend] = true
	}
	for _, ref := range p.refs {
		if !named[ref] {
			p.found(IngestUnrecorded, "", ref, "a half-written blob that nothing names", repairGarbage)
		}
	}
}

func (p *pass) snapshots() {
	named := make(map[string]bool)
	backend := make(map[string]string) // `ns/driver/key` -> backend key
	for _, s := range p.dump.Snapshots {
		named[s.Driver+"/"+s.Backend] = true
		backend[s.Namespace+"/"+s.Driver+"/"+s.Key] = s.Backend
	}
	for _, s := range p.dump.Snapshots {
		keys, ok := p.keys[s.Driver]
		if !ok {
			continue // a driver that is not configured here: nothing can be said
		}
		subject := s.Driver + "/" + s.Key
		info, ok := keys[s.Backend]
		if !ok {
			p.found(SnapshotMissing, s.Namespace, subject, fmt.Sprintf("the driver has no %q", s.Backend), repairSnapshot)
			continue
		}
		if err := p.missing[s.Driver+"/"+s.Backend]; err != nil {
			p.found(SnapshotDirectory, s.Namespace, subject, err.Error(), "remove the image and what was made from it, then pull it again")
		}
		if want := backend[s.Namespace+"/"+s.Driver+"/"+s.Parent]; want != info.Parent {
			p.found(SnapshotParent, s.Namespace, subject, fmt.Sprintf("the driver's parent is %q and the record's is %q", info.Parent, want), "remove the image and pull it again")
		}
	}
	for driver, keys := range p.keys {
		for key := range keys {
			if !named[driver+"/"+key] {
				p.found(SnapshotUnnamed, "", driver+"/"+key, "a snapshot that no record names", repairGarbage)
			}
		}
	}
}

// digests reads every blob.
func (p *pass) digests(ctx context.Context) error {
	buf := make([]byte, 1<<20)
	for dgst := range p.files {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		r, err := p.store.Content.Reader(dgst)
		if err != nil {
			continue // removed meanwhile; a record that misses it is a finding of its own
		}
		v := dgst.Verifier()
		_, err = io.CopyBuffer(struct{ io.Writer }{v}, io.NewSectionReader(r, 0, r.Size()), buf)
		r.Close()
		switch {
		case err != nil:
			p.found(BlobDigest, "", dgst.String(), "reading it: "+err.Error(), "look at the disk's health; remove the image and pull it again")
		case !v.Verified():
			p.found(BlobDigest, "", dgst.String(), "its bytes are not what its name says", "remove the image, then pull it again")
		}
	}
	return nil
}
