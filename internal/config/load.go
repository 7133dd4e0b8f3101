package config

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

// currentVersion is the version of documents that we write, and the highest
// that we read: containerd 2.4's.
const currentVersion = 4

// maxDocuments bounds how many files one configuration may be made of.
const maxDocuments = 256

// defaultDocument holds every honoured key with its default, and a comment on
// each. It is the only place where defaults stand.
//
//go:embed default.toml
var defaultDocument string

// Default is a version-4 document with every key that Holdfast honours, its
// default and a comment. containerd 2.4.2 reads it too.
func Default() string { return defaultDocument }

// loader lays documents over the defaults, one after the other.
type loader struct {
	tree      *value
	noted     []Finding
	documents []string
}

func newLoader() (*loader, error) {
	tree, err := parseDocument([]byte(defaultDocument), "built-in defaults")
	if err != nil {
		return nil, err
	}
	tree.take("version")
	tree.take("imports") // counts where a document names it, and nowhere else
	tree.forget()
	return &loader{tree: tree}, nil
}

// forget makes everything in v a default.
func (v *value) forget() {
	v.from = Origin{}
	for _, item := range v.table {
		item.forget()
	}
}

// pendingDocument is a file to be read, and the import that asks for it.
type pendingDocument struct {
	path string
	from Origin
}

// load reads the document at path and then, breadth first, what it imports.
// A file is read once, so that loops end.
func (l *loader) load(path string) error {
	pending := []pendingDocument{{path: filepath.Clean(path)}}
	for len(pending) > 0 {
		next := pending[0]
		pending = pending[1:]
		if slices.Contains(l.documents, next.path) {
			continue
		}
		if len(l.documents) == maxDocuments {
			return fmt.Errorf("%s: imports add up to more than %d files", next.from, maxDocuments)
		}
		doc, err := readDocument(next.path)
		if errors.Is(err, fs.ErrNotExist) && next.from != (Origin{}) {
			return fmt.Errorf("%s: imported file %s does not exist: create it, or take it out of imports: %w", next.from, next.path, err)
		}
		if err != nil {
			return err
		}
		l.documents = append(l.documents, next.path)
		if err := l.add(doc, next.path); err != nil {
			return err
		}
		imports, err := resolveImports(next.path, doc.lookup("imports"))
		if err != nil {
			return err
		}
		pending = append(pending, imports...)
	}
	return nil
}

// add brings one document to the current version and merges it.
func (l *loader) add(doc *value, path string) error {
	version, err := documentVersion(doc)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := checkTables(doc); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	migrate(doc, version)
	doc.take("version")
	l.merge(doc)
	return nil
}

// documentVersion reads a document's version; one that gives none has
// version 1, as containerd holds it.
func documentVersion(doc *value) (int64, error) {
	v := doc.lookup("version")
	if v == nil {
		return 1, nil
	}
	version, ok := v.leaf.(int64)
	switch {
	case !ok:
		return 0, fmt.Errorf("line %d: version must be a whole number", v.from.Line)
	case version > currentVersion:
		return 0, fmt.Errorf("line %d: the document has version %d, and this Holdfast reads up to version %d", v.from.Line, version, currentVersion)
	case version < 0:
		return 0, fmt.Errorf("line %d: the document has version %d; versions are 1 to %d", v.from.Line, version, currentVersion)
	}
	return max(version, 1), nil
}

// checkTables refuses a document that has a plain value where a section
// belongs: moving and merging would lose it.
func checkTables(doc *value) error {
	for _, section := range []string{"plugins", "debug", "grpc", "ttrpc", "metrics", "cgroup", "timeouts", "proxy_plugins", "stream_processors"} {
		v := doc.lookup(section)
		if v == nil {
			continue
		}
		if v.table == nil {
			return fmt.Errorf("line %d: %s must be a table", v.from.Line, section)
		}
		if section != "plugins" {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(v.table)) {
			if plugin := v.table[name]; plugin.table == nil {
				return fmt.Errorf("line %d: %s must be a table", plugin.from.Line, plugin.from.Key)
			}
		}
	}
	return nil
}

// resolveImports turns a document's imports into files: relative ones are
// relative to the document, and only ones with a * are patterns.
func resolveImports(parent string, imports *value) ([]pendingDocument, error) {
	if imports == nil {
		return nil, nil
	}
	list, err := stringList(imports.leaf)
	if err != nil {
		return nil, fmt.Errorf("%s: imports %w", imports.from, err)
	}
	var found []pendingDocument
	for _, path := range list {
		path = filepath.Clean(path)
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(parent), path)
		}
		files := []string{path}
		if strings.Contains(path, "*") {
			if files, err = filepath.Glob(path); err != nil {
				return nil, fmt.Errorf("%s: imports %q: %w", imports.from, path, err)
			}
		}
		for _, file := range files {
			found = append(found, pendingDocument{path: file, from: imports.from})
		}
	}
	return found, nil
}

// override lays the command line over the documents.
func (l *loader) override(flags Flags) error {
	for _, f := range []struct {
		name, given string
		path        bool
		key         []string
	}{
		{"--root", flags.Root, true, []string{"root"}},
		{"--state", flags.State, true, []string{"state"}},
		{"--address", flags.Address, true, []string{"plugins", grpcServer, "address"}},
		{"--log-level", flags.LogLevel, false, []string{"debug", "level"}},
	} {
		if f.given == "" {
			continue
		}
		if f.path {
			abs, err := filepath.Abs(f.given)
			if err != nil {
				return fmt.Errorf("%s %s: %w", f.name, f.given, err)
			}
			f.given = abs
		}
		l.tree.put(&value{leaf: f.given, from: Origin{Flag: f.name}}, f.key...)
	}
	return nil
}
