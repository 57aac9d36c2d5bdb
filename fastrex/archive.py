"""The zip archive that ``torch.save`` writes: its entries and storages, sizes checked before anything is allocated."""

from __future__ import annotations

import re
import sys

import torch
from torch import Tensor

from .errors import FastrexError
from .stored import StoredZip

CONVERT = "load it where you trust it and save its state_dict with a current torch.save or with safetensors"
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Archive:
    """The zip archive of one file: entries by exact name, the pickle ``data.pkl`` and the storages."""

    def __init__(self, archive: StoredZip) -> None:
        roots = [name.removesuffix("/data.pkl") for name in archive.entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise FastrexError(f"it is a zip file, but none that torch.save wrote; {CONVERT}")
        self.root = roots[0]
        if f"{self.root}/constants.pkl" in archive.entries:
            raise FastrexError(f"it is a TorchScript program, not a checkpoint; {CONVERT}")
        self.archive = archive
        self.swap = self.read("byteorder", 16, sys.byteorder.encode()) != sys.byteorder.encode()

    def read(self, name: str, limit: int, default: bytes | None = None) -> bytes:
        entry = self.archive.entries.get(f"{self.root}/{name}")
        if entry is None:
            if default is None:
                raise FastrexError(f"its entry {name} is missing")
            return default
        if entry.file_size > limit:
            raise FastrexError(f"its entry {name} has {entry.file_size} bytes, more than {limit}")
        return self.archive.read(entry.filename)

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        if not re.fullmatch(r"[0-9]{1,9}", key) or count < 0:
            raise FastrexError(f"it names a storage {key[:20]!r} of {count} elements")
        entry = self.archive.entries.get(f"{self.root}/data/{key}")
        held = -1 if entry is None else entry.file_size
        if held != count * dtype.itemsize:
            raise FastrexError(
                f"its storage {key} must have {count * dtype.itemsize} bytes, the archive has {max(held, 0)}"
            )
        if count == 0:
            return torch.empty(0, dtype=dtype)
        data = torch.frombuffer(bytearray(self.read(f"data/{key}", held)), dtype=torch.uint8)
        if self.swap:
            data = data.reshape(-1, dtype.itemsize).flip(1).reshape(-1).contiguous()
        return data != 0 if dtype == torch.bool else data.view(dtype)


def not_a_zip(head: bytes) -> str:
    """What a file is that begins with ``head``, and the way out."""
    if not head:
        return "it is empty; get it again"
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        return f"it has torch's format from before version 1.6; {CONVERT}"
    if head[8:9] == b"{":
        return "it looks like safetensors; rename it to .safetensors"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the file itself; run git lfs pull"
    if head.startswith(b"\x80"):
        return f"it is a bare pickle; {CONVERT}"
    return f"it is no torch file (it begins with {head[:16]!r}); {CONVERT}"
