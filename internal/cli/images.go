package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/ref"
)

// imageRow is one listed image, as `--json` prints it.
type imageRow struct {
	Name      string            `json:"name"`
	Digest    string            `json:"digest"`
	MediaType string            `json:"mediaType"`
	Size      int64             `json:"size"` // compressed bytes for this platform; -1 when its documents are not here
	CreatedAt time.Time         `json:"createdAt"`
	UpdatedAt time.Time         `json:"updatedAt"`
	Labels    map[string]string `json:"labels,omitempty"`
}

func (a *app) images() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "images",
		Aliases: []string{"ls"},
		Short:   "List the images of the namespace",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			rows, err := a.listImages(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return a.printJSON(rows)
			}
			return a.printImages(rows)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func (a *app) listImages(ctx context.Context) ([]imageRow, error) {
	ctx = a.in(ctx)
	resp, err := imagesapi.NewImagesClient(a.conn).List(ctx, &imagesapi.ListImagesRequest{})
	if err != nil {
		return nil, err
	}
	docs := remoteDocuments{contentapi.NewContentClient(a.conn)}
	rows := []imageRow{}
	for _, img := range resp.Images {
		row := imageRow{
			Name: img.Name, Digest: img.Target.Digest, MediaType: img.Target.MediaType, Size: -1,
			CreatedAt: img.CreatedAt.AsTime(), UpdatedAt: img.UpdatedAt.AsTime(), Labels: img.Labels,
		}
		target := oci.Descriptor{MediaType: img.Target.MediaType, Digest: digest.Digest(img.Target.Digest), Size: img.Target.Size}
		found, err := image.Load(ctx, docs, target, oci.Host())
		switch status.Code(err) {
		case codes.OK:
			row.Size = found.Size()
		case codes.Unavailable, codes.Canceled:
			return nil, err
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func (a *app) printImages(rows []imageRow) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tDIGEST\tSIZE\tPULLED")
	for _, r := range rows {
		size := "not all here"
		if r.Size >= 0 {
			size = units.BytesSize(float64(r.Size))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s ago\n", r.Name, shortDigest(r.Digest), size, units.HumanDuration(time.Since(r.UpdatedAt)))
	}
	return w.Flush()
}

// shortDigest is enough of a digest to tell it from others on one screen.
func shortDigest(d string) string {
	const keep = len("sha256:") + 12
	return d[:min(len(d), keep)]
}

// remoteDocuments reads documents from the daemon's content service.
type remoteDocuments struct{ content contentapi.ContentClient }

// ReadDocument implements image.Documents.
func (r remoteDocuments) ReadDocument(ctx context.Context, desc oci.Descriptor) ([]byte, error) {
	if desc.Size > oci.MaxDocument {
		return nil, fmt.Errorf("document %s has %d bytes, more than a document may have", desc.Digest, desc.Size)
	}
	stream, err := r.content.Read(ctx, &contentapi.ReadContentRequest{Digest: desc.Digest.String()})
	if err != nil {
		return nil, err
	}
	var doc []byte
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return doc, nil
		}
		if err != nil {
			return nil, err
		}
		if doc = append(doc, m.Data...); int64(len(doc)) > desc.Size {
			return nil, fmt.Errorf("document %s is longer than its descriptor says", desc.Digest)
		}
	}
}

func (a *app) rmi() *cobra.Command {
	return &cobra.Command{
		Use:   "rmi IMAGE...",
		Short: "Remove images, and everything that only they needed",
		Long: "Remove images, and everything that only they needed.\n\n" +
			"A name is taken at its word and, if there is no such image, completed as `holdfast pull` does.",
		Example: "  holdfast rmi docker.io/library/alpine:3.20.1\n  holdfast rmi alpine:3.20.1 busybox",
		Args:    usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var all error
			for i, name := range args {
				// The last removal waits for one collection, which serves them all.
				err := a.removeImage(cmd.Context(), name, i == len(args)-1)
				switch status.Code(err) {
				case codes.OK:
				case codes.Unavailable, codes.Canceled:
					return errors.Join(all, errors.New(a.explain(err)))
				default:
					all = errors.Join(all, errors.New(a.explain(err)))
				}
			}
			return all
		},
	}
}

// removeImage removes the image of exactly this name, or else the one that
// the name is short for.
func (a *app) removeImage(ctx context.Context, name string, wait bool) error {
	images := imagesapi.NewImagesClient(a.conn)
	remove := func(name string) error {
		_, err := images.Delete(a.in(ctx), &imagesapi.DeleteImageRequest{Name: name, Sync: wait})
		if err == nil {
			fmt.Fprintln(a.out, "removed", name)
		}
		return err
	}
	err := remove(name)
	if status.Code(err) != codes.NotFound {
		return err
	}
	if long, e := ref.Normalize(name); e == nil && long.String() != name {
		err = remove(long.String())
	}
	if status.Code(err) == codes.NotFound {
		return a.noSuchImage(name)
	}
	return err
}

func (a *app) noSuchImage(name string) error {
	return fmt.Errorf("there is no image %s in namespace %s: `holdfast -n %s images` lists them", name, a.namespace, a.namespace)
}
