// Command holdfastd is the Holdfast daemon.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/holdfast-dev/holdfast/internal/config"
	"github.com/holdfast-dev/holdfast/internal/daemon"
)

// version and revision are set by the linker.
var (
	version  = "dev"
	revision = ""
)

func main() {
	if err := command().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "holdfastd:", err)
		os.Exit(1)
	}
}

// options are the flags, which all commands share.
type options struct {
	path  string
	flags config.Flags
}

func command() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:           "holdfastd",
		Short:         "Keeps images and runs containers, in containerd's place",
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return serve(cmd.Context(), o)
		},
	}
	flags := root.PersistentFlags()
	flags.StringVarP(&o.path, "config", "c", "", "config file; it must exist (default "+config.DefaultPath+", which need not)")
	flags.StringVar(&o.flags.Root, "root", "", "directory of the store")
	flags.StringVar(&o.flags.State, "state", "", "directory of sockets and run-time files")
	flags.StringVarP(&o.flags.Address, "address", "a", "", "path of the socket for clients")
	flags.StringVarP(&o.flags.LogLevel, "log-level", "l", "", "trace, debug, info, warn, error, fatal or panic")
	root.AddCommand(configCommand(&o))
	return root
}

// serve runs the daemon until SIGTERM or SIGINT, and returns after an
// orderly shutdown. A second such signal ends the process at once.
func serve(ctx context.Context, o options) error {
	cfg, err := config.Load(o.path, o.flags)
	if err != nil {
		return err
	}
	log := newLogger(cfg.Log)
	reportIneffective(log, cfg)
	if err := setTemp(cfg.Temp); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop)
	defer dumpStacksOn(syscall.SIGUSR1, log)()
	stopProfile, err := startProfile(os.Getenv(profileEnv))
	if err != nil {
		return err
	}
	defer stopProfile()

	d, err := daemon.New(ctx, cfg, daemon.Build{Version: version, Revision: revision}, log)
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// reportIneffective logs every key of the documents that has no effect:
// unknown ones as warnings, since they are likely misspelt.
func reportIneffective(log *slog.Logger, cfg *config.Config) {
	for _, f := range cfg.Check() {
		level := slog.LevelInfo
		switch f.Status {
		case config.Honoured:
			continue
		case config.Unknown:
			level = slog.LevelWarn
		}
		log.Log(context.Background(), level, "config key has no effect", "key", f.Key, "value", f.Value, "at", f.Origin.String(), "status", string(f.Status), "reason", f.Reason)
	}
}

// setTemp makes dir the place for this process' temporary files.
func setTemp(dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory for temporary files: %w", err)
	}
	return os.Setenv("TMPDIR", dir)
}

// profileEnv names the file that a CPU profile of the daemon's whole life goes
// to; `make bench BENCH=-profile` sets it.
const profileEnv = "HOLDFAST_CPUPROFILE"

// startProfile profiles the process until the returned func is called; with no file it does nothing.
func startProfile(file string) (stop func(), err error) {
	if file == "" {
		return func() {}, nil
	}
	out, err := os.Create(file)
	if err != nil {
		return nil, fmt.Errorf("create the file of %s: %w", profileEnv, err)
	}
	if err := pprof.StartCPUProfile(out); err != nil {
		out.Close()
		return nil, fmt.Errorf("start a CPU profile: %w", err)
	}
	return func() {
		pprof.StopCPUProfile()
		out.Close()
	}, nil
}

// maxStacks bounds one dump of goroutines, in bytes.
const maxStacks = 16 << 20

// dumpStacksOn writes all goroutines to the log whenever the process gets
// sig, until the returned func is called.
func dumpStacksOn(sig os.Signal, log *slog.Logger) (stop func()) {
	signals := make(chan os.Signal, 1)
	done := make(chan struct{})
	signal.Notify(signals, sig)
	go func() {
		for {
			select {
			case <-signals:
				log.Error("goroutines, as asked", "stacks", string(stacks())) // at a level that is never left out
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
	}
}

// stacks is what every goroutine is doing, as a panic would print it.
func stacks() []byte {
	for size := 64 << 10; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size || size >= maxStacks {
			return buf[:n]
		}
	}
}
