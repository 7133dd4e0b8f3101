package cli

import (
	"fmt"
	"strings"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/emptypb"
)

// versionRow is what `version --json` prints.
type versionRow struct {
	Client   string `json:"client"`
	Server   string `json:"server,omitempty"` // absent when no daemon answers
	Revision string `json:"revision,omitempty"`
}

func (a *app) version(own string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this program and of the daemon",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := versionapi.NewVersionClient(a.conn).Version(cmd.Context(), &emptypb.Empty{})
			if asJSON {
				row := versionRow{Client: own, Server: resp.GetVersion(), Revision: resp.GetRevision()}
				if e := a.printJSON(row); e != nil {
					return e
				}
				return err
			}
			fmt.Fprintln(a.out, "client:", own)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, strings.TrimSpace("server: "+resp.Version+" "+resp.Revision))
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
