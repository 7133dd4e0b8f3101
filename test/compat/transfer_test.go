package compat

import (
	"testing"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

func TestTransferLook(t *testing.T) {
	t.Parallel()
	srv := registrytest.New(t)
	one := push(srv, "one", baseLayer, nextLayer)
	for _, k := range []kind{theirs, ours} {
		d := newRoot(t).start(t, k)
		for range 2 {
			o := d.ctr(t, "images", "pull", "--plain-http", one)
			t.Logf("%s: exit %d\n%q\n%s", k, o.code, o.stdout, o.stderr)
		}
		o := d.ctr(t, "images", "pull", "--plain-http", "--snapshotter", "native", one)
		t.Logf("%s: exit %d\n%s\n%s", k, o.code, o.stdout, o.stderr)
		o = d.ctr(t, "images", "pull", "--plain-http", "--all-platforms", one)
		t.Logf("%s: exit %d\n%s\n%s", k, o.code, o.stdout, o.stderr)
		o = d.ctr(t, "images", "tag", one, srv.Host()+"/other:1")
		t.Logf("%s: exit %d\n%s\n%s", k, o.code, o.stdout, o.stderr)
		o = d.ctr(t, "images", "tag", one, srv.Host()+"/other:1")
		t.Logf("%s: exit %d\n%s\n%s", k, o.code, o.stdout, o.stderr)
	}
}
