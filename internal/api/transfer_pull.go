package api

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/api/types"
	transfertypes "github.com/containerd/containerd/api/types/transfer"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"

	"github.com/holdfast-dev/holdfast/internal/image"
	"github.com/holdfast-dev/holdfast/internal/image/pull"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/oci"
	"github.com/holdfast-dev/holdfast/internal/registry"
	"github.com/holdfast-dev/holdfast/internal/registry/hosts"
)

// maxPlatforms bounds the platforms that one transfer names.
const maxPlatforms = 64

// pull is the transfer from a registry to the store.
func (s *transferService) pull(ctx context.Context, sp meta.Space, from *transfertypes.OCIRegistry, to *transfertypes.ImageStore, report *report) error {
	if _, err := records(to, oci.Descriptor{}); err != nil {
		return err
	}
	req, err := pullRequest(sp, to, report)
	if err != nil {
		return err
	}
	var done func()
	if req.Session, done, err = s.session(sp.Namespace(), from); err != nil {
		return err
	}
	defer done()
	report.begin(from.GetReference())
	req.Progress = report.hear
	img, err := s.puller.Pull(ctx, sp, from.GetReference(), req)
	if err != nil {
		return err
	}
	recs, err := records(to, img.Target)
	if err != nil {
		return err
	}
	if err := keep(ctx, sp, to, recs); err != nil {
		return err
	}
	report.saved(recs)
	return nil
}

// keep records the names that the pull hasn't, and puts what it brought under
// the client's own lease.
func keep(ctx context.Context, sp meta.Space, to *transfertypes.ImageStore, recs []meta.Image) error {
	if to.GetName() != "" && len(recs) == 1 && sp.Lease() == "" {
		return nil
	}
	return sp.Update(ctx, func(tx *meta.Tx) error {
		if sp.Lease() != "" {
			if err := tx.LeaseBlob(recs[0].Target.Digest); err != nil {
				return err
			}
		}
		if to.GetName() == "" {
			return nil // the pull has recorded them all
		}
		return putAll(tx, recs[1:])
	})
}

// pullRequest says in pull's words what a store wants of an image.
func pullRequest(sp meta.Space, to *transfertypes.ImageStore, report *report) (pull.Request, error) {
	req := pull.Request{
		Labels:   to.GetLabels(),
		Metadata: to.GetAllMetadata(),
		All:      len(to.GetPlatforms()) == 0,
		Names: func(img image.Image) (names []string) {
			recs, _ := records(to, img.Target())
			if to.GetName() != "" {
				recs = recs[:1] // the others have labels of their own
			}
			for _, rec := range recs {
				names = append(names, rec.Name)
			}
			return names
		},
	}
	if n := len(to.GetPlatforms()) + len(to.GetUnpacks()); n > maxPlatforms {
		return req, fmt.Errorf("%d platforms are more than %d: %w", n, maxPlatforms, errdefs.ErrInvalidArgument)
	}
	if limit := int(to.GetManifestLimit()); limit > 0 && (req.All || limit < len(to.GetPlatforms())) {
		return req, fmt.Errorf("manifest_limit %d leaves open which platforms are meant; name the ones you want: %w", limit, errdefs.ErrNotImplemented)
	}
	unpacks, err := unpackable(sp, to.GetUnpacks(), &req, report)
	if err != nil {
		return req, err
	}
	for _, p := range to.GetPlatforms() {
		name := platformName(p)
		req.Platforms = append(req.Platforms, pull.Platform{Name: name, Packed: !slices.Contains(unpacks, name)})
	}
	if req.All {
		for _, name := range unpacks {
			req.Platforms = append(req.Platforms, pull.Platform{Name: name})
		}
	}
	return req, nil
}

// unpackable are the platforms that the client wants unpacked and that can be:
// those of Linux, into a snapshotter that there is. As with containerd the
// others are only fetched, but not without a word, and not if there are no
// others.
func unpackable(sp meta.Space, unpacks []*transfertypes.UnpackConfiguration, req *pull.Request, report *report) (names []string, err error) {
	var because string
	for _, u := range unpacks {
		name := platformName(u.GetPlatform())
		if why := notUnpackable(sp, u); why != "" {
			report.note("unpack "+name, "stays packed: "+why)
			because = fmt.Sprintf("%s: %s", name, why)
			continue
		}
		if len(names) > 0 && u.GetSnapshotter() != req.Snapshotter {
			return nil, fmt.Errorf("one pull can't unpack into both %q and %q; pull once for each: %w", req.Snapshotter, u.GetSnapshotter(), errdefs.ErrNotImplemented)
		}
		req.Snapshotter = u.GetSnapshotter()
		names = append(names, name)
	}
	if len(names) == 0 && because != "" {
		return nil, fmt.Errorf("the image can't be unpacked for %s: %w", because, errdefs.ErrInvalidArgument)
	}
	return names, nil
}

func notUnpackable(sp meta.Space, u *transfertypes.UnpackConfiguration) (why string) {
	if p := u.GetPlatform(); p.GetOS() != "" && p.GetOS() != "linux" {
		return "only images for Linux are unpacked"
	}
	if u.GetSnapshotter() == "" {
		return ""
	}
	if _, err := sp.Snapshots(u.GetSnapshotter()); err != nil {
		return err.Error()
	}
	return ""
}

// platformName is a platform in the words of pull; none is this machine's.
func platformName(p *types.Platform) string {
	if p.GetOS() == "" && p.GetArchitecture() == "" {
		return platforms.FormatAll(platforms.DefaultSpec())
	}
	return platforms.FormatAll(platforms.Normalize(types.OCIPlatformFromProto([]*types.Platform{p})[0]))
}

// session is how the client wants the registry to be reached. done must be
// called when it isn't used any more.
func (s *transferService) session(ns string, from *transfertypes.OCIRegistry) (sess registry.Session, done func(), err error) {
	res := from.GetResolver()
	switch res.GetDefaultScheme() {
	case "", "https": // which is tried first everywhere
	case "http":
		sess.PlainHTTP = true
	default:
		return sess, nil, fmt.Errorf("default_scheme %q is neither http nor https: %w", res.GetDefaultScheme(), errdefs.ErrInvalidArgument)
	}
	if res.GetHttpDebug() != transfertypes.HTTPDebug_DISABLED {
		return sess, nil, fmt.Errorf("http_debug %s: requests to registries can't be dumped yet; pull without it, errors name request and answer: %w", res.GetHttpDebug(), errdefs.ErrNotImplemented)
	}
	if dir := res.GetHostDir(); dir != "" {
		if !filepath.IsAbs(dir) {
			return sess, nil, fmt.Errorf("host_dir %q is relative, and the daemon has another working directory than you; give its full path: %w", dir, errdefs.ErrInvalidArgument)
		}
		sess.Hosts = hosts.Dirs{Paths: []string{dir}}.Lookup
	}
	for key, value := range res.GetHeaders() {
		if sess.Header == nil {
			sess.Header = make(http.Header)
		}
		sess.Header[key] = []string{value}
	}
	if id := res.GetAuthStream(); id != "" {
		end, err := s.streams.Take(ns, id)
		if err != nil {
			return sess, nil, fmt.Errorf("auth stream: %w", err)
		}
		sess.Credentials = newCallback(end, from.GetReference())
		return sess, end.Close, nil
	}
	return sess, func() {}, nil
}
