"""Whether an image file can be trained on, by its header and its end: one open and two short reads for most files.

A plain JPEG or PNG header is parsed here. Whatever is unusual in any way is left to Pillow, so that the statuses are
Pillow's and only the time differs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..untrusted import OPEN_FLAGS
from .scan import PIXEL_LIMIT, Listing, Progress, Status, in_order

FORMATS = frozenset(["JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"])
# Pillow's rarer readers never see a file; these know what people take for an image that the decoder reads.
READERS = (*sorted(FORMATS), "GIF", "AVIF", "ICO")
# Not of JPEG 2000: damage in the middle kills the decoder, so such files are decoded here.
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
EXIF_ORIENTATION, SAMPLES_PER_PIXEL = 0x0112, 0x0115
EXIF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # bytes of a value, by its type
HEADS = (4096, 1 << 16)
TAIL, PIECE = 16, 1 << 20
CHUNK = 64

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
# Chunks that Pillow skips or reads without a fault at this length (None: at any).
PNG_PLAIN = {
    b"gAMA": 4,
    b"cHRM": 32,
    b"sRGB": 1,
    b"pHYs": 9,
    b"PLTE": None,
    b"bKGD": None,
    b"tIME": None,
    b"sBIT": None,
}
JPEG_FRAMES = frozenset([0xC0, 0xC1, 0xC2])
JPEG_TABLES = frozenset([0xC4, 0xDB, 0xDD, 0xFE])

Shape = tuple[int, int, int]


def probe(listing: Listing, threads: int, progress: Progress | None) -> NDArray[np.int64]:
    """int64 [N, 4]: bytes, height, width and :class:`Status` of every file of ``listing``, read by up to
    ``threads`` threads (0 = four per core)."""
    count = len(listing.paths)
    result = np.empty((count, 4), np.int64)
    # Members are read in the order in which they lie on the disk.
    order = np.lexsort((listing.first, listing.shard)) if listing.shards else np.arange(count)

    def chunk(start: int) -> list[tuple[int, int, int, int]]:
        rows = order[start : start + CHUNK].tolist()
        return _probe_members(listing, rows) if listing.shards else [_probe_file(listing.file(row)) for row in rows]

    Image.init()  # Pillow loads its rarer readers on demand, but not safely from several threads
    starts = range(0, count, CHUNK)
    # Pillow warns about large images and odd metadata; what matters here is in the status.
    with warnings.catch_warnings(), contextlib.closing(in_order(chunk, starts, threads)) as chunks:
        warnings.simplefilter("ignore")
        for start, rows in zip(starts, chunks, strict=True):
            result[order[start : start + len(rows)]] = rows
            if progress:
                progress(start + len(rows), count)
    return result


def _probe_file(path: bytes) -> tuple[int, int, int, int]:
    try:
        handle = os.open(path, OPEN_FLAGS)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                return 0, 0, 0, Status.UNREADABLE
            return found.st_size, *examine(handle, 0, found.st_size)
        finally:
            os.close(handle)
    except OSError:
        return 0, 0, 0, Status.UNREADABLE


def _probe_members(listing: Listing, rows: Sequence[int]) -> list[tuple[int, int, int, int]]:
    found, handle, opened = [], -1, -1
    try:
        for row in rows:
            size, status = int(listing.lengths[row]), int(listing.given[row])
            height = width = 0
            if status == Status.OK:
                try:
                    if opened != listing.shard[row]:
                        if handle >= 0:
                            os.close(handle)
                        handle, opened = -1, -1
                        handle = os.open(listing.file(row), OPEN_FLAGS)
                        opened = int(listing.shard[row])
                    height, width, status = examine(handle, int(listing.first[row]), size)
                except OSError:
                    status = Status.UNREADABLE
            found.append((size, height, width, status))
    finally:
        if handle >= 0:
            os.close(handle)
    return found


def examine(handle: int, first: int, size: int) -> Shape:
    """Height, width and status of the image in ``size`` bytes from byte ``first`` of the open file ``handle``.

    Height and width are those of the decoded image (EXIF applied), 0 where unknown. OSError where it cannot be read.
    """
    if size == 0:
        return 0, 0, Status.EMPTY
    for length in HEADS:
        head = os.pread(handle, min(length, size), first)
        parsed: tuple[int, int, int, str] | None = None
        # A header that runs past ``head`` is tried with more of it; one that is odd goes to Pillow.
        try:
            if head.startswith(b"\xff\xd8\xff"):
                parsed = _jpeg(head)
            elif head.startswith(PNG_MAGIC):
                parsed = _png(head)
            elif _webp_pixels(head) > PIXEL_LIMIT:
                return 0, 0, Status.TOO_LARGE
        except (IndexError, struct.error):
            continue
        if parsed is None:
            break
        height, width, data, kind = parsed
        if not 0 < height * width <= PIXEL_LIMIT:
            break
        whole = _has_end(handle, first, size, data, END_MARKERS[kind])
        return height, width, Status.OK if whole else Status.TRUNCATED
    return _examine_by_pillow(handle, first, size)


def _jpeg(head: bytes) -> tuple[int, int, int, str] | None:
    """Height and width as decoded, first byte behind the header; None for a header that is not plain.

    IndexError or struct.error where the header goes on behind ``head``.
    """
    place, height, width, turned, exif = 2, 0, 0, False, False
    while True:
        if head[place] != 0xFF:
            return None
        marker, length = head[place + 1], head[place + 2] << 8 | head[place + 3]
        start, end = place + 4, place + 2 + length
        if length < 2:
            return None
        head[end]  # the segment is all there, and something follows
        if marker == 0xDA:
            return (width, height, end, "JPEG") if turned else (height, width, end, "JPEG") if height else None
        if marker in JPEG_FRAMES:
            if height or length < 11 or head[start] != 8 or head[start + 5] not in (1, 3, 4):
                return None
            if length != 8 + 3 * head[start + 5]:
                return None
            height, width = struct.unpack_from(">HH", head, start + 1)
            if not (height and width):
                return None
        elif marker == 0xDB:
            # Tables of 8 bits; Pillow checks their lengths, and so would the decoder.
            if (length - 2) % 65 or any(table & 0xF0 for table in head[start:end:65]):
                return None
        elif marker == 0xE1 and head.startswith(b"Exif\0\0", start):
            if exif:
                return None
            exif, orientation = True, _orientation(head[start + 6 : end])
            if orientation is None:
                return None
            turned = orientation in (5, 6, 7, 8)
        elif marker == 0xE0 and head.startswith(b"JFIF", start):
            if length < 14:
                return None
        elif marker == 0xEE and head.startswith(b"Adobe", start):
            if length < 9:
                return None
        elif marker in (0xE2, 0xED):
            # A film of pictures, or resources with a layout of their own.
            if head.startswith((b"MPF\0", b"Photoshop 3.0\0"), start) and not _plain_resources(head[start:end]):
                return None
        elif not 0xE0 <= marker <= 0xEF and marker not in JPEG_TABLES:
            return None
        place = end


def _plain_resources(segment: bytes) -> bool:
    """Whether Pillow reads the resources that Photoshop left without an error."""
    place = 14
    if not segment.startswith(b"Photoshop"):
        return False
    while segment.startswith(b"8BIM", place):
        place += 7 + segment[place + 6] if place + 6 < len(segment) else len(segment)
        place += place & 1
        if place + 4 > len(segment):
            return False
        place += 4 + int.from_bytes(segment[place : place + 4], "big")
        place += place & 1
    return True


def _orientation(tiff: bytes) -> int | None:
    """The orientation in an EXIF block, 1 where it holds none; None for a block that is not plain."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "L", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        if start < 8 or start + 2 + 12 * count > len(tiff):
            return None
        found = 1
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(order + "HHLH", tiff, place)
            length = number * EXIF_SIZES[kind] if kind < len(EXIF_SIZES) else 0
            # Pillow and the decoder read on, or not, in ways of their own behind a value that is not there.
            if not length or (length > 4 and struct.unpack_from(order + "L", tiff, place + 8)[0] + length > len(tiff)):
                return None
            if tag == EXIF_ORIENTATION:
                if kind != 3 or number != 1:
                    return None
                found = value
        return found
    except struct.error:
        return None


def _png(head: bytes) -> tuple[int, int, int, str] | None:
    """As :func:`_jpeg`."""
    if head[8:16] != b"\0\0\0\rIHDR":
        return None
    width, height, depth, kind, packing, sieve, laces = struct.unpack_from(">LLBBBBB", head, 16)
    if depth not in PNG_DEPTHS.get(kind, ()) or packing or sieve or laces > 1:
        return None
    place = 8
    while True:
        length, name = struct.unpack_from(">L4s", head, place)
        if name == b"IDAT":
            return height, width, place + 8, "PNG"
        if place > 8 and PNG_PLAIN.get(name, -1) not in (None, length):
            return None
        (checksum,) = struct.unpack_from(">L", head, place + 8 + length)
        if zlib.crc32(head[place + 4 : place + 8 + length]) != checksum:
            return None
        place += 12 + length


def _webp_pixels(head: bytes) -> int:
    """The pixels of a WebP's canvas, 0 for what is none. Pillow takes memory for all of them when it opens the file."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0
    kind = head[12:16]
    if kind == b"VP8X":  # extended: two sizes less one, of 24 bits each
        width, height = (int.from_bytes(head[place : place + 3], "little") + 1 for place in (24, 27))
    elif kind == b"VP8L":  # lossless: two sizes less one, of 14 bits each, behind a mark
        sizes = int.from_bytes(head[21:25], "little")
        width, height = (sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1
    else:  # lossy: two sizes of 14 bits, two bits of scale above each
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", head, 26))
    return width * height


def _has_end(handle: int, first: int, size: int, data: int, marker: bytes) -> bool:
    """Whether ``marker`` stands behind byte ``data`` of the image.

    It is looked for in the last bytes, then further back (padding or a film may follow the image), never before the
    coded data: a thumbnail in the header has an end of its own.
    """
    start = max(data, size - TAIL)
    if marker in os.pread(handle, size - start, first + start):
        return True
    while start > data:
        start, end = max(data, start - PIECE), start
        if marker in os.pread(handle, end - start + len(marker) - 1, first + start):
            return True
    return False


class _Window(io.RawIOBase):
    """The bytes of one image in an open file, for Pillow."""

    def __init__(self, handle: int, first: int, size: int) -> None:
        self._handle, self._first, self._size, self._place = handle, first, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if place < 0:
            raise ValueError(f"negative seek position {place}")
        self._place = place
        return place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._place))
        count = os.preadv(self._handle, [memoryview(buffer)[:length]], self._first + self._place) if length else 0
        self._place += count
        return count


def _examine_by_pillow(handle: int, first: int, size: int) -> Shape:
    """:func:`examine` for any format. Whatever a damaged file makes Pillow raise is a status here."""
    file = io.BufferedReader(_Window(handle, first, size))
    try:
        image = Image.open(file, formats=_readers())
        known = image.format in FORMATS and not _misread(image)
    except Image.DecompressionBombError:
        return 0, 0, Status.TOO_LARGE
    except Exception:
        return 0, 0, Status.HEADER
    data = file.tell()
    width, height = image.size
    if not known:
        return 0, 0, Status.FORMAT
    if min(width, height) < 1:
        return 0, 0, Status.HEADER
    if width * height > PIXEL_LIMIT:
        return height, width, Status.TOO_LARGE
    if _turned(image):
        width, height = height, width
    marker = END_MARKERS.get(image.format or "")
    try:
        if marker is not None:
            whole = _has_end(handle, first, size, data, marker)
        else:
            # WebP was read whole by opening it; what has no mark at its end is rare enough to be decoded.
            if image.format != "WEBP":
                image.load()
            whole = True
    except Exception:
        whole = False
    return height, width, Status.OK if whole else Status.TRUNCATED


@functools.cache
def _readers() -> list[str]:
    """Those of ``READERS`` that this Pillow has."""
    Image.init()
    return [name for name in READERS if name in Image.OPEN]


def _misread(image: Image.Image) -> bool:
    """Whether the decoder reads past the end of its pixels: it takes two samples per pixel of a TIFF for three."""
    return bool(image.format == "TIFF" and image.tag_v2.get(SAMPLES_PER_PIXEL) == 2)


def _turned(image: Image.Image) -> bool:
    """Whether the decoder will exchange height and width. (Pillow has done so in a TIFF's size already.)

    ``Image.getexif`` is not used: it decodes a whole PNG, and looks into XMP where the decoder does not.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return exif.get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception:
        return False
