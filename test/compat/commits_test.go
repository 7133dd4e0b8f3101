package compat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// The databases of a root.
const (
	metaFile  = "io.containerd.metadata.v1.bolt/meta.db"
	indexFile = "io.containerd.snapshotter.v1.overlayfs/metadata.db"
)

// bound is how many transactions a pull of one layer may take.
const (
	metaBound  = 4
	indexBound = 2
)

// TestCommitsOfAPull counts the write transactions that a pull of an image of
// one layer takes in both databases, and prints containerd's beside them.
func TestCommitsOfAPull(t *testing.T) {
	t.Parallel()
	srv := registrytest.New(t)
	one := push(srv, "one", baseLayer)
	first := push(srv, "first", layertest.Archive(layertest.File("first", "x")))
	count := make(map[kind][2]uint64)
	for _, which := range []kind{theirs, ours} {
		r := newRoot(t)
		d := r.start(t, which)
		pull := func(reference string) {
			t.Helper()
			if which == ours {
				if _, err := d.holdfast.Ctl("-n", "default", "pull", "--plain-http", "--snapshotter", overlay, reference); err != nil {
					t.Fatal(err)
				}
			} else {
				d.mustCtr(t, "-n", "default", "images", "pull", "--local", "--plain-http", "--snapshotter", overlay, reference)
			}
		}
		// The first pull also makes buckets and the index, which happens once in a root's life.
		pull(first)
		meta, index := r.transactions(t, metaFile), r.transactions(t, indexFile)
		pull(one)
		count[which] = [2]uint64{r.transactions(t, metaFile) - meta, r.transactions(t, indexFile) - index}
	}
	t.Logf("transactions for a pull of one layer: meta.db %d (containerd %d), metadata.db %d (containerd %d)",
		count[ours][0], count[theirs][0], count[ours][1], count[theirs][1])
	if n := count[ours]; n[0] == 0 || n[0] > metaBound || n[1] == 0 || n[1] > indexBound {
		t.Errorf("a pull of one layer takes %d transactions in meta.db and %d in metadata.db, want at most %d and %d", n[0], n[1], metaBound, indexBound)
	}
}

// open reads a copy of a database while a daemon has it, and is idle.
func (r root) open(t *testing.T, file string) *bolt.DB {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(r.dir, file))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(harness.TempDir(t), "copy.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// transactions is the number of write transactions that a database has ever
// seen: bolt counts them in its meta pages.
func (r root) transactions(t *testing.T, file string) (n uint64) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(r.dir, file)); errors.Is(err, fs.ErrNotExist) {
		return 0
	}
	err := r.open(t, file).View(func(tx *bolt.Tx) error {
		n = uint64(tx.ID())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestSameRecords: after the same commands the databases of both daemons hold
// the same keys and values, but for times and sequence numbers. After a pull
// of ours they hold what containerd's pull leaves, and what its transfer service adds.
func TestSameRecords(t *testing.T) {
	t.Parallel()
	srv := registrytest.New(t)
	f := filling{srv: srv, one: push(srv, "one", baseLayer, nextLayer), two: push(srv, "two", baseLayer, sideLayer)}
	stores := make(map[kind]root)
	for _, which := range []kind{theirs, ours} {
		stores[which] = newRoot(t)
		d := stores[which].start(t, which)
		f.byContainerd = true
		f.fill(t, d)
		d.mustCtr(t, "-n", "default", "images", "rm", "--sync", "example.com/other/name:1")
		d.stop()
	}
	for _, file := range []string{metaFile, indexFile, "io.containerd.snapshotter.v1.native/metadata.db"} {
		want, got := stores[theirs].dump(t, file), stores[ours].dump(t, file)
		if strings.Count(want, "\n") < 10 {
			t.Errorf("the dump of containerd's %s is short: %s", file, want)
		}
		if lines := lineDifferences(want, got); lines != "" {
			t.Errorf("%s is not as containerd writes it:%s", file, lines)
		}
	}
}

// TestSamePull: a pull of ours leaves in the databases what containerd's
// transfer service leaves.
func TestSamePull(t *testing.T) {
	t.Parallel()
	srv := registrytest.New(t)
	one, two := push(srv, "one", baseLayer, nextLayer), push(srv, "two", baseLayer, sideLayer)
	stores := make(map[kind]root)
	for _, which := range []kind{theirs, ours} {
		stores[which] = newRoot(t)
		d := stores[which].start(t, which)
		for _, reference := range []string{one, two, two} {
			if which == ours {
				if _, err := d.holdfast.Ctl("-n", "default", "pull", "--plain-http", reference); err != nil {
					t.Fatal(err)
				}
			} else {
				d.mustCtr(t, "-n", "default", "images", "pull", "--plain-http", reference)
			}
		}
		d.stop()
	}
	for _, file := range []string{metaFile, indexFile} {
		if lines := lineDifferences(stores[theirs].dump(t, file), stores[ours].dump(t, file)); lines != "" {
			t.Errorf("%s is not as containerd writes it:%s", file, lines)
		}
	}
}

// dump lists a database: one line for each key, with its value, and for each
// empty bucket.
func (r root) dump(t *testing.T, file string) string {
	t.Helper()
	var b strings.Builder
	err := r.open(t, file).View(func(tx *bolt.Tx) error {
		return dumpBucket(&b, "", tx.Cursor().Bucket())
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// backendKey is `<namespace>/<number>/<key>`.
var backendKey = regexp.MustCompile(`^([a-z]+)/\d+/`)

func dumpBucket(b *strings.Builder, path string, bucket *bolt.Bucket) error {
	empty := true
	err := bucket.ForEach(func(k, v []byte) error {
		if labels := bucket.Bucket(k); string(k) == "labels" && labels != nil {
			if first, _ := labels.Cursor().First(); first == nil {
				return nil // no labels, whether there is a bucket for them or not
			}
		}
		empty = false
		name := backendKey.ReplaceAllString(string(k), "$1/N/")
		if path == "/v1/parents" {
			name = "IDS"
		}
		if v == nil && bucket.Bucket(k) != nil {
			return dumpBucket(b, path+"/"+name, bucket.Bucket(k))
		}
		fmt.Fprintf(b, "%s/%s = %s\n", path, name, value(name, v))
		return nil
	})
	if empty {
		fmt.Fprintf(b, "%s/ is empty\n", path)
	}
	return err
}

// value tells a value. Of a time only that it is one, of an id of metadata.db nothing.
func value(name string, v []byte) string {
	switch name {
	case "createdat", "updatedat", "expireat":
		var at time.Time
		if err := at.UnmarshalBinary(v); err != nil {
			return fmt.Sprintf("%q, no time: %v", v, err)
		}
		return at.Location().String()
	case "containerd.io/gc.root", "containerd.io/gc.expire":
		return "set"
	case "id":
		_, n := binary.Uvarint(v)
		return fmt.Sprintf("of %t length", n == len(v))
	}
	return fmt.Sprintf("%q", backendKey.ReplaceAll(v, []byte("$1/N/")))
}
