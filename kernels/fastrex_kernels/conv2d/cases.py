"""Sizes at which ``conv2d`` is tested and measured, and its rival in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Call, Case, Cost, Op, in_cpp
from . import conv2d


def eager(
    input: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, weight_copy: Tensor | None = None
) -> Tensor:
    """The layer under autocast: the weight is cast in every forward, its gradient in every backward."""
    return F.conv2d(input, weight.to(input.dtype), stride=stride, padding=padding)


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """A layer and a batch. ``sizes``: ``input`` [N, I, H, W]; ``outputs``; ``kernel``, ``stride``, ``padding`` (default
    1, 1 and kernel // 2); ``copy``: also the rounded weight; ``first``: no gradient for the input is wanted."""
    g = torch.Generator().manual_seed(seed)
    kernel = sizes.get("kernel", 1)
    shape = (sizes["outputs"], sizes["input"][1], kernel, kernel)

    def channels_last(shape: tuple[int, ...], scale: float) -> Tensor:
        values = torch.randn(shape, generator=g) * scale
        return values.to(device, dtype).contiguous(memory_format=torch.channels_last)

    # Numbers that the dtype holds exactly: what is compared is the arithmetic, not the rounding of the weight.
    copy = channels_last(shape, 1 / math.sqrt(max(1, math.prod(shape[1:]))))
    tensors = {
        "input": channels_last(sizes["input"], 1.0),
        "weight": copy.to(torch.promote_types(dtype, torch.float32)),
    }
    if sizes.get("copy"):
        tensors["weight_copy"] = copy
    options = {"stride": sizes.get("stride", 1), "padding": sizes.get("padding", kernel // 2)}
    return Call(tensors, options, ("weight",) if sizes.get("first") else ("input", "weight"))


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """Every tensor once; products with the padding's zeros count, as they do in everyone's figures."""
    images, channels, *maps = sizes["input"]
    kernel, stride = sizes.get("kernel", 1), sizes.get("stride", 1)
    padding, size = sizes.get("padding", kernel // 2), dtype.itemsize
    pixels = math.prod((m + 2 * padding - kernel) // stride + 1 for m in maps)
    weight = sizes["outputs"] * channels * kernel * kernel
    input, output = math.prod(sizes["input"]), images * sizes["outputs"] * pixels
    backward = 1 if sizes.get("first") else 2
    # The weight is read in fp32, and its gradient written in fp32; the input's gradient reads the weight again.
    moved = {"fwd": size * (input + output) + 4 * weight, "bwd": (size * (input + output) + 4 * weight) * backward}
    flops = {"fwd": 2 * images * pixels * weight, "bwd": 2 * images * pixels * weight * backward}
    parts = {"fwd": ("fwd",), "bwd": ("bwd",), "fwd_bwd": ("fwd", "bwd")}[direction]
    return Cost(bytes=sum(moved[part] for part in parts), flops=sum(flops[part] for part in parts))


# ResNet-50: `copy` as its training step has it.
STAGE_1 = {"input": (8, 64, 56, 56), "copy": True}
CROPS_3 = {"input": (64, 256, 6, 6), "outputs": 256, "kernel": 3, "copy": True}
CROPS_4 = {"input": (64, 512, 3, 3), "outputs": 512, "kernel": 3, "copy": True}
STEM = {"outputs": 64, "kernel": 7, "stride": 2, "copy": True, "first": True}

CASES = (
    Case("3x3", "border, an odd batch, no tile divides anything", {"input": (3, 40, 5, 7), "outputs": 24, "kernel": 3}),
    Case("1x1", "no border", {"input": (4, 70, 5, 3), "outputs": 37}),
    Case("1x1 strided", "a shortcut: most pixels are skipped", {"input": (3, 48, 7, 6), "outputs": 33, "stride": 2}),
    Case("3x3 strided", "columns by their phase", {"input": (4, 32, 9, 8), "outputs": 32, "kernel": 3, "stride": 2}),
    Case("stem", "three channels: patches", {**STEM, "input": (3, 3, 20, 23), "outputs": 17, "copy": False}),
    Case("small stem", "patches without a stride", {"input": (2, 3, 6, 6), "outputs": 8, "kernel": 3}),
    Case("five by five", "stride 3", {"input": (2, 24, 11, 8), "outputs": 5, "kernel": 5, "stride": 3, "padding": 1}),
    Case("no padding", "all taps inside", {"input": (2, 24, 5, 9), "outputs": 20, "kernel": 3, "padding": 0}),
    Case("one pixel", "eight of nine taps meet nothing", {"input": (2, 16, 1, 1), "outputs": 16, "kernel": 3}),
    Case("one image", "a pair without a second one", {"input": (1, 16, 4, 4), "outputs": 8, "kernel": 3}),
    Case("with a copy", "the weight is not read", {"input": (2, 16, 4, 4), "outputs": 16, "kernel": 3, "copy": True}),
    Case("blocks", "several blocks and slices of pixels", {"input": (9, 8, 28, 30), "outputs": 16}),
    Case("blocks of patches", "of a stem", {"input": (5, 3, 40, 44), "outputs": 8, "kernel": 5, "stride": 2}),
    Case("3x3 of stage 1", "the largest maps", {**STAGE_1, "outputs": 64, "kernel": 3}, bench=True),
    Case("1x1 of stage 1", "memory decides", {**STAGE_1, "outputs": 256}, bench=True),
    Case("1x1 of stage 3", "many channels", {"input": (8, 1024, 14, 14), "outputs": 256, "copy": True}, bench=True),
    Case("3x3 of stage 3, 96 crops", "a fifth of the taps is outside", CROPS_3, bench=True),
    Case("3x3 of stage 4, 96 crops", "maps of nine pixels: two fifths are", CROPS_4, bench=True),
    Case("7x7 stem", "three channels", {**STEM, "input": (8, 3, 224, 224)}, bench=True),
)  # fmt: skip

OP = Op(
    name="conv2d",
    function=conv2d,
    eager=eager,
    make=make,
    cases=CASES,
    cost=cost,
    dtypes=(torch.bfloat16,),
    kernels=lambda: ("cpp",) if in_cpp("conv_weight_grad") else (),
)
