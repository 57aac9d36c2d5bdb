"""The host's side of the contrastive kernels: tiles, how much of a sum one program takes, and what all of them need."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._op import INTERPRETED
from .._triton import cdiv, next_power_of_2
from ..cosine_ce.kernel_gradient import DTYPES, norm_kernel
from ..cosine_ce.launch import Tile, split

# Rows of one program that adds up partials.
LINES = 128


def forward_tile(D: int, compute: torch.dtype, precision: str, inputs: int) -> Tile:
    """Tile of the forward. Untuned: chosen so that nothing spills on sm_80, sm_90, sm_100 and 99 KiB of shared memory
    suffice; no GPU yet. ``inputs`` is the width in bytes of the widest operand; it has no columns of sums."""
    line = next_power_of_2(max(D, 16))
    if INTERPRETED:  # pays for every step, not for its size
        return Tile(64, 128, line, min(line, 128))
    if compute == torch.float32 and precision == "ieee":
        return Tile(64, 32, line, 16)
    if compute != torch.float32 and inputs == 2 and line <= 256:
        return Tile(128 if line <= 128 else 64, 32, line, line)
    return Tile(64, 32, line, min(line, 32 if compute == torch.float32 else 64))


def cosine_tile(D: int, compute: torch.dtype, precision: str, inputs: int) -> Tile:
    """The same for ``nearest_keys``, which keeps nothing beside the tile."""
    tile = forward_tile(D, compute, precision, inputs)
    if INTERPRETED:
        return tile
    if compute == torch.float32 and precision == "ieee":
        return tile._replace(step=min(tile.columns, 32))
    return tile._replace(own=64, stream=64, step=min(tile.step, 64))


def gradient_tile(D: int, compute: torch.dtype, precision: str, inputs: int) -> Tile:
    """The same for the gradients, which hold sums of up to 256 columns in registers as well."""
    columns = min(256, next_power_of_2(max(D, 16)))
    if INTERPRETED:
        return Tile(64, 64, columns, min(columns, 128))
    if compute == torch.float32 and precision == "ieee":
        return Tile(32, 16, columns, 16)
    if compute != torch.float32 and inputs == 2 and D <= 256:
        return Tile(64, 32, columns, columns)
    if compute != torch.float32 and D > 256:
        return Tile(32, 64, columns, 64)  # 64 rows spill on sm_80
    return Tile(64, 32, columns, min(columns, 32))


def ranges(
    tile: Tile, own: int, stream: int, chunks: int, bytes_each: int, forced: int | None
) -> tuple[tuple[int, int, int], int]:
    """Grid of a tiled kernel, and how many streamed rows one program takes: by the sizes alone, so that the order of
    every sum is too."""
    tasks, blocks = cdiv(own, tile.own), max(1, cdiv(stream, tile.stream))
    parts, each = split(tasks * chunks, blocks, bytes_each)
    if forced is not None:
        each = cdiv(blocks, forced)
        parts = cdiv(blocks, each)
    return (tasks, parts, chunks), each * tile.stream


def margin_words(temperature: float, hardness: float, kind: int, margin: float) -> dict[str, Any]:
    return {
        "inverse_tau": 1 / temperature, "hardness": hardness, "margin": margin, "cosine": math.cos(margin),
        "sine": math.sin(margin), "HARD": hardness > 0, "MARGIN": kind,
    }  # fmt: skip


class Similarities:
    """What every kernel of one call takes: operands, their norms and ids."""

    def __init__(
        self,
        input: Tensor,
        keys: Tensor,
        ids: Tensor,
        key_ids: Tensor,
        instance: Tensor | None,
        key_instance: Tensor | None,
        private: int,
        ignore_index: int,
        compute: torch.dtype,
    ) -> None:
        self.D = input.shape[1]
        self.x, self.k = (t if t.stride(1) == 1 else t.contiguous() for t in (input, keys))
        self.precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.width = max(input.element_size(), keys.element_size())
        # What one program of the cosine cross-entropy's norm_kernel and project_kernel holds.
        self.line = next_power_of_2(self.D)
        self.lines = max(1, min(64, 4096 // self.line))
        self.common: dict[str, Any] = {
            "x_ptr": self.x, "k_ptr": self.k, "id_ptr": ids.contiguous(), "key_id_ptr": key_ids.contiguous(),
            "instance_ptr": None if instance is None else instance.contiguous(),
            "key_instance_ptr": None if key_instance is None else key_instance.contiguous(),
            "inverse_x_ptr": self.inverse(self.x, ids, ignore_index),
            "inverse_k_ptr": self.inverse(self.k, key_ids, ignore_index),
            "N": input.shape[0], "M": keys.shape[0], "private": private, "ignore_index": ignore_index,
            "stride_x": self.x.stride(0), "stride_k": self.k.stride(0), "D": self.D, "COMPUTE": DTYPES[compute],
            "PRECISION": self.precision, "HAS_INSTANCE": instance is not None,
        }  # fmt: skip

    def inverse(self, rows: Tensor, ids: Tensor, ignore_index: int) -> Tensor:
        """One over the norms; 0 for what is ignored, which the kernels then take for a row of zeros."""
        out = rows.new_empty(rows.shape[0], dtype=torch.float32)
        if rows.shape[0]:
            norm_kernel[(cdiv(rows.shape[0], self.lines),)](
                rows, out, rows.shape[0], rows.stride(0), D=self.D, BLOCK_R=self.lines, BLOCK_D=self.line
            )
        return out.masked_fill_(ids == ignore_index, 0.0)
