package cli

import (
	"fmt"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/emptypb"
)

func (a *app) version(own string) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of this program and of the daemon",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			resp, err := versionapi.NewVersionClient(a.conn).Version(cmd.Context(), &emptypb.Empty{})
			if asJSON {
				if err != nil {
					return err
				}
				return a.printJSON(map[string]string{"client": own, "server": resp.Version, "revision": resp.Revision})
			}
			fmt.Fprintln(a.out, "client:", own)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, "server:", resp.Version, resp.Revision)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
