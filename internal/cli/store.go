package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	holdfastv1 "github.com/holdfast-dev/holdfast/proto/holdfast/v1"
)

func (a *app) store() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Look at what lies on disk, and whether it is whole",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.storeTree(), a.storeCheck())
	return cmd
}

// treeRow is one thing of the store, as `--json` prints it.
type treeRow struct {
	Depth   uint32   `json:"depth"`
	Kind    string   `json:"kind"`
	Name    string   `json:"name"`
	Path    string   `json:"path,omitempty"`
	Size    int64    `json:"size"` // bytes on disk; -1 when not known
	Note    string   `json:"note,omitempty"`
	Holders []string `json:"holders,omitempty"`
}

func (a *app) storeTree() *cobra.Command {
	var asJSON, all bool
	cmd := &cobra.Command{
		Use:   "tree",
		Short: "Show what lies on disk, what each thing is for and what keeps it",
		Long: "Show what lies on disk, what each thing is for and what keeps it.\n\n" +
			"What nothing keeps goes with the next collection. Remove what keeps a thing to free it:\n" +
			"an image with `holdfast rmi`, a lease with `ctr leases rm`.",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			rows, err := a.readTree(cmd.Context(), all)
			if err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(rows)
			}
			return a.printTree(rows)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "show what every namespace keeps")
	return cmd
}

func (a *app) readTree(ctx context.Context, all bool) ([]treeRow, error) {
	stream, err := a.holdfast.Tree(a.in(ctx), &holdfastv1.TreeRequest{AllNamespaces: all})
	if err != nil {
		return nil, err
	}
	rows := []treeRow{}
	for {
		n, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return rows, nil
		}
		if err != nil {
			return nil, err
		}
		rows = append(rows, treeRow{n.Depth, n.Kind, n.Name, n.Path, n.Size, n.Note, n.Holders})
	}
}

func (a *app) printTree(rows []treeRow) error {
	lead := branches(rows)
	under := make(map[uint32]string) // depth -> path of the last row
	for i, r := range rows {
		line := lead[i] + r.Name
		if at := whereIs(r, under); at != "" {
			line += "  at " + at
		}
		under[r.Depth] = r.Path
		if r.Size >= 0 {
			line += "  " + units.BytesSize(float64(r.Size))
		}
		if r.Note != "" {
			line += "  (" + r.Note + ")"
		}
		if len(r.Holders) > 0 {
			line += "  kept by " + strings.Join(r.Holders, ", ")
		} else if needsHolder(r.Kind) {
			line += "  kept by nothing"
		}
		if _, err := fmt.Fprintln(a.out, line); err != nil {
			return err
		}
	}
	return nil
}

// whereIs is the place of what doesn't lie under its own name, seen from the
// directory that it is listed in.
func whereIs(r treeRow, under map[uint32]string) string {
	if r.Path == "" || r.Kind != "snapshot" && r.Kind != "ingest" {
		return ""
	}
	rel, err := filepath.Rel(under[r.Depth-1], r.Path)
	if err != nil || strings.HasPrefix(rel, "..") {
		return r.Path
	}
	return rel
}

// needsHolder says of what is collected as soon as nothing keeps it.
func needsHolder(kind string) bool { return kind == "blob" || kind == "snapshot" || kind == "ingest" }

// branches draws the lines that lead to each row. It goes from the last to
// the first, and remembers at which depths a sibling follows.
func branches(rows []treeRow) []string {
	lead := make([]string, len(rows))
	var follows []bool // by depth
	for i := len(rows) - 1; i >= 0; i-- {
		depth := int(rows[i].Depth)
		for len(follows) <= depth {
			follows = append(follows, false)
		}
		var b strings.Builder
		for d := 1; d <= depth; d++ {
			switch {
			case d == depth && follows[d]:
				b.WriteString("├── ")
			case d == depth:
				b.WriteString("└── ")
			case follows[d]:
				b.WriteString("│   ")
			default:
				b.WriteString("    ")
			}
		}
		lead[i] = b.String()
		follows[depth] = true
		clear(follows[depth+1:])
	}
	return lead
}

// findingRow is one thing that is wrong, as `--json` prints it.
type findingRow struct {
	Class     string `json:"class"`
	Namespace string `json:"namespace,omitempty"`
	Subject   string `json:"subject"`
	Problem   string `json:"problem"`
	Advice    string `json:"advice"`
}

// checkReport is what `store check --json` prints.
type checkReport struct {
	Findings  []findingRow `json:"findings"`
	Images    int64        `json:"images"`
	Blobs     int64        `json:"blobs"`
	Snapshots int64        `json:"snapshots"`
	Bytes     int64        `json:"bytes"`
}

func (a *app) storeCheck() *cobra.Command {
	var asJSON, deep bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Compare every record with the bytes it promises; exits with 1 if something is wrong",
		Long: "Compare every record with the bytes it promises, in all namespaces.\n\n" +
			"It changes nothing but what a collection, which it may wait for, would remove anyway.\n" +
			"The exit code is 1 if something is wrong; each finding says what puts it right.",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			rep, err := a.check(cmd.Context(), deep)
			if err != nil {
				return err
			}
			if asJSON {
				err = a.printJSON(rep)
			} else {
				a.printReport(rep, deep)
			}
			if err == nil && len(rep.Findings) > 0 {
				err = errFindings
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&deep, "deep", false, "also read every blob and verify its digest")
	return cmd
}

func (a *app) check(ctx context.Context, deep bool) (checkReport, error) {
	rep := checkReport{Findings: []findingRow{}}
	stream, err := a.holdfast.Check(a.in(ctx), &holdfastv1.CheckRequest{Deep: deep})
	if err != nil {
		return rep, err
	}
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return rep, nil
		}
		if err != nil {
			return rep, err
		}
		if f := e.GetFinding(); f != nil {
			rep.Findings = append(rep.Findings, findingRow{f.Class, f.Namespace, f.Subject, f.Problem, f.Advice})
		}
		if s := e.GetSummary(); s != nil {
			rep.Images, rep.Blobs, rep.Snapshots, rep.Bytes = s.Images, s.Blobs, s.Snapshots, s.Bytes
		}
	}
}

func (a *app) printReport(rep checkReport, deep bool) {
	for _, f := range rep.Findings {
		where := f.Subject
		if f.Namespace != "" {
			where += " in namespace " + f.Namespace
		}
		fmt.Fprintf(a.out, "%s: %s: %s\n    %s\n", f.Class, where, f.Problem, f.Advice)
	}
	how := "records and files agree"
	if deep {
		how = "records and files agree, and every digest is right"
	}
	if n := len(rep.Findings); n > 0 {
		how = count(n, "finding")
	}
	fmt.Fprintf(a.out, "%s, %s (%s), %s: %s\n",
		count(int(rep.Images), "image"), count(int(rep.Blobs), "blob"), units.BytesSize(float64(rep.Bytes)), count(int(rep.Snapshots), "snapshot"), how)
}
