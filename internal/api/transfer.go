package api

import (
	"context"
	"fmt"
	"maps"
	"time"

	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	transfertypes "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/stream"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// The labels by which an extra name of an image lives as long as its main
// name. Source: containerd core/transfer/image.
const (
	labelKeptBy  = "containerd.io/gc.bref.image"
	labelExpires = "containerd.io/gc.expire"
)

// transferService moves images between places, as containerd's Transfer does:
//
//	from \ to      ImageStore   OCIRegistry   ImageExportStream
//	OCIRegistry    pull
//	ImageStore     tag          -             -
//	ImageImport-   -                          -
//	Stream
//
// What has a dash is not built yet, and is Unimplemented like everything else.
type transferService struct {
	transferapi.UnimplementedTransferServer
	door
	puller  Puller
	streams *stream.Manager
}

func (s *transferService) Transfer(ctx context.Context, req *transferapi.TransferRequest) (*emptypb.Empty, error) {
	if s.puller == nil || s.streams == nil {
		return s.UnimplementedTransferServer.Transfer(ctx, req)
	}
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	report, err := s.openReport(sp.Namespace(), req.GetOptions().GetProgressStream())
	if err != nil {
		return nil, wire.Error(err)
	}
	defer report.close()
	from, err := decodePlace("source", req.GetSource())
	if err != nil {
		return nil, wire.Error(err)
	}
	to, err := decodePlace("destination", req.GetDestination())
	if err != nil {
		return nil, wire.Error(err)
	}
	if store, ok := to.(*transfertypes.ImageStore); ok {
		switch from := from.(type) {
		case *transfertypes.OCIRegistry:
			return &emptypb.Empty{}, wire.Error(s.pull(ctx, sp, from, store, report))
		case *transfertypes.ImageStore:
			return &emptypb.Empty{}, wire.Error(tag(ctx, sp, from, store))
		}
	}
	return nil, wire.Error(fmt.Errorf("transfer from %s to %s: images are not pushed, imported or exported yet, only pulled and tagged: %w",
		typeName(req.GetSource().GetTypeUrl()), typeName(req.GetDestination().GetTypeUrl()), errdefs.ErrNotImplemented))
}

// decodePlace reads what stands at one end of a transfer.
func decodePlace(which string, a *anypb.Any) (proto.Message, error) {
	if a.GetTypeUrl() == "" {
		return nil, fmt.Errorf("the %s is missing: %w", which, errdefs.ErrInvalidArgument)
	}
	m, err := a.UnmarshalNew()
	switch {
	case err == protoregistry.NotFound:
		return nil, fmt.Errorf("%s of unknown type %q: %w", which, a.GetTypeUrl(), errdefs.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("read %s of type %q: %w: %w", which, a.GetTypeUrl(), err, errdefs.ErrInvalidArgument)
	}
	return m, nil
}

// tag gives an image more names. A name that is taken moves.
func tag(ctx context.Context, sp meta.Space, from, to *transfertypes.ImageStore) error {
	return sp.Update(ctx, func(tx *meta.Tx) error {
		img, err := tx.Image(from.GetName())
		if err != nil {
			return err
		}
		recs, err := records(to, img.Target)
		if err != nil {
			return err
		}
		return putAll(tx, recs)
	})
}

func putAll(tx *meta.Tx, recs []meta.Image) error {
	for _, rec := range recs {
		if _, err := tx.PutImage(rec); err != nil {
			return err
		}
	}
	return nil
}

// records are the images that a store is asked to record for a target: one of
// its name, and one for each extra reference that is a whole name or becomes
// one by the target's digest. The extra ones go with the first, if there is
// one.
func records(to *transfertypes.ImageStore, target oci.Descriptor) (recs []meta.Image, err error) {
	labels := to.GetLabels()
	if to.GetName() != "" {
		recs = append(recs, meta.Image{Name: to.GetName(), Target: target, Labels: labels})
		labels = maps.Clone(labels)
		if labels == nil {
			labels = make(map[string]string)
		}
		labels[labelKeptBy] = to.GetName()
		labels[labelExpires] = time.Now().UTC().Format(time.RFC3339)
	}
	for _, r := range to.GetExtraReferences() {
		name := r.GetName()
		switch {
		case name == "":
			return nil, fmt.Errorf("an extra reference has no name: %w", errdefs.ErrInvalidArgument)
		case r.GetAddDigest():
			name += "@" + target.Digest.String()
		case r.GetIsPrefix():
			continue // a tag would come from an archive's annotations
		}
		recs = append(recs, meta.Image{Name: name, Target: target, Labels: labels})
	}
	if len(recs) == 0 {
		return nil, fmt.Errorf("no image name found: the destination names none: %w", errdefs.ErrNotFound)
	}
	return recs, nil
}
