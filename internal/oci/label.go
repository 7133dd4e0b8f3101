package oci

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// The labels that a pull writes, as containerd names them.
const (
	LabelUncompressed = "containerd.io/uncompressed"         // on a layer blob: its DiffID
	LabelSource       = "containerd.io/distribution.source." // + host without its port, on a fetched blob: repositories, joined by commas (see SourceKey)
	LabelSnapshot     = "containerd.io/gc.ref.snapshot."     // + driver, on a config: the top ChainID
	LabelSnapshotRef  = "containerd.io/snapshot.ref"         // on an active snapshot: the ChainID that it will be
	LabelDiffID       = "containerd.io/snapshot/diff-id"     // on a layer's snapshot: its DiffID
	LabelParentChain  = "containerd.io/snapshot/parent-chain-id"
	labelContent      = "containerd.io/gc.ref.content."
	maxLabel          = 4096 // bytes of a label's key and value together
)

// ChildLabels returns the collection labels by which a document keeps its
// children alive, in containerd's names: `...content.config`, `...content.m.0`
// for manifests, `...content.l.0` for layers and `...content.0` for the rest.
func ChildLabels(children []Descriptor) map[string]string {
	labels := make(map[string]string, len(children))
	next := map[string]int{}
	for _, ch := range children {
		key := labelContent
		switch mt := ch.MediaType; {
		case IsManifest(mt) || IsIndex(mt):
			key += "m."
		case IsLayer(mt):
			key += "l."
		case IsConfig(mt):
			key += "config"
		}
		n := next[key]
		next[key]++
		if n > 0 || strings.HasSuffix(key, ".") {
			key += fmt.Sprint(n)
		}
		labels[key] = ch.Digest.String()
	}
	return labels
}

// SourceKey is the label that lists the repositories of a host, which may have
// a port: containerd's label leaves it out, and brackets too.
func SourceKey(host string) string {
	return LabelSource + (&url.URL{Host: host}).Hostname()
}

// SourceLabel adds repository to the list of those that a blob was fetched
// from, value "" being the empty list. ok is false when the list is complete
// already or would outgrow a label.
func SourceLabel(host, value, repository string) (key, list string, ok bool) {
	key = SourceKey(host)
	var repos []string
	if value != "" {
		repos = strings.Split(value, ",")
	}
	if slices.Contains(repos, repository) {
		return key, value, false
	}
	repos = append(repos, repository)
	slices.Sort(repos)
	list = strings.Join(slices.Compact(repos), ",")
	return key, list, len(key)+len(list) <= maxLabel
}
