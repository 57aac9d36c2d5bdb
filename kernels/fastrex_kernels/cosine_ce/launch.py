"""The host's side of the Triton kernels: tiles, how much of a sum one program takes, and the gradient's launches."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import INTERPRETED
from .._triton import cdiv, next_power_of_2
from .kernel_gradient import DTYPES, gradient_kernel, norm_kernel, project_kernel

# An H200's multiprocessors; another GPU is split a little too finely or too coarsely. Partials stay within its L2.
PROCESSORS = 132
PARTIAL_BYTES = 16 * 2**20


class Tile(NamedTuple):
    """Sizes of one program: rows owned, rows streamed, columns of its sums, step through D."""

    own: int
    stream: int
    columns: int
    step: int
    num_warps: int = 8
    num_stages: int = 2


def tile_of(D: int, compute: torch.dtype, precision: str, inputs: int) -> Tile:
    """Untuned: chosen so that nothing spills on sm_80, sm_90, sm_100 and 99 KiB of shared memory suffice; no GPU yet.

    ``inputs`` is the width in bytes of the widest of x and W. Only two-byte inputs leave room to keep x in place.
    """
    columns = min(256, next_power_of_2(max(D, 16)))
    if INTERPRETED:  # pays for every step, not for its size
        return Tile(64, 64, columns, min(columns, 128))
    if compute == torch.float32 and precision == "ieee":
        return Tile(32, 16, columns, 16)  # 64 rows spill on Triton 3.9
    if compute == torch.bfloat16 and inputs == 2:
        return Tile(64, 32, columns, columns, num_stages=3) if D <= 256 else Tile(64, 64, columns, 64, num_stages=3)
    return Tile(64, 32, columns, min(columns, 32 if compute == torch.float32 else 64))


@cache
def split(own: int, stream: int, bytes_each: int) -> tuple[int, int]:
    """(parts, blocks in each): how many programs share the ``stream`` blocks of each of ``own`` tasks.

    The fewest rounds over the processors, counted in blocks; starting a program costs about one and a half, a partial
    an eighth. Depends on shapes alone, so that the order of every sum does.
    """
    best, cost = (1, stream), float("inf")
    for parts in range(1, min(stream, 64) + 1):
        blocks = cdiv(stream, parts)
        estimate = cdiv(own * parts, PROCESSORS) * (blocks + 1.5) + parts / 8
        if parts > 1 and parts * bytes_each > PARTIAL_BYTES:
            break
        if estimate < cost:
            best, cost = (cdiv(stream, blocks), blocks), estimate
    return best


class Head:
    """What every kernel of one call takes: operands, target and tiles."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: Tensor | None,
        temperature_value: float,
        class_weight: Tensor | None,
        first_class: int,
        num_classes: int,
        ignore_index: int,
        smoothing: float,
        compute: torch.dtype,
    ) -> None:
        (self.N, self.D), self.C = input.shape, weight.shape[0]
        self.x, self.w = _rows(input), _rows(weight)
        soft = target.is_floating_point()
        factors = None if class_weight is None else class_weight.float().contiguous()
        # What smoothing adds to every A: its share of the mean factor.
        spread = smoothing if factors is None or not smoothing else smoothing * factors.mean()
        label, share = (target.argmax(1), _rows(target)) if soft else (target.contiguous(), None)
        self.mass: Tensor | None = None
        if share is not None:
            total = share.sum(1, dtype=torch.float32) if factors is None else share.float() @ factors
            self.mass = (1 - smoothing) * total + spread
        elif isinstance(spread, Tensor):
            self.mass = spread
        self.fused = not soft and not smoothing
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.tile = tile_of(self.D, compute, precision, max(input.element_size(), weight.element_size()))
        self.line = next_power_of_2(self.D)
        self.lines = max(1, min(64, 4096 // self.line))
        # By name: the kernels share most of their arguments.
        self.common: dict[str, Any] = {
            "x_ptr": self.x, "w_ptr": self.w, "label_ptr": label, "class_weight_ptr": factors, "tau_ptr": temperature,
            "N": self.N, "C": self.C, "B": target.shape[0], "first_class": first_class, "num_classes": num_classes,
            "ignore_index": ignore_index, "stride_x": self.x.stride(0), "stride_w": self.w.stride(0),
            "tau": temperature_value, "smoothing": smoothing, "D": self.D, "SOFT": soft,
        }  # fmt: skip
        narrow = self.tile.columns >= self.D
        self.tiles: dict[str, Any] = {
            "share_ptr": share, "stride_share": 0 if share is None else share.stride(0), "SPREAD": smoothing > 0,
            "inverse_x_ptr": None if narrow else self.inverse(self.x),
            "inverse_w_ptr": None if narrow else self.inverse(self.w),
            "COMPUTE": DTYPES[compute], "PRECISION": precision, "BLOCK_D": self.tile.columns,
            "BLOCK_K": self.tile.step, "num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages,
        }  # fmt: skip

    def inverse(self, rows: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], dtype=torch.float32)
        norm_kernel[(cdiv(rows.shape[0], self.lines),)](
            rows, out, rows.shape[0], rows.stride(0), D=self.D, BLOCK_R=self.lines, BLOCK_D=self.line
        )
        return out

    def grid(self, own: int, stream: int, chunks: int, bytes_each: int, forced: int | None) -> tuple[Any, int]:
        """Grid of a tiled kernel, and how many streamed rows one program takes."""
        tasks, blocks = cdiv(own, self.tile.own), cdiv(stream, self.tile.stream)
        parts, each = split(tasks * chunks, blocks, bytes_each)
        if forced is not None:
            each = cdiv(blocks, forced)
            parts = cdiv(blocks, each)
        return (tasks, parts, chunks), each * self.tile.stream

    def gradient(
        self,
        top: Tensor,
        total: Tensor | None,
        upstream: Tensor | None,
        out: Tensor,
        radial: Tensor | None,
        forced: int | None,
    ) -> None:
        """Gradient of the rows (``radial`` given) or of the classes into ``out``."""
        rows = radial is not None
        own, stream = (self.x, self.w) if rows else (self.w, self.x)
        chunks = cdiv(self.D, self.tile.columns)
        count = own.shape[0]
        grid, each = self.grid(count, stream.shape[0], chunks, count * self.D * 4, forced)
        direct = not rows and grid[1] == chunks == 1
        # A single partial may stand where the result will. Long lines only: with fewer elements than threads, one
        # thread could overwrite what another has yet to read.
        here = direct or (grid[1] == 1 and out.dtype == torch.float32 and chunks > 1)
        sums = out if here else out.new_empty((grid[1], count, self.D), dtype=torch.float32)
        gradient_kernel[grid](
            **self.common, **self.tiles, weight_ptr=self.mass, top_ptr=top, total_ptr=total, upstream_ptr=upstream,
            out_ptr=sums, per_split=each, OWN_ROWS=rows, DIRECT=direct, BLOCK_O=self.tile.own, BLOCK_S=self.tile.stream,
        )  # fmt: skip
        if not direct:
            project_kernel[(cdiv(count, self.lines),)](
                sums, own, upstream if rows else None, out, radial, count, grid[1], own.stride(0),
                D=self.D, BLOCK_R=self.lines, BLOCK_D=self.line,
            )  # fmt: skip


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
