"""What the decoder's own parser says of an image, asked before a batch with that image goes to the decoder.

DALI 2.4 reads the headers of a batch in several threads. Where it refuses one (a damaged header, no pixels, pixels of
a type that it does not know) it throws while the other threads still write into its frame, and the process dies of
SIGSEGV: with 2 such JPEGs in 100, within ten batches of 64. What fails later, in the coded data, is an error as others.
The parser alone is the same code (nvImageCodec), one image at a time, and takes 4 microseconds.

JPEG 2000 is the exception: damage inside such a file kills the decoder (OpenJPEG in OpenCV) also alone.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import FastrexError
from .scan import PIXEL_LIMIT

# What DALI takes; of others it says "Invalid sample_type".
PIXELS = frozenset(["uint8", "int8", "uint16", "int16", "float32"])


def refusal(file: NDArray[np.uint8], *, whole: bool = False) -> str | None:
    """Why the decoder would refuse the header of the encoded image ``file``; None where it takes it.

    whole: also decode with Pillow what the decoder is not safe from (JPEG 2000).
    """
    codec = _codec()
    try:
        stream = codec.CodeStream(file)
        height, width, kind = stream.height, stream.width, stream.dtype.name
        samples, name = stream.num_channels, stream.codec_name
    except (RuntimeError, ValueError, AttributeError, TypeError):
        return "cannot be decoded (no header that the decoder understands)"
    if not (height and width):
        return "cannot be decoded (no pixels)"
    if height * width > PIXEL_LIMIT:
        return f"has more than {PIXEL_LIMIT} pixels"
    if kind not in PIXELS:
        return f"cannot be decoded (pixels of type {kind})"
    if name == "tiff" and samples == 2:
        # The decoder takes every pixel for three bytes and reads past the last one.
        return "cannot be decoded (grey with alpha in a TIFF)"
    if whole and name == "jpeg2k":
        try:
            with Image.open(io.BytesIO(file.data)) as image:
                image.load()
        except Exception:  # a damaged file makes Pillow raise nearly anything
            return "cannot be decoded (damaged JPEG 2000)"
    return None


def _codec() -> Any:
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        fact = f"nvImageCodec, which comes with NVIDIA DALI, cannot be imported ({error})"
        raise FastrexError(f"{fact}; pip install 'fastrex[train]'") from error
    return nvimgcodec
