package index

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/holdfast-dev/holdfast/internal/snapshot"
)

// Get reads one snapshot; ErrNotFound.
func (x *Index) Get(key string) (r Record, err error) {
	err = x.view(func(b buckets) error {
		r, err = b.get(key)
		return err
	})
	return r, err
}

// Chain reads a snapshot and those below it, nearest first.
func (x *Index) Chain(key string) (r Record, parents []Record, err error) {
	err = x.view(func(b buckets) error {
		if r, err = b.get(key); err != nil {
			return err
		}
		parents, err = b.chain(r)
		return err
	})
	return r, parents, err
}

// Creation is one snapshot for Create.
type Creation struct {
	snapshot.New
	ID uint64 // from Reserve
}

// Create records snapshots, all or none: ErrAlreadyExists for a key that is
// there, ErrNotFound for a parent that isn't, ErrInvalidArgument for one that
// is not committed or a Kind that can't be created.
func (x *Index) Create(news ...Creation) error {
	return x.update(func(b buckets) error {
		last := b.snapshots.Sequence()
		for _, n := range news {
			if err := b.create(n); err != nil {
				return err
			}
			last = max(last, n.ID)
		}
		return b.snapshots.SetSequence(last)
	})
}

func (b buckets) create(n Creation) error {
	if n.Kind != snapshot.KindActive && n.Kind != snapshot.KindView {
		return fmt.Errorf("create snapshot %s of kind %s: %w", n.Key, n.Kind, errdefs.ErrInvalidArgument)
	}
	now := time.Now()
	r := Record{ID: n.ID, Info: snapshot.Info{
		Key: n.Key, Parent: n.Parent, Kind: n.Kind, Labels: n.Labels, Created: now, Updated: now,
	}}
	if n.Parent == "" {
		return b.put(r)
	}
	p, err := b.get(n.Parent)
	if err != nil {
		return fmt.Errorf("parent of %s: %w", n.Key, err)
	}
	if p.Kind != snapshot.KindCommitted {
		return fmt.Errorf("parent of %s: snapshot %s is not committed: %w", n.Key, n.Parent, errdefs.ErrInvalidArgument)
	}
	if err := b.put(r); err != nil {
		return err
	}
	return b.parents.Put(parentKey(p.ID, n.ID), []byte(n.Key))
}

// Committal is one step for CommitChain.
type Committal struct {
	Key, Name string
	Parent    string // "" keeps the one that Key has
	Labels    map[string]string
	Usage     snapshot.Usage
}

// CommitChain makes active snapshots committed ones, all or none, in order: a
// step's Parent may be the Name of an earlier one. A snapshot without parent
// may get one; ErrInvalidArgument if it has another. Its id stays; its labels
// and times are new.
func (x *Index) CommitChain(steps ...Committal) error {
	return x.update(func(b buckets) error {
		for _, s := range steps {
			if err := b.commit(s); err != nil {
				return fmt.Errorf("commit %s: %w", s.Key, err)
			}
		}
		return nil
	})
}

func (b buckets) commit(s Committal) error {
	r, parent, err := b.committable(s)
	if err != nil {
		return err
	}
	now := time.Now()
	committed := Record{ID: r.ID, Usage: s.Usage, Info: snapshot.Info{
		Key: s.Name, Parent: parent.Key, Kind: snapshot.KindCommitted, Labels: s.Labels, Created: now, Updated: now,
	}}
	if err := b.put(committed); err != nil {
		return err
	}
	if err := b.snapshots.DeleteBucket([]byte(s.Key)); err != nil {
		return err
	}
	if parent.Key == "" {
		return nil
	}
	return b.parents.Put(parentKey(parent.ID, r.ID), []byte(s.Name))
}

// committable reads the active snapshot of a step and the parent that it
// will have, which is zero at the bottom.
func (b buckets) committable(s Committal) (r, parent Record, err error) {
	if s.Name != "" && b.bucket(s.Name) != nil {
		return r, parent, fmt.Errorf("snapshot %s: %w", s.Name, errdefs.ErrAlreadyExists)
	}
	if r, err = b.get(s.Key); err != nil {
		return r, parent, err
	}
	if r.Kind != snapshot.KindActive {
		return r, parent, fmt.Errorf("snapshot is not active but %s: %w", r.Kind, errdefs.ErrFailedPrecondition)
	}
	name := r.Parent
	if name == "" {
		name = s.Parent
	} else if s.Parent != "" && s.Parent != name {
		return r, parent, fmt.Errorf("its parent is %s and can't become %s: %w", name, s.Parent, errdefs.ErrInvalidArgument)
	}
	if name == "" {
		return r, parent, nil
	}
	if parent, err = b.get(name); err != nil {
		return r, parent, fmt.Errorf("parent: %w", err)
	}
	if parent.Kind != snapshot.KindCommitted {
		return r, parent, fmt.Errorf("parent %s is not committed: %w", name, errdefs.ErrFailedPrecondition)
	}
	return r, parent, nil
}

// Remove forgets a snapshot and returns what it was: ErrFailedPrecondition if
// another has it as parent.
func (x *Index) Remove(key string) (r Record, err error) {
	err = x.update(func(b buckets) error {
		if r, err = b.get(key); err != nil {
			return err
		}
		prefix := parentPrefix(r.ID)
		if k, child := b.parents.Cursor().Seek(prefix); bytes.HasPrefix(k, prefix) {
			return fmt.Errorf("remove snapshot %s: it is the parent of %s: %w", key, child, errdefs.ErrFailedPrecondition)
		}
		// A parent that is not there has no id to find the link by; its id
		// is never used again, so the link does no harm.
		if p := b.bucket(r.Parent); p != nil {
			id, _ := binary.Uvarint(p.Get(keyID))
			if err := b.parents.Delete(parentKey(id, r.ID)); err != nil {
				return err
			}
		}
		return b.snapshots.DeleteBucket([]byte(key))
	})
	return r, err
}

// Update sets the labels that fields name (`labels.<key>`), or all labels if
// there are no fields or `labels` is one. Other fields are ErrInvalidArgument.
func (x *Index) Update(key string, labels map[string]string, fields ...string) (r Record, err error) {
	err = x.update(func(b buckets) error {
		if r, err = b.get(key); err != nil {
			return err
		}
		if r.Labels, err = updated(r.Labels, labels, fields); err != nil {
			return fmt.Errorf("update snapshot %s: %w", key, err)
		}
		r.Updated = time.Now().UTC()
		bkt := b.bucket(key)
		if err := putTimes(bkt, r.Created, r.Updated); err != nil {
			return err
		}
		return putLabels(bkt, r.Labels)
	})
	return r, err
}

func updated(old, labels map[string]string, fields []string) (map[string]string, error) {
	if len(fields) == 0 {
		fields = []string{"labels"}
	}
	out := maps.Clone(old)
	if out == nil {
		out = make(map[string]string)
	}
	for _, f := range fields {
		if f == "labels" {
			clear(out)
			maps.Copy(out, labels)
		} else if key, ok := strings.CutPrefix(f, "labels."); ok {
			out[key] = labels[key]
		} else {
			return nil, fmt.Errorf("field %q can't be changed: %w", f, errdefs.ErrInvalidArgument)
		}
	}
	maps.DeleteFunc(out, func(_, v string) bool { return v == "" })
	return out, nil
}

// walkBatch is how many snapshots are read in one transaction.
const walkBatch = 100

// Walk yields every snapshot in the order of keys. It reads in batches and
// holds no transaction while it yields (inv 5).
func (x *Index) Walk() iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		var after []byte
		for {
			records, err := x.batch(after)
			for _, r := range records {
				if !yield(r, nil) {
					return
				}
				after = []byte(r.Key)
			}
			if err != nil {
				yield(Record{}, err)
				return
			}
			if len(records) < walkBatch {
				return
			}
		}
	}
}

// batch reads the first snapshots whose keys come after the given one.
func (x *Index) batch(after []byte) (out []Record, err error) {
	err = x.view(func(b buckets) error {
		if b.snapshots == nil {
			return nil
		}
		c := b.snapshots.Cursor()
		k, v := c.First()
		if after != nil {
			if k, v = c.Seek(after); bytes.Equal(k, after) {
				k, v = c.Next()
			}
		}
		for ; k != nil && len(out) < walkBatch; k, v = c.Next() {
			if v != nil {
				continue // not a bucket: nothing of ours
			}
			r, err := decode(string(k), b.snapshots.Bucket(k))
			if err != nil {
				return fmt.Errorf("snapshot %s: %w", k, err)
			}
			out = append(out, r)
		}
		return nil
	})
	return out, err
}

// IDs maps the id of every snapshot to its key, as of one moment.
func (x *Index) IDs() (map[uint64]string, error) {
	ids := make(map[uint64]string)
	err := x.view(func(b buckets) error {
		if b.snapshots == nil {
			return nil
		}
		return b.snapshots.ForEachBucket(func(k []byte) error {
			id, n := binary.Uvarint(b.snapshots.Bucket(k).Get(keyID))
			if n <= 0 {
				return fmt.Errorf("snapshot %s: record has no id: %w", k, errdefs.ErrDataLoss)
			}
			ids[id] = string(k)
			return nil
		})
	})
	return ids, err
}
