package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-dev/holdfast/internal/registry/registrytest"
)

// line joins two network namespaces by a shaped link. Whoever is in one reaches the other and nothing else, the machine's
// own network stays as it is, and all of it is gone with the last descriptor and process.
//
//	near: the daemon         this process                far: registries
//	10.99.0.1  tun  <->  loss, rate, queue, delay  <->  tun  10.99.0.2
//
// It does what tc's netem and tbf would do to a pair of veths. They are modules that many kernels come without (the one
// that this was written on has no netem), so the packets take their way through this process instead: real TCP on both
// sides, and losses that it has to notice and mend.
type line struct {
	near, far *netns
}

// shape says what happens to packets, each way alike.
type shape struct {
	rate  int           // bits per second
	delay time.Duration // half of a round trip
	loss  float64       // part of all packets
}

// slowLine is what the issue asks for: 50 Mbit/s, and 40 ms there and back.
var slowLine = shape{rate: 50e6, delay: 20 * time.Millisecond}

func (s shape) lossy(part float64) shape {
	s.loss = part
	return s
}

// takes is how long the line needs for so many bytes.
func (s shape) takes(bytes int64) time.Duration {
	return time.Duration(float64(bytes*8) / float64(s.rate) * float64(time.Second))
}

const (
	nearAddress  = "10.99.0.1"
	farAddress   = "10.99.0.2"
	nowhere      = "10.99.0.3" // what is sent there gets lost
	maxPacket    = 1500
	routerBuffer = 100 * time.Millisecond // of traffic that waits for the line; what comes on top is lost
)

// newLine makes a line for the duration of a test. Which packets are lost depends on the seed.
func newLine(t *testing.T, s shape, seed uint64) *line {
	t.Helper()
	l := &line{near: newNetns(t, nearAddress), far: newNetns(t, farAddress)}
	go carry(l.near.tun, l.far.tun, s, rand.New(rand.NewPCG(seed, 1)))
	go carry(l.far.tun, l.near.tun, s, rand.New(rand.NewPCG(seed, 2)))
	return l
}

type packet struct {
	data []byte
	due  time.Time
}

// carry takes packets from one end to the other until an end is closed.
func carry(from, to *os.File, s shape, rnd *rand.Rand) {
	under := make(chan packet, 1<<14)
	defer close(under)
	go func() {
		for p := range under {
			time.Sleep(time.Until(p.due))
			to.Write(p.data) // an error loses the packet
		}
	}()
	free := time.Now() // when the line has sent all that it was given
	for {
		data := make([]byte, maxPacket)
		n, err := from.Read(data)
		if err != nil {
			return
		}
		now := time.Now()
		if free.Before(now) {
			free = now
		}
		if rnd.Float64() < s.loss || free.Sub(now) > routerBuffer {
			continue
		}
		free = free.Add(s.takes(int64(n)))
		under <- packet{data[:n], free.Add(s.delay)}
	}
}

// netns is a network namespace with a loopback and a tun device.
type netns struct {
	fd  int
	tun *os.File // its packets
}

func newNetns(t *testing.T, address string) *netns {
	t.Helper()
	n := &netns{fd: -1}
	err := onThread(func() error { return n.open(address) })
	t.Cleanup(func() {
		if n.tun != nil {
			n.tun.Close()
		}
		unix.Close(n.fd)
	})
	if err != nil {
		t.Fatalf("a network namespace for %s: %v", address, err)
	}
	return n
}

// onThread calls f on a thread that ends afterwards, and with it whatever f has changed about it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

func (n *netns) open(address string) (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return err
	}
	fd, err := openTun()
	if err != nil {
		return fmt.Errorf("open the kernel's tun device (is its module loaded?): %w", err)
	}
	device, err := unix.NewIfreq("line")
	if err != nil {
		return err
	}
	device.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, device); err != nil {
		unix.Close(fd)
		return fmt.Errorf("make a tun device: %w", err)
	}
	n.tun = os.NewFile(uintptr(fd), "tun")
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	set := func(request uint, name string, value func(*unix.Ifreq) error) {
		r, e := unix.NewIfreq(name)
		if e == nil {
			e = value(r)
		}
		if e == nil {
			e = unix.IoctlIfreq(s, request, r)
		}
		if e != nil && err == nil {
			err = fmt.Errorf("set up %s: %w", name, e)
		}
	}
	up := func(r *unix.Ifreq) error { r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING); return nil }
	set(unix.SIOCSIFADDR, "line", func(r *unix.Ifreq) error { return r.SetInet4Addr(net.ParseIP(address).To4()) })
	set(unix.SIOCSIFNETMASK, "line", func(r *unix.Ifreq) error { return r.SetInet4Addr([]byte{255, 255, 255, 0}) })
	set(unix.SIOCSIFFLAGS, "line", up)
	set(unix.SIOCSIFFLAGS, "lo", up)
	return err
}

// openTun opens the device, which containers often have no node for.
func openTun() (fd int, err error) {
	const flags, major, minor = unix.O_RDWR | unix.O_NONBLOCK | unix.O_CLOEXEC, 10, 200
	fd, err = unix.Open("/dev/net/tun", flags, 0)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	dir, err := os.MkdirTemp("", "tun-")
	if err != nil {
		return -1, err
	}
	defer os.RemoveAll(dir)
	node := filepath.Join(dir, "tun")
	if err := unix.Mknod(node, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return -1, err
	}
	return unix.Open(node, flags, 0)
}

// enter moves the calling thread into the namespace.
func (n *netns) enter() error { return unix.Setns(n.fd, unix.CLONE_NEWNET) }

// listen opens a port in the namespace. An address without a port gets a free one.
func (n *netns) listen(address string) (l net.Listener, err error) {
	// The way in which TCP answers losses differs from machine to machine, unless it is said.
	congestion := func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic") })
	}
	err = onThread(func() error {
		if err := n.enter(); err != nil {
			return err
		}
		l, err = (&net.ListenConfig{Control: congestion}).Listen(context.Background(), "tcp4", address)
		return err
	})
	return l, err
}

// registry starts a registry at the far end for the duration of a test.
func (l *line) registry(t *testing.T, address string) *registrytest.Server {
	t.Helper()
	port, err := l.far.listen(address)
	if err != nil {
		t.Fatal(err)
	}
	s := registrytest.Serve(port)
	t.Cleanup(s.Close)
	return s
}
