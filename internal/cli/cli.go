// Package cli is the command-line client; it speaks gRPC and nothing else.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

const (
	defaultAddress   = "/run/containerd/containerd.sock"
	defaultNamespace = "default"

	// maxMessage is what the daemon may send in one message, in bytes.
	maxMessage = 16 << 20

	// dialTimeout bounds the look at a socket that can't be used.
	dialTimeout = 2 * time.Second
)

// Exit codes of the command line.
const (
	ExitOK      = 0
	ExitFailure = 1 // the command failed, or a check found something
	ExitUsage   = 2 // the words of the command are off
)

// errFindings makes a check that found something exit with ExitFailure after
// everything has been printed.
var errFindings = errors.New("the store needs attention")

type usageError struct{ error }

// app is what all commands share.
type app struct {
	address   string
	namespace string
	out, err  io.Writer
	conn      *grpc.ClientConn
	holdfast  holdfastv1.HoldfastClient
}

// Run executes one command line (without the program's name) and returns the
// exit code. version is this program's own.
func Run(ctx context.Context, args []string, out, errw io.Writer, version string) int {
	a := &app{out: out, err: errw}
	root := a.root(version)
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errw)
	err := root.ExecuteContext(ctx)
	if a.conn != nil {
		a.conn.Close()
	}
	var usage usageError
	switch {
	case err == nil:
		return ExitOK
	case errors.Is(err, errFindings):
		return ExitFailure
	case errors.As(err, &usage):
		fmt.Fprintf(errw, "holdfast: %v\nRun `holdfast --help` for the commands and their flags.\n", err)
		return ExitUsage
	}
	fmt.Fprintln(errw, "holdfast:", a.explain(err))
	return ExitFailure
}

func (a *app) root(version string) *cobra.Command {
	root := &cobra.Command{
		Use:           "holdfast",
		Short:         "Keep images and run containers, through holdfastd",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          usageArgs(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVarP(&a.address, "address", "a", env("CONTAINERD_ADDRESS", defaultAddress), "the daemon's `socket` ($CONTAINERD_ADDRESS)")
	root.PersistentFlags().StringVarP(&a.namespace, "namespace", "n", env("CONTAINERD_NAMESPACE", defaultNamespace), "the `namespace` to work in ($CONTAINERD_NAMESPACE)")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return a.connect() }
	root.AddCommand(a.pull(), a.images(), a.rmi(), a.store(), a.trace(), a.version(version))
	return root
}

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

// usageArgs marks complaints about arguments as usage errors.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{fmt.Errorf("%s: %w", cmd.CommandPath(), err)}
		}
		return nil
	}
}

// connect prepares the connection; the first call makes it.
func (a *app) connect() error {
	a.address = strings.TrimPrefix(a.address, "unix://")
	var d net.Dialer
	conn, err := grpc.NewClient("passthrough:///localhost", // the dialer knows where; a path may hold what a URL can't
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", a.address) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return fmt.Errorf("address %s: %w", a.address, err)
	}
	a.conn, a.holdfast = conn, holdfastv1.NewHoldfastClient(conn)
	return nil
}

// in puts the namespace where the daemon looks for it.
func (a *app) in(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "containerd-namespace", a.namespace)
}

// explain turns an error from the wire into a sentence for people.
func (a *app) explain(err error) string {
	st, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	switch st.Code() {
	case codes.Unavailable:
		return a.explainUnavailable(st.Message())
	case codes.Unimplemented:
		return st.Message() + ": the daemon at " + a.address + " doesn't know this call; is it a containerd, or an older holdfastd?"
	case codes.Canceled:
		return "interrupted"
	}
	return st.Message()
}

// explainUnavailable tells a daemon that isn't there from one that says that
// something else isn't.
func (a *app) explainUnavailable(message string) string {
	switch {
	case strings.HasPrefix(message, "connection error"):
		err := a.dial()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Sprintf("no daemon at %s: start holdfastd, or name its socket with --address", a.address)
		case errors.Is(err, fs.ErrPermission):
			return fmt.Sprintf("%s may not be opened by this user: run as root, or as the socket's owner or group", a.address)
		case errors.Is(err, syscall.ECONNREFUSED):
			return fmt.Sprintf("nobody listens at %s: start holdfastd, or name its socket with --address", a.address)
		case err != nil:
			return fmt.Sprintf("%s: %v: name the daemon's socket with --address", a.address, err)
		}
	case strings.HasPrefix(message, "error reading from server"):
		return fmt.Sprintf("the daemon at %s went away: look at its log, then run the command again", a.address)
	}
	return message
}

// dial says why the socket can't be connected to, nil if it can.
func (a *app) dial() error {
	c, err := net.DialTimeout("unix", a.address, dialTimeout)
	if err != nil {
		return err
	}
	return c.Close()
}

// printJSON writes v for machines.
func (a *app) printJSON(v any) error {
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
