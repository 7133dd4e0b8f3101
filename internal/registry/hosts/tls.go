package hosts

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// Limits of what is read from files that administrators write, in bytes.
const (
	maxFile = 1 << 20 // hosts.toml
	maxPEM  = 4 << 20 // certificates and keys; the whole Mozilla bundle is a quarter of a megabyte
)

var errTooLarge = errors.New("file too large")

// TLSConfig reads h's certificate files. The errors name the file, and the file that names it.
func (h Host) TLSConfig() (*tls.Config, error) {
	c := &tls.Config{InsecureSkipVerify: h.SkipVerify != nil && *h.SkipVerify}
	if len(h.CA) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("certificate authorities of the system: %w", err)
		}
		for _, file := range h.CA {
			pem, err := readBounded(file, maxPEM)
			if err != nil {
				return nil, h.blame(err)
			}
			if !pool.AppendCertsFromPEM(pem) {
				return nil, h.blame(fmt.Errorf("%s: no PEM certificate in it", file))
			}
		}
		c.RootCAs = pool
	}
	for _, pair := range h.Client {
		cert, err := pair.load()
		if err != nil {
			return nil, h.blame(err)
		}
		c.Certificates = append(c.Certificates, cert)
	}
	return c, nil
}

func (h Host) blame(err error) error {
	if h.Origin == "" {
		return fmt.Errorf("TLS settings for %s: %w", h.Host, err)
	}
	return fmt.Errorf("TLS settings for %s in %s: %w", h.Host, h.Origin, err)
}

func (p KeyPair) load() (tls.Certificate, error) {
	cert, err := readBounded(p.Cert, maxPEM)
	if err != nil {
		return tls.Certificate{}, err
	}
	key := cert
	if p.Key != "" {
		if key, err = readBounded(p.Key, maxPEM); err != nil {
			return tls.Certificate{}, err
		}
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %w", p.Cert, err)
	}
	return pair, nil
}

// readBounded reads a regular file of at most limit bytes. It does not wait for a writer should it meet a FIFO.
func readBounded(file string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return nil, err
	} else if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", file)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes: %w", file, limit, errTooLarge)
	}
	return data, nil
}
