package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/holdfast-dev/holdfast/internal/config"
)

// configCommand is `holdfastd config`, whose commands read the
// configuration and start nothing.
func configCommand(o *options) *cobra.Command {
	parent := &cobra.Command{
		Use:   "config",
		Short: "Shows and checks the configuration",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	parent.AddCommand(&cobra.Command{
		Use:   "default",
		Short: "Prints the defaults as a commented config file",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprint(cmd.OutOrStdout(), config.Default())
			return err
		},
	}, &cobra.Command{
		Use:   "dump",
		Short: "Prints the effective configuration, with imports and flags, and where each value was set",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(o.path, o.flags)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), cfg.Dump())
			return err
		},
	}, &cobra.Command{
		Use:   "check",
		Short: "Lists each effective value with its origin, and each key that has no effect with the reason",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(o.path, o.flags)
			if err != nil {
				return err
			}
			if err := printFindings(cmd.OutOrStdout(), cfg.Check()); err != nil {
				return err
			}
			if err := cfg.Refuse(); err != nil {
				return errors.Join(errors.New("the daemon would refuse to start"), err)
			}
			return nil
		},
	})
	return parent
}

// printFindings writes a table of the values in effect, and then one of the
// keys that have none, if there are any.
func printFindings(w io.Writer, findings []config.Finding) error {
	table := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, "KEY\tVALUE\tSET BY")
	var ineffective []config.Finding
	for _, f := range findings {
		if f.Status != config.Honoured {
			ineffective = append(ineffective, f)
			continue
		}
		origin := f.Origin.String()
		if f.Reason != "" {
			origin += " (" + f.Reason + ")"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", f.Key, f.Value, origin)
	}
	if len(ineffective) == 0 {
		fmt.Fprintln(table, "\nEvery key of the configuration has its effect.")
		return table.Flush()
	}
	fmt.Fprintf(table, "\nKeys without effect: %d\n", len(ineffective))
	fmt.Fprintln(table, "KEY\tVALUE\tSET BY\tSTATUS\tREASON")
	for _, f := range ineffective {
		origin := f.Origin.String()
		if f.Origin.Key != "" && f.Origin.Key != f.Key {
			origin += " as " + f.Origin.Key
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", f.Key, f.Value, origin, f.Status, f.Reason)
	}
	return table.Flush()
}
