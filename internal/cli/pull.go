package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func (a *app) pull() *cobra.Command {
	var user string
	req := &holdfastv1.PullRequest{}
	cmd := &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Fetch an image from its registry and unpack it",
		Long: "Fetch an image from its registry and unpack it.\n\n" +
			"Short names are completed as docker does: `alpine` is `docker.io/library/alpine:latest`.\n" +
			"An interrupted pull goes on where it stopped when it is run again.",
		Example: "  holdfast pull docker.io/library/alpine:3.20.1\n  holdfast pull --plain-http 127.0.0.1:5000/demo/busybox:1",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Reference = args[0]
			if err := credential(req, user); err != nil {
				return err
			}
			return a.runPull(cmd.Context(), req)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Snapshotter, "snapshotter", "", "the snapshot `driver` to unpack into (default: the daemon's)")
	f.StringVar(&req.Platform, "platform", "", "the `os/arch[/variant]` to pull (default: this machine's)")
	f.BoolVar(&req.PlainHttp, "plain-http", false, "speak HTTP without TLS to the registry")
	f.BoolVar(&req.SkipVerify, "skip-verify", false, "do not verify the registry's certificate")
	f.BoolVar(&req.NoUnpack, "no-unpack", false, "fetch, and don't unpack")
	f.StringVarP(&user, "user", "u", "", "`name[:password]` for the registry; the password is asked for when it is left out (default: the daemon's credentials)")
	return cmd
}

func credential(req *holdfastv1.PullRequest, user string) error {
	if user == "" {
		return nil
	}
	name, password, ok := strings.Cut(user, ":")
	if !ok {
		if !term.IsTerminal(int(os.Stdin.Fd())) {
			return usageError{errors.New("--user needs NAME:PASSWORD where no terminal can be asked")}
		}
		fmt.Fprint(os.Stderr, "Password: ")
		b, err := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(os.Stderr)
		if err != nil {
			return fmt.Errorf("read password: %w", err)
		}
		password = string(b)
	}
	req.Credential = &holdfastv1.Credential{Username: name, Password: password}
	return nil
}

// display shows how a pull goes.
type display interface {
	layer(l *holdfastv1.PullLayer)
	close(err error)
}

func (a *app) runPull(ctx context.Context, req *holdfastv1.PullRequest) (err error) {
	begin := time.Now()
	stream, err := a.holdfast.Pull(a.in(ctx), req)
	if err != nil {
		return err
	}
	var d display = &lines{out: a.out, stages: map[string]holdfastv1.PullLayer_Stage{}}
	if f, ok := a.out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		d = newBars(f)
	}
	var done *holdfastv1.Image
	fetched := map[string]int64{}
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			d.close(nil)
			break
		}
		if err != nil {
			d.close(err)
			return err
		}
		switch {
		case e.GetResolved() != nil:
			fmt.Fprintf(a.out, "%s: %s\n", e.GetResolved().Reference, e.GetResolved().Target.Digest)
		case e.GetLayer() != nil:
			l := e.GetLayer()
			if l.Stage != holdfastv1.PullLayer_EXISTS {
				fetched[l.Descriptor_.GetDigest()] = l.Offset
			}
			d.layer(l)
		case e.GetDone() != nil:
			done = e.GetDone()
		}
	}
	if done == nil {
		return errors.New("the daemon ended the pull without a word: look at its log")
	}
	a.summarize(done, fetched, time.Since(begin))
	return nil
}

func (a *app) summarize(img *holdfastv1.Image, fetched map[string]int64, took time.Duration) {
	total := int64(0)
	for _, n := range fetched {
		total += n
	}
	if len(fetched) == 0 {
		fmt.Fprintf(a.out, "%s is up to date\n", img.Name)
		return
	}
	fmt.Fprintf(a.out, "%s pulled: %d layers, %s in %s\n", img.Name, len(fetched), units.BytesSize(float64(total)), took.Round(10*time.Millisecond))
}

// lines is the display for a log or a pipe: a line when a layer changes its
// stage.
type lines struct {
	out    io.Writer
	stages map[string]holdfastv1.PullLayer_Stage
}

func (p *lines) layer(l *holdfastv1.PullLayer) {
	d := l.Descriptor_.GetDigest()
	if p.stages[d] == l.Stage {
		return
	}
	p.stages[d] = l.Stage
	fmt.Fprintf(p.out, "%s  %-16s %s\n", shortDigest(d), stageWord(l.Stage), units.BytesSize(float64(l.Descriptor_.GetSize())))
}

func (p *lines) close(error) {}

func stageWord(s holdfastv1.PullLayer_Stage) string {
	switch s {
	case holdfastv1.PullLayer_WAITING:
		return "waiting"
	case holdfastv1.PullLayer_EXISTS:
		return "already unpacked"
	case holdfastv1.PullLayer_FETCHING:
		return "fetching"
	case holdfastv1.PullLayer_UNPACKING:
		return "unpacking"
	case holdfastv1.PullLayer_COMMITTING:
		return "committing"
	case holdfastv1.PullLayer_COMPLETE:
		return "complete"
	}
	return "working"
}
