package survey

import "os"

// fileSize is a file's length in bytes, -1 if it can't be asked.
func fileSize(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return -1
	}
	return info.Size()
}
