"""What the tests compile ahead of time: each kernel of the cosine cross-entropy as heads of common kinds launch it."""

from __future__ import annotations

from typing import Any

import torch

from .._triton import Compile, next_power_of_2
from .kernel import combine_kernel, forward_kernel, reduce_kernel
from .kernel_gradient import DTYPES, gradient_kernel, norm_kernel, project_kernel
from .launch import tile_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

_INTEGERS = ("N", "C", "B", "R", "first_class", "num_classes", "ignore_index", "classes_per_split", "per_split")
_TYPES = dict.fromkeys((*_INTEGERS, "splits"), "i32") | dict.fromkeys(("tau", "smoothing"), "fp32")
_TYPES |= {"label_ptr": "*i64", "rank_ptr": "*i64"}
# Aligned rows of ids without class weights and smoothing. Pointers without a type here are fp32.
_ABSENT = ("share_ptr", "weight_ptr", "class_weight_ptr", "threshold_ptr", "tau_ptr", "upstream_ptr")
_CONSTANTS = dict.fromkeys(_ABSENT) | {"stride_share": 0, "SOFT": False, "SPREAD": False, "PRECISION": "ieee"}


def _compile(
    name: str, kernel: Any, x: torch.dtype, w: torch.dtype | None = None, D: int = 256, **constants: Any
) -> Compile:
    """A kernel for rows of x and W (None: of x's type) with D columns, in x's precision, and tiles as launched."""
    w = w or x
    line = next_power_of_2(D)
    lines = max(1, min(64, 4096 // line))
    sizes: dict[str, Any] = {"D": D, "stride_x": D, "stride_w": D, "stride_a": D, "BLOCK_D": line}
    sizes |= {"BLOCK_N": lines, "BLOCK_R": lines}
    warps, stages = 4, 3  # Triton's own
    if kernel in (forward_kernel, gradient_kernel):
        tile = tile_of(D, x, "ieee", max(x.itemsize, w.itemsize))
        warps, stages = tile.num_warps, tile.num_stages
        sizes |= {"BLOCK_N": tile.own, "BLOCK_C": tile.stream, "BLOCK_O": tile.own, "BLOCK_S": tile.stream}
        sizes |= {"BLOCK_D": tile.columns, "BLOCK_K": tile.step, "COMPUTE": DTYPES[x]}
        if tile.columns >= D:
            sizes |= dict.fromkeys(("inverse_x_ptr", "inverse_w_ptr"))
    given = _CONSTANTS | sizes | constants
    types = _TYPES | {key: value for key, value in constants.items() if key.endswith("_ptr") and value is not None}
    for key, kind in (("x_ptr", x), ("w_ptr", w), ("a_ptr", x), ("grad_ptr", x)):
        types.setdefault(key, f"*{DTYPES[kind]}")
    values = {key: value for key, value in given.items() if key in kernel.arg_names and key not in types}
    signature = {key: types.get(key, "*fp32") for key in kernel.arg_names if key not in values}
    return Compile(name, kernel, signature, values, num_warps=warps, num_stages=stages)


_CLASSES: dict[str, Any] = {"OWN_ROWS": False, "DIRECT": False}
_BACKWARD: dict[str, Any] = {
    "total_ptr": None,
    "upstream_ptr": "*fp32",
}  # from a given lse; the forward has its own sums
AOT = (
    _compile("forward in bf16", forward_kernel, BF16, ACCUMULATE=True),
    _compile("forward in fp32", forward_kernel, FP32, ACCUMULATE=True),
    _compile("forward in fp16", forward_kernel, FP16, ACCUMULATE=True),
    _compile("forward in fp16, W in fp32", forward_kernel, FP16, FP32, ACCUMULATE=True),
    _compile("forward in bf16, W in fp32", forward_kernel, BF16, FP32, ACCUMULATE=True),
    _compile("forward of 512-d rows in bf16", forward_kernel, BF16, D=512, ACCUMULATE=True),
    _compile("combination in bf16", combine_kernel, BF16, ACCUMULATE=True, scale_ptr=None),
    _compile("mean loss", reduce_kernel, BF16, MEAN=True, BLOCK=1024),
    _compile("norms of 512-d rows in bf16", norm_kernel, BF16, D=512),
    _compile("gradient of classes in bf16", gradient_kernel, BF16, **_CLASSES),
    _compile("gradient of classes in fp32", gradient_kernel, FP32, **_CLASSES),
    _compile("gradient of classes in bf16, W in fp32", gradient_kernel, BF16, FP32, **_CLASSES),
    _compile("gradient of classes in bf16, finished", gradient_kernel, BF16, OWN_ROWS=False, DIRECT=True),
    _compile("gradient of 512-d classes in bf16", gradient_kernel, BF16, D=512, **_CLASSES),
    _compile("gradient of rows in bf16", gradient_kernel, BF16, OWN_ROWS=True, DIRECT=False, **_BACKWARD),
    _compile(
        "gradient of smoothed rows in bf16", gradient_kernel, BF16, FP32, OWN_ROWS=True, DIRECT=False, SPREAD=True
    ),
    _compile("projection of rows in bf16", project_kernel, BF16, upstream_ptr="*fp32"),
    _compile("projection of classes in fp32", project_kernel, FP32, radial_ptr=None),
)
