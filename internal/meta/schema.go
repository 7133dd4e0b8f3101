package meta

// The file meta.db is containerd's schema v1, version 4, and holds nothing of
// ours (COMPATIBILITY §1.3). Buckets are drawn by what lies indented below
// them; <x> stands for any name. T is time.MarshalBinary in UTC, V a signed
// varint, S a string, A a marshalled google.protobuf.Any, - an empty value.
//
//	v1
//	    version                         V  4
//	    <ns>
//	        labels
//	            <key>                   S
//	        images
//	            <name>
//	                createdat           T
//	                updatedat           T
//	                labels
//	                    <key>           S
//	                annotations
//	                    <key>           S
//	                target
//	                    digest          S
//	                    mediatype       S
//	                    size            V
//	        content
//	            blob
//	                <digest>
//	                    createdat       T
//	                    updatedat       T
//	                    size            V
//	                    labels
//	                        <key>       S
//	            ingests
//	                <ref>
//	                    ref             S  <ns>/<seq>/<ref>
//	                    expireat        T  unless a lease holds it
//	                    expected        S  of a blob that another namespace has
//	        snapshots
//	            <driver>
//	                <key>
//	                    name            S  <ns>/<seq>/<key>, the driver's key
//	                    parent          S
//	                    createdat       T
//	                    updatedat       T
//	                    labels
//	                        <key>       S
//	                    children
//	                        <key>       -
//	        leases
//	            <id>
//	                createdat           T
//	                labels
//	                    <key>           S
//	                content
//	                    <digest>        -
//	                ingests
//	                    <ref>           -
//	                images
//	                    <name>          -
//	                snapshots
//	                    <driver>
//	                        <key>       -
//	        containers                     read, not written
//	            <id>
//	                image               S
//	                snapshotter         S
//	                snapshotKey         S
//	                labels
//	                    <key>           S
//	        sandboxes                      read, not written
//	            <id>
//	                labels
//	                    <key>           S
//
// The sequence of a bucket snapshots/<driver> gives the <seq> of its keys; an
// ingest's comes from its own bucket and so is 1. Empty labels aren't stored.

// Names of buckets and keys.
const (
	keyV1          = "v1"
	keyVersion     = "version"
	keyLabels      = "labels"
	keyAnnotations = "annotations"
	keyImages      = "images"
	keyTarget      = "target"
	keyDigest      = "digest"
	keyMediaType   = "mediatype"
	keySize        = "size"
	keyContent     = "content"
	keyBlob        = "blob"
	keyIngests     = "ingests"
	keyIngestV1    = "ingest" // before version 2
	keyRef         = "ref"
	keyExpireAt    = "expireat"
	keyExpected    = "expected"
	keySnapshots   = "snapshots"
	keyName        = "name"
	keyParent      = "parent"
	keyChildren    = "children"
	keyLeases      = "leases"
	keyContainers  = "containers"
	keyImage       = "image"
	keySnapshotter = "snapshotter"
	keySnapshotKey = "snapshotKey"
	keySandboxes   = "sandboxes"
	keyCreatedAt   = "createdat"
	keyUpdatedAt   = "updatedat"
)

// schemaVersion is what we read and write; older files are migrated, and a
// newer one is taken as it is, as containerd does.
const schemaVersion = 4
