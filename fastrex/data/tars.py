"""Reading the headers of a tar archive: where its members lie, without unpacking any (ustar, pax and GNU names).

``tarfile`` reads the same formats, but hides what is sparse or linked, and gives up an archive that is cut off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from .. import untrusted
from ..errors import FastrexError

BLOCK = 512
ZEROS = bytes(BLOCK)
EXTRA_LIMIT = 1 << 20  # bytes of a pax header or of a long name
NAME_LIMIT = 4096
SIZE_LIMIT = 1 << 62
CONTENT_LIMIT = 1 << 28  # bytes of all contents that are asked for
PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
REGULAR, LINKS, WITHOUT_DATA = b"0\x007", b"12", b"123456"


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar: ``size`` bytes from byte ``first``.

    ``whole``: the archive holds all of them; ``link``: it holds none, the member points to another; ``content``: what
    :func:`read_members` was asked to read.
    """

    name: bytes
    first: int
    size: int
    whole: bool = True
    link: bool = False
    content: bytes = b""


class _Damaged(Exception):
    """A header that makes no sense."""


def read_members(path: str, name: str, wanted: Callable[[bytes, int], bool]) -> tuple[list[Member], str]:
    """The files in the tar at ``path`` in order, and a notice where it breaks off ("" where it is whole).

    ``wanted(name, size)`` asks for the content of a member. ``name`` is what messages call the archive. FastrexError
    for what is no tar archive, is compressed, or holds sparse files.
    """
    try:
        with untrusted.opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(BLOCK)
            for magic, kind in PACKED.items():
                if start.startswith(magic):
                    way_out = "decompress it first (images hardly shrink, and only a plain tar can be read by offset)"
                    raise FastrexError(f"{name}: compressed with {kind}; {way_out}")
            if start != ZEROS and not _intact(start):
                fact = f"{size} bytes" if size < BLOCK else "no tar header at its start"
                raise FastrexError(f"{name}: not a tar archive ({fact}); write it again, or remove it")
            return _walk(file, size, name, wanted)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise FastrexError(f"cannot read {name} ({reason}); make it readable, or remove it") from error


def _walk(file: IO[bytes], end: int, name: str, wanted: Callable[[bytes, int], bool]) -> tuple[list[Member], str]:
    members: list[Member] = []
    place, long_name, long_size, held = 0, None, None, 0
    try:
        while True:
            file.seek(place)
            head = file.read(BLOCK)
            if head == ZEROS:
                return members, ""
            if len(head) < BLOCK:
                return members, f"{name}: cut off, its end mark is missing; write it again where images are missing"
            if not _intact(head):
                raise _Damaged
            kind, size, data = head[156:157], _number(head[124:136]), place + BLOCK
            if kind in b"LKxgX":
                extra = _extra(file, size)
                place = data + _padded(size)
                if kind == b"L":
                    long_name = extra.partition(b"\0")[0]
                elif kind in b"xX":
                    records = _records(extra)
                    if any(key.startswith(b"GNU.sparse") for key in records):
                        raise _sparse(name)
                    long_name = records.get(b"path", long_name)
                    if b"size" in records:
                        long_size = int(records[b"size"])
                continue
            if kind == b"S":
                raise _sparse(name)
            size = size if long_size is None else long_size
            if not 0 <= size < SIZE_LIMIT:
                raise _Damaged
            member_name = _name(head) if long_name is None else long_name
            if b"\0" in member_name:
                raise FastrexError(f"{name}: the name {os.fsdecode(member_name)!r} holds a NUL; write this shard again")
            if len(member_name) > NAME_LIMIT:
                fact = f"the name {os.fsdecode(member_name[:80])!r}.. is longer than {NAME_LIMIT} bytes"
                raise FastrexError(f"{name}: {fact}; write this shard again")
            long_name = long_size = None
            place = data if kind in WITHOUT_DATA else data + _padded(size)
            if kind in LINKS:
                members.append(Member(member_name, 0, 0, link=True))
            elif kind in REGULAR:
                whole = data + size <= end
                content = file.read(size) if whole and wanted(member_name, size) else b""
                held += len(content)
                if held > CONTENT_LIMIT:
                    fact = f"its labels take more than {CONTENT_LIMIT} bytes"
                    raise FastrexError(f"{name}: {fact}; write them shorter, or more shards")
                members.append(Member(member_name, data, size, whole, content=content))
            if kind not in WITHOUT_DATA and data + size > end:
                return (
                    members,
                    f"{name}: cut off inside {os.fsdecode(member_name)!r}; what is missing has to be written again",
                )
    except (_Damaged, ValueError):
        return members, f"{name}: damaged at byte {place}; what follows is not read, so write this shard again"


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(text: bytes) -> int:
    """A number of a header: octal digits, or base 256 where GNU tar needs more room."""
    if text[0] in (0x80, 0xFF):
        number = int.from_bytes(text[1:], "big")
        if text[0] == 0xFF:
            raise _Damaged
        return number
    number = int(text.partition(b"\0")[0].strip() or b"0", 8)
    if number < 0:
        raise _Damaged
    return number


def _intact(head: bytes) -> bool:
    """Whether the checksum of a header is right; some old writers summed signed bytes."""
    if len(head) < BLOCK:
        return False
    try:
        stored = _number(head[148:156])
    except (ValueError, _Damaged):
        return False
    computed = sum(head) - sum(head[148:156]) + 8 * 32
    signed = computed - 256 * sum(byte > 127 for byte in head[:148] + head[156:]) if stored != computed else computed
    return stored in (computed, signed)


def _name(head: bytes) -> bytes:
    name = head[:100].partition(b"\0")[0]
    # The field of the prefix means something else in GNU tar's own format.
    prefix = head[345:500].partition(b"\0")[0] if head[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _extra(file: IO[bytes], size: int) -> bytes:
    if size > EXTRA_LIMIT:
        raise _Damaged
    extra = file.read(size)
    if len(extra) < size:
        raise _Damaged
    return extra


def _records(extra: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, each "length key=value" and a line break."""
    records, place = {}, 0
    while place < len(extra) and extra[place]:
        digits, blank, _ = extra[place : place + 20].partition(b" ")
        length = int(digits)
        record = extra[place : place + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not (blank and equals and record.endswith(b"\n") and len(record) == length):
            raise _Damaged
        records[key] = value
        place += length
    return records


def _sparse(name: str) -> FastrexError:
    return FastrexError(f"{name}: holds sparse files; write it without --sparse")
