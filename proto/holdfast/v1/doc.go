// Package holdfastv1 is Holdfast's own gRPC service, which stands beside
// containerd's on the same socket. All but this file is generated from
// holdfast.proto by scripts/proto.
package holdfastv1
