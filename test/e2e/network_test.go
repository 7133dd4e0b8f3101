package e2e

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/test/harness"
)

// site is a daemon at one end of a line, and at the other a registry with a mirror before it.
type site struct {
	t              *testing.T
	line           *line
	shape          shape
	origin, mirror *registrytest.Server
	img            *harness.Image
	d              *harness.Daemon
	certs          string
}

const repository = "team/app"

// newSite has both hosts serve an image of layers.
func newSite(t *testing.T, s shape, layers ...harness.Layer) *site {
	t.Helper()
	harness.NeedRoot(t)
	t.Parallel()
	at := &site{t: t, shape: s, img: harness.NewImage(t, layers...), certs: harness.TempDir(t)}
	at.line = newLine(t, s, 1)
	at.origin = at.host(farAddress + ":0")
	at.mirror = at.host(farAddress + ":0")
	at.before(at.mirror.Host())
	at.d = harness.Start(t, harness.Options{
		Config: hostsConfig(at.certs), Enter: at.line.near.enter,
		Env: []string{"NO_PROXY=*", "no_proxy=*"}, // a proxy could not be reached from there
	})
	t.Cleanup(func() { at.d.Stop(t) })
	return at
}

// host starts one that has the image.
func (s *site) host(address string) *registrytest.Server {
	s.t.Helper()
	srv := s.line.registry(s.t, address)
	stock(srv, s.img, "1")
	return srv
}

// stock has a registry serve an image.
func stock(srv *registrytest.Server, img *harness.Image, tag string) {
	for dgst, body := range img.Blobs {
		if dgst != img.Target.Digest {
			srv.PushBlob(repository, body)
		}
	}
	srv.PushManifest(repository, tag, img.Target.MediaType, img.Blobs[img.Target.Digest])
}

// before has mirrors asked before the registry. Whoever is dead costs a second at most.
func (s *site) before(mirrors ...string) {
	s.t.Helper()
	text := fmt.Sprintf("server = 'http://%s'\ndial_timeout = '1s'\n", s.origin.Host())
	for _, m := range mirrors {
		text += fmt.Sprintf("[host.'http://%s']\ncapabilities = ['pull', 'resolve']\n", m)
	}
	write(s.t, filepath.Join(s.certs, s.origin.Host(), "hosts.toml"), text)
}

func (s *site) ref() string { return s.origin.Host() + "/" + repository + ":1" }

// pull pulls the image, which must end within so long.
func (s *site) pull(within time.Duration) result {
	s.t.Helper()
	begun := time.Now()
	res := holdfast(s.t, s.d.Socket, "pull", s.ref())
	took := time.Since(begun)
	s.t.Logf("exit code %d after %s", res.code, took.Round(time.Millisecond))
	if took > within {
		s.t.Errorf("the pull took %s, more than %s", took, within)
	}
	return res
}

// mustPull pulls the image, which must then be here, whole.
func (s *site) mustPull(within time.Duration) {
	s.t.Helper()
	s.pull(within).wants(s.t, 0, s.ref())
	whole(s.t, s.d)
	checkTree(s.t, s.d, "overlayfs", s.img)
}

// mustFail pulls the image, which must fail with an error that says all of parts, and leave a whole store.
func (s *site) mustFail(within time.Duration, parts ...string) {
	s.t.Helper()
	s.pull(within).wants(s.t, 1, parts...)
	whole(s.t, s.d)
	if images := s.d.Images(s.t); len(images) > 0 {
		s.t.Errorf("after a failed pull there are images %v", images)
	}
}

// mustResume pulls an image of one layer that a first pull has got a part of.
func (s *site) mustResume(within time.Duration) {
	s.t.Helper()
	kept := s.kept(s.layer())
	s.origin.Forget()
	s.mirror.Forget()
	s.mustPull(within)
	if sent := s.sent(s.origin) + s.sent(s.mirror); sent > s.img.LayerBytes()-kept {
		s.t.Errorf("%d bytes of a layer of %d were kept, and then %d sent", kept, s.img.LayerBytes(), sent)
	}
}

// kept is how many bytes are here of a layer that was cut off.
func (s *site) kept(layer digest.Digest) (n int64) {
	s.t.Helper()
	for _, st := range s.d.Ingests(s.t) {
		if strings.Contains(st.Ref, string(layer)) {
			n = max(n, st.Offset)
		}
	}
	if n == 0 {
		s.t.Error("nothing is kept of the layer that was cut off")
	}
	return n
}

// layer is the image's first.
func (s *site) layer() digest.Digest { return s.img.Layers[0].Digest }

// sent is how many bytes of the first layer a host has sent, or given to TCP to be sent.
func (s *site) sent(srv *registrytest.Server) int64 { return srv.Bytes(s.layer().String()) }

// noisy is a layer of one file of so many bytes, which don't compress.
func noisy(seed byte, size int) harness.Layer {
	body := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(body)
	dir := fmt.Sprintf("noise%d", seed)
	return harness.Layer{harness.Dir(dir), harness.File(dir+"/body", body), harness.Symlink(dir+"/link", "body")}
}

const mebi = 1 << 20

// TestSlowMirrors: a mirror that falls silent costs half a minute, one that trickles a minute, and the registry sends what
// is missing. If that is dead the error names the mirror, and what came is not fetched again. All of them at once, and
// first in this file, since they take so long.
func TestSlowMirrors(t *testing.T) {
	const size = 2 * mebi
	stalls := registrytest.Fault{Stall: true, At: size / 2}
	trickles := registrytest.Fault{Trickle: 100 * time.Millisecond, Piece: 64}
	pulls := []struct {
		tag   string
		fault registrytest.Fault
		alone string // what the error says where the registry is dead
		img   *harness.Image
		err   error
		took  time.Duration
	}{
		{tag: "stalls", fault: stalls},
		{tag: "silent", fault: registrytest.Fault{Silent: true}},
		{tag: "trickles", fault: trickles},
		{tag: "stalls-alone", fault: stalls, alone: "no byte arrived"},
		{tag: "trickles-alone", fault: trickles, alone: "bytes arrived in 1m"},
	}
	s := newSite(t, slowLine, noisy(1, 1000))
	const dead = "dead.invalid"
	write(t, filepath.Join(s.certs, dead, "hosts.toml"), fmt.Sprintf("server = 'http://%s:1'\n[host.'http://%s']\n", farAddress, s.mirror.Host()))
	name := func(tag, alone string) string {
		if alone != "" {
			return dead + "/" + repository + ":" + tag
		}
		return s.origin.Host() + "/" + repository + ":" + tag
	}
	var wg sync.WaitGroup
	for i := range pulls {
		p := &pulls[i]
		p.img = harness.NewImage(t, noisy(byte(10+i), size))
		stock(s.origin, p.img, p.tag)
		stock(s.mirror, p.img, p.tag)
		s.mirror.Fault(p.img.Layers[0].Digest.String(), p.fault)
		wg.Go(func() {
			begun := time.Now()
			_, p.err = s.d.Ctl("pull", name(p.tag, p.alone))
			p.took = time.Since(begun)
		})
	}
	wg.Wait()
	whole(t, s.d)
	s.mirror.Heal()
	for _, p := range pulls {
		layer := p.img.Layers[0].Digest
		if p.took > 75*time.Second {
			t.Errorf("%s: took %s", p.tag, p.took)
		}
		if p.alone != "" {
			if p.err == nil {
				t.Errorf("%s: pulled from a mirror that does not send it", p.tag)
				continue
			}
			for _, part := range []string{s.mirror.Host(), layer.String(), p.alone} {
				if !strings.Contains(p.err.Error(), part) {
					t.Errorf("%s: no %q in %v", p.tag, part, p.err)
				}
			}
			kept := s.kept(layer)
			s.mirror.Forget()
			holdfast(t, s.d.Socket, "pull", name(p.tag, p.alone)).wants(t, 0, p.tag)
			if sent := s.mirror.Bytes(layer.String()); sent > p.img.LayerBytes()-kept {
				t.Errorf("%s: %d bytes of a layer of %d were kept, and then %d sent", p.tag, kept, p.img.LayerBytes(), sent)
			}
		} else if p.err != nil {
			t.Errorf("%s: %v", p.tag, p.err)
			continue
		}
		checkTree(t, s.d, "overlayfs", p.img)
	}
	whole(t, s.d)
}

// TestShapedLine: a large layer and small ones come through 50 Mbit/s and 40 ms in not much more time than the line needs.
func TestShapedLine(t *testing.T) {
	s := newSite(t, slowLine, append([]harness.Layer{noisy(1, 40*mebi)}, harness.Random(1, 4)...)...)
	s.before() // no mirror
	least := slowLine.takes(s.img.LayerBytes())
	begun := time.Now()
	s.mustPull(3*least + 5*time.Second)
	if took := time.Since(begun); took < least {
		t.Errorf("%s is less than the %s that the line needs: it is not shaped", took, least)
	}
	if n := s.origin.Bytes("/blobs/"); n > s.img.LayerBytes()+mebi {
		t.Errorf("%d bytes were sent of layers of %d", n, s.img.LayerBytes())
	}
	s.inRanges(s.origin)
}

// inRanges fails unless a host was asked for several ranges of the first layer.
func (s *site) inRanges(srv *registrytest.Server) {
	s.t.Helper()
	if n := srv.Count("GET /v2/" + repository + "/blobs/" + s.layer().String()); n < 4 {
		s.t.Errorf("a layer of %d bytes came by %d requests, want several ranges of it", s.img.LayerBytes(), n)
	}
}

// TestLossyLine: lost packets cost time and nothing else.
func TestLossyLine(t *testing.T) {
	t.Parallel()
	for _, percent := range []float64{1, 2} {
		t.Run(fmt.Sprint(percent), func(t *testing.T) {
			s := newSite(t, slowLine.lossy(percent/100), harness.Random(2, 3)...)
			s.before()
			s.mustPull(30 * time.Second)
			if n := s.origin.Bytes("/blobs/"); n > s.img.LayerBytes()+mebi {
				t.Errorf("%d bytes were sent of layers of %d", n, s.img.LayerBytes())
			}
		})
	}
}

// dies kills a host when so much of the first layer is on its way.
func (s *site) dies(srv *registrytest.Server, after int64) (dead chan struct{}) {
	srv.Fault(s.layer().String(), registrytest.Fault{Trickle: 1, Piece: 32 << 10}) // so that what is sent gets counted as it goes
	dead = make(chan struct{})
	go func() {
		defer close(dead)
		defer srv.Kill()
		for tick := time.NewTicker(5 * time.Millisecond); s.sent(srv) < after; {
			select {
			case <-tick.C:
			case <-s.t.Context().Done():
				return
			}
		}
	}()
	return dead
}

// TestMirrorDies: a mirror that dies while it sends a layer is replaced by the registry, which sends what is missing. If
// that is dead too the error names the mirror, and what came is not fetched again.
func TestMirrorDies(t *testing.T) {
	t.Parallel()
	const size = 8 * mebi
	for _, how := range []string{"process", "reset"} {
		t.Run(how, func(t *testing.T) {
			s := newSite(t, slowLine, noisy(2, size))
			if how == "process" {
				s.dies(s.mirror, size/2)
			} else {
				s.mirror.Fault(s.layer().String(), registrytest.Fault{Drop: true})
				s.mirror.Fault(s.layer().String(), registrytest.Fault{Reset: true, At: size / 2, Times: 1})
			}
			s.mustPull(10 * time.Second)
			if from := s.sent(s.origin); from == 0 || from == s.img.LayerBytes() {
				t.Errorf("the registry has sent %d of %d bytes", from, s.img.LayerBytes())
			}
		})
	}
	t.Run("among several ranges", func(t *testing.T) {
		const size = 40 * mebi
		s := newSite(t, slowLine, noisy(9, size))
		s.dies(s.mirror, size*5/8)
		s.mustPull(2*slowLine.takes(size) + 10*time.Second)
		if from := s.sent(s.origin); from == 0 || from == s.img.LayerBytes() {
			t.Errorf("the registry has sent %d of %d bytes", from, s.img.LayerBytes())
		}
		s.inRanges(s.mirror)
	})
	t.Run("registry dead", func(t *testing.T) {
		s := newSite(t, slowLine, noisy(3, size))
		s.origin.Kill()
		address := s.mirror.Host()
		dead := s.dies(s.mirror, size*3/4)
		s.mustFail(15*time.Second, address, s.layer().String())
		<-dead
		s.mirror = s.host(address)
		s.mustResume(15 * time.Second)
	})
}

// TestMirrorLies: a mirror that sends other bytes than it should costs no more than what it has sent. If there is nobody
// else the error names it.
func TestMirrorLies(t *testing.T) {
	t.Parallel()
	const size = 2 * mebi
	for name, lies := range map[string][]registrytest.Fault{
		"wrong bytes":         {{Corrupt: true, At: size / 2}},
		"another blob":        {{Replace: make([]byte, size)}},
		"truncated":           {{Truncate: true, At: 1000}},
		"truncated, no range": {{Truncate: true, At: size / 2, IgnoreRange: true}},
		"another range":       {{WrongRange: true}, {Truncate: true, At: size / 2, Times: 1}},
		"longer":              {{Excess: []byte("more")}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, slowLine, noisy(4, size))
			for _, f := range lies {
				s.mirror.Fault("GET /v2/"+repository+"/blobs/"+s.layer().String(), f)
			}
			down := s.origin.Host()
			s.origin.Kill()
			s.mustFail(15*time.Second, s.mirror.Host(), s.layer().String())
			s.origin = s.host(down)
			s.mustPull(15 * time.Second)
		})
	}
}

// TestRangeLies: one of several ranges of a large layer comes wrong from a mirror; the registry sends all of it.
func TestRangeLies(t *testing.T) {
	s := newSite(t, slowLine, noisy(14, 40*mebi))
	s.mirror.Fault(s.layer().String(), registrytest.Fault{Corrupt: true, At: 1000, Skip: 3, Times: 1})
	s.mustPull(4*slowLine.takes(s.img.LayerBytes()) + 10*time.Second)
	s.inRanges(s.mirror)
	if from := s.sent(s.origin); from < s.img.LayerBytes() {
		t.Errorf("the registry has sent %d of %d bytes", from, s.img.LayerBytes())
	}
}

// TestMirrorHangs: a mirror that doesn't take connections costs a second. If the registry doesn't either, the error names
// it, and a mirror that does is enough.
func TestMirrorHangs(t *testing.T) {
	s := newSite(t, slowLine, noisy(5, mebi))
	s.before(nowhere+":80", s.mirror.Host())
	s.mustPull(5 * time.Second)
	if s.sent(s.origin) > 0 {
		t.Error("the registry was asked before the second mirror")
	}
	lost := nowhere + ":81"
	hangs := fmt.Sprintf("server = 'http://%s'\ndial_timeout = '1s'\n[host.'http://%s:80']\n", lost, nowhere)
	file := filepath.Join(s.certs, lost, "hosts.toml")
	write(t, file, hangs)
	begun := time.Now()
	holdfast(t, s.d.Socket, "pull", lost+"/"+repository+":1").wants(t, 1, lost, "no connection within 1s", nowhere+":80")
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("nobody takes connections, and the pull gives up after %s", took)
	}
	write(t, file, hangs+fmt.Sprintf("[host.'http://%s']\n", s.mirror.Host()))
	holdfast(t, s.d.Socket, "pull", lost+"/"+repository+":1").wants(t, 0, lost)
	whole(t, s.d)
}

// TestBadCompany: one mirror hangs, one lies, one dies, and packets get lost; the pull is right all the same. Without
// the registry the error names every host that was asked.
func TestBadCompany(t *testing.T) {
	const size = 2 * mebi
	s := newSite(t, slowLine.lossy(0.01), append([]harness.Layer{noisy(8, size)}, harness.Random(8, 2)...)...)
	liar, mortal := s.mirror, s.host(farAddress+":0")
	liar.Fault("/blobs/", registrytest.Fault{Corrupt: true, At: 500})
	mortal.Fault(s.layer().String(), registrytest.Fault{Drop: true})
	mortal.Fault(s.layer().String(), registrytest.Fault{Reset: true, At: size / 2, Times: 1})
	s.before(nowhere+":80", liar.Host(), mortal.Host())
	alive := s.origin.Host()
	s.origin.Kill()
	s.mustFail(45*time.Second, alive, liar.Host(), mortal.Host(), nowhere+":80", s.layer().String())
	s.origin = s.host(alive)
	s.mustPull(45 * time.Second)
}
