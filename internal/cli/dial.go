package cli

import (
	"net"
)

// dial says why a socket can't be connected to, nil if it can.
func dial(path string) error {
	c, err := net.DialTimeout("unix", path, connectTimeout)
	if err != nil {
		return err
	}
	return c.Close()
}
