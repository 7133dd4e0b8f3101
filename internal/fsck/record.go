package fsck

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

const (
	repairBlob      = "restart holdfastd: it drops the record; then pull the image again"
	repairSnapshot  = "restart holdfastd: it drops the record; then pull the image again"
	repairDirectory = "remove what was made from it and the image, then pull the image again"
	repairGarbage   = "none needed: the next collection or start of holdfastd removes it"
	repairStray     = "look at it and delete it by hand"
)

// list reads what is on disk and what the drivers know.
func (p *pass) list(ctx context.Context) error {
	p.files = make(map[digest.Digest]int64)
	for info, err := range p.store.Content.Blobs() {
		if err != nil {
			return fmt.Errorf("list blobs: %w", err)
		}
		p.files[info.Digest] = info.Size
		p.rep.Bytes += info.Size
	}
	for path, err := range p.store.Content.Strays() {
		if err != nil {
			return fmt.Errorf("list blobs: %w", err)
		}
		p.strays = append(p.strays, path)
	}
	for ref, err := range p.store.Content.Refs() {
		if err != nil {
			return fmt.Errorf("list ingests: %w", err)
		}
		p.refs = append(p.refs, ref)
	}
	p.keys, p.gone = make(map[string]map[string]snapshot.Info), make(map[string]string)
	for name, d := range p.store.Drivers {
		p.keys[name] = make(map[string]snapshot.Info)
		for info, err := range d.Walk(ctx) {
			if err != nil {
				return fmt.Errorf("list snapshots of %s: %w", name, err)
			}
			p.keys[name][info.Key] = info
			if why := lacks(ctx, d, info.Key); why != "" {
				p.gone[name+"/"+info.Key] = why
			}
		}
	}
	return nil
}

// lacks says what of a snapshot's directory is missing, "" for nothing.
func lacks(ctx context.Context, d snapshot.Driver, key string) string {
	if _, err := d.Stat(ctx, key); errdefs.IsNotFound(err) {
		return err.Error()
	}
	dir, err := d.Dir(ctx, key)
	if err != nil {
		return "" // a view has none of its own
	}
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return "its directory " + dir + " is missing"
	}
	return ""
}

func (p *pass) blobs() {
	for _, b := range p.dump.Blobs {
		f := Finding{Namespace: b.Namespace, Subject: b.Digest.String(), Repair: repairBlob}
		switch size, ok := p.files[b.Digest]; {
		case !ok:
			f.Class, f.Detail = BlobMissing, "the record has no file"
		case size != b.Size:
			f.Class, f.Detail = BlobSize, fmt.Sprintf("the file has %d bytes and the record says %d", size, b.Size)
		default:
			continue
		}
		p.found(blobPromise(b), f)
	}
}

func (p *pass) snapshots() {
	backend := make(map[string]string) // `ns/driver/key` -> backend key
	for _, s := range p.dump.Snapshots {
		backend[s.Namespace+"/"+s.Driver+"/"+s.Key] = s.Backend
	}
	for _, s := range p.dump.Snapshots {
		keys, ok := p.keys[s.Driver]
		if !ok {
			continue // a driver that is not configured here: nothing can be said
		}
		found := func(c Class, detail, repair string) {
			p.found(snapshotPromise(s), Finding{c, s.Namespace, s.Driver + "/" + s.Key, detail, repair})
		}
		info, ok := keys[s.Backend]
		if !ok {
			found(SnapshotMissing, fmt.Sprintf("the driver has no %q", s.Backend), repairSnapshot)
			continue
		}
		if why := p.gone[s.Driver+"/"+s.Backend]; why != "" {
			found(SnapshotDirectory, why, repairDirectory)
		}
		want := "" // the record's parent, in the driver's words
		if s.Parent != "" {
			want = backend[s.Namespace+"/"+s.Driver+"/"+s.Parent]
		}
		if want != info.Parent || s.Parent != "" && want == "" {
			found(SnapshotParent, fmt.Sprintf("its parent is %q to the driver, and to the record %q, which is %q to the driver", info.Parent, s.Parent, want), repairDirectory)
		}
	}
}

// garbage finds what is on disk and named by no record of d.
func (p *pass) garbage(d meta.Dump) {
	for _, path := range p.strays {
		p.found(promise{}, Finding{BlobStray, "", path, "it lies in the content store and is neither a blob nor an ingest", repairStray})
	}
	blobs, ingests, coming := make(map[digest.Digest]bool), make(map[string]bool), make(map[string]bool)
	for _, b := range d.Blobs {
		blobs[b.Digest] = true
	}
	for _, in := range d.Ingests {
		blobs[in.Expected] = true
		ingests[in.Backend] = true
		// Who fetches names the ingest after the digest. From the moment that the blob has its place until it has a
		// record, which may take as long as its snapshot takes to be committed, this is all that tells of it.
		_, dgst, _ := strings.Cut(in.Ref, "-")
		coming[dgst] = true
	}
	for dgst, size := range p.files {
		if !blobs[dgst] && !coming[dgst.String()] {
			p.found(promise{}, Finding{BlobUnrecorded, "", dgst.String(), fmt.Sprintf("%d bytes that nothing names", size), repairGarbage})
		}
	}
	for _, ref := range p.refs {
		if !ingests[ref] {
			p.found(promise{}, Finding{IngestUnrecorded, "", ref, "a half-written blob that nothing names", repairGarbage})
		}
	}
	named := make(map[string]bool)
	for _, s := range d.Snapshots {
		named[s.Driver+"/"+s.Backend] = true
	}
	for driver, keys := range p.keys {
		for key := range keys {
			if !named[driver+"/"+key] {
				p.found(promise{}, Finding{SnapshotUnnamed, "", driver + "/" + key, "a snapshot that no record names", repairGarbage})
			}
		}
	}
}
