package registry_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net/http/httptest"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/holdfast-dev/holdfast/internal/oci"
)

func askForCertificate() *tls.Config { return &tls.Config{ClientAuth: tls.RequestClientCert} }

// keyPair yields srv's own certificate and key in PEM; any pair will do.
func keyPair(t *testing.T, srv *httptest.Server) (cert, key []byte) {
	t.Helper()
	pair := srv.TLS.Certificates[0]
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func blobOf(text string) oci.Descriptor {
	return oci.Descriptor{Digest: digest.FromString(text), Size: int64(len(text))}
}
