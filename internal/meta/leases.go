package meta

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/holdfast-dev/holdfast/internal/filter"
	"github.com/opencontainers/go-digest"
)

// Lease holds resources against collection, until it is deleted or the time
// in its label containerd.io/gc.expire (RFC 3339) has passed.
type Lease struct {
	ID      string
	Labels  map[string]string
	Created time.Time
}

// Resource is what a lease holds. Type is content, ingests, images or
// snapshots/<driver>.
type Resource struct{ ID, Type string }

// CreateLease records a lease; an ID of "" makes one up. ErrAlreadyExists, ErrInvalidArgument.
func (sp Space) CreateLease(ctx context.Context, l Lease) (created Lease, err error) {
	err = sp.Update(ctx, func(tx *Tx) error {
		created, err = tx.CreateLease(l)
		return err
	})
	return created, err
}

// CreateLease is as Space.CreateLease. The lease doesn't become the transaction's own:
// an Update in sp.Leased(id) may create id first and then use it.
func (tx *Tx) CreateLease(l Lease) (Lease, error) {
	if err := checkLabels(l.Labels); err != nil {
		return Lease{}, fmt.Errorf("lease %q: %w", l.ID, err)
	}
	if l.ID == "" {
		l.ID = tx.now.Format("20060102150405") + "-" + rand.Text()
	}
	if tx.ns().sub(keyLeases, l.ID).exists() {
		return Lease{}, fmt.Errorf("lease %q: %w", l.ID, errdefs.ErrAlreadyExists)
	}
	b, err := tx.v1.create(tx.sp.ns, keyLeases, l.ID)
	if err != nil {
		return Lease{}, err
	}
	l.Created, l.Labels = tx.now, withoutEmpty(l.Labels)
	if err := b.putTime(keyCreatedAt, l.Created); err != nil {
		return Lease{}, err
	}
	return l, b.putTexts(keyLabels, l.Labels)
}

// DeleteLease forgets a lease; what only it held goes with the next
// collection. ErrNotFound.
func (sp Space) DeleteLease(ctx context.Context, id string) error {
	return sp.Update(ctx, func(tx *Tx) error { return tx.DeleteLease(id) })
}

// DeleteLease is as Space.DeleteLease.
func (tx *Tx) DeleteLease(id string) error {
	leases := tx.ns().sub(keyLeases)
	if !leases.sub(id).exists() {
		return fmt.Errorf("lease %q: %w", id, errdefs.ErrNotFound)
	}
	tx.deleted = true
	return leases.drop(id)
}

// Leases lists the leases that match any of the filters, in the order of their ids.
func (sp Space) Leases(ctx context.Context, filters ...string) (all []Lease, err error) {
	match, err := filter.Parse(filters...)
	if err != nil {
		return nil, err
	}
	err = sp.view(func(ns bucket) error {
		for id, b := range ns.sub(keyLeases).subs() {
			l, err := readLease(id, b)
			if err != nil {
				return err
			}
			if match.Match(fields{"id": textField(l.ID), "labels": mapField(l.Labels)}) {
				all = append(all, l)
			}
		}
		return nil
	})
	return all, err
}

func readLease(id string, b bucket) (l Lease, err error) {
	l = Lease{ID: id, Labels: b.texts(keyLabels)}
	if l.Created, err = b.time(keyCreatedAt); err != nil {
		return l, fmt.Errorf("lease %q: %w", id, err)
	}
	return l, nil
}

// LeaseResources lists what a lease holds. ErrNotFound.
func (sp Space) LeaseResources(ctx context.Context, id string) (all []Resource, err error) {
	err = sp.view(func(ns bucket) error {
		lease := ns.sub(keyLeases, id)
		if !lease.exists() {
			return fmt.Errorf("lease %q: %w", id, errdefs.ErrNotFound)
		}
		all = resources(lease)
		return nil
	})
	return all, err
}

func resources(lease bucket) (all []Resource) {
	for _, typ := range []string{keyContent, keyImages, keyIngests} {
		for id := range lease.sub(typ).values() {
			all = append(all, Resource{ID: id, Type: typ})
		}
	}
	for driver, keys := range lease.sub(keySnapshots).subs() {
		for key := range keys.values() {
			all = append(all, Resource{ID: key, Type: keySnapshots + "/" + driver})
		}
	}
	return all
}

// AddLeaseResource puts a resource, which need not exist yet, under a lease.
// ErrNotFound for the lease; ErrNotImplemented for an unknown type; ErrInvalidArgument.
func (sp Space) AddLeaseResource(ctx context.Context, id string, r Resource) error {
	path, err := r.path()
	if err != nil {
		return err
	}
	return sp.Leased(id).Update(ctx, func(tx *Tx) error {
		if !tx.ns().sub(keyLeases, id).exists() {
			return fmt.Errorf("lease %q: %w", id, errdefs.ErrNotFound)
		}
		_, err := tx.hold(path...)
		return err
	})
}

// DeleteLeaseResource takes a resource from a lease; one that isn't in it is
// no error. Otherwise as AddLeaseResource.
func (sp Space) DeleteLeaseResource(ctx context.Context, id string, r Resource) error {
	path, err := r.path()
	if err != nil {
		return err
	}
	return sp.Leased(id).Update(ctx, func(tx *Tx) error {
		if !tx.ns().sub(keyLeases, id).exists() {
			return fmt.Errorf("lease %q: %w", id, errdefs.ErrNotFound)
		}
		tx.deleted = true
		return tx.release(path...)
	})
}

// path is where a lease's bucket holds the resource.
func (r Resource) path() ([]string, error) {
	kind, driver, sub := strings.Cut(r.Type, "/")
	switch kind {
	case keyContent, keyIngests, keyImages, keySnapshots:
	default:
		return nil, fmt.Errorf("lease of resource type %q: %w", r.Type, errdefs.ErrNotImplemented)
	}
	if sub != (kind == keySnapshots) || strings.Contains(driver, "/") || sub && driver == "" {
		return nil, fmt.Errorf("lease of resource type %q: %w", r.Type, errdefs.ErrInvalidArgument)
	}
	if kind == keyContent {
		if _, err := digest.Parse(r.ID); err != nil {
			return nil, fmt.Errorf("lease of content %q: %w: %w", r.ID, err, errdefs.ErrInvalidArgument)
		}
	}
	if sub {
		return []string{kind, driver, r.ID}, nil
	}
	return []string{kind, r.ID}, nil
}
