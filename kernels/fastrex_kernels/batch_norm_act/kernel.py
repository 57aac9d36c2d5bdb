"""Triton kernels of batch_norm_act: how they read memory, and their launches.

With d = x - mean, scale = weight / sqrt(var + eps), g = dy where the ReLU let y through, sums over n rows:
    y = relu(d * scale + bias + residual),    dx = scale * (g - sum(g) / n - d * sum(g d) / (n (var + eps)))

Channels lie side by side in memory, which is read as ``rows`` lines of ``width`` elements: ``fold`` times the C
channels, so that width is a multiple of 16, vector loads are aligned and a byte of the mask lies within a line. The
last line is ragged where fold does not divide the number of samples.

Two launches forward (moments of x, output), two backward (sums, gradients). Each reads its tensors once, and the second
joins the partials of the first by itself. Sums over elements and parts are fp32, a channel's last few numbers fp64. The
mean is used as an fp32 part and a rest that goes into ``shift``. No atomics, and cuts by shape alone: the same input
gives the same bits. Assumed: fewer than 2^30 lines.
"""

# torch leaves ``device_of`` untyped.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._op import INTERPRETED
from .._triton import Compile, cdiv, next_power_of_2
from .kernel_rows import NONE, RECOMPUTED, STORED, backward_kernel, forward_kernel, sums_kernel
from .kernel_statistics import join_kernel, moments_kernel, slot_kernel, track_kernel

# Untuned: no GPU figure yet. Two programs share one of an H200's 132 processors within 128 registers a thread, and have
# 64 bytes a thread of bf16 in flight: 32 elements where only x is read, 16 where there are two tensors.
# The interpreter pays for every program and step, not for their size.
WARPS = 8
MOMENTS_TILE, TILE = 8192, 4096
PARTS, PROGRAMS = (8, 8) if INTERPRETED else (256, 512)
SIDE = 256  # channels of a program in the kernels without rows


class Cut(NamedTuple):
    """How the kernels read an input: arguments of all over rows, of those that join partials; grids; a plane's size."""

    common: dict[str, Any]
    joins: dict[str, Any]
    first: tuple[int, int]
    second: tuple[int, int]
    plane: int
    moments_r: int
    lines: int


@lru_cache(maxsize=1024)
def cut(total: int, C: int, itemsize: int) -> Cut:
    fold = 16 // gcd(C, 16)
    width, samples = C * fold, total // C
    rows = cdiv(samples, fold)
    # Whole cache lines where a line of x has them. A tile of partials has at most 8192 numbers, to fit in registers.
    block = 256 if INTERPRETED else 16 if fold >= 8 else 64 if itemsize == 2 and C >= 128 else 32
    block = min(block, next_power_of_2(width))
    blocks, moments_r, lines = cdiv(width, block), MOMENTS_TILE // block, TILE // block
    tiles = cdiv(rows, moments_r)
    parts = max(min(tiles, 8192 // block // fold, PARTS // blocks), 1)
    parts = cdiv(tiles, cdiv(tiles, parts))
    entries = next(size for size in (16, 64, 128, 256, 512) if size >= parts * fold)
    common = {"total": total, "rows": rows, "width": width, "C": C, "FOLD": fold, "RAGGED": samples % fold != 0}
    common |= {"BLOCK_C": block, "num_warps": WARPS}
    joins = {"samples": samples, "parts": parts, "ENTRIES": entries}
    programs = max(min(cdiv(rows, lines), PROGRAMS // blocks), 1)
    return Cut(common, joins, (blocks, parts), (blocks, programs), parts * width, moments_r, lines)


def cut_of(input: Tensor) -> Cut:
    return cut(input.numel(), input.shape[1], input.element_size())


def _moments(input: Tensor, how: Cut) -> Tensor:
    partial = input.new_empty(3 * how.plane, dtype=torch.float32)
    moments_kernel[how.first](input, partial, samples=how.joins["samples"], BLOCK_R=how.moments_r, **how.common)
    return partial


def _forward(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None,
    partial: Tensor | None, relu: bool, eps: float, save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output = torch.empty_like(input)
    stored = save_mask and relu and residual is not None
    mask = input.new_empty((input.numel() + 7) // 8 if stored else 0, dtype=torch.uint8)
    if input.numel():
        how = cut_of(input)
        forward_kernel[how.second](
            input, residual, output, mask if stored else None, mean, var, weight.contiguous(), bias.contiguous(),
            partial, eps=float(eps), RELU=relu, MOMENTS_R=how.moments_r, BLOCK_R=how.lines, **how.common, **how.joins,
        )  # fmt: skip
    return output, mask


def bn_act(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float, save_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launcher of ``fastrex::bn_act``."""
    mean, var = (input.new_empty(input.shape[1], dtype=torch.float64) for _ in range(2))
    with torch.cuda.device_of(input):
        partial = _moments(input, cut_of(input)) if input.numel() else None
        output, mask = _forward(input, mean, var, weight, bias, residual, partial, relu, eps, save_mask)
    return output, mean, var, mask


def bn_apply(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool,
    eps: float, save_mask: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrex::bn_apply``."""
    with torch.cuda.device_of(input):
        mean, var = mean.contiguous(), var.contiguous()
        return _forward(input, mean, var, weight, bias, residual, None, relu, eps, save_mask)


def bn_stats(input: Tensor) -> Tensor:
    """Launcher of ``fastrex::bn_stats``."""
    C = input.shape[1]
    slot = input.new_empty(1 + 2 * C, dtype=torch.float64)
    if input.numel() == 0:
        return slot.zero_()
    with torch.cuda.device_of(input):
        how = cut_of(input)
        options = {key: value for key, value in how.common.items() if key != "total"} | how.joins
        grid = (cdiv(C, how.common["BLOCK_C"]),)
        slot_kernel[grid](_moments(input, how), slot, MOMENTS_R=how.moments_r, **options)
    return slot


def bn_join(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of ``fastrex::bn_join``."""
    C = (slots.shape[1] - 1) // 2
    mean, var, count = slots.new_empty(C), slots.new_empty(C), slots.new_empty(())
    with torch.cuda.device_of(slots):
        grid = (max(cdiv(C, SIDE), 1),)
        join_kernel[grid](slots.contiguous(), mean, var, count, slots.shape[0], C, BLOCK_C=SIDE)
    return mean, var, count


class _Backward:
    """What the kernels of one backward share."""

    def __init__(
        self, grad: Tensor, input: Tensor, mask: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
        relu: bool, eps: float,
    ) -> None:  # fmt: skip
        gate = (STORED if mask.numel() else RECOMPUTED) if relu else NONE
        self.input, self.cut = input, cut_of(input)
        self.common = self.cut.common | {
            "grad_ptr": grad, "x_ptr": input, "bits_ptr": mask if mask.numel() else None,
            "mean_ptr": mean.contiguous(), "var_ptr": var.contiguous(), "weight_ptr": weight.contiguous(),
            "bias_ptr": bias.contiguous(), "eps": float(eps), "GATE": gate.value, "BLOCK_R": self.cut.lines,
        }  # fmt: skip

    def sums(self) -> Tensor:
        partial = self.input.new_empty(2 * self.cut.plane, dtype=torch.float32)
        sums_kernel[self.cut.first](partial_ptr=partial, **self.common)
        return partial

    def finish(self, *, batch: bool, dx: Tensor | None, dresidual: Tensor | None, **pointers: Tensor | None) -> None:
        """dx and dresidual where given; gradients of weight and bias, and sums, where ``pointers`` has partials."""
        blocks, programs = self.cut.second
        names = ("partial_ptr", "sums_ptr", "count_ptr", "dweight_ptr", "dbias_ptr")
        backward_kernel[blocks, 1 if dx is None and dresidual is None else programs](
            dx_ptr=dx, dresidual_ptr=dresidual, BATCH=batch, **{name: pointers.get(name) for name in names},
            **self.common, **self.cut.joins,
        )  # fmt: skip


def _gradient(input: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(input) if wanted else input.new_empty(0)


def bn_backward(
    grad: Tensor, input: Tensor, mask: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, relu: bool,
    eps: float, batch: bool, want_input: bool, want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrex::bn_backward``."""
    dx, dresidual = _gradient(input, want_input), _gradient(input, want_residual and relu)
    dweight, dbias = (weight.new_empty(weight.shape) for _ in range(2))
    if input.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    with torch.cuda.device_of(input):
        run = _Backward(grad, input, mask, mean, var, weight, bias, relu, eps)
        run.finish(
            batch=batch, dx=dx if want_input else None, dresidual=dresidual if want_residual and relu else None,
            partial_ptr=run.sums(), dweight_ptr=dweight, dbias_ptr=dbias,
        )  # fmt: skip
    return dx, dweight, dbias, dresidual


def bn_backward_sums(
    grad: Tensor, input: Tensor, mask: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, relu: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrex::bn_backward_sums``."""
    sums = input.new_empty(2, input.shape[1], dtype=torch.float64)
    dweight, dbias = (weight.new_empty(weight.shape) for _ in range(2))
    if input.numel() == 0:
        return sums.zero_(), dweight.zero_(), dbias.zero_()
    with torch.cuda.device_of(input):
        run = _Backward(grad, input, mask, mean, var, weight, bias, relu, eps)
        run.finish(
            batch=False, dx=None, dresidual=None, partial_ptr=run.sums(), sums_ptr=sums, dweight_ptr=dweight,
            dbias_ptr=dbias,
        )  # fmt: skip
    return sums, dweight, dbias


def bn_backward_apply(
    grad: Tensor, input: Tensor, mask: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, sums: Tensor,
    count: Tensor, relu: bool, eps: float, want_residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of ``fastrex::bn_backward_apply``."""
    dx, dresidual = torch.empty_like(input), _gradient(input, want_residual and relu)
    if input.numel():
        with torch.cuda.device_of(input):
            run = _Backward(grad, input, mask, mean, var, weight, bias, relu, eps)
            run.finish(
                batch=True, dx=dx, dresidual=dresidual if want_residual and relu else None, sums_ptr=sums.contiguous(),
                count_ptr=count,
            )  # fmt: skip
    return dx, dresidual


def bn_track_(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor | None, rows: int,
    momentum: float,
) -> None:  # fmt: skip
    """Launcher of ``fastrex::bn_track_``."""
    C = running_mean.numel()
    if C:
        with torch.cuda.device_of(running_mean):
            track_kernel[(cdiv(C, SIDE),)](
                running_mean, running_var, mean, var, count, rows, running_mean.stride(0), running_var.stride(0), C,
                float(momentum), BLOCK_C=SIDE,
            )  # fmt: skip
    torch.autograd.graph.increment_version((running_mean, running_var))


_KINDS = {
    "*i": ("x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "dx_ptr", "dresidual_ptr"),
    "*u8": ("bits_ptr",),
    "*fp64": ("mean_ptr", "var_ptr", "sums_ptr", "count_ptr", "slot_ptr", "slots_ptr"),
    "*fp32": (
        "weight_ptr", "bias_ptr", "partial_ptr", "dweight_ptr", "dbias_ptr", "running_mean_ptr", "running_var_ptr",
    ),
    "i32": ("total", "rows", "width", "C", "samples", "parts", "ranks"),
    "fp32": ("eps", "momentum"),
}  # fmt: skip


def _compile(name: str, kernel: Any, kind: str, num_warps: int = WARPS, **constants: Any) -> Compile:
    """A kernel whose arguments are what their names say; tensors of ``kind``."""
    types = {argument: f"*{kind}" if key == "*i" else key for key, group in _KINDS.items() for argument in group}
    constants = {"FOLD": 1, "RAGGED": False, "ENTRIES": 128, "MOMENTS_R": 128, "BLOCK_C": 64} | constants
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {key: types[key] for key in kernel.arg_names if key not in constants}
    return Compile(f"{name} in {kind}", kernel, signature, constants, num_warps=num_warps)


_GIVEN: dict[str, Any] = {"sums_ptr": None, "count_ptr": None, "BATCH": True}
AOT = (
    _compile("moments", moments_kernel, "bf16", BLOCK_R=128),
    _compile("output of a sum", forward_kernel, "bf16", BLOCK_R=64, RELU=True),
    _compile("sums behind a mask", sums_kernel, "bf16", BLOCK_R=64, GATE=STORED.value),
    _compile("gradients behind a mask", backward_kernel, "bf16", BLOCK_R=64, GATE=STORED.value, **_GIVEN),
    _compile(
        "gradients without a mask", backward_kernel, "fp32", BLOCK_R=128, BLOCK_C=32, ENTRIES=256,
        GATE=RECOMPUTED.value, bits_ptr=None, dresidual_ptr=None, **_GIVEN,
    ),
    _compile("slot of a rank", slot_kernel, "bf16"),
    _compile("join of slots", join_kernel, "fp64", num_warps=4, BLOCK_C=SIDE),
    _compile("running statistics", track_kernel, "fp32", num_warps=4, BLOCK_C=SIDE, stride_mean=1, stride_var=1),
)  # fmt: skip
