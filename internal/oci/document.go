// Package oci defines the OCI documents: descriptors, manifests, indexes, configs, platforms.
package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	_ "crypto/sha256" // digest algorithms that a descriptor may name
	_ "crypto/sha512"
)

// The documents, as the OCI image specification 1.1 gives them.
type (
	Descriptor = ocispec.Descriptor
	Platform   = ocispec.Platform
	Index      = ocispec.Index
	Manifest   = ocispec.Manifest
	// Image is the config document of an image.
	Image = ocispec.Image
)

// Bounds on documents, which come from strangers.
const (
	MaxDocument = 4 << 20 // bytes of an index, manifest or config
	MaxChildren = 10_000  // descriptors in one document, layers of one image
	maxDepth    = 64      // nested arrays and objects
)

// ErrAmbiguous says that two readers could take a document for different
// things, so that what is verified might not be what is run.
var ErrAmbiguous = errors.New("ambiguous document")

// ParseIndex reads an index or Docker manifest list that a descriptor of
// media type mt promised. The error is errdefs.ErrInvalidArgument when the
// document is no index, is ambiguous or breaks a bound.
func ParseIndex(mt string, doc []byte) (Index, error) {
	var idx Index
	if !IsIndex(mt) {
		return idx, invalid("index", fmt.Errorf("media type %q is none", mt))
	}
	if err := parse(doc, mt, []string{"config", "layers", "fsLayers"}, &idx); err != nil {
		return Index{}, invalid("index", err)
	}
	if err := checkAll(idx.Manifests); err != nil {
		return Index{}, invalid("index", err)
	}
	return idx, nil
}

// ParseManifest reads a manifest that a descriptor of media type mt promised.
// Errors are as for ParseIndex.
func ParseManifest(mt string, doc []byte) (Manifest, error) {
	var m Manifest
	if !IsManifest(mt) {
		return m, invalid("manifest", fmt.Errorf("media type %q is none", mt))
	}
	if err := parse(doc, mt, []string{"manifests", "fsLayers"}, &m); err != nil {
		return Manifest{}, invalid("manifest", err)
	}
	if m.Config.Digest == "" {
		return Manifest{}, invalid("manifest", errors.New("it names no config"))
	}
	if err := checkAll(append([]Descriptor{m.Config}, m.Layers...)); err != nil {
		return Manifest{}, invalid("manifest", err)
	}
	return m, nil
}

// ParseImage reads an image config. Errors are as for ParseIndex.
func ParseImage(doc []byte) (Image, error) {
	var img Image
	if err := parse(doc, "", []string{"layers", "manifests", "fsLayers"}, &img); err != nil {
		return Image{}, invalid("image config", err)
	}
	if len(img.RootFS.DiffIDs) > MaxChildren {
		return Image{}, invalid("image config", fmt.Errorf("%d layers are more than %d", len(img.RootFS.DiffIDs), MaxChildren))
	}
	for i, d := range img.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return Image{}, invalid("image config", fmt.Errorf("diff id %d: %w", i, err))
		}
	}
	return img, nil
}

// ChainIDs returns the names under which the first 1, 2, ... n layers are
// kept as snapshots, as the OCI image specification defines them.
func ChainIDs(diffIDs []digest.Digest) []digest.Digest {
	return identity.ChainIDs(slices.Clone(diffIDs))
}

func invalid(kind string, err error) error {
	return fmt.Errorf("%s refused: %w: %w", kind, err, errdefs.ErrInvalidArgument)
}

func checkAll(descs []Descriptor) error {
	if len(descs) > MaxChildren {
		return fmt.Errorf("%d descriptors are more than %d", len(descs), MaxChildren)
	}
	for i, d := range descs {
		if err := Check(d); err != nil {
			return fmt.Errorf("descriptor %d: %w", i, err)
		}
	}
	return nil
}

// Check says what is wrong with a descriptor by itself: its digest, size or
// media type.
func Check(desc Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w", desc.Digest, err)
	}
	if desc.Size < 0 {
		return fmt.Errorf("%s has the size %d", desc.Digest, desc.Size)
	}
	if desc.MediaType == "" {
		return fmt.Errorf("%s has no media type", desc.Digest)
	}
	return nil
}

// parse decodes doc into v after making sure that it can be read in one way
// only: see unambiguous. mt, if not empty, is what doc's own mediaType must be
// when it has one. foreign are keys of other kinds of document.
func parse(doc []byte, mt string, foreign []string, v any) error {
	if len(doc) > MaxDocument {
		return fmt.Errorf("it is larger than %d bytes", MaxDocument)
	}
	top, err := unambiguous(doc)
	if err != nil {
		return err
	}
	for _, key := range foreign {
		if top[strings.ToLower(key)] != "" {
			return fmt.Errorf("%w: it has %q", ErrAmbiguous, key)
		}
	}
	if err := json.Unmarshal(doc, v); err != nil {
		return err
	}
	var own struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal(doc, &own); err != nil {
		return err
	}
	if mt != "" && own.MediaType != "" && own.MediaType != mt {
		return fmt.Errorf("%w: it calls itself %q and was promised as %q", ErrAmbiguous, own.MediaType, mt)
	}
	return nil
}

// unambiguous walks doc as tokens and refuses what two JSON decoders may read
// differently: a key twice in one object, keys of the document's own
// structure in another case (encoding/json folds them), and anything after the
// value. It returns the top-level keys by their lower-case form.
func unambiguous(doc []byte) (map[string]string, error) {
	dec := json.NewDecoder(bytes.NewReader(doc))
	tok, err := dec.Token()
	if err != nil {
		return nil, err
	}
	if tok != json.Delim('{') {
		return nil, errors.New("it is no JSON object")
	}
	top, err := walkObject(dec, true, 1)
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("%w: something follows the JSON object", ErrAmbiguous)
	}
	return top, nil
}

// walkObject reads the rest of an object. In structure, keys may not even
// differ by case alone; below `annotations`, `Labels` and other maps they may.
func walkObject(dec *json.Decoder, structure bool, depth int) (map[string]string, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("it nests deeper than %d", maxDepth)
	}
	exact, folded := map[string]bool{}, map[string]string{}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return nil, err
		}
		key := tok.(string)
		low := strings.ToLower(key)
		if exact[key] || structure && folded[low] != "" {
			return nil, fmt.Errorf("%w: the key %q stands twice", ErrAmbiguous, key)
		}
		exact[key], folded[low] = true, key
		if err := walkValue(dec, structure && isStructure(low), depth); err != nil {
			return nil, err
		}
	}
	_, err := dec.Token()
	return folded, err
}

func isStructure(key string) bool {
	return slices.Contains([]string{"manifests", "layers", "config", "subject", "platform", "rootfs"}, key)
}

func walkValue(dec *json.Decoder, structure bool, depth int) error {
	tok, err := dec.Token()
	if err != nil {
		return err
	}
	switch tok {
	case json.Delim('{'):
		_, err = walkObject(dec, structure, depth+1)
		return err
	case json.Delim('['):
		if depth+1 > maxDepth {
			return fmt.Errorf("it nests deeper than %d", maxDepth)
		}
		for dec.More() {
			if err := walkValue(dec, structure, depth+1); err != nil {
				return err
			}
		}
		_, err = dec.Token()
		return err
	}
	return nil
}
