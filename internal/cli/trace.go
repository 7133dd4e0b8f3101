package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/types/known/durationpb"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func (a *app) trace() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trace",
		Short: "Look at where the time of pulls went",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.traceList(), a.traceShow())
	return cmd
}

func (a *app) traceList() *cobra.Command {
	var asJSON, all bool
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List the newest pulls, whoever asked for them",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			traces, err := a.readTraces(cmd.Context(), &holdfastv1.TracesRequest{AllNamespaces: all, Brief: true})
			if err != nil {
				return err
			}
			if asJSON {
				rows := []traceRow{}
				for _, t := range traces {
					rows = append(rows, newTraceRow(t))
				}
				return a.printJSON(rows)
			}
			return a.printTraces(traces)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "list the pulls of every namespace")
	return cmd
}

func (a *app) traceShow() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show [ID]",
		Short: "Show one pull stage by stage, and what bounded it",
		Long: "Show one pull stage by stage, and what bounded it; the namespace's last one if no ID is given.\n\n" +
			"Each stage has a bar over the time in which it went on. Where the stages of a layer go on\n" +
			"side by side, the bar is the darker the more of its time the stage worked, and the time\n" +
			"before it is how long that was in all.",
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &holdfastv1.TracesRequest{Limit: 1}
			if len(args) > 0 {
				req.Id = args[0]
			}
			return a.showTrace(cmd.Context(), req, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) showTrace(ctx context.Context, req *holdfastv1.TracesRequest, asJSON bool) error {
	traces, err := a.readTraces(ctx, req)
	if err != nil {
		return err
	}
	if len(traces) == 0 {
		return fmt.Errorf("nothing was pulled in namespace %s of late: `holdfast trace ls -A` lists the pulls of all", a.namespace)
	}
	if asJSON {
		return a.printJSON(newTraceRow(traces[0]))
	}
	_, err = io.WriteString(a.out, waterfall(traces[0], a.width()))
	return err
}

// width is how many columns a picture may take.
func (a *app) width() int {
	const least, most = 80, 120
	if f, ok := a.out.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil {
			return min(max(w, least), most)
		}
	}
	return 100
}

func (a *app) readTraces(ctx context.Context, req *holdfastv1.TracesRequest) (traces []*holdfastv1.Trace, err error) {
	stream, err := a.holdfast.Traces(a.in(ctx), req)
	if err != nil {
		return nil, err
	}
	for {
		t, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return traces, nil
		}
		if err != nil {
			return nil, err
		}
		traces = append(traces, t)
	}
}

func (a *app) printTraces(traces []*holdfastv1.Trace) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tBEGAN\tTOOK\tRESULT\tBOUNDED BY\tNAMESPACE\tIMAGE")
	for _, t := range traces {
		result := "done"
		switch {
		case t.Running:
			result = "under way"
		case t.Error != "":
			result = "failed"
		}
		fmt.Fprintf(w, "%s\t%s ago\t%s\t%s\t%s\t%s\t%s\n", t.Id, units.HumanDuration(time.Since(t.Start.AsTime())),
			span(t.Elapsed.AsDuration()), result, t.Verdict.GetResource(), t.Namespace, t.Reference)
	}
	return w.Flush()
}

// traceRow is one record, as `--json` prints it. Times are milliseconds, those
// of stages since the record's start.
type traceRow struct {
	ID        string       `json:"id"`
	Operation string       `json:"operation"`
	Namespace string       `json:"namespace"`
	Reference string       `json:"reference"`
	Target    string       `json:"target,omitempty"`
	Start     time.Time    `json:"start"`
	Elapsed   float64      `json:"elapsed"`
	Running   bool         `json:"running,omitempty"`
	Error     string       `json:"error,omitempty"`
	Resource  string       `json:"boundedBy"`
	Verdict   string       `json:"verdict"`
	Path      []partRow    `json:"criticalPath,omitempty"`
	Stages    []stageRow   `json:"stages,omitempty"`
	Layers    []layerTrace `json:"layers,omitempty"`
	Hosts     []hostRow    `json:"hosts,omitempty"`
}

type partRow struct {
	Resource string  `json:"resource"`
	Took     float64 `json:"took"`
}

type stageRow struct {
	Stage   string  `json:"stage"`
	Start   float64 `json:"start"`
	Elapsed float64 `json:"elapsed"`
	Busy    float64 `json:"busy,omitempty"` // of elapsed, where stages go on side by side
	Bytes   int64   `json:"bytes,omitempty"`
	Note    string  `json:"note,omitempty"`
	Open    bool    `json:"open,omitempty"`
}

type layerTrace struct {
	Digest  string     `json:"digest"`
	Size    int64      `json:"size"`
	Present bool       `json:"present,omitempty"`
	Joined  bool       `json:"joined,omitempty"`
	Host    string     `json:"host,omitempty"`
	Fetched int64      `json:"fetched"`
	Kept    int64      `json:"kept,omitempty"`
	Retries int64      `json:"retries,omitempty"`
	Stages  []stageRow `json:"stages,omitempty"`
}

type hostRow struct {
	Name     string `json:"name"`
	Requests int64  `json:"requests"`
	Failures int64  `json:"failures,omitempty"`
	Down     string `json:"down,omitempty"`
}

func millis(d *durationpb.Duration) float64 {
	return float64(d.AsDuration().Microseconds()) / 1000
}

func newTraceRow(t *holdfastv1.Trace) traceRow {
	row := traceRow{
		ID: t.Id, Operation: t.Operation, Namespace: t.Namespace, Reference: t.Reference, Target: t.Target, Start: t.Start.AsTime(),
		Elapsed: millis(t.Elapsed), Running: t.Running, Error: t.Error, Resource: t.Verdict.GetResource(), Verdict: t.Verdict.GetText(),
		Stages: stageRows(t.Spans),
	}
	for _, p := range t.Verdict.GetParts() {
		row.Path = append(row.Path, partRow{p.Resource, millis(p.Took)})
	}
	for _, l := range t.Layers {
		row.Layers = append(row.Layers, layerTrace{l.Digest, l.Size, l.Present, l.Joined, l.Host, l.Fetched, l.Kept, l.Retries, stageRows(l.Spans)})
	}
	for _, h := range t.Hosts {
		row.Hosts = append(row.Hosts, hostRow{h.Name, h.Requests, h.Failures, h.Down})
	}
	return row
}

func stageRows(spans []*holdfastv1.TraceSpan) (rows []stageRow) {
	for _, s := range spans {
		rows = append(rows, stageRow{s.Stage, millis(s.Start), millis(s.Elapsed), millis(s.Busy), s.Bytes, s.Note, s.Open})
	}
	return rows
}
