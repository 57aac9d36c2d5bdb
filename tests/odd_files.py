"""Files of every kind that people put into image folders, made here byte by byte where Pillow cannot write them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 30, 50
rows, columns = np.mgrid[:HEIGHT, :WIDTH]
RGB = np.stack((4 * columns + 20, 6 * rows + 30, 255 - 3 * columns - 2 * rows), -1).clip(0, 255).astype(np.uint8)
ALPHA = (5 * columns).astype(np.uint8)
PICTURE = Image.fromarray(RGB)
GREY = np.asarray(PICTURE.convert("L"))
RGBA = Image.fromarray(np.dstack((RGB, ALPHA)))
LA = Image.merge("LA", (PICTURE.convert("L"), RGBA.getchannel("A")))
COLOURS = PICTURE.quantize(64)
# Large enough that half a file holds the whole header.
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def encode(format: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def film(format: str, **options: Any) -> bytes:
    """Two pictures, of which the first counts."""
    return encode(format, save_all=True, append_images=[PICTURE.transpose(Image.Transpose.ROTATE_180)], **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, kind: int, data: bytes, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def lines(pixels: NDArray[Any]) -> bytes:
    """PNG's rows, each behind the byte of its filter."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


def interlaced_png() -> bytes:
    """Adam7, which Pillow reads but does not write."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    data = b"".join(lines(np.ascontiguousarray(RGB[y::down, x::right])) for x, y, right, down in passes)
    return png(WIDTH, HEIGHT, 8, 2, data, interlaced=1)


def wrong_checksum_png() -> bytes:
    data = bytearray(encode("PNG"))
    place = data.index(b"IDAT")
    data[place + 4 + int.from_bytes(data[place - 4 : place], "big")] ^= 1
    return bytes(data)


def bmp(depth: int, packing: int, data: bytes, height: int = HEIGHT, palette: Iterable[int] = ()) -> bytes:
    table = bytes(palette)
    start = 54 + len(table)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, depth, packing, len(data), 0, 0, len(table) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + table + data


def packed_bmp() -> bytes:
    """8 bits, run lengths."""
    data = b"".join(b"".join(bytes((1, value)) for value in row) + b"\0\0" for row in GREY[::-1]) + b"\0\1"
    return bmp(8, 1, data, palette=(byte for level in range(256) for byte in (level, level, level, 0)))


def upside_down_bmp() -> bytes:
    return bmp(24, 0, b"".join(row.tobytes() + bytes(-3 * WIDTH % 4) for row in RGB[..., ::-1]), height=-HEIGHT)


def short_bmp() -> bytes:
    """5 bits per colour."""
    parts = RGB.astype(np.uint16) >> 3
    return bmp(16, 0, (parts[..., 0] << 10 | parts[..., 1] << 5 | parts[..., 2])[::-1].astype("<u2").tobytes())


def netpbm(kind: int, most: int, pixels: NDArray[Any]) -> bytes:
    return b"P%d\n%d %d\n%d\n" % (kind, WIDTH, HEIGHT, most) + pixels.astype(">u2" if most > 255 else "u1").tobytes()


def sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    data = bytearray(encode("JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def ycck_jpeg() -> bytes:
    """A CMYK JPEG that says that its colours are YCCK."""
    data = encode("JPEG", PICTURE.convert("CMYK"), quality=95)
    place = data.index(b"Adobe")
    return data[: place + 11] + b"\x02" + data[place + 12 :]


def rotten_jpeg() -> bytes:
    """Bytes of the coded data are others; the markers are whole."""
    data = bytearray(encode("JPEG", NOISE, quality=90))
    start = data.index(b"\xff\xda") + 14
    for place in np.random.default_rng(0).integers(start, len(data) - 2, 60).tolist():
        data[place] = data[place] % 254 + 1 if data[place - 1] != 0xFF else data[place]
    return bytes(data)


def whole_behind_a_cut_jpeg() -> bytes:
    """Half a JPEG with an end."""
    data = encode("JPEG", NOISE, quality=90)
    return data[: len(data) // 2] + b"\xff\xd9"
