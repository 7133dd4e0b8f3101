package registry

import (
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"
)

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-7":                            0,
		"7.5":                           0,
		"soon":                          0,
		"2147483647":                    24 * time.Hour,
		"99999999999999999999":          0,
		"Fri, 02 Jan 2026 03:05:05 GMT": time.Minute,
		"Fri, 02 Jan 2026 03:00:00 GMT": 0,
		"Fri, 02 Jan 2099 03:00:00 GMT": 24 * time.Hour,
	} {
		if got := retryAfter(http.Header{"Retry-After": {value}}, now); got != want {
			t.Errorf("%q: %s, want %s", value, got, want)
		}
	}
}

func TestContentRange(t *testing.T) {
	for value, want := range map[string][2]int64{
		"bytes 5-9/10":                     {5, 10},
		"bytes 0-0/*":                      {0, -1},
		"bytes */10":                       {10, 10},
		"bytes */*":                        {-2, 0},
		"":                                 {-2, 0},
		"bytes 5":                          {-2, 0},
		"bytes -5-9/10":                    {-2, 0},
		"bytes 5-9/x":                      {-2, 0},
		"bytes 5-9":                        {-2, 0},
		"items 5-9/10":                     {-2, 0},
		"bytes 99999999999999999999-9/100": {-2, 0},
	} {
		start, size, err := contentRange(value)
		if want[0] == -2 {
			if err == nil {
				t.Errorf("%q: %d of %d", value, start, size)
			}
		} else if err != nil || start != want[0] || size != want[1] {
			t.Errorf("%q: %d of %d, %v", value, start, size, err)
		}
	}
}

// The waits of one ask are bounded whatever the registry says.
func TestPatienceIsBounded(t *testing.T) {
	for _, more := range []bool{false, true} {
		limit := maxWait
		if more {
			limit = maxMirrorWait
		}
		for _, after := range []string{"", "1", "20", "60", "2147483647"} {
			tally := attempts{more: more}
			a := &answer{Response: &http.Response{StatusCode: 429, Header: http.Header{"Retry-After": {after}}}}
			for n := range maxAttempts {
				wait, again := tally.judge(200*time.Millisecond<<n, a, nil)
				asked := retryAfter(a.Header, time.Now())
				if again && (wait > limit || wait < asked) || !again && asked <= limit/2 && 300*time.Millisecond<<n < limit {
					t.Errorf("more %v, Retry-After %q, attempt %d: %s, %v", more, after, n, wait, again)
				}
			}
		}
	}
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 5-9/10")
	f.Fuzz(func(t *testing.T, value string) {
		start, size, err := contentRange(value)
		if err == nil && (start < 0 || size < -1) {
			t.Fatalf("%d of %d", start, size)
		}
		if err != nil && strings.ContainsFunc(err.Error(), unicode.IsControl) {
			t.Fatalf("%q", err)
		}
	})
}

func FuzzDocumentType(f *testing.F) {
	f.Add([]byte(`{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`))
	f.Add([]byte(`{"fsLayers":null,"layers":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if got := documentType(data); got != "" && !isManifestType(got) {
			t.Fatalf("%q", got)
		}
	})
}
