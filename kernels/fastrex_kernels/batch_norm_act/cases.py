"""Sizes at which ``batch_norm_act`` is tested and measured, and its rival in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Call, Case, Cost, Op
from . import batch_norm_act


def eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    training: bool = True,
) -> Tensor:
    """The layer, the sum and the ReLU as models write them."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training)
    if residual is not None:
        output = output + residual
    return output.relu() if relu else output


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """A batch. ``sizes``: shape; ``residual``, ``relu``, ``training`` (default True), ``mean`` of the input (deviation
    1), ``strided`` (2-d rows apart)."""
    g = torch.Generator().manual_seed(seed)
    shape, channels = sizes["shape"], sizes["shape"][1]

    def batch(mean: float) -> Tensor:
        if sizes.get("strided"):
            return (torch.randn(shape[0], channels + 3, generator=g) + mean).to(device, dtype)[:, :channels]
        tensor = (torch.randn(shape, generator=g) + mean).to(device, dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    kind = torch.promote_types(dtype, torch.float32)
    vectors = ("weight", "bias", "running_mean", "running_var")
    tensors = {"input": batch(sizes.get("mean", 0.5))}
    tensors |= {name: (torch.rand(channels, generator=g) + 0.5).to(device, kind) for name in vectors}
    tensors["bias"] -= 1.0  # on both sides of zero, so that the ReLU shuts often
    if sizes.get("residual", True):
        tensors["residual"] = batch(0.0)
    options = {"relu": sizes.get("relu", True), "training": sizes.get("training", True)}
    grads = [name for name in ("input", "weight", "bias", "residual") if name in tensors]
    return Call(tensors, options, grads, ("running_mean", "running_var"))


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """Each pass over a tensor counts as memory traffic, as for a batch that no cache holds.

    Forward the input twice (the statistics come before the first output), residual, output and mask; backward the
    gradient, the input and the mask twice (the sums come before the first gradient), and both gradients. A batch that
    stays in a cache between two passes needs the input, or gradient and input, only once.
    """
    elements, size = math.prod(sizes["shape"]), dtype.itemsize
    relu, training, residual = sizes.get("relu", True), sizes.get("training", True), sizes.get("residual", True)
    mask = (elements + 7) // 8 if relu and residual else 0
    forward = elements * size * (1 + training + residual + 1) + mask
    backward = elements * size * (4 + 1 + (residual and relu)) + 2 * mask
    flops = {"fwd": elements * (4 * training + 3 + residual), "bwd": elements * 10}
    parts = {"fwd": ("fwd",), "bwd": ("bwd",), "fwd_bwd": ("fwd", "bwd")}[direction]
    total = {"fwd": forward, "bwd": backward}
    return Cost(bytes=sum(total[part] for part in parts), flops=sum(flops[part] for part in parts))


CASES = (
    Case("residual", "the end of a residual block; no tile divides the rows", {"shape": (3, 32, 5, 7)}),
    Case("plain", "no sum: the backward recomputes the sign", {"shape": (3, 32, 5, 7), "residual": False}),
    Case("bare", "the shortcut's layer: no sum, no ReLU", {"shape": (3, 32, 5, 7), "residual": False, "relu": False}),
    Case("sum only", "a sum without a ReLU: its gradient is the output's", {"shape": (3, 32, 5, 7), "relu": False}),
    Case("eval", "running statistics, with gradients", {"shape": (3, 32, 5, 7), "training": False}),
    Case("eval plain", "likewise without a sum", {"shape": (3, 32, 5, 7), "residual": False, "training": False}),
    Case("three channels", "fewer than a vector holds; bytes of the mask over two rows", {"shape": (5, 3, 3, 3)}),
    Case("one channel", "both memory formats at once", {"shape": (4, 1, 5, 3)}),
    Case("odd channels", "neither vectors nor tiles divide the channels", {"shape": (4, 37, 3, 3)}),
    Case("many channels", "more channels than one tile is wide", {"shape": (2, 520, 2, 2), "residual": False}),
    Case("rows", "features of a projector", {"shape": (70, 48), "residual": False}),
    Case("strided rows", "rows of a wider tensor", {"shape": (33, 20), "residual": False, "strided": True}),
    Case("two rows", "the smallest batch: the variance divides by one", {"shape": (2, 16), "residual": False}),
    Case("many rows", "several chunks and segments of rows", {"shape": (9, 8, 30, 33)}),
    Case("far mean", "a thousand deviations: sums of squares lose six digits", {"shape": (9, 16, 8, 8), "mean": 1e3}),
    Case("block of stage 2", "the largest sum of ResNet-50 at batch 64", {"shape": (64, 256, 28, 28)}, bench=True),
    Case("block of stage 3", "small enough for caches", {"shape": (32, 256, 14, 14)}, bench=True),
    Case("inside a block", "no sum", {"shape": (32, 256, 14, 14), "residual": False}, bench=True),
    Case("projector", "256 images of nine crops", {"shape": (2304, 2048), "residual": False}, bench=True),
)  # fmt: skip

OP = Op(name="batch_norm_act", function=batch_norm_act, eager=eager, make=make, cases=CASES, cost=cost)
