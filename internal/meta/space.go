package meta

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/filter"
	bolt "go.etcd.io/bbolt"
)

// Space is a namespace and, once Leased, a lease: whatever is made through it
// is in that namespace and under that lease. It is a value, and cheap to copy.
type Space struct {
	db        *DB
	ns, lease string
}

// Space returns the namespace ns under no lease. It doesn't look at the name;
// each method does, and fails with ErrFailedPrecondition for "" and
// ErrInvalidArgument for what is no identifier. A namespace begins to exist
// with the first record in it.
func (db *DB) Space(ns string) Space { return Space{db: db, ns: ns} }

// Leased returns the same namespace under a lease. Methods that would add to
// a lease that doesn't exist fail with ErrNotFound.
func (sp Space) Leased(id string) Space {
	sp.lease = id
	return sp
}

// Namespace is the name that the Space was made with.
func (sp Space) Namespace() string { return sp.ns }

// Lease is the id of the lease, or "".
func (sp Space) Lease() string { return sp.lease }

func (sp Space) check() error {
	if sp.ns == "" {
		return fmt.Errorf("namespace is required: %w", errdefs.ErrFailedPrecondition)
	}
	return checkNamespace(sp.ns)
}

// view runs fn on the namespace's bucket, perhaps absent, in a read
// transaction. fn must only read (inv 5).
func (sp Space) view(fn func(ns bucket) error) error {
	if err := sp.check(); err != nil {
		return err
	}
	return sp.db.bolt.View(func(btx *bolt.Tx) error { return fn(root(btx, nil).sub(sp.ns)) })
}

// maxIdentifier bounds the names of namespaces and what else is an identifier
// (COMPATIBILITY §2.2), in bytes.
const maxIdentifier = 76

var identifier = regexp.MustCompile(`^[A-Za-z0-9]+(?:[._-](?:[A-Za-z0-9]+))*$`)

func checkNamespace(name string) error {
	switch {
	case len(name) > maxIdentifier:
		return fmt.Errorf("namespace %.76q... is longer than %d characters: %w", name, maxIdentifier, errdefs.ErrInvalidArgument)
	case !identifier.MatchString(name):
		return fmt.Errorf("namespace %q must match %s: %w", name, identifier, errdefs.ErrInvalidArgument)
	case name == keyVersion: // the schema has a key of that name where namespaces lie
		return fmt.Errorf("namespace %q: the name is taken: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// maxLabel bounds one label's key and value together, in bytes, as
// containerd does.
const maxLabel = 4096

func checkLabels(labels map[string]string) error {
	for k, v := range labels {
		if n := len(k) + len(v); n > maxLabel {
			return fmt.Errorf("label %.64q: key and value have %d bytes, more than %d: %w", k, n, maxLabel, errdefs.ErrInvalidArgument)
		}
		if k == "" {
			return fmt.Errorf("label with an empty key: %w", errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// maskTexts is what a field mask makes of a map: paths that begin with name
// and a dot set one key (to "" deletes it), the path name itself replaces all.
// It reports whether path was one of these.
func maskTexts(path, name string, old *map[string]string, update map[string]string) bool {
	if path == name {
		*old = update
		return true
	}
	key, ok := strings.CutPrefix(path, name+".")
	if !ok {
		return false
	}
	merged := make(map[string]string, len(*old)+1)
	for k, v := range *old {
		merged[k] = v
	}
	merged[key] = update[key]
	*old = merged
	return true
}

// updateLabels applies an update with a mask of `labels` and `labels.<key>`,
// or without one, to old; anything else in the mask is ErrInvalidArgument.
func updateLabels(old, update map[string]string, fields []string) (map[string]string, error) {
	if len(fields) == 0 {
		old = update
	}
	for _, path := range fields {
		if !maskTexts(path, keyLabels, &old, update) {
			return nil, fmt.Errorf("field %q can't be updated: %w", path, errdefs.ErrInvalidArgument)
		}
	}
	return withoutEmpty(old), checkLabels(old)
}

// fields adapts a record to filters: each func is asked with the rest of the
// path.
type fields map[string]func(rest []string) (string, bool)

// Field looks a path up, as filters want it.
func (f fields) Field(path []string) (string, bool) {
	if len(path) == 0 || f[path[0]] == nil {
		return "", false
	}
	return f[path[0]](path[1:])
}

func textField(s string) func([]string) (string, bool) {
	return func(rest []string) (string, bool) { return s, s != "" && len(rest) == 0 }
}

func mapField(m map[string]string) func([]string) (string, bool) {
	return func(rest []string) (string, bool) { return filter.Label(m, rest) }
}

// hold puts what lies at path under the transaction's lease, and reports
// whether there is one.
func (tx *Tx) hold(path ...string) (held bool, err error) {
	if tx.sp.lease == "" {
		return false, nil
	}
	lease := tx.ns().sub(keyLeases, tx.sp.lease)
	if !lease.exists() {
		return false, fmt.Errorf("lease %q: %w", tx.sp.lease, errdefs.ErrNotFound)
	}
	b, err := lease.create(path[:len(path)-1]...)
	if err != nil {
		return false, err
	}
	return true, b.put(path[len(path)-1], nil)
}

// release takes what lies at path from the transaction's lease, if it is there.
func (tx *Tx) release(path ...string) error {
	if tx.sp.lease == "" {
		return nil
	}
	at := slices.Concat([]string{keyLeases, tx.sp.lease}, path[:len(path)-1])
	return tx.ns().sub(at...).delete(path[len(path)-1])
}
