package api

import (
	"context"
	"errors"
	"fmt"
	"io"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/holdfast-dev/holdfast/internal/content"
	"github.com/holdfast-dev/holdfast/internal/meta"
	"github.com/holdfast-dev/holdfast/internal/wire"
)

// readChunk is how many bytes of a blob travel in one message.
const readChunk = 1 << 20

type contentService struct {
	contentapi.UnimplementedContentServer
	door
}

func (s *contentService) Info(ctx context.Context, req *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	dgst, err := parseDigest(req.GetDigest())
	if err != nil {
		return nil, wire.Error(err)
	}
	b, err := sp.Blob(ctx, dgst)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &contentapi.InfoResponse{Info: blobInfo(b)}, nil
}

func (s *contentService) Update(ctx context.Context, req *contentapi.UpdateRequest) (*contentapi.UpdateResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	dgst, err := parseDigest(req.GetInfo().GetDigest())
	if err != nil {
		return nil, wire.Error(err)
	}
	b := meta.Blob{Digest: dgst, Labels: req.GetInfo().GetLabels()}
	b, err = sp.UpdateBlob(ctx, b, req.GetUpdateMask().GetPaths()...)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &contentapi.UpdateResponse{Info: blobInfo(b)}, nil
}

func (s *contentService) List(req *contentapi.ListContentRequest, stream contentapi.Content_ListServer) error {
	sp, err := s.space(stream.Context())
	if err != nil {
		return wire.Error(err)
	}
	blobs := sp.Blobs(stream.Context(), req.GetFilters()...)
	return wire.Error(sendChunks(blobs, blobInfo, func(infos []*contentapi.Info) error {
		return stream.Send(&contentapi.ListContentResponse{Info: infos})
	}))
}

func (s *contentService) Delete(ctx context.Context, req *contentapi.DeleteContentRequest) (*emptypb.Empty, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	dgst, err := parseDigest(req.GetDigest())
	if err != nil {
		return nil, wire.Error(err)
	}
	return &emptypb.Empty{}, wire.Error(sp.DeleteBlob(ctx, dgst))
}

func (s *contentService) Read(req *contentapi.ReadContentRequest, stream contentapi.Content_ReadServer) error {
	sp, err := s.space(stream.Context())
	if err != nil {
		return wire.Error(err)
	}
	dgst, err := parseDigest(req.GetDigest())
	if err != nil {
		return wire.Error(err)
	}
	blob, err := sp.Reader(stream.Context(), dgst)
	if err != nil {
		return wire.Error(err)
	}
	defer blob.Close()
	return wire.Error(sendBlob(blob, req.GetOffset(), req.GetSize(), stream))
}

// sendBlob sends size bytes of a blob from offset on. A size that is not
// positive, or reaches past the end, means to the end. The offsets in the
// answers count from the first byte sent and not from the blob's own; clients
// rely on that.
func sendBlob(blob *content.Reader, offset, size int64, stream contentapi.Content_ReadServer) error {
	offset = max(offset, 0)
	if offset > blob.Size() {
		return fmt.Errorf("read past object length %d bytes: %w", blob.Size(), errdefs.ErrOutOfRange)
	}
	rest := blob.Size() - offset
	if size <= 0 || size > rest {
		size = rest
	}
	buf := make([]byte, min(size, readChunk))
	for sent := int64(0); sent < size; {
		n, err := blob.ReadAt(buf[:min(size-sent, readChunk)], offset+sent)
		if n == 0 && err == nil || err == io.EOF && int64(n) < min(size-sent, readChunk) {
			err = fmt.Errorf("the blob ends at byte %d of %d: %w", offset+sent+int64(n), blob.Size(), errdefs.ErrDataLoss)
		}
		if err != nil && err != io.EOF {
			return err
		}
		if err := stream.Send(&contentapi.ReadContentResponse{Offset: sent, Data: buf[:n]}); err != nil {
			return err
		}
		sent += int64(n)
	}
	return nil
}

func (s *contentService) Status(ctx context.Context, req *contentapi.StatusRequest) (*contentapi.StatusResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	st, err := sp.Ingest(ctx, req.GetRef())
	if err != nil {
		return nil, wire.Error(fmt.Errorf("could not get status for ref %q: %w", req.GetRef(), err))
	}
	return &contentapi.StatusResponse{Status: ingestStatus(st)}, nil
}

func (s *contentService) ListStatuses(ctx context.Context, req *contentapi.ListStatusesRequest) (*contentapi.ListStatusesResponse, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	sts, err := sp.Ingests(ctx, req.GetFilters()...)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &contentapi.ListStatusesResponse{Statuses: convertAll(sts, ingestStatus)}, nil
}

func (s *contentService) Abort(ctx context.Context, req *contentapi.AbortRequest) (*emptypb.Empty, error) {
	sp, err := s.space(ctx)
	if err != nil {
		return nil, wire.Error(err)
	}
	return &emptypb.Empty{}, wire.Error(sp.AbortIngest(ctx, req.GetRef()))
}

// Write answers one upload. The ingest is locked while the stream is open; when
// it ends without a commit, for whatever reason, the ingest stays to be
// resumed.
func (s *contentService) Write(stream contentapi.Content_WriteServer) error {
	ctx := stream.Context()
	sp, err := s.space(ctx)
	if err != nil {
		return wire.Error(err)
	}
	req, err := stream.Recv()
	if err != nil && !errors.Is(err, io.EOF) {
		return wire.Error(err)
	}
	u, err := openUpload(ctx, sp, req)
	if err != nil {
		return wire.Error(err)
	}
	defer u.w.Close()
	for {
		resp, err := u.step(ctx, req)
		if err != nil {
			return wire.Error(err)
		}
		if err := stream.Send(resp); err != nil || req.GetAction() == contentapi.WriteAction_COMMIT {
			return err
		}
		if req, err = stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return wire.Error(err)
		}
	}
}

// upload is the state of a Write stream between two messages:
//
//	         first message            STAT, WRITE
//	(start) ---------------> (open) ---------------> (open)
//	                           |
//	                           | COMMIT: answered, then the stream ends
//	                           +-----------------------------------> (committed)
//	                           | `expected` is there already, an error,
//	                           | the client's end
//	                           +-----------------------------------> (closed)
//
// Source: containerd plugins/services/content/contentserver.
type upload struct {
	sp       meta.Space
	ref      string
	w        *meta.Writer
	total    int64         // the last that a message gave; 0 = unknown
	expected digest.Digest // the last that a message gave; "" = unknown
}

func openUpload(ctx context.Context, sp meta.Space, req *contentapi.WriteContentRequest) (*upload, error) {
	if req.GetRef() == "" {
		return nil, fmt.Errorf("first message must have a reference: %w", errdefs.ErrInvalidArgument)
	}
	u := &upload{sp: sp, ref: req.GetRef()}
	if err := u.learn(req); err != nil {
		return nil, err
	}
	w, err := sp.OpenWriter(ctx, u.ref, meta.WriterOptions{Total: u.total, Expected: u.expected})
	if err != nil {
		return nil, err
	}
	u.w = w
	return u, nil
}

// learn takes over what a message says about the whole.
func (u *upload) learn(req *contentapi.WriteContentRequest) error {
	if req.GetTotal() < 0 {
		return fmt.Errorf("total size %d is negative: %w", req.GetTotal(), errdefs.ErrInvalidArgument)
	}
	if req.GetTotal() > 0 {
		u.total = req.GetTotal()
	}
	if req.GetExpected() == "" {
		return nil
	}
	dgst, err := parseDigest(req.GetExpected())
	if err != nil {
		return err
	}
	u.expected = dgst
	return nil
}

// step does what one message asks for and says how to answer it.
func (u *upload) step(ctx context.Context, req *contentapi.WriteContentRequest) (*contentapi.WriteContentResponse, error) {
	if err := u.learn(req); err != nil {
		return nil, err
	}
	if req.GetExpected() != "" {
		if err := u.refuseExisting(ctx); err != nil {
			return nil, err
		}
	}
	st, err := u.w.Status()
	if err != nil {
		return nil, err
	}
	resp := &contentapi.WriteContentResponse{Action: req.GetAction(), Offset: st.Offset}
	switch req.GetAction() {
	case contentapi.WriteAction_STAT:
		resp.StartedAt = wire.Time(st.StartedAt)
		resp.UpdatedAt = wire.Time(st.UpdatedAt)
		resp.Total = u.total
	case contentapi.WriteAction_WRITE, contentapi.WriteAction_COMMIT:
		if resp.Offset, err = u.write(req, st.Offset); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("unknown write action %d: %w", req.GetAction(), errdefs.ErrInvalidArgument)
	}
	if req.GetAction() == contentapi.WriteAction_COMMIT {
		if err := u.w.Commit(ctx, u.total, u.expected, req.GetLabels()); err != nil {
			return nil, err
		}
	}
	resp.Digest = u.w.Digest().String()
	return resp, nil
}

// refuseExisting ends an upload of what the namespace has got meanwhile: the
// ingest is dropped, and the blob, on which the client now relies, comes under
// its lease. // inv 3
func (u *upload) refuseExisting(ctx context.Context) error {
	_, err := u.sp.Blob(ctx, u.expected)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil && u.sp.Lease() != "" {
		err = u.sp.Update(ctx, func(tx *meta.Tx) error { return tx.LeaseBlob(u.expected) })
		if errdefs.IsNotFound(err) {
			if _, gone := u.sp.Blob(ctx, u.expected); errdefs.IsNotFound(gone) {
				return nil // collected between the two; the upload goes on
			}
		}
	}
	if err != nil {
		return err
	}
	err = fmt.Errorf("blob with expected digest %s exists: %w", u.expected, errdefs.ErrAlreadyExists)
	if e := u.w.Close(); e != nil {
		return errors.Join(err, e)
	}
	if e := u.sp.AbortIngest(ctx, u.ref); e != nil && !errdefs.IsNotFound(e) {
		return errors.Join(err, e)
	}
	return err
}

// write appends the data of a message and returns the new offset. An offset
// that is given must be where the ingest ends. None (0) starts the ingest
// again: a commit without its offset so wipes what was written, which clients
// know and resuming ones use.
func (u *upload) write(req *contentapi.WriteContentRequest, end int64) (int64, error) {
	switch off := req.GetOffset(); {
	case off != 0 && off != end:
		return 0, fmt.Errorf("write @%d must occur at current offset %d: %w", off, end, errdefs.ErrOutOfRange)
	case off == 0 && end > 0:
		if err := u.w.Truncate(0); err != nil {
			return 0, fmt.Errorf("truncate: %w", err)
		}
		end = 0
	}
	if len(req.GetData()) == 0 {
		return end, nil
	}
	n, err := u.w.Write(req.GetData())
	if err != nil {
		return 0, err
	}
	if n != len(req.GetData()) {
		return 0, fmt.Errorf("wrote %d of %d bytes: %w", n, len(req.GetData()), errdefs.ErrDataLoss)
	}
	return end + int64(n), nil
}

// parseDigest checks a digest of a request.
func parseDigest(s string) (digest.Digest, error) {
	dgst, err := digest.Parse(s)
	if err != nil {
		return "", fmt.Errorf("digest %q failed validation: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return dgst, nil
}

func blobInfo(b meta.Blob) *contentapi.Info {
	return &contentapi.Info{
		Digest:    b.Digest.String(),
		Size:      b.Size,
		CreatedAt: wire.Time(b.Created),
		UpdatedAt: wire.Time(b.Updated),
		Labels:    b.Labels,
	}
}

func ingestStatus(st content.Status) *contentapi.Status {
	return &contentapi.Status{
		StartedAt: wire.Time(st.StartedAt),
		UpdatedAt: wire.Time(st.UpdatedAt),
		Ref:       st.Ref,
		Offset:    st.Offset,
		Total:     st.Total,
		Expected:  st.Expected.String(),
	}
}
