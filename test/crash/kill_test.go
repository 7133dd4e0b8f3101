package crash

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-dev/holdfast/test/harness"
)

const (
	killCount    = 50 // at least
	killsEach    = 10 // at least, in each stage
	killAttempts = 120

	// spreadCount and shortCount are how the first moments are drawn: over the
	// whole pull, and in each of the stages that are too short to be met by that.
	spreadCount = 26
	shortCount  = 12
)

// TestKillMoments kills the daemon by SIGKILL at moments of a pull: some drawn over
// its whole duration, some in the stages that are short. What is recorded then is
// whole, what is not recorded is gone or leased, and the next pull ends well and
// fetches what was not here, and nothing else.
func TestKillMoments(t *testing.T) {
	harness.NeedRoot(t)
	seed := newSeed(t)
	v := newVictim(t, seed)
	rnd := rand.New(rand.NewPCG(seed, 3))
	kills, hits := 0, make(map[stage]int)
	for n := 0; !t.Failed(); n++ {
		m := v.draw(rnd, n, hits)
		if n >= spreadCount+2*shortCount && m.in == "" && kills >= killCount {
			break
		}
		if n == killAttempts {
			t.Errorf("not %d kills and %d in each stage after %d attempts", killCount, killsEach, n)
		}
		t.Run(fmt.Sprintf("%02d", n), func(t *testing.T) {
			stages, killed := v.kill(t, m)
			if killed {
				kills++
			}
			for s := range stages {
				hits[s]++
			}
		})
	}
	t.Logf("%d kills; in each stage, of which several may be under way: %v", kills, hits)
}

// moment is when to kill.
type moment struct {
	in    stage         // "": at any
	nth   int           // time that the stage begins, from 1
	after time.Duration // since then, or since the pull was asked for
}

func (m moment) String() string {
	if m.in == "" {
		return fmt.Sprintf("after %s", m.after)
	}
	return fmt.Sprintf("%s after the beginning of %s no. %d", m.after, m.in, m.nth)
}

// draw draws the n-th moment: when the first ones have all been, from a stage
// that was not hit often enough.
func (v *victim) draw(rnd *rand.Rand, n int, hits map[stage]int) moment {
	var in stage
	switch {
	case n < spreadCount:
		part := (float64(n) + rnd.Float64()) / spreadCount
		return moment{after: time.Duration(part * float64(v.elapsed))}
	case n < spreadCount+shortCount:
		in = syncing
	case n < spreadCount+2*shortCount:
		in = committing
	default:
		for _, s := range stages {
			if hits[s] < killsEach {
				in = s
			}
		}
	}
	if in == "" {
		return moment{after: time.Duration(rnd.Float64() * float64(v.elapsed))}
	}
	seen := v.seen[in]
	times := max(1, seen.times/pullsMeasured)
	// What is seen of a stage begins a little late, so its mean would be too long.
	most := seen.lasting / time.Duration(2*max(1, seen.times))
	return moment{in: in, nth: 1 + rnd.IntN(times), after: time.Duration(rnd.Float64() * float64(most))}
}

// kill pulls onto a new disk, kills the daemon at the moment, checks what is left
// and pulls again. It returns what was under way, and whether the pull was.
func (v *victim) kill(t *testing.T, m moment) (under map[stage]bool, killed bool) {
	p := v.begin(t)
	p.reach(m)
	under = p.freeze(t)
	kept := keptBytes(t, p.root, v.img)
	p.daemon.Kill()
	<-p.over
	if killed = p.err != nil; killed {
		t.Logf("killed %s, in %v; %d of %d bytes are here", m, slices.Sorted(maps.Keys(under)), sum(kept), v.img.LayerBytes())
	} else {
		t.Logf("%s the pull was over", m)
	}

	d := harness.Start(t, harness.Options{Root: p.root})
	if _, err := d.Ctl("store", "check", "--deep", "--json"); err != nil {
		t.Error(err)
	}
	checkStore(t, d)
	checkHeld(t, d)
	checkRecorded(t, d)
	p.registry.Served() // what the first pull was sent is not what counts
	pull(t, d, v.img, p.ref)
	checkRecorded(t, d)
	for dgst, n := range p.registry.Served() {
		if want := int64(len(v.img.Blobs[dgst])) - kept[dgst]; n > want {
			t.Errorf("%d bytes of blob %s were fetched again", n-want, dgst)
		}
	}
	d.Stop(t)
	return under, killed
}

// victim is what is pulled, and what pulls of it are like when nobody disturbs them.
type victim struct {
	img      *harness.Image
	diskSize int64             // that has room for it, in bytes
	elapsed  time.Duration     // of the fastest pull
	seen     map[stage]sight   // in all pulls
	trees    map[treeSize]bool // of its layers, whole
}

const pullsMeasured = 3

// measure pulls without disturbing.
func (v *victim) measure(t *testing.T) {
	v.seen = make(map[stage]sight)
	for n := range pullsMeasured {
		t.Run(fmt.Sprintf("undisturbed%d", n), func(t *testing.T) {
			p := v.begin(t)
			start := time.Now()
			seen := p.watch("", 0)
			elapsed := time.Since(start)
			if p.err != nil {
				t.Fatal(p.err)
			}
			if v.elapsed == 0 || elapsed < v.elapsed {
				v.elapsed = elapsed
			}
			for s, one := range seen {
				all := v.seen[s]
				v.seen[s] = sight{all.times + one.times, all.lasting + one.lasting}
			}
			v.trees = make(map[treeSize]bool)
			for _, size := range treeSizes(t, p.root) {
				v.trees[size] = true
			}
			if v.img.Tree == nil {
				var err error
				if v.img.Tree, err = p.daemon.Tree(t, snapshotter, v.img.ChainID.String()); err != nil {
					t.Fatal(err)
				}
			}
			p.daemon.Stop(t)
		})
	}
	t.Logf("%d layers, %d bytes; undisturbed, a pull takes %s", len(v.img.Layers), v.img.LayerBytes(), v.elapsed)
	for _, s := range []stage{syncing, committing} {
		t.Logf("%s was seen %d times in %d pulls, %s in all", s, v.seen[s].times, pullsMeasured, v.seen[s].lasting)
	}
}
