package forgetful

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sync"
)

// The log is a memory file, shared by the server that appends to it and the
// test that reads it:
//
//	record*
//	record = kind    uint64 LE   1 write, 2 flush
//	         offset  uint64 LE   byte on the disk; 0 for a flush
//	         length  uint64 LE   bytes that follow; 0 for a flush
//	         data    length bytes
//
// A record is appended before the kernel is told that its request is done. So
// whatever a file system has waited for stands before the next record, and
// a flush stands behind every write that it makes durable.

// Kind says what a record of the log holds.
type Kind uint64

// The kinds of record.
const (
	Write Kind = 1 // bytes that reached the disk's cache
	Flush Kind = 2 // everything before is on the platter
)

// Record is one entry of a disk's log.
type Record struct {
	Kind   Kind
	Offset int64 // where on the disk, in bytes
	Length int64 // in bytes

	data int64 // where the bytes stand in the log file
}

const headerSize = 24

// appender writes the log. Its mutex also orders the writes to the disk's
// present content, so that content and log never disagree about which came last.
type appender struct {
	mu   sync.Mutex
	file *os.File
	end  int64
	head [headerSize]byte
}

func (a *appender) append(kind Kind, offset int64, data []byte) error {
	binary.LittleEndian.PutUint64(a.head[0:], uint64(kind))
	binary.LittleEndian.PutUint64(a.head[8:], uint64(offset))
	binary.LittleEndian.PutUint64(a.head[16:], uint64(len(data)))
	if _, err := a.file.WriteAt(a.head[:], a.end); err != nil {
		return err
	}
	if _, err := a.file.WriteAt(data, a.end+headerSize); err != nil {
		return err
	}
	a.end += headerSize + int64(len(data))
	return nil
}

// reader indexes the log as far as it has been written.
type reader struct {
	file    *os.File
	end     int64
	records []Record
}

// catchUp indexes the records appended since the last call. One that is only
// half there is left for the next.
func (r *reader) catchUp() error {
	st, err := r.file.Stat()
	if err != nil {
		return err
	}
	var head [headerSize]byte
	for r.end+headerSize <= st.Size() {
		if _, err := r.file.ReadAt(head[:], r.end); err != nil {
			return err
		}
		rec := Record{
			Kind:   Kind(binary.LittleEndian.Uint64(head[0:])),
			Offset: int64(binary.LittleEndian.Uint64(head[8:])),
			Length: int64(binary.LittleEndian.Uint64(head[16:])),
			data:   r.end + headerSize,
		}
		if rec.Kind != Write && rec.Kind != Flush {
			return fmt.Errorf("record %d of the log has kind %d", len(r.records), rec.Kind)
		}
		if rec.data+rec.Length > st.Size() {
			break
		}
		r.records = append(r.records, rec)
		r.end = rec.data + rec.Length
	}
	return nil
}

// replay copies the bytes [from, to) of a write record into an image.
func (r *reader) replay(image *os.File, rec Record, from, to int64) error {
	src := io.NewSectionReader(r.file, rec.data+from, to-from)
	_, err := io.Copy(io.NewOffsetWriter(image, rec.Offset+from), src)
	return err
}
