package e2e

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/test/harness"
)

// TestDirectories: what the daemon makes has containerd's names and modes.
func TestDirectories(t *testing.T) {
	harness.NeedRoot(t)
	top := harness.TempDir(t)
	d := harness.Start(t, harness.Options{Root: filepath.Join(top, "root"), State: filepath.Join(top, "state")})
	reg := harness.NewRegistry(t)
	if err := d.Pull(reg.Push(harness.NewImage(t, harness.Random(1, 1)...), "app")); err != nil {
		t.Fatal(err)
	}
	info, err := introspection.NewIntrospectionClient(d.Conn).Server(harness.Context(t), new(emptypb.Empty))
	if err != nil || info.UUID == "" {
		t.Errorf("introspection: %v, %v", info, err)
	}
	for name, mode := range map[string]fs.FileMode{
		"root":                                  fs.ModeDir | 0o700,
		"state":                                 fs.ModeDir | 0o711,
		"root/io.containerd.content.v1.content": fs.ModeDir | 0o755,
		"root/io.containerd.content.v1.content/blobs":             fs.ModeDir | 0o755,
		"root/io.containerd.content.v1.content/ingest":            fs.ModeDir,
		"root/io.containerd.grpc.v1.introspection":                fs.ModeDir | 0o700,
		"root/io.containerd.grpc.v1.introspection/uuid":           0,
		"root/io.containerd.metadata.v1.bolt":                     fs.ModeDir | 0o711,
		"root/io.containerd.metadata.v1.bolt/meta.db":             0,
		"root/io.containerd.runtime.v2.task":                      fs.ModeDir | 0o711,
		"root/io.containerd.snapshotter.v1.native":                fs.ModeDir | 0o700,
		"root/io.containerd.snapshotter.v1.native/snapshots":      fs.ModeDir | 0o700,
		"root/io.containerd.snapshotter.v1.overlayfs":             fs.ModeDir | 0o700,
		"root/io.containerd.snapshotter.v1.overlayfs/snapshots":   fs.ModeDir | 0o700,
		"root/io.containerd.snapshotter.v1.overlayfs/metadata.db": 0o600,
		"root/io.holdfast.v1.trace":                               fs.ModeDir | 0o700,
		"root/io.holdfast.v1.trash":                               fs.ModeDir | 0o700,
		"root/tmpmounts":                                          fs.ModeDir | 0o700,
		"state/io.containerd.runtime.v2.task":                     fs.ModeDir | 0o711,
		"state/d.sock":                                            fs.ModeSocket | 0o660,
	} {
		got, err := os.Lstat(filepath.Join(top, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if got.Mode().Type() != mode.Type() || mode.Perm() != 0 && got.Mode().Perm() != mode.Perm() {
			t.Errorf("%s is %s, want %s", name, got.Mode(), mode)
		}
	}
	entries, err := os.ReadDir(d.Root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "io.containerd.") && !strings.HasPrefix(e.Name(), "io.holdfast.v1.") && e.Name() != "tmpmounts" &&
			e.Name() != "bin" && e.Name() != "lib" { // the harness has opt.path there
			t.Errorf("the root holds %s", e.Name())
		}
	}
	d.Stop(t)
	if _, err := os.Lstat(d.Socket); err == nil {
		t.Error("the socket is left behind")
	}
}

// TestTightened: the wide modes of an older daemon's directories are tightened.
func TestTightened(t *testing.T) {
	harness.NeedRoot(t)
	root := filepath.Join(harness.TempDir(t), "root")
	for _, dir := range []string{"", "tmpmounts", "io.containerd.metadata.v1.bolt"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(root, dir), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	d := harness.Start(t, harness.Options{Root: root})
	for dir, want := range map[string]fs.FileMode{"": 0o700, "tmpmounts": 0o700, "io.containerd.metadata.v1.bolt": 0o711} {
		info, err := os.Stat(filepath.Join(root, dir))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s/%s is %v (%v), want %s", root, dir, info.Mode(), err, want)
		}
	}
	d.Stop(t)
}

// nobody is a user with no rights.
const nobody = 65534

// TestUnprivileged walks all that the daemon has made as a user with no rights, who must read no file and list nothing
// but what is there to be passed through.
func TestUnprivileged(t *testing.T) {
	harness.NeedRoot(t)
	top := harness.TempDir(t)
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	d := harness.Start(t, harness.Options{Root: filepath.Join(top, "root"), State: filepath.Join(top, "state")})
	reg := harness.NewRegistry(t)
	ref := reg.Push(harness.NewImage(t, harness.Random(1, 2)...), "app")
	for _, driver := range []string{"overlayfs", "native"} {
		if err := d.Pull(ref, "--snapshotter", driver); err != nil {
			t.Fatal(err)
		}
	}
	asUser(t, nobody, func() {
		if _, err := os.ReadDir(top); err != nil {
			t.Errorf("this test tests nothing: %v", err)
		}
	})
	count := 0
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == top {
			return err
		}
		if strings.Count(path, "/") > 12 {
			return fs.SkipDir
		}
		count++
		var open error
		asUser(t, nobody, func() {
			f, err := os.Open(path)
			if open = err; err == nil {
				f.Close()
			}
		})
		if open == nil {
			t.Errorf("%s can be read by anybody", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if count < 100 {
		t.Errorf("only %d names were looked at", count)
	}
	asUser(t, nobody, func() {
		if c, err := net.Dial("unix", d.Socket); err == nil {
			c.Close()
			t.Error("the socket can be connected to by anybody")
		}
		if _, err := os.Stat(filepath.Join(d.State, "io.containerd.runtime.v2.task")); err != nil {
			t.Errorf("a mapped user's container could not pass through the state directory: %v", err)
		}
	})
	d.Stop(t)
}

// asUser runs f on a thread that has the rights of uid and no capability.
func asUser(t *testing.T, uid int, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		// The thread is never unlocked, so it ends with this goroutine.
		runtime.LockOSThread()
		err := raw(unix.SYS_SETGROUPS, 0, 0, 0)
		if err == nil {
			err = raw(unix.SYS_SETRESGID, uid, uid, uid)
		}
		if err == nil {
			err = raw(unix.SYS_SETRESUID, uid, uid, uid)
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestOneDaemon: a second one on the same root or the same socket is refused, and told who has it.
func TestOneDaemon(t *testing.T) {
	harness.NeedRoot(t)
	d := harness.Start(t, harness.Options{})
	bin := harness.Build(t).Daemon
	for name, args := range map[string][]string{
		"root":   {"--root", d.Root, "--state", harness.TempDir(t), "--address", filepath.Join(harness.TempDir(t), "s")},
		"socket": {"--root", harness.TempDir(t), "--state", harness.TempDir(t), "--address", d.Socket},
	} {
		t.Run(name, func(t *testing.T) {
			begin := time.Now()
			res := run(t, exec.Command(bin, append([]string{"--config", "/dev/null"}, args...)...))
			res.wants(t, 1, "pid ", "(holdfastd)", "stop it, or give this daemon another")
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("it took %s to be refused", took)
			}
			pid := regexp.MustCompile(`pid (\d+)`).FindStringSubmatch(res.err)
			if pid == nil {
				t.Fatal("no pid")
			}
			cmdline, err := os.ReadFile(filepath.Join("/proc", pid[1], "cmdline"))
			if err != nil || !strings.Contains(string(cmdline), d.Root) {
				t.Errorf("pid %s is %q (%v), and not the daemon on %s", pid[1], cmdline, err, d.Root)
			}
		})
	}
	res := run(t, exec.Command(bin, "--config", "/dev/null", "--root", d.Root, "--state", d.Root))
	res.wants(t, 1, "state")
	whole(t, d) // the first one is as it was
	d.Stop(t)
}

// TestLongAddress: a socket's path has a limit, which is told.
func TestLongAddress(t *testing.T) {
	harness.NeedRoot(t)
	long := filepath.Join(harness.TempDir(t), strings.Repeat("x", 100), "d.sock")
	res := holdfastd(t, "--config", "/dev/null", "--root", harness.TempDir(t), "--state", harness.TempDir(t), "--address", long)
	res.wants(t, 1, "at most 104 bytes", long)
}

// TestNotify: systemd is told when the daemon is ready and when it stops.
func TestNotify(t *testing.T) {
	harness.NeedRoot(t)
	path := filepath.Join(harness.TempDir(t), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	told := func() string {
		l.SetReadDeadline(time.Now().Add(20 * time.Second))
		buf := make([]byte, 4096)
		n, err := l.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	d := harness.Start(t, harness.Options{Env: []string{"NOTIFY_SOCKET=" + path}})
	if got := told(); got != "READY=1" {
		t.Errorf("systemd is told %q", got)
	}
	d.Stop(t)
	if got := told(); got != "STOPPING=1" {
		t.Errorf("systemd is told %q", got)
	}
}

// TestStopDuringPull: a daemon that is told to stop while it pulls exits in order and soon; the pull fails with a word,
// and goes on where it was when there is a daemon again.
func TestStopDuringPull(t *testing.T) {
	harness.NeedRoot(t)
	for _, driver := range []string{"overlayfs", "native"} {
		t.Run(driver, func(t *testing.T) {
			reg := harness.NewRegistry(t)
			img := harness.NewImage(t, harness.Random(1, 2)...)
			ref := reg.Push(img, "app")
			root := harness.TempDir(t)
			d := harness.Start(t, harness.Options{Root: root})
			reached := reg.Hold(img.LayerBytes() / 2)
			pulled := make(chan error, 1)
			go func() { pulled <- d.Pull(ref, "--snapshotter", driver) }()
			<-reached
			kept(t, d, img)
			begin := time.Now()
			d.Stop(t)
			if took := time.Since(begin); took > stopsWithin {
				t.Errorf("it took %s to stop", took)
			}
			if err := <-pulled; err == nil || !strings.Contains(err.Error(), "the daemon is stopping") {
				t.Errorf("the pull ended with %v", err)
			}
			reg.Release()
			reg.Served()
			d = harness.Start(t, harness.Options{Root: root})
			if len(d.Images(t)) > 0 {
				t.Error("an image is listed whose pull did not end")
			}
			whole(t, d)
			if err := d.Pull(ref, "--snapshotter", driver); err != nil {
				t.Fatal(err)
			}
			again := int64(0)
			for _, n := range reg.Served() {
				again += n
			}
			if again > img.LayerBytes()*6/10 {
				t.Errorf("%d bytes were fetched again of %d", again, img.LayerBytes())
			}
			whole(t, d)
			checkTree(t, d, driver, img)
			if n := len(d.Leases(t)); n > 0 {
				t.Errorf("%d leases are left", n)
			}
			d.Stop(t)
		})
	}
}

// inTheAir bounds what may be sent and not yet written when a daemon stops, in bytes.
const inTheAir = 64 << 10

// kept waits until the daemon has written half of the image's layers, less what is in the air: a registry that is held
// there has sent that.
func kept(t *testing.T, d *harness.Daemon, img *harness.Image) {
	t.Helper()
	soon(t, "half of the layers is written", func() bool {
		n := int64(0)
		for _, st := range d.Ingests(t) {
			n += st.Offset
		}
		return n >= img.LayerBytes()/2-inTheAir
	})
}

// TestRestart: an idle daemon stops at once, and the next one takes over its root and state.
func TestRestart(t *testing.T) {
	harness.NeedRoot(t)
	d := harness.Start(t, harness.Options{})
	begin := time.Now()
	d.Stop(t)
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("an idle daemon takes %s to stop", took)
	}
	d = harness.Start(t, harness.Options{Root: d.Root, State: d.State})
	whole(t, d)
	d.Stop(t)
}

// TestTemporaryMounts: what a killed daemon has left mounted is unmounted at start, and nothing below the mounts is
// touched.
func TestTemporaryMounts(t *testing.T) {
	harness.NeedRoot(t)
	root := harness.TempDir(t)
	data := filepath.Join(harness.TempDir(t), "data")
	write(t, filepath.Join(data, "file"), "precious")
	mounts := filepath.Join(root, harness.TmpmountDir)
	for i := range 3 {
		dir := filepath.Join(mounts, fmt.Sprintf("containerd-mount%d", i))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			continue // an empty one
		}
		if err := unix.Mount(data, dir, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	d := harness.Start(t, harness.Options{Root: root})
	if entries, err := os.ReadDir(mounts); err != nil || len(entries) > 0 {
		t.Errorf("%s holds %v, %v", mounts, entries, err)
	}
	if body, err := os.ReadFile(filepath.Join(data, "file")); err != nil || string(body) != "precious" {
		t.Errorf("what was mounted is now %q, %v", body, err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(table), mounts) {
		t.Errorf("still mounted (%v):\n%s", err, table)
	}
	d.Stop(t)
}

// TestForeignDirectories: what other versions have left in a root stays as it is.
func TestForeignDirectories(t *testing.T) {
	harness.NeedRoot(t)
	root := harness.TempDir(t)
	kept := []string{
		"io.containerd.runtime.v1.linux/k8s.io/abc/state.json",
		"io.containerd.snapshotter.v1.stargz/snapshotter/metadata.db",
		"io.containerd.snapshotter.v1.btrfs/active/x",
		"containerd.log",
	}
	for _, name := range kept {
		write(t, filepath.Join(root, name), name)
	}
	reg := harness.NewRegistry(t)
	d := harness.Start(t, harness.Options{Root: root})
	ref := reg.Push(harness.NewImage(t, harness.Random(1, 1)...), "app")
	if err := d.Pull(ref); err != nil {
		t.Fatal(err)
	}
	holdfast(t, d.Socket, "rmi", ref).wants(t, 0)
	d.Stop(t)
	for _, name := range kept {
		if body, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(body) != name {
			t.Errorf("%s is now %q, %v", name, body, err)
		}
	}
}

// TestOptPath: bin and lib stand where opt.path says.
func TestOptPath(t *testing.T) {
	harness.NeedRoot(t)
	opt := filepath.Join(harness.TempDir(t), "opt")
	d := harness.Start(t, harness.Options{Config: fmt.Sprintf("version = 2\n[plugins.'io.containerd.internal.v1.opt']\npath = '%s'\n", opt)})
	for _, dir := range []string{"bin", "lib"} {
		if info, err := os.Stat(filepath.Join(opt, dir)); err != nil || info.Mode().Perm() != 0o711 {
			t.Errorf("%s: %v, %v", dir, info, err)
		}
	}
	d.Stop(t)
}

// noOpt keeps a daemon from making the directories of opt.path, whose default lies outside of the test's own.
const noOpt = "[plugins.'io.containerd.internal.v1.opt']\npath = ''\n"

// TestSocketOwner: the socket belongs to whom the config says.
func TestSocketOwner(t *testing.T) {
	harness.NeedRoot(t)
	d := harness.Start(t, harness.Options{Config: "version = 2\n[grpc]\nuid = 0\ngid = 42\n" + noOpt})
	var st unix.Stat_t
	if err := unix.Stat(d.Socket, &st); err != nil || st.Uid != 0 || st.Gid != 42 || st.Mode&0o777 != 0o660 {
		t.Errorf("the socket is of %d:%d with mode %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	d.Stop(t)
}

// TestConfigCommands: what the daemon would do is told without starting it.
func TestConfigCommands(t *testing.T) {
	dir := harness.TempDir(t)
	file := filepath.Join(dir, "config.toml")
	res := holdfastd(t, "config", "default")
	res.wants(t, 0, "root", "state", "version")
	write(t, file, res.out)
	holdfastd(t, "config", "check", "--config", file).wants(t, 0, "Every key of the configuration has its effect.")
	write(t, file, "version = 2\nroot = '/data'\nnonsense = 1\n[plugins.'io.containerd.snapshotter.v1.overlayfs']\nupperdir_label = true\n")
	holdfastd(t, "config", "check", "--config", file, "--state", "/run/elsewhere").wants(t, 0,
		"'/data'", file+":2", "'/run/elsewhere'", "--state", "Keys without effect: 1", "nonsense", "unknown")
	holdfastd(t, "config", "dump", "--config", file).wants(t, 0, "root = '/data'", "upperdir_label = true")
	holdfastd(t, "config", "check", "--config", file+".absent").wants(t, 1, "no such file")
	write(t, file, "version = 2\nroot = \n")
	holdfastd(t, "--config", file).wants(t, 1, file, "2")
	holdfastd(t, "nonsense").wants(t, 1, "nonsense")
}

// TestUnknownKeys: a daemon that starts says which keys have no effect.
func TestUnknownKeys(t *testing.T) {
	harness.NeedRoot(t)
	d := harness.Start(t, harness.Options{Config: "version = 2\nnonsense = 1\n" + noOpt})
	soon(t, "the log tells of the key", func() bool {
		return strings.Contains(d.Log(), "config key has no effect") && strings.Contains(d.Log(), "nonsense")
	})
	d.Stop(t)
}

func raw(trap uintptr, a, b, c int) error {
	if _, _, errno := syscall.RawSyscall(trap, uintptr(a), uintptr(b), uintptr(c)); errno != 0 {
		return errno
	}
	return nil
}
