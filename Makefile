# make             builds, vets, lints and runs the unit tests
# make quickstart  installs what is missing and shows a first pull
# make test        installs what is missing and runs every test
# make e2e, make crash, make bench    one suite each
#
# Arguments for `go test`, such as V=-v, go in V; those for the benchmark, such as
# BENCH='-only b -runs 2', in BENCH.

export PATH := $(CURDIR)/.tools/go/bin:$(PATH)
export GOTOOLCHAIN := local
export CGO_ENABLED := 0
# A clone that another user owns makes git, and with it `go build`, refuse.
export GOFLAGS := -buildvcs=false
export HOLDFAST_PEER_DIR ?= $(CURDIR)/.tools/bin

V ?=
BENCH ?=
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)
UNIT := ./cmd/... ./internal/... ./proto/... ./test/bench

.PHONY: all build vet lint unit e2e compat crash crash-first bench microbench setup proto quickstart test arm64 clean

all: build vet lint unit

build:
	go build -ldflags "-X main.version=$(VERSION) -X main.revision=$(REVISION)" -o bin/ ./cmd/...

vet:
	go vet ./...
	go vet -tags fault ./...
	cd test/compat && go vet ./...

lint:
	@unformatted=$$(gofmt -l cmd internal proto test); if [ -n "$$unformatted" ]; then echo "gofmt -w is needed on:" $$unformatted; exit 1; fi
	.tools/bin/staticcheck ./...

unit:
	go test $(V) $(UNIT)

e2e:
	go test $(V) -count=1 -parallel 4 -timeout 15m ./test/harness/... ./test/e2e/...

compat:
	cd test/compat && go test $(V) -count=1 -timeout 15m ./...

crash:
	go test $(V) -count=1 -timeout 60m -tags fault ./test/crash -args -thorough

crash-first:
	go test $(V) -count=1 -timeout 15m -tags fault ./internal/fault ./test/crash/...

bench:
	scripts/setup bench
	go build -o bin/bench ./test/bench
	bin/bench $(BENCH)

microbench:
	go test -run '^$$' -bench . -benchmem $(UNIT)

setup:
	scripts/setup test

proto:
	scripts/proto

quickstart:
	scripts/setup run
	$(MAKE) --no-print-directory build
	scripts/quickstart

test: setup
	$(MAKE) --no-print-directory build vet lint
	$(MAKE) --no-print-directory unit e2e compat crash-first

arm64:
	GOARCH=arm64 go build ./...
	GOARCH=arm64 go vet ./...

clean:
	rm -rf bin
