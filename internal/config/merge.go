package config

import (
	"maps"
	"reflect"
	"slices"
)

// merge lays a migrated document over what was read before. The rules are
// containerd's, and differ by place:
//
//	top level and [debug], [cgroup] ...   a zero value doesn't override; lists are appended, without doubles
//	[plugins.*]                           key by key, at any depth; false, 0 and "" do override; lists are replaced
//	[timeouts] [proxy_plugins.*] [stream_processors.*]   the entry of each name is replaced whole
func (l *loader) merge(doc *value) {
	for _, key := range slices.Sorted(maps.Keys(doc.table)) {
		item := doc.table[key]
		switch key {
		case "plugins":
			l.tree.mergeDeep(key, item)
		case "timeouts", "proxy_plugins", "stream_processors":
			l.tree.mergeEntries(key, item)
		default:
			l.mergeTop(l.tree, []string{key}, item)
		}
	}
}

func (v *value) mergeDeep(key string, item *value) {
	old := v.table[key]
	if old == nil || old.table == nil || item.table == nil {
		v.table[key] = item
		return
	}
	for name, inner := range item.table {
		old.mergeDeep(name, inner)
	}
}

func (v *value) mergeEntries(key string, item *value) {
	old := v.table[key]
	if old == nil || old.table == nil || item.table == nil {
		v.table[key] = item
		return
	}
	maps.Copy(old.table, item.table)
}

// mergeTop merges the item of a top-level key, or of a key in a top-level
// table, into the table dst. path ends with the item's key.
func (l *loader) mergeTop(dst *value, path []string, item *value) {
	key := path[len(path)-1]
	old := dst.table[key]
	if old == nil {
		dst.table[key] = item
		return
	}
	if old.table != nil && item.table != nil {
		for name, inner := range item.table {
			l.mergeTop(old, append(slices.Clip(path), name), inner)
		}
		return
	}
	if oldList, ok := old.leaf.([]any); ok {
		if list, ok := item.leaf.([]any); ok {
			dst.table[key] = &value{leaf: appendNew(oldList, list), from: item.from}
			return
		}
	}
	if item.isZero() && !old.isZero() && reflect.TypeOf(item.leaf) == reflect.TypeOf(old.leaf) {
		l.noted = append(l.noted, Finding{
			Key: dotted(path), Value: literal(item.leaf), Origin: item.from, Status: Never,
			Reason: "an empty value at the top level overrides nothing, in containerd neither; what holds is " + literal(old.leaf) + " (" + old.from.String() + ")",
		})
		return
	}
	dst.table[key] = item
}

func appendNew(list, more []any) []any {
	list = slices.Clip(list)
	for _, item := range more {
		if !slices.ContainsFunc(list, func(have any) bool { return reflect.DeepEqual(have, item) }) {
			list = append(list, item)
		}
	}
	return list
}
