package pull

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/durable"
	"github.com/holdfast-dev/holdfast/internal/oci"
)

// How room is reckoned.
const (
	spare       = 32 << 20 // bytes that stay free, for the records; at most 1/20 of the file system
	spareInodes = 256      // the same for inodes

	// What an unpacked layer takes at least, for each byte of its blob: one
	// that doesn't compress at all, and a plain archive of the smallest files,
	// which is half headers.
	leastPacked = 0.9
	leastPlain  = 0.5
	// What it takes as a rule.
	usualPacked = 2.8
	usualPlain  = 1.0

	calmTick    = time.Second
	tightRoom   = 1 << 30 // with less than this above what is needed it is measured
	tightTick   = 20 * time.Millisecond
	crampedRoom = 256 << 20            // and with less than this in all
	crampedTick = 2 * time.Millisecond // in which a file of zeros may grow by some MiB
)

// rooms keeps account of what the pulls of a daemon have still to write, so
// that one that can't fit says so before it has filled the disk.
//
// What a layer takes unpacked shows only in the end. So a pull is refused at
// its start only if it can't fit even when nothing is compressed; one that
// would have fitted must not be. While it runs, what the disk has lost so far
// says more: the estimate for the rest moves from the least to what was seen,
// in the measure in which the pulls are done. It counts on the disk itself:
// blocks, inodes and what others write at the same time are in it.
//
// When there is too little for two pulls the younger one gives way. As the last
// kilobytes of a blob may unpack to any size, room is measured by the clock,
// the more often the less there is, and not by what was read.
type rooms struct {
	measure   func(dir string) (durable.Room, error)
	content   string            // directories; "" is not watched
	snapshots map[string]string // by driver
	warn      func(msg string, args ...any)

	mu       sync.Mutex
	shares   []*share // of pulls under way, the oldest first
	watching bool     // whether watch is under way
	disks    map[uint64]*filesystem
}

// filesystem is one that shares concern.
type filesystem struct {
	dir    string
	device uint64
	users  int          // accounts
	first  durable.Room // when the first of them came
	last   durable.Room

	kept     int64 // bytes of blobs that were written since first
	unpacked int64 // bytes of blobs whose content was
	total    int64 // that are to be unpacked
}

// share is what one pull, or what is left of it, has still to write.
type share struct {
	rooms    *rooms
	holders  int // the pull itself and its jobs
	accounts []*account
	err      error // it gives way
}

// account is that of one layer.
type account struct {
	share          *share
	job            *job
	blobs, trees   *filesystem // nil where nothing is written
	size           int64
	least          float64
	kept, unpacked int64 // bytes of the blob
	landed         bool  // nothing is left to write
}

// noRoom says that a pull doesn't fit.
type noRoom struct {
	dir        string
	need, free int64
	inodes     bool
}

func (e *noRoom) Error() string {
	if e.inodes {
		return fmt.Sprintf("the file system of %s has %d files left that it can make, too few for the image; remove some images (`holdfast rmi IMAGE`) and pull again", e.dir, e.free)
	}
	return fmt.Sprintf("the image needs about %s more and %s is free on %s; free some (`holdfast rmi IMAGE`) and pull again", bytesText(e.need), bytesText(e.free), e.dir)
}

func (e *noRoom) Unwrap() error { return errdefs.ErrResourceExhausted }

func bytesText(n int64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.1f kB", float64(max(n, 0))/1e3)
}

// admit gives the layers that a pull is about to fetch their accounts, or
// says that they can't fit: nothing of them has been written yet.
func (r *run) admit(ctx context.Context, todo []*job) error {
	m := r.p.rooms
	if m.content == "" {
		return nil
	}
	kept, err := r.keptBytes(ctx, todo)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &share{rooms: m, holders: 1 + len(todo)}
	for _, j := range todo {
		if err := m.open(s, j, kept[j]); err != nil {
			m.drop(s)
			return err
		}
	}
	m.shares = append(m.shares, s)
	for _, fs := range s.filesystems() {
		if err := m.lacks(fs, s, len(todo)); err != nil {
			m.drop(s)
			return err
		}
		if need := m.need(fs, s, usual); need > float64(fs.spareFree()) {
			m.warn("an image may not fit", "image", r.reference, "directory", fs.dir, "needs", bytesText(int64(need)), "free", bytesText(fs.spareFree()))
		}
	}
	for _, a := range s.accounts {
		a.job.account = a
	}
	r.rooms = append(r.rooms, s)
	if !m.watching {
		m.watching = true
		r.p.jobs.Go(m.watch)
	}
	return nil
}

// keptBytes says how much of each layer's blob is here. A blob that several
// layers have is written for the first of them.
func (r *run) keptBytes(ctx context.Context, todo []*job) (map[*job]int64, error) {
	kept := make(map[*job]int64, len(todo))
	seen := make(map[digest.Digest]bool, len(todo))
	for _, j := range todo {
		desc := j.layer.Desc
		here, err := r.sp.Blob(ctx, desc.Digest)
		switch {
		case err == nil:
			kept[j] = here.Size
		case !errdefs.IsNotFound(err):
			return nil, err
		case seen[desc.Digest]:
			kept[j] = desc.Size
		default:
			if kept[j], err = r.keptElsewhere(ctx, desc); err != nil {
				return nil, err
			}
		}
		seen[desc.Digest] = true
	}
	return kept, nil
}

// keptElsewhere counts the bytes of a blob that an earlier pull has left, or
// that another namespace has.
func (r *run) keptElsewhere(ctx context.Context, desc oci.Descriptor) (int64, error) {
	st, err := r.sp.Ingest(ctx, oci.Key(desc))
	if err == nil || !errdefs.IsNotFound(err) {
		return st.Offset, err
	}
	all, err := r.p.db.Namespaces(ctx)
	if err != nil {
		return 0, err
	}
	for _, ns := range all {
		if _, err := r.p.db.Space(ns.Name).Blob(ctx, desc.Digest); err == nil {
			return desc.Size, nil
		}
	}
	return 0, nil
}

// open adds the account of a layer. m.mu is held.
func (m *rooms) open(s *share, j *job, kept int64) (err error) {
	a := &account{share: s, job: j, size: j.layer.Desc.Size, kept: kept, least: leastPacked}
	if !strings.HasSuffix(j.layer.Desc.MediaType, "gzip") && !strings.HasSuffix(j.layer.Desc.MediaType, "zstd") {
		a.least = leastPlain
	}
	s.accounts = append(s.accounts, a)
	if a.blobs, err = m.disk(m.content); err != nil {
		return err
	}
	a.blobs.users++
	dir := m.snapshots[j.key.driver]
	if j.key.packed || dir == "" {
		return nil
	}
	if a.trees, err = m.disk(dir); err != nil {
		return err
	}
	a.trees.users++
	a.trees.total += a.size
	return nil
}

// disk finds the file system of dir, measured just now. m.mu is held.
func (m *rooms) disk(dir string) (*filesystem, error) {
	room, err := m.measure(dir)
	if err != nil {
		return nil, err
	}
	fs := m.disks[room.Device]
	if fs == nil {
		fs = &filesystem{dir: dir, device: room.Device, first: room}
		m.disks[room.Device] = fs
	}
	fs.last = room
	return fs, nil
}

// drop ends a share. m.mu is held.
func (m *rooms) drop(s *share) {
	for _, a := range s.accounts {
		for _, fs := range []*filesystem{a.blobs, a.trees} {
			if fs == nil {
				continue
			}
			if fs.users--; fs.users == 0 {
				delete(m.disks, fs.device)
			}
		}
	}
	m.shares = slices.DeleteFunc(m.shares, func(o *share) bool { return o == s })
}

// release ends what one holder has of a share; what the others of it have
// still to write goes on counting.
func (s *share) release() {
	s.rooms.mu.Lock()
	defer s.rooms.mu.Unlock()
	s.letGo()
}

// close ends an account: its layer is through, or will not come.
func (a *account) close() {
	if a == nil {
		return
	}
	a.share.rooms.mu.Lock()
	defer a.share.rooms.mu.Unlock()
	a.kept, a.unpacked, a.landed = a.size, a.size, true
	a.share.letGo()
}

// letGo ends what one holder has. The rooms are locked.
func (s *share) letGo() {
	if s.holders--; s.holders == 0 {
		s.rooms.drop(s)
	}
}

func (s *share) filesystems() (list []*filesystem) {
	for _, a := range s.accounts {
		for _, fs := range []*filesystem{a.blobs, a.trees} {
			if fs != nil && !slices.Contains(list, fs) {
				list = append(list, fs)
			}
		}
	}
	return list
}

// spareFree is what pulls may still write.
func (fs *filesystem) spareFree() int64 {
	keep := max(0, min(spare, fs.last.Size/20)-fs.last.RootOnly)
	return max(0, fs.last.Free-keep)
}

// usual estimates what an account takes unpacked, for each byte of its blob.
func usual(fs *filesystem, a *account) float64 {
	if a.least == leastPlain {
		return usualPlain
	}
	return usualPacked
}

// seen is the same while pulls run: see rooms.
func seen(fs *filesystem, a *account) float64 {
	if fs.unpacked == 0 || fs.total == 0 {
		return a.least
	}
	lost := max(0, fs.first.Free-fs.last.Free-fs.kept)
	ratio := float64(lost) / float64(fs.unpacked)
	done := min(1, float64(fs.unpacked)/float64(fs.total))
	return a.least + max(0, ratio-a.least)*done
}

// need is what the share and all that are older than it will write to fs.
func (m *rooms) need(fs *filesystem, upTo *share, estimate func(*filesystem, *account) float64) (need float64) {
	for _, s := range m.shares {
		for _, a := range s.accounts {
			if a.blobs == fs {
				need += float64(max(0, a.size-a.kept))
			}
			if a.trees == fs {
				need += float64(max(0, a.size-a.unpacked)) * estimate(fs, a)
			}
		}
		if s == upTo {
			break
		}
	}
	return need
}

// lacks says what fs is short of for the share, at the least or as seen.
func (m *rooms) lacks(fs *filesystem, s *share, layers int) error {
	if need := m.need(fs, s, seen); need > float64(fs.spareFree()) || fs.spareFree() == 0 {
		return &noRoom{dir: fs.dir, need: int64(min(need, math.MaxInt64/2)), free: fs.last.Free}
	}
	keep := min(spareInodes, fs.last.Inodes/20) + 2*uint64(layers)
	if fs.last.Inodes > 0 && fs.last.Unused < keep {
		return &noRoom{dir: fs.dir, free: int64(fs.last.Unused), inodes: true}
	}
	return nil
}

// book notes that n bytes of a layer's blob have come, up to offset.
func (a *account) book(offset, n int64, fetched, unpacking bool) {
	if a == nil {
		return
	}
	m := a.share.rooms
	m.mu.Lock()
	defer m.mu.Unlock()
	if fetched {
		a.kept = offset
		a.blobs.kept += n
	}
	if unpacking && a.trees != nil {
		a.unpacked = offset
		a.trees.unpacked += n
	}
}

// land notes that all of a layer is written.
func (a *account) land() {
	if a == nil {
		return
	}
	a.share.rooms.mu.Lock()
	defer a.share.rooms.mu.Unlock()
	a.landed = true
}

// watch measures until no share is left.
func (m *rooms) watch() {
	t := time.NewTimer(0)
	defer t.Stop()
	for range t.C {
		m.mu.Lock()
		wait := calmTick
		for _, fs := range m.disks {
			wait = min(wait, m.look(fs))
		}
		if len(m.shares) == 0 {
			m.watching = false
			m.mu.Unlock()
			return
		}
		m.mu.Unlock()
		t.Reset(wait)
	}
}

// look measures fs, has the youngest pull there give way if there is too
// little room, and says when to look again. m.mu is held.
func (m *rooms) look(fs *filesystem) time.Duration {
	room, err := m.measure(fs.dir)
	if err != nil {
		return calmTick // whoever writes there hears of it
	}
	fs.last = room
	for _, s := range slices.Backward(m.shares) {
		if !s.concerns(fs) {
			continue
		}
		if err := m.lacks(fs, s, 0); err != nil && s.err == nil {
			s.giveWay(err)
		}
		switch left := fs.spareFree(); {
		case left < crampedRoom:
			return crampedTick
		case float64(left) < m.need(fs, s, seen)+tightRoom:
			return tightTick
		}
		break
	}
	return calmTick
}

// concerns reports whether the share has still something to write to fs, or
// something to give back.
func (s *share) concerns(fs *filesystem) bool {
	return slices.ContainsFunc(s.accounts, func(a *account) bool { return (!a.landed || s.err != nil) && (a.blobs == fs || a.trees == fs) })
}

// giveWay ends all layers of the share.
func (s *share) giveWay(err error) {
	s.err = err
	for _, a := range s.accounts {
		a.job.cancel(err)
	}
}

// isFull reports whether err says that a disk is full, or about to be.
func isFull(err error) bool {
	_, refused := errors.AsType[*noRoom](err)
	return refused || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
