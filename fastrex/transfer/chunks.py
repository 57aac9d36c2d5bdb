"""Chunks of features on disk: each a safetensors file that appears whole, is verified when it is read, and can be
removed at any time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import files, tensorfile
from ..errors import FastrexError, explain

Rows = NDArray[np.int64]

STALE_S = 600.0  # what a killed writer left is removed after so long
DIGEST = "digest"
SIZE = 32  # bytes of each digest


@dataclass(frozen=True, eq=False)
class Chunk:
    """Features float32 [m, D] on the CPU, zeros where ``kept`` (bool [m]) is False: those images could not be decoded.

    content, stat: what the images were (:mod:`.contents`). lasting: whether it may be stored; an image that could not
    be read, or was changed meanwhile, may come back.
    """

    features: Tensor
    kept: NDArray[np.bool_]
    content: bytes
    stat: bytes
    lasting: bool = True


class Store:
    """The chunks of one extraction: features float32 [m, D], which of them are kept, labels and rows int64 [m], digests
    of the images, and a digest over all of it.

    Args:
        folder: where they are, None: nowhere. key: of the extraction; a chunk of another one is not taken.
        size: D. note: is told, in one line each, of what is not used and of what cannot be kept.
    """

    def __init__(self, folder: Path | None, key: str, size: int, note: Callable[[str], None]) -> None:
        self.folder, self.key, self.size, self.note = folder, key, size, note
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed writers have left, unless it may be of one that still writes."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            for name in {path.name[1:].rpartition(".")[0] for path in self.folder.glob(".*")}:
                files.sweep(self.folder / name, STALE_S)

    def path(self, number: int) -> Path:
        """Of a chunk, where there is a folder."""
        assert self.folder is not None
        return self.folder / f"{number:05d}.safetensors"

    def read(self, number: int, rows: Rows, labels: Tensor) -> Chunk | None:
        """What is stored for ``rows``, or None where it has to be computed.

        Raises:
            FastrexError: they were stored with other ``labels``.
        """
        if self.folder is None or not self.path(number).exists():
            return None
        path = self.path(number)
        try:
            held = self._verified(tensorfile.load(path), rows)
        except (FastrexError, ValueError) as error:
            self.note(f"{path} cannot be used ({error}); its features are computed anew")
            return None
        if not torch.equal(held["labels"], labels):
            raise FastrexError(
                f"transfer: the labels in {path} must be those of the images' index, they are others; remove the "
                f"folder {self.folder}"
            )
        kept = held["kept"].numpy().astype(bool)
        return Chunk(held["features"], kept, held["content"].numpy().tobytes(), held["stat"].numpy().tobytes())

    def _verified(self, held: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """What was read, if it is what :meth:`write` has written for ``rows``; ValueError where it is not."""
        wanted = {
            "features": (torch.float32, (len(rows), self.size)),
            "labels": (torch.int64, (len(rows),)),
            "rows": (torch.int64, (len(rows),)),
            "kept": (torch.uint8, (len(rows),)),
            **dict.fromkeys(("content", "stat", DIGEST), (torch.uint8, (SIZE,))),
        }
        if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()} != wanted:
            raise ValueError("it holds other tensors")
        if not torch.equal(held.pop(DIGEST), self._digest(held)):
            raise ValueError("its digest is another one")
        if not np.array_equal(held["rows"].numpy(), rows):
            raise ValueError("it is of other images")
        return held

    def write(self, number: int, chunk: Chunk, rows: Rows, labels: Tensor, *, replace: bool = True) -> None:
        """Keep a chunk if it lasts; once ``note`` has been told that it cannot be done, no more of them. Not
        ``replace``: what is there stays."""
        if self.folder is None or not chunk.lasting or (not replace and self.path(number).exists()):
            return
        held = {
            "features": chunk.features.contiguous(),
            "labels": labels.contiguous(),
            "rows": torch.from_numpy(rows.copy()),
            "kept": torch.from_numpy(chunk.kept.astype(np.uint8)),
            "content": _words(chunk.content),
            "stat": _words(chunk.stat),
        }
        path = self.path(number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.sweep(path, STALE_S)
            files.write_bytes(path, safetensors.torch.save({**held, DIGEST: self._digest(held)}))
        except OSError as error:
            self.note(
                f"features are not kept in {self.folder} ({explain(error)}); this run goes on with them in memory"
            )
            self.folder = None

    def _digest(self, held: Mapping[str, Tensor]) -> Tensor:
        digest = hashlib.sha256(self.key.encode())
        for name in ("features", "labels", "rows", "kept", "content", "stat"):
            digest.update(_bytes(held[name]))
        return _words(digest.digest())


def _words(digest: bytes) -> Tensor:
    return torch.tensor(list(digest), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
