package inflate

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// A gzip stream is a row of members (RFC 1952), numbers lowest byte first:
//
//	1f 8b 08   flags   time(4)   hints(1)   system(1)
//	[extra]    if flags&4:  size(2) and that many bytes
//	[name]     if flags&8:  bytes up to a 0
//	[comment]  if flags&16: bytes up to a 0
//	[check]    if flags&2:  low half of the CRC-32 of the header up to here (2)
//	content    a DEFLATE stream, filled up to a whole byte
//	crc(4)     CRC-32 of the decoded content
//	size(4)    its length modulo 2^32
const (
	flagHeaderSum = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4

	fixedHeaderSize = 10
	trailerSize     = 8

	// maxText bounds name and comment together. They are skipped, so it only
	// bounds the patience with a header that doesn't end.
	maxText = 1 << 16
)

// A phase is what the next byte of the stream belongs to:
//
//	atMember -> atExtra -> inExtra -> inName -> inComment -> atHeaderSum -> atBlock
//	atBlock  -> inSymbols | inStored -> atBlock | atTrailer
//	atTrailer -> atMember
type phase int

const (
	atMember phase = iota
	atExtra
	inExtra
	inName
	inComment
	atHeaderSum
	atBlock
	inSymbols
	inStored
	atTrailer
)

// A member is what must be remembered of the current one.
type member struct {
	flags     byte
	extra     int    // bytes of the extra field not yet skipped
	text      int    // bytes of name and comment skipped so far
	headerSum uint32 // of the header so far
	sum, size uint32 // of the content so far
}

// memberHeader reads on in the header of a member, as far as the next phase.
func (z *Reader) memberHeader() status {
	m := &z.member
	in := z.in[z.ip:z.iend]
	switch z.phase {
	case atMember:
		if len(in) < fixedHeaderSize {
			return needInput
		}
		if in[0] != 0x1f || in[1] != 0x8b || in[2] != 8 {
			return badHeader
		}
		*m = member{flags: in[3]}
		z.skip(fixedHeaderSize)
	case atExtra:
		if m.flags&flagExtra != 0 {
			if len(in) < 2 {
				return needInput
			}
			m.extra = int(binary.LittleEndian.Uint16(in))
			z.skip(2)
		}
	case inExtra:
		n := min(m.extra, len(in))
		z.skip(n)
		if m.extra -= n; m.extra > 0 {
			return needInput
		}
	case inName:
		if st := z.skipText(flagName); st != more {
			return st
		}
	case inComment:
		if st := z.skipText(flagComment); st != more {
			return st
		}
	case atHeaderSum:
		if m.flags&flagHeaderSum != 0 {
			if len(in) < 2 {
				return needInput
			}
			if binary.LittleEndian.Uint16(in) != uint16(m.headerSum) {
				return badHeader
			}
			z.skip(2)
		}
		z.low = z.op // no member refers to the one before
	}
	z.phase++
	return more
}

// skipText moves behind the 0 that ends a name or comment, if flag says that
// there is one.
func (z *Reader) skipText(flag byte) status {
	if z.member.flags&flag == 0 {
		return more
	}
	in := z.in[z.ip:z.iend]
	end := bytes.IndexByte(in, 0)
	n := end + 1
	if end < 0 {
		n = len(in)
	}
	z.skip(n)
	if z.member.text += n; z.member.text > maxText {
		return badHeader
	}
	if end < 0 {
		return needInput
	}
	return more
}

// skip consumes n bytes of a member's header.
func (z *Reader) skip(n int) {
	z.member.headerSum = crc32.Update(z.member.headerSum, crc32.IEEETable, z.in[z.ip:z.ip+n])
	z.ip += n
}

// trailer compares the content of the member that ends with what its packer
// says of it.
func (z *Reader) trailer(b *Buffer) status {
	in := z.in[z.ip:z.iend]
	if len(in) < trailerSize {
		return needInput
	}
	z.sum(b)
	if binary.LittleEndian.Uint32(in) != z.member.sum || binary.LittleEndian.Uint32(in[4:]) != z.member.size {
		return badChecksum
	}
	z.ip += trailerSize
	z.phase, z.whole = atMember, true
	return more
}

// sum adds what b holds of the content, and no earlier call added, to the
// member's checksum.
func (z *Reader) sum(b *Buffer) {
	content := b.mem[z.summed:z.op]
	z.member.sum = crc32.Update(z.member.sum, crc32.IEEETable, content)
	z.member.size += uint32(len(content))
	z.summed = z.op
}
