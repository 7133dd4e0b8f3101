// Package content keeps immutable blobs on disk by digest and resumes half-written ones.
//
// The directory is containerd's io.containerd.content.v1.content, byte for
// byte, so that either daemon can go on with what the other left:
//
//	<dir>/                        0755
//	  blobs/                      0755
//	    sha256/                   0755, made by the first commit
//	      <hex>                   0444 (less the umask), a whole blob; its modification
//	                              time is that of the commit
//	  ingest/                     0755
//	    <hex sha256 of ref>/      0755, one half-written blob
//	      ref                     the ref, as it is
//	      startedat               RFC 3339 with nanoseconds; written as startedat.tmp
//	      updatedat               the same; or the modification time of data, if later
//	      total                   decimal; only if the size is known
//	      data                    the bytes so far; grows only at its end
//
// An ingest's files are made in this order, so that one with data is whole.
// They are removed in this order too: without ref nothing can be resumed. At
// commit, data goes by rename to its place among the blobs.
//
// This room knows digests and nothing else: labels, namespaces and leases are
// records, and live in meta. Of the power cut it promises: a blob whose Commit
// has returned (and, with CommitOptions.Unsynced, whose file system has been
// synced) is whole; an ingest may be lost; a blob that no record names may be
// anything, which is why meta removes such at open (inv 1, inv 2).
package content

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Names inside a store's directory.
const (
	blobsDir  = "blobs"
	ingestDir = "ingest"

	refFile     = "ref"
	startedFile = "startedat"
	updatedFile = "updatedat"
	totalFile   = "total"
	dataFile    = "data"
	tmpSuffix   = ".tmp"
)

// MaxRef is the longest ref, in bytes, that an ingest may have (inv 10).
const MaxRef = 64 << 10

// maxSmallFile bounds what is read of the timestamps and of total.
const maxSmallFile = 256

// hashes are the digest algorithms that name blobs.
var hashes = map[digest.Algorithm]func() hash.Hash{
	digest.SHA256: sha256.New,
	digest.SHA384: sha512.New384,
	digest.SHA512: sha512.New,
}

// errDamaged marks an ingest whose files contradict each other or can't be
// understood, so that there is nothing to resume.
var errDamaged = errors.New("damaged ingest")

// checkDigest refuses what could not be the name of a blob.
func checkDigest(dgst digest.Digest) error {
	if err := dgst.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", clip(string(dgst)), err, errdefs.ErrInvalidArgument)
	}
	if hashes[dgst.Algorithm()] == nil {
		return fmt.Errorf("digest %q: unsupported algorithm: %w", dgst, errdefs.ErrInvalidArgument)
	}
	return nil
}

// clip keeps a request's words in an error message short.
func clip(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}

// blobPath is where the blob of a checked digest stands.
func (s *Store) blobPath(dgst digest.Digest) string {
	return filepath.Join(s.dir, blobsDir, dgst.Algorithm().String(), dgst.Encoded())
}

// ingestName is the name of the directory for ref.
func ingestName(ref string) string {
	sum := sha256.Sum256([]byte(ref))
	return hex.EncodeToString(sum[:])
}

// isIngestName reports whether a name in ingest/ could be made by ingestName.
func isIngestName(name string) bool {
	return digest.SHA256.Validate(name) == nil
}

// ingest is the directory of one half-written blob.
type ingest string

func (s *Store) ingest(ref string) ingest {
	return ingest(filepath.Join(s.dir, ingestDir, ingestName(ref)))
}

func (in ingest) path(file string) string { return filepath.Join(string(in), file) }

// readRef returns the ref that the directory is for.
func (in ingest) readRef() (string, error) {
	b, err := readSmall(in.path(refFile), MaxRef)
	if err != nil {
		return "", err
	}
	if ingestName(string(b)) != filepath.Base(string(in)) {
		return "", fmt.Errorf("%s belongs to another ref: %w", in.path(refFile), errDamaged)
	}
	return string(b), nil
}

// status reads everything about the ingest that the disk knows.
func (in ingest) status() (Status, error) {
	fi, err := os.Lstat(in.path(dataFile))
	if err != nil {
		return Status{}, err
	}
	if !fi.Mode().IsRegular() {
		return Status{}, fmt.Errorf("%s is not a file: %w", in.path(dataFile), errDamaged)
	}
	st := Status{Offset: fi.Size()}
	if st.Ref, err = in.readRef(); err != nil {
		return Status{}, err
	}
	if st.StartedAt, err = in.readTime(startedFile); err != nil {
		return Status{}, err
	}
	if st.UpdatedAt, err = in.readTime(updatedFile); err != nil {
		return Status{}, err
	}
	if fi.ModTime().After(st.UpdatedAt) {
		st.UpdatedAt = fi.ModTime() // updatedat is not rewritten with each write
	}
	if st.Total, err = in.readTotal(); err != nil {
		return Status{}, err
	}
	return st, nil
}

func (in ingest) readTime(file string) (time.Time, error) {
	b, err := readSmall(in.path(file), maxSmallFile)
	if err != nil {
		return time.Time{}, err
	}
	var t time.Time
	if err := t.UnmarshalText(b); err != nil {
		return time.Time{}, fmt.Errorf("%s: %w: %w", in.path(file), err, errDamaged)
	}
	return t, nil
}

func (in ingest) writeTime(file string, t time.Time) error {
	b, err := t.MarshalText()
	if err != nil {
		return err
	}
	if err := os.WriteFile(in.path(file+tmpSuffix), b, 0o666); err != nil {
		return err
	}
	return os.Rename(in.path(file+tmpSuffix), in.path(file))
}

// readTotal returns 0 when the size is not known.
func (in ingest) readTotal() (int64, error) {
	b, err := readSmall(in.path(totalFile), maxSmallFile)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%s holds no size: %w", in.path(totalFile), errDamaged)
	}
	return n, nil
}

func (in ingest) writeTotal(n int64) error {
	return os.WriteFile(in.path(totalFile), strconv.AppendInt(nil, n, 10), 0o666)
}

// readSmall reads a file of at most limit bytes; a longer one is damaged.
func readSmall(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b bytes.Buffer
	if n, err := io.Copy(&b, io.LimitReader(f, limit+1)); err != nil {
		return nil, err
	} else if n > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes: %w", path, limit, errDamaged)
	}
	return b.Bytes(), nil
}
