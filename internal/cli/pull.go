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
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func (a *app) pull() *cobra.Command {
	var user string
	var trace bool
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
			if err := credential(cmd.Context(), req, user); err != nil {
				return err
			}
			err := a.runPull(cmd.Context(), req, trace)
			if status.Code(err) == codes.Canceled && cmd.Context().Err() != nil {
				return errInterrupted
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Snapshotter, "snapshotter", "", "the snapshot `driver` to unpack into (default: the daemon's)")
	f.StringVar(&req.Platform, "platform", "", "the `os/arch[/variant]` to pull (default: this machine's)")
	f.BoolVar(&req.PlainHttp, "plain-http", false, "speak HTTP without TLS to the registry")
	f.BoolVar(&req.SkipVerify, "skip-verify", false, "do not verify the registry's certificate")
	f.BoolVar(&trace, "trace", false, "show where the time went, as 'holdfast trace show' does afterwards")
	f.BoolVar(&req.NoUnpack, "no-unpack", false, "fetch, and don't unpack")
	f.StringVarP(&user, "user", "u", "", "`name[:password]` for the registry; the password is asked for when it is left out (default: the daemon's credentials)")
	return cmd
}

func credential(ctx context.Context, req *holdfastv1.PullRequest, user string) error {
	if user == "" {
		return nil
	}
	name, password, ok := strings.Cut(user, ":")
	if !ok {
		if !term.IsTerminal(int(os.Stdin.Fd())) {
			return usageError{errors.New("--user needs NAME:PASSWORD where no terminal can be asked")}
		}
		var err error
		if password, err = askPassword(ctx); err != nil {
			return fmt.Errorf("read password: %w", err)
		}
	}
	req.Credential = &holdfastv1.Credential{Username: name, Password: password}
	return nil
}

// askPassword reads a line that the terminal doesn't show. When ctx ends
// first, the terminal is as it was; the read is left to the process' end.
func askPassword(ctx context.Context) (string, error) {
	fd := int(os.Stdin.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	type answer struct {
		text []byte
		err  error
	}
	answers := make(chan answer, 1)
	fmt.Fprint(os.Stderr, "Password: ")
	defer fmt.Fprintln(os.Stderr)
	go func() {
		text, err := term.ReadPassword(fd)
		answers <- answer{text, err}
	}()
	select {
	case a := <-answers:
		return string(a.text), a.err
	case <-ctx.Done():
		return "", errors.Join(context.Cause(ctx), term.Restore(fd, before))
	}
}

// display shows how a pull goes.
type display interface {
	layer(l *holdfastv1.PullLayer)
	close()
}

// errInterrupted is what a pull says that its user has ended.
var errInterrupted = errors.New("interrupted; what was fetched is kept for a day, and the same command goes on from there")

func (a *app) runPull(ctx context.Context, req *holdfastv1.PullRequest, trace bool) error {
	begin := time.Now()
	stream, err := a.holdfast.Pull(a.in(ctx), req)
	if err != nil {
		return err
	}
	var d display = &lines{out: a.out, stages: map[string]holdfastv1.PullLayer_Stage{}}
	if f, ok := a.out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		d = newBars(f)
	}
	sum := summary{layers: map[string]*holdfastv1.PullLayer{}}
	err = sum.follow(stream, a.out, d)
	d.close()
	switch {
	case err != nil && trace && sum.trace != "" && ctx.Err() == nil:
		if e := a.showTrace(ctx, &holdfastv1.TracesRequest{Id: sum.trace}, false); e != nil {
			fmt.Fprintln(a.err, "holdfast:", a.explain(e))
		}
		return err
	case err != nil:
		return err
	case sum.done == nil:
		return errors.New("the daemon ended the pull without a word: look at its log")
	}
	if _, err = fmt.Fprintln(a.out, sum.sentence(time.Since(begin))); err != nil || !trace {
		return err
	}
	if sum.trace == "" {
		return errors.New("the image is pulled, but the daemon keeps no traces: is it an older holdfastd?")
	}
	return a.showTrace(ctx, &holdfastv1.TracesRequest{Id: sum.trace}, false)
}

// summary is what a pull has come to.
type summary struct {
	layers map[string]*holdfastv1.PullLayer // the last word on each
	done   *holdfastv1.Image
	trace  string // the ID of the record that it leaves
}

// follow shows the events of a pull until its end.
func (s *summary) follow(stream grpc.ServerStreamingClient[holdfastv1.PullEvent], out io.Writer, d display) error {
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Trace != "" {
			s.trace = e.Trace
		}
		switch {
		case e.GetResolved() != nil:
			fmt.Fprintf(out, "%s: %s\n", e.GetResolved().Reference, e.GetResolved().Target.GetDigest())
		case e.GetLayer() != nil:
			s.layers[e.GetLayer().Descriptor_.GetDigest()] = e.GetLayer()
			d.layer(e.GetLayer())
		case e.GetDone() != nil:
			s.done = e.GetDone()
		}
	}
}

// sentence tells new layers, with their size, from those that were there. How
// much of the new ones an earlier pull had fetched isn't known here.
func (s *summary) sentence(took time.Duration) string {
	fresh, present, size := 0, 0, int64(0)
	for _, l := range s.layers {
		if l.Stage == holdfastv1.PullLayer_EXISTS {
			present++
			continue
		}
		fresh++
		size += l.Descriptor_.GetSize()
	}
	if fresh == 0 {
		return fmt.Sprintf("%s is up to date: all of it is here", s.done.Name)
	}
	text := fmt.Sprintf("%s pulled in %s: %s, %s", s.done.Name, took.Round(10*time.Millisecond), count(fresh, "new layer"), units.BytesSize(float64(size)))
	if present > 0 {
		text += fmt.Sprintf("; %s already unpacked", count(present, "layer"))
	}
	return text
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
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

func (p *lines) close() {}

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
