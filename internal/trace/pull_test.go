package trace

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/fsck"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/layer/layertest"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/ref"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/auth"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
	"github.com/holdfast-dev/holdfast/internal/snapshot"
	"github.com/holdfast-dev/holdfast/internal/snapshot/overlay"
)

// shop is a registry, a store, and a Puller between them that records.
type shop struct {
	srv    *registrytest.Server
	db     *meta.DB
	plain  *pull.Puller
	puller *Puller
	traces *Recorder
	before string // the host to ask first, if any
}

func newShop(t testing.TB, downloads int) *shop {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers are unpacked with their owners, which needs root")
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	s := &shop{srv: registrytest.New(t)}
	blobs, err := content.Open(filepath.Join(dir, "content"), filepath.Join(dir, "trash"), content.Options{})
	must(err)
	over, err := overlay.Open(filepath.Join(dir, "overlayfs"), overlay.Options{})
	must(err)
	drivers := map[string]snapshot.Driver{"overlayfs": over}
	s.db, err = meta.Open(t.Context(), filepath.Join(dir, "meta.db"), blobs, drivers, meta.Options{NoSync: true})
	must(err)
	client := registry.New(registry.Options{Backoff: time.Millisecond, MirrorDial: time.Second,
		Credentials: auth.For(s.srv.Host(), auth.Credential{Username: "me", Password: "secret"}),
		Hosts: func(_ context.Context, host string) (list []hosts.Host, err error) {
			if s.before != "" {
				list = append(list, hosts.Host{Scheme: "http", Host: s.before, Path: "/v2", Capabilities: hosts.Everything})
			}
			return append(list, hosts.Host{Scheme: "http", Host: host, Path: "/v2", Capabilities: hosts.Everything}), nil
		}})
	s.plain = pull.New(s.db, func(reference string, session registry.Session) (*registry.Repository, string, string, error) {
		r, err := ref.Parse(reference)
		if err != nil {
			return nil, "", "", err
		}
		repo, err := client.Repository(r, session)
		return repo, r.Host, r.Path, err
	}, nil, pull.Options{Downloads: downloads})
	s.traces = open(t, filepath.Join(dir, "traces"), Options{})
	s.puller = NewPuller(s.plain, s.traces)
	t.Cleanup(func() {
		must(s.plain.Close())
		_, err := s.db.Collect(context.Background())
		must(err)
		rep, err := fsck.Check(context.Background(), fsck.Store{DB: s.db, Content: blobs, Drivers: drivers}, fsck.Options{Deep: true})
		must(err)
		for _, f := range rep.Findings {
			t.Errorf("store: %s %s: %s", f.Class, f.Subject, f.Detail)
		}
		must(s.db.Close())
		must(over.Close())
		must(blobs.Close())
	})
	return s
}

// push puts an image of so many layers, of incompressible files, into the registry.
func (s *shop) push(tag string, layers, size int) registrytest.Image {
	var list []registrytest.Layer
	for i := range layers {
		noise := make([]byte, size)
		random := rand.New(rand.NewPCG(uint64(i), 1))
		for k := range noise {
			noise[k] = byte(random.Uint32())
		}
		archive := layertest.Archive(layertest.File(fmt.Sprintf("file%d", i), string(noise)))
		var z bytes.Buffer
		w, _ := gzip.NewWriterLevel(&z, gzip.BestSpeed)
		w.Write(archive)
		w.Close()
		list = append(list, registrytest.Layer{Data: z.Bytes(), DiffID: digest.FromBytes(archive)})
	}
	return s.srv.Push("app", tag, list...)
}

// pull pulls a tag and returns its record.
func (s *shop) pull(t testing.TB, tag string, req pull.Request) (Record, error) {
	t.Helper()
	req.ID = NewID()
	req.Platform = "linux/amd64"
	_, pullErr := s.puller.Pull(t.Context(), s.db.Space("default"), s.srv.Host()+"/app:"+tag, req)
	rec, err := s.traces.Get(req.ID)
	if err != nil {
		t.Fatal(err)
	}
	return rec, pullErr
}

// late stands before the registry and holds back the answers for blobs.
func (s *shop) late(t *testing.T, delay time.Duration) {
	target, err := url.Parse(s.srv.URL())
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			time.Sleep(delay) // as a slow registry does
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	s.before = strings.TrimPrefix(front.URL, "http://")
}

// TestVerdictOnRealPulls pulls from registries that are slow in one way, and has it named.
func TestVerdictOnRealPulls(t *testing.T) {
	for _, test := range []struct {
		name      string
		downloads int
		layers    int
		slow      func(t *testing.T, s *shop, img registrytest.Image)
		want      Resource
		words     string // of the sentence
	}{
		{"late answers", 3, 1, func(t *testing.T, s *shop, _ registrytest.Image) { s.late(t, 300*time.Millisecond) }, Registry, "requests"},
		{"late answers, one after the other", 1, 4, func(t *testing.T, s *shop, _ registrytest.Image) { s.late(t, 200*time.Millisecond) }, Slots, "more downloads"},
		{"bytes that trickle", 3, 2, func(t *testing.T, s *shop, img registrytest.Image) {
			s.srv.Fault("/blobs/"+img.Layers[1].Digest.String(), registrytest.Fault{Trickle: 10 * time.Millisecond, Piece: 1000})
		}, Network, "layer 2 of 2"},
		{"a slow token server", 3, 1, func(t *testing.T, s *shop, _ registrytest.Image) {
			s.srv.Require(registrytest.Auth{User: "me", Password: "secret", Slow: 400 * time.Millisecond})
		}, Login, "logging in"},
		{"come back later", 3, 1, func(t *testing.T, s *shop, img registrytest.Image) {
			s.srv.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Status: 429, RetryAfter: "1", Times: 1})
		}, Registry, "1 of "},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newShop(t, test.downloads)
			img := s.push("1", test.layers, 50_000)
			test.slow(t, s, img)
			rec, err := s.pull(t, "1", pull.Request{})
			if err != nil {
				t.Fatal(err)
			}
			v := rec.Verdict
			if v.Resource != test.want || !strings.Contains(v.Text, test.words) {
				t.Errorf("%s\n%+v", v.Text, v.Parts)
			}
			var path time.Duration
			for _, p := range v.Parts {
				path += p.Took
			}
			if diff := rec.Elapsed - path; diff < -time.Millisecond || diff > time.Millisecond {
				t.Errorf("the critical path has %s of %s", path, rec.Elapsed)
			}
		})
	}
}

// TestRecordOfAPull has what a record is to hold, for a pull whose mirror is
// down and one of whose requests is repeated.
func TestRecordOfAPull(t *testing.T) {
	s := newShop(t, 3)
	s.before = registrytest.Refused(t)
	img := s.push("1", 2, 50_000)
	s.srv.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Status: 503, Times: 1})
	rec, err := s.pull(t, "1", pull.Request{})
	if err != nil {
		t.Fatal(err)
	}
	if rec.Target != img.Descriptor.Digest || rec.Namespace != "default" || rec.Error != "" || rec.Running || len(rec.Layers) != 2 {
		t.Fatalf("%+v", rec)
	}
	l := rec.Layers[0]
	if l.Digest != img.Layers[0].Digest || l.Size != img.Layers[0].Size || l.Fetched != l.Size || l.Host != s.srv.Host() || l.Retries != 1 ||
		rec.Layers[1].Parent != l.ID || rec.Layers[1].Retries != 0 {
		t.Errorf("layers %+v", rec.Layers)
	}
	has := map[Stage]Span{}
	for _, span := range append(rec.Spans, l.Spans...) {
		has[span.Stage] = span
		if span.Open || span.Elapsed < 0 || span.end() > rec.Elapsed {
			t.Errorf("span %+v of %s", span, rec.Elapsed)
		}
	}
	for _, stage := range []Stage{StageResolve, StageBegin, StageDocuments, StageClaim, StageLayers, StageRecord,
		StageAnswer, StageRetry, StageQueue, StageFetch, StageKeep, StageInflate, StageVerify, StageEmit, StageFlush, StageBatch, StageSeal, StageSnapshot, StageMeta} {
		if _, ok := has[stage]; !ok {
			t.Errorf("there is no %s", stage)
		}
	}
	if has[StageInflate].Bytes < 50_000 || has[StageFetch].Bytes != l.Size || has[StageFetch].Note != s.srv.Host() {
		t.Errorf("%+v, %+v", has[StageInflate], has[StageFetch])
	}
	if len(rec.Hosts) != 2 || rec.Hosts[0].Name != s.before || rec.Hosts[0].Down == "" || rec.Hosts[1].Name != s.srv.Host() || rec.Hosts[1].Failures != 1 {
		t.Errorf("hosts %+v", rec.Hosts)
	}

	rec, err = s.pull(t, "1", pull.Request{})
	if err != nil || len(rec.Layers) != 2 || !rec.Layers[0].Present || len(rec.Layers[0].Spans) != 0 {
		t.Errorf("what is here: %+v, %v", rec.Layers, err)
	}
}

// TestRecordOfAFailedPull: it says why, and where the time went until then.
func TestRecordOfAFailedPull(t *testing.T) {
	s := newShop(t, 3)
	img := s.push("1", 2, 50_000)
	s.srv.Fault("/blobs/"+img.Layers[1].Digest.String(), registrytest.Fault{Status: 404})
	rec, err := s.pull(t, "1", pull.Request{})
	if err == nil || rec.Error != err.Error() || rec.Running || len(rec.Layers) != 2 || rec.Verdict.Text == "" {
		t.Errorf("%+v, %v", rec, err)
	}
	for _, l := range rec.Layers {
		for _, span := range l.Spans {
			if span.Open {
				t.Errorf("span %+v has not ended", span)
			}
		}
	}
	if rec, err := s.pull(t, "2", pull.Request{}); err == nil || rec.Error == "" || len(rec.Layers) != 0 {
		t.Errorf("an absent tag: %+v, %v", rec, err)
	}
}

// TestRecordOfAJoinedPull: the second pull of an image says whom it waited for.
func TestRecordOfAJoinedPull(t *testing.T) {
	s := newShop(t, 3)
	img := s.push("1", 1, 50_000)
	s.srv.Fault("/blobs/"+img.Layers[0].Digest.String(), registrytest.Fault{Trickle: 10 * time.Millisecond, Piece: 1000})
	begun, once := make(chan struct{}), sync.Once{}
	first := make(chan Record, 1)
	go func() {
		rec, err := s.pull(t, "1", pull.Request{Progress: func(e pull.Event) {
			if e.Stage == pull.StageFetching {
				once.Do(func() { close(begun) })
			}
		}})
		if err != nil {
			t.Error(err)
		}
		first <- rec
	}()
	<-begun
	second, err := s.pull(t, "1", pull.Request{})
	if err != nil {
		t.Fatal(err)
	}
	if len(second.Layers) != 1 || !second.Layers[0].Joined || second.Verdict.Resource != Joined {
		t.Errorf("%+v: %s", second.Layers, second.Verdict.Text)
	}
	if rec := <-first; rec.Layers[0].Joined || rec.Verdict.Resource != Network {
		t.Errorf("the first pull: %s", rec.Verdict.Text)
	}
}

// BenchmarkPull pulls an image of three layers of 4 MiB, with a record and without.
func BenchmarkPull(b *testing.B) {
	for _, name := range []string{"plain", "traced"} {
		b.Run(name, func(b *testing.B) {
			s := newShop(b, 3)
			s.push("1", 3, 4<<20)
			b.ResetTimer()
			for range b.N {
				sp := s.db.Space("default")
				var err error
				reference := s.srv.Host() + "/app:1"
				if name == "plain" {
					_, err = s.plain.Pull(b.Context(), sp, reference, pull.Request{Platform: "linux/amd64"})
				} else {
					_, err = s.puller.Pull(b.Context(), sp, reference, pull.Request{Platform: "linux/amd64"})
				}
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := sp.DeleteImage(b.Context(), reference, ""); err != nil {
					b.Fatal(err)
				}
				if _, err := s.db.Collect(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
