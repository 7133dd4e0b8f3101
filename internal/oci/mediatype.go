package oci

import (
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The media types of Docker's registry, schema 2, and of the schema 1 that is
// recognised only to be refused. Source: distribution's manifest v2 schema 2.
const (
	MediaTypeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeDockerConfig   = "application/vnd.docker.container.image.v1+json"
	MediaTypeDockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
	MediaTypeDockerForeign  = "application/vnd.docker.image.rootfs.foreign.diff.tar"
	MediaTypeDockerSchema1  = "application/vnd.docker.distribution.manifest.v1+json"
	MediaTypeDockerSigned1  = "application/vnd.docker.distribution.manifest.v1+prettyjws"

	mediaTypeLayer       = "application/vnd.oci.image.layer.v1.tar"
	mediaTypeForeign     = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	mediaTypeAttestation = "application/vnd.in-toto+json"
)

// IsIndex reports whether documents of media type mt list manifests.
func IsIndex(mt string) bool {
	return mt == ocispec.MediaTypeImageIndex || mt == MediaTypeDockerList
}

// IsManifest reports whether documents of media type mt describe one image.
func IsManifest(mt string) bool {
	return mt == ocispec.MediaTypeImageManifest || mt == MediaTypeDockerManifest
}

// IsConfig reports whether mt is an image config.
func IsConfig(mt string) bool {
	return mt == ocispec.MediaTypeImageConfig || mt == MediaTypeDockerConfig
}

// IsSchema1 reports whether mt is Docker's first manifest format, which can't
// be verified by its digest and is refused.
func IsSchema1(mt string) bool {
	return mt == MediaTypeDockerSchema1 || mt == MediaTypeDockerSigned1
}

// IsLayer reports whether mt is a layer archive, compressed in whatever way.
func IsLayer(mt string) bool {
	base, _, _ := strings.Cut(mt, "+")
	if base == mediaTypeLayer || base == mediaTypeForeign {
		return true
	}
	return isDockerLayer(mt, MediaTypeDockerLayer) || isDockerLayer(mt, MediaTypeDockerForeign)
}

func isDockerLayer(mt, base string) bool {
	rest, ok := strings.CutPrefix(mt, base)
	return ok && slices.Contains([]string{"", ".gzip", ".zstd"}, rest)
}

// Key names the ingest in which containerd, and we, fetch desc: a word for
// its kind and its digest, as in `layer-sha256:...`. A name that the
// descriptor's annotations give stands before the digest, with an `@`.
func Key(desc Descriptor) string {
	key := desc.Digest.String()
	if name, ok := desc.Annotations[ocispec.AnnotationRefName]; ok {
		key = name + "@" + key
	}
	switch mt := desc.MediaType; {
	case IsManifest(mt):
		return "manifest-" + key
	case IsIndex(mt):
		return "index-" + key
	case IsLayer(mt):
		return "layer-" + key
	case IsConfig(mt):
		return "config-" + key
	case mt == mediaTypeAttestation:
		return "attestation-" + key
	}
	return "unknown-" + key
}
