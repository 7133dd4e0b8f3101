// Package trace records what one operation read, wrote, waited for and changed.
//
// So far the operations are pulls. A Recorder keeps the newest records on disk;
// Puller stands before whatever pulls, so every door's pulls leave one, failed
// ones too. What a record holds comes from funcs that the lower rooms call
// (pull.Hooks, registry.Hooks): they know nothing of it.
package trace

import (
	"crypto/rand"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
)

// Record is what one operation left.
type Record struct {
	ID        string        `json:"id"`
	Operation string        `json:"operation"` // "pull"
	Namespace string        `json:"namespace"`
	Reference string        `json:"reference"`
	Target    digest.Digest `json:"target,omitempty"` // what the reference turned out to be
	Start     time.Time     `json:"start"`
	Elapsed   time.Duration `json:"elapsed"`           // all durations are nanoseconds
	Running   bool          `json:"running,omitempty"` // it has not ended; never on disk
	Error     string        `json:"error,omitempty"`

	Verdict Verdict `json:"verdict"`
	Spans   []Span  `json:"spans"`             // of the operation itself
	Layers  []Layer `json:"layers,omitempty"`  // bottom first
	Hosts   []Host  `json:"hosts,omitempty"`   // in the order in which they were asked
	Dropped int     `json:"dropped,omitempty"` // spans and layers beyond the bounds
}

// Layer is what was done for one layer.
type Layer struct {
	ID      digest.Digest `json:"id"` // ChainID, or the blob's digest if it stays packed
	Parent  digest.Digest `json:"parent,omitempty"`
	Digest  digest.Digest `json:"digest"`            // of the blob
	Size    int64         `json:"size"`              // of the blob, in bytes
	Present bool          `json:"present,omitempty"` // it was here: nothing was done
	Joined  bool          `json:"joined,omitempty"`  // another pull had begun it
	Host    string        `json:"host,omitempty"`    // that sent the last bytes
	Fetched int64         `json:"fetched,omitempty"` // bytes that came over the network
	Kept    int64         `json:"kept,omitempty"`    // bytes that an earlier pull had fetched
	Retries int           `json:"retries,omitempty"` // requests that were repeated
	Spans   []Span        `json:"spans,omitempty"`
}

// Host is one registry or mirror that was asked.
type Host struct {
	Name     string `json:"name"`
	Requests int    `json:"requests"`
	Failures int    `json:"failures,omitempty"` // without an answer, or answered by 429 or 5xx
	Down     string `json:"down,omitempty"`     // why it was not asked any more
}

// Span is a stretch of time. Those that begin and end together are the parts
// of one pass over a layer's bytes: they go on side by side, each busy for
// some of it.
type Span struct {
	Stage   Stage         `json:"stage"`
	Start   time.Duration `json:"start"` // since the record's
	Elapsed time.Duration `json:"elapsed"`
	Open    bool          `json:"open,omitempty"`    // it has not ended
	Busy    time.Duration `json:"busy,omitempty"`    // of a part of a pass: how long it worked
	Starved time.Duration `json:"starved,omitempty"` // of StageInflate: how long it waited for compressed bytes
	Bytes   int64         `json:"bytes,omitempty"`
	Note    string        `json:"note,omitempty"` // a host, an error
}

func (s Span) end() time.Duration { return s.Start + s.Elapsed }

// Stage says what a span's time went to.
type Stage string

// The stages of a pull, then those of a request, of a pass over a layer's
// bytes, and of a layer's other time.
const (
	StageResolve   Stage = "resolve"
	StageBegin     Stage = "begin"
	StageDocuments Stage = "documents"
	StageClaim     Stage = "claim"
	StageLayers    Stage = "layers"
	StageRecord    Stage = "record"

	StageLogin   Stage = "login" // a refusal, credentials, a token
	StageDNS     Stage = "dns"
	StageConnect Stage = "connect"
	StageTLS     Stage = "tls"
	StageAnswer  Stage = "answer" // until the first byte of the answer
	StageRetry   Stage = "retry"  // the wait before a repetition

	StageFetch   Stage = "fetch"   // bytes arrive
	StageKeep    Stage = "keep"    // they are digested and written to the store
	StageRead    Stage = "read"    // bytes that were here are read
	StageInflate Stage = "inflate" // they are decompressed
	StageVerify  Stage = "verify"  // the plain archive is digested
	StageEmit    Stage = "emit"    // its files are written
	StageUnpack  Stage = "unpack"  // all of these, as long as it goes on

	StageQueue    Stage = "queue"    // waits for a download slot
	StageParent   Stage = "parent"   // waits for the layer below
	StageFlush    Stage = "flush"    // files are synced one by one
	StageBatch    Stage = "batch"    // waits for others to commit with, or for the commit in front
	StageSync     Stage = "sync"     // file systems are synced
	StageSeal     Stage = "seal"     // the blob goes to its place
	StageSnapshot Stage = "snapshot" // the driver commits
	StageMeta     Stage = "meta"     // the records commit
)

// ofRequest reports whether the stage is one of an HTTP request.
func (s Stage) ofRequest() bool {
	switch s {
	case StageLogin, StageDNS, StageConnect, StageTLS, StageAnswer, StageRetry:
		return true
	}
	return false
}

// ofPass reports whether the stage is a part of a pass.
func (s Stage) ofPass() bool {
	switch s {
	case StageFetch, StageKeep, StageRead, StageInflate, StageVerify, StageEmit, StageUnpack:
		return true
	}
	return false
}

// Bounds of one record (inv 10). With all of them reached it has less than
// maxFile bytes.
const (
	maxLayers = 1024
	maxSpans  = 8192 // of the record and its layers together
	maxHosts  = 32
	maxText   = 200  // bytes of a host or note
	maxError  = 4096 // bytes of the error, and of the reference
	maxFile   = 8 << 20
)

// clip bounds a text, and takes out what is no text: it may come from a registry.
func clip(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			return r
		}
		return ' '
	}, s)
}

// idForm is that of a record's ID: when it began, and four letters that tell
// it from others.
var idForm = regexp.MustCompile(`^\d{8}-\d{6}\.\d{3}-[a-z2-7]{4}$`)

// NewID names an operation that begins now. IDs sort by time.
func NewID() string {
	return time.Now().UTC().Format("20060102-150405.000-") + strings.ToLower(rand.Text()[:4])
}
