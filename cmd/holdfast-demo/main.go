// Command holdfast-demo serves a small registry on loopback, in memory, with
// one image in it: a root file system made of this machine's static busybox,
// in four layers. The quickstart pulls it, so that nothing needs a network.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "loopback `address` to serve on; port 0 takes a free one")
	busybox := flag.String("busybox", "/bin/busybox", "`path` of a static busybox")
	ready := flag.String("ready-file", "", "`file` into which the image's reference is written when it can be pulled")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "holdfast-demo: unexpected argument %q\n", flag.Arg(0))
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *listen, *busybox, *ready); err != nil {
		fmt.Fprintln(os.Stderr, "holdfast-demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, listen, busybox, ready string) error {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	if !l.Addr().(*net.TCPAddr).IP.IsLoopback() {
		l.Close()
		return fmt.Errorf("%s is not a loopback address: the demo registry asks nobody who they are", listen)
	}
	quiet := log.New(io.Discard, "", 0)
	srv := &http.Server{Handler: registry.New(registry.Logger(quiet)), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer srv.Close()

	reference := l.Addr().String() + "/demo/busybox:1"
	if err := push(ctx, reference, busybox); err != nil {
		return fmt.Errorf("make the demo image: %w", err)
	}
	fmt.Printf("demo registry at %s, image: %s\n", l.Addr(), reference)
	if ready != "" {
		// Renamed into place: whoever waits for the file never reads half of it.
		if err := os.WriteFile(ready+".tmp", []byte(reference+"\n"), 0o644); err != nil {
			return err
		}
		if err := os.Rename(ready+".tmp", ready); err != nil {
			return err
		}
	}
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		return nil
	}
}

func push(ctx context.Context, reference, busybox string) error {
	img, err := buildImage(busybox)
	if err != nil {
		return err
	}
	ref, err := name.ParseReference(reference, name.Insecure)
	if err != nil {
		return err
	}
	return remote.Write(ref, img, remote.WithContext(ctx))
}
