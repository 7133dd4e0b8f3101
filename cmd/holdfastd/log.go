package main

import (
	"log/slog"
	"os"

	"github.com/holdfast-dev/holdfast/internal/config"
)

// levels are the config's names of log levels. slog has four of them; those
// that containerd has beyond are the nearest, further out.
var levels = map[string]slog.Level{
	"trace":   slog.LevelDebug - 4,
	"debug":   slog.LevelDebug,
	"":        slog.LevelInfo,
	"info":    slog.LevelInfo,
	"warn":    slog.LevelWarn,
	"warning": slog.LevelWarn,
	"error":   slog.LevelError,
	"fatal":   slog.LevelError + 4,
	"panic":   slog.LevelError + 8,
}

// newLogger writes to standard error, which systemd keeps in the journal.
func newLogger(cfg config.Log) *slog.Logger {
	opts := &slog.HandlerOptions{Level: levels[cfg.Level]}
	var handler slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if cfg.Format == "json" {
		handler = slog.NewJSONHandler(os.Stderr, opts)
	}
	return slog.New(handler)
}
