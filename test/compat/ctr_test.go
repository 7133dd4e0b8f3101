package compat

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// The images of the script. They share their first layer.
var (
	baseLayer = layertest.Archive(layertest.Dir("etc", 0o755), layertest.File("etc/release", "1\n"), layertest.Dir("bin", 0o755), layertest.File("bin/tool", strings.Repeat("tool", 3000)).Moded(0o755))
	nextLayer = layertest.Archive(layertest.Dir("etc", 0o755), layertest.File("etc/release", "2\n"), layertest.Dir("bin", 0o755), layertest.Whiteout("bin/tool"), layertest.Link("etc/same", "etc/release"), layertest.Symlink("etc/soft", "same"))
	sideLayer = layertest.Archive(layertest.Dir("var", 0o755), layertest.File("var/data", strings.Repeat("data", 20000)))
)

// script is what is asked of both daemons, in order: the words of `ctr`, with
// names in braces that stand for what the test has made. A line that begins
// with `<` is what the next command reads.
const script = `
version
plugins ls
namespaces ls
images ls
images check
content ls
content active
snapshots ls
snapshots tree
leases ls

images pull --local --plain-http {one}
images pull --local --plain-http {one}
images ls
images ls -q
images ls name=={one}
images ls name~=two
images ls nonsense-field==1
images ls name=
images check
images check -q
images check --snapshotter native
images usage {one}
images usage nope
images inspect {one}
content ls
content ls -q
content ls labels."containerd.io/gc.ref.content.config"
content active
content get {manifest}
content get {config}
content get sha256:0000000000000000000000000000000000000000000000000000000000000000
content get nope
snapshots ls
snapshots tree
snapshots usage
snapshots usage -b {chain1}
snapshots usage nope
snapshots info {chain2}
snapshots info nope
snapshots --snapshotter native ls
snapshots --snapshotter nope ls
snapshots --snapshotter nope info {chain1}

content fetch --plain-http {two}
content ls -q
images ls
images check
snapshots unpack {two.manifest}
snapshots unpack --snapshotter native {two.manifest}
images pull --local --plain-http --snapshotter native {two}
images pull --local --plain-http --label team=red --label tier=1 {two}
snapshots --snapshotter native ls
snapshots --snapshotter native usage -b
images pull --local --plain-http --print-chainid {one}
images pull --local --plain-http --platform linux/s390x {one}
images pull --local --plain-http {host}/no/such:1
images pull --local --plain-http NOT/A-REFERENCE
images pull --local --plain-http {host}/one@{manifest}

images tag --local {one} {host}/tagged:1
images tag --local {one} {host}/tagged:1
images tag --local --force {two} {host}/tagged:1
images tag --local nope {host}/tagged:2
images label {host}/tagged:1 a=b c=d
images label {host}/tagged:1 c=
images label --replace-all {host}/tagged:1 e=f
images label nope a=b
images ls
images rm --sync {host}/tagged:1
images rm {host}/tagged:1
images rm nope

content label {config} mine=1
content label {config} other=2 containerd.io/gc.root=now
content label {config} other=
content label sha256:0000000000000000000000000000000000000000000000000000000000000000 a=b
content ls labels.mine==1
content delete sha256:0000000000000000000000000000000000000000000000000000000000000000
content delete nope
content fetch-blob --plain-http {two} {side}
content fetch-object --plain-http {two} {two}
< forty-two
content ingest --expected-size 9 --expected-digest {forty-two} upload
< forty-two
content ingest --expected-digest {forty-two} upload-again
< forty-three
content ingest --expected-digest {forty-two} bad-digest
< forty-three
content ingest --expected-size 3 bad-size
< forty-three
content ingest --expected-size 30 short
content active
content ls labels.mine
content get {forty-two}
content delete {forty-two}
content get {forty-two}
content delete {forty-two}

leases create --id mine a=b
leases create --id mine
leases create --id short --expires 1h x=y
leases create --id eternal --expires 0
leases create --id bad/../id
leases ls
leases ls -q
leases ls id==mine
leases ls labels.x==y
leases delete --sync short
leases delete short nope
leases delete mine eternal bad/../id
leases ls

namespaces create blue colour=blue
namespaces create blue
namespaces create bad/name
namespaces create -- -x
namespaces create a123456789b123456789c123456789d123456789e123456789f123456789g123456789h1234567
namespaces label blue colour=azure deep=1
namespaces label blue deep=
namespaces label unknown a=b
namespaces ls
namespaces ls -q
-n blue images ls
-n blue images pull --local --plain-http {one}
-n blue images ls
-n blue content ls
-n blue snapshots tree
-n blue snapshots ls
namespaces rm blue
-n blue images rm --sync {one}
-n blue content ls
-n blue snapshots ls
namespaces rm blue
namespaces rm unknown
namespaces ls
-n bad/ns images ls
-n bad/ns content ls
-n bad/ns snapshots ls
-n bad/ns leases ls
-n nobody images ls

snapshots prepare work {chain2}
snapshots prepare work {chain2}
snapshots prepare --target {mnt} again {chain2}
snapshots prepare empty
snapshots prepare orphan nope
snapshots prepare child work
snapshots view look {chain2}
snapshots view look2 {chain1}
snapshots view look {chain1}
snapshots mounts {mnt} work
snapshots mounts {mnt} look
snapshots mounts {mnt} look2
snapshots mounts {mnt} empty
snapshots mounts {mnt} {chain1}
snapshots mounts {mnt} nope
snapshots ls
snapshots tree
snapshots info look
snapshots info work
snapshots label work mine=1 two=2
snapshots label work two=
snapshots label nope mine=1
snapshots usage work
snapshots usage -b look
snapshots commit done work
snapshots commit done2 work
snapshots commit done again
snapshots commit done3 look
snapshots commit done4 {chain1}
snapshots info done
snapshots rm {chain1}
snapshots rm {chain2}
snapshots rm look look2 empty again
snapshots rm done
snapshots rm nope
snapshots --snapshotter native prepare copy {side.chain}
snapshots --snapshotter native prepare copy {chain2}
snapshots --snapshotter native mounts {mnt} copy
snapshots --snapshotter native view peek {base.chain}
snapshots --snapshotter native mounts {mnt} peek
snapshots --snapshotter native commit copied copy
snapshots --snapshotter native usage -b copied
snapshots --snapshotter native rm peek copied
snapshots tree

images mount --snapshotter overlayfs {one} {mnt}
images mount nope {mnt}
snapshots info {mnt}
snapshots mounts {mnt} {mnt}
leases ls
images unmount --rm {mnt}
images mount {one} {mnt}
images unmount --rm {mnt}
images mount --rw --snapshotter native {two} {mnt2}
images unmount {mnt2}
images unmount --rm --snapshotter native {mnt2}
images pull --local --plain-http --platform linux/s390x {s390x}
images mount --platform linux/s390x {s390x} {mnt3}
images unmount --rm {mnt3}
images rm {s390x}
leases ls

content delete {config}
images check
images ls
images pull --local --plain-http {one}
images check
images rm --sync {two} {one}
images rm {host}/one@{manifest}
content label {config} containerd.io/gc.root=
leases create --id flush
leases delete --sync flush
content ls
snapshots ls
snapshots --snapshotter native ls
images ls
namespaces ls
containers ls
tasks ls
`

// listed are the lines of the script for which the daemons may differ: why,
// and what ours says. One that no longer differs is an error too.
var listed = map[string]struct{ ours, why string }{
	"version":                  {`Server:\n  Version:  \S+\n  Revision:.*\n  UUID: UUID\n`, "it is another program"},
	"plugins ls":               {`(?s)^exit 0\nTYPE .*io.containerd.content.v1 +content .*io.containerd.snapshotter.v1 +overlayfs`, "we list what is there, and fewer things are"},
	"containers ls":            {`unknown service containerd\.services\.containers\.v1\.Containers`, "containers come with a later issue"},
	"images mount {one} {mnt}": {`exit 0`, "containerd's mount manager does not notice an unmount, so a second mount fails there; the script does it twice and the first is the same"},
	"tasks ls":                 {`unknown service containerd\.services\.tasks\.v1\.Tasks`, "containers come with a later issue"},
}

// TestCtr asks both daemons the same and compares what containerd's command
// line prints and exits with, byte for byte but for times, durations and
// names that are made up.
func TestCtr(t *testing.T) {
	t.Parallel()
	srv := registrytest.New(t)
	names := scriptNames(t, srv)
	their, our := newRoot(t).start(t, theirs), newRoot(t).start(t, ours)
	want, got := their.play(t, names), our.play(t, names)
	for i, w := range want {
		g := got[i]
		if difference, ok := listed[w.line]; ok {
			if g.text == w.text {
				t.Errorf("ctr %s: no longer differs: take it off the list", w.line)
			} else if !regexp.MustCompile(difference.ours).MatchString(g.text) {
				t.Errorf("ctr %s: ours says\n%s\nwant %s, since %s", w.line, g.text, difference.ours, difference.why)
			}
		} else if g.text != w.text {
			t.Errorf("ctr %s\ncontainerd: %s\nholdfastd:  %s", w.line, w.text, g.text)
		}
	}
	our.mustBeSound(t)
}

// scriptNames makes what the script refers to.
func scriptNames(t *testing.T, srv *registrytest.Server) *strings.Replacer {
	one, two := push(srv, "one", baseLayer, nextLayer), push(srv, "two", baseLayer, sideLayer)
	base, next, side := digest.FromBytes(baseLayer), digest.FromBytes(nextLayer), digest.FromBytes(sideLayer)
	manifest, config := documents(t, srv, one)
	twoManifest, _ := documents(t, srv, two)
	return strings.NewReplacer(
		"{host}", srv.Host(), "{one}", one, "{two}", two,
		"{manifest}", manifest, "{config}", config, "{two.manifest}", twoManifest,
		"{chain1}", base.String(), "{base.chain}", base.String(),
		"{chain2}", identity.ChainID([]digest.Digest{base, next}).String(),
		"{side.chain}", identity.ChainID([]digest.Digest{base, side}).String(),
		"{side}", digest.FromBytes(packed(sideLayer)).String(),
		"{forty-two}", digest.FromString("forty-two").String(),
		"{mnt}", harness.TempDir(t), "{mnt2}", harness.TempDir(t), "{mnt3}", harness.TempDir(t),
		"{s390x}", pushFor(srv, ocispec.Platform{OS: "linux", Architecture: "s390x"}, "s390x", baseLayer),
	)
}

// exchange is one command and what came of it, with what may differ evened out.
type exchange struct{ line, text string }

// play runs the script.
func (d *daemon) play(t *testing.T, names *strings.Replacer) []exchange {
	var played []exchange
	stdin := ""
	for line := range strings.Lines(script) {
		line = strings.TrimSpace(line)
		if text, ok := strings.CutPrefix(line, "< "); ok {
			stdin = text
			continue
		} else if line == "" {
			continue
		}
		args := strings.Fields(names.Replace(line))
		if args[0] != "-n" {
			args = append([]string{"-n", "default"}, args...)
		}
		out := d.ctrInput(t, stdin, args...)
		stdin = ""
		if line == "content active" { // it has no order
			lines := slices.Sorted(strings.Lines(out.stdout))
			out.stdout = strings.Join(lines, "")
		}
		played = append(played, exchange{line, d.even(fmt.Sprintf("exit %d\n%s--\n%s", out.code, out.stdout, out.stderr))})
	}
	return played
}

// What two runs of the same command print differently, in this order.
var evened = []struct {
	pattern *regexp.Regexp
	with    string
}{
	{regexp.MustCompile(`time="[^"]*" level=info [^\n]*\n`), ""},
	{regexp.MustCompile(`time="[^"]*"`), "time=TIME"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d| \+0000 UTC)`), "TIME"},
	{regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`), "UUID"},
	{regexp.MustCompile(`[ \t]+AGE[ \t]+`), " AGE "},
	{regexp.MustCompile(`[ \t]+(Less than a second|\d+ seconds?|About a minute|\d+ minutes)[ \t]+`), " AGE "},
	{regexp.MustCompile(`(?m)^done: \S+\s*$`), "done: TIME"},
	// The frames of a progress display depend on the moment.
	{regexp.MustCompile(`(?s)exit 0\n.*elapsed: [^\n]*\n`), "exit 0\nPROGRESS\n"},
	{regexp.MustCompile(`snapshots/\d+`), "snapshots/N"},
	{regexp.MustCompile(`[0-9]+-[A-Za-z0-9_-]{4} `), "RANDOM "},
	// The words of an error are each daemon's own. What programs go by is its kind, at the end.
	{regexp.MustCompile(`(?m)^ctr: (.*: )?([^:\n]+)$`), "ctr: ... $2"},
	{regexp.MustCompile(`error="((\\.|[^"\\])*: )?((\\.|[^"\\:])*)"`), `error="... $3"`},
}

// labels is a line of labels, which ctr prints in any order.
var labels = regexp.MustCompile(`(?m)^[^ =,\n]+=[^=,\n]*(,[^ =,\n]+=[^=,\n]*)+$`)

func (d *daemon) even(text string) string {
	text = strings.NewReplacer(d.root, "ROOT", d.socket, "SOCKET").Replace(text)
	for _, e := range evened {
		text = e.pattern.ReplaceAllString(text, e.with)
	}
	return labels.ReplaceAllStringFunc(text, func(line string) string {
		pairs := strings.Split(line, ",")
		slices.Sort(pairs)
		return strings.Join(pairs, ",")
	})
}

// mustBeSound runs the consistency check of our daemon.
func (d *daemon) mustBeSound(t testing.TB) {
	t.Helper()
	if d.kind != ours {
		return
	}
	d.collect(t)
	if err := d.holdfast.Check(); err != nil {
		t.Errorf("the store is not sound: %v", err)
	}
}

// TestDiff compares what the daemons make of the difference of two snapshots,
// entry by entry.
func TestDiff(t *testing.T) {
	t.Parallel()
	srv := registrytest.New(t)
	reference := push(srv, "one", baseLayer, nextLayer)
	base, next := digest.FromBytes(baseLayer), digest.FromBytes(nextLayer)
	top := identity.ChainID([]digest.Digest{base, next}).String()
	their, our := newRoot(t).start(t, theirs), newRoot(t).start(t, ours)
	for _, snapshotter := range []string{"overlayfs", "native"} {
		for _, d := range []*daemon{their, our} {
			if err := d.pull(t, "default", snapshotter, reference); err != nil {
				t.Fatal(err)
			}
		}
		for _, args := range [][]string{{top}, {base.String()}, {base.String(), top},
			{"--media-type", "application/vnd.oci.image.layer.v1.tar", top}} {
			args = append([]string{"-n", "default", "snapshots", "--snapshotter", snapshotter, "diff"}, args...)
			want, err := archiveEntries(their.mustCtr(t, args...))
			if err != nil {
				t.Fatalf("ctr %q of containerd: %v", args, err)
			}
			got, err := archiveEntries(our.mustCtr(t, args...))
			if err != nil {
				t.Errorf("ctr %q of ours: %v", args, err)
			} else if got != want {
				t.Errorf("ctr %q: ours is\n%s\nwant\n%s", args, got, want)
			}
		}
	}
}

// archiveEntries tells what a layer archive holds.
func archiveEntries(archive string) (string, error) {
	var r io.Reader = strings.NewReader(archive)
	if strings.HasPrefix(archive, "\x1f\x8b") {
		unzipped, err := gzip.NewReader(r)
		if err != nil {
			return "", err
		}
		r = unzipped
	}
	var b strings.Builder
	for entries := tar.NewReader(r); ; {
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return b.String(), nil
		} else if err != nil {
			return b.String(), err
		}
		body, err := io.ReadAll(entries)
		if err != nil {
			return b.String(), err
		}
		fmt.Fprintf(&b, "%q %c %o %d:%d %q %d,%d %q %.16s", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Linkname, h.Devmajor, h.Devminor, h.PAXRecords, digest.FromBytes(body).Encoded())
		if !strings.HasPrefix(h.Name, "etc/.wh.") && !bytes.HasPrefix([]byte(h.Name), []byte("bin/.wh.")) {
			fmt.Fprintf(&b, " %s", h.ModTime.UTC())
		}
		b.WriteByte('\n')
	}
}

// collect has the daemon collect, and waits for it.
func (d *daemon) collect(t testing.TB) {
	t.Helper()
	service, ctx := d.client.LeasesService(), in(t, "default")
	l, err := service.Create(ctx, leases.WithRandomID())
	if err == nil {
		err = service.Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		t.Errorf("collect in %s: %v", d.kind, err)
	}
}
