"""What the tests compile ahead of time: each contrastive kernel as calls of common kinds launch it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .._triton import Compile, next_power_of_2
from ..cosine_ce.kernel_gradient import DTYPES, norm_kernel, project_kernel
from .kernel import combine_kernel, cosine_kernel, forward_kernel
from .kernel_gradient import gradient_kernel
from .launch import LINES, cosine_tile, forward_tile, gradient_tile

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

_INTEGERS = ("N", "M", "R", "private", "ignore_index", "per_split", "count_own", "splits")
_TYPES = dict.fromkeys((*_INTEGERS, "first_row", "first_key", "rows", "columns"), "i32")
_TYPES |= dict.fromkeys(("inverse_tau", "hardness", "margin", "cosine", "sine"), "fp32")
_TYPES |= dict.fromkeys(("id_ptr", "key_id_ptr", "instance_ptr", "key_instance_ptr", "counts_ptr"), "*i64")
_TYPES |= {"count_ptr": "*i32"}
# Aligned rows; a row's own image is left out. Pointers without a type here are fp32.
_CONSTANTS: dict[str, Any] = {"PRECISION": "ieee", "HAS_INSTANCE": True, "HARD": False, "MARGIN": 0, "BLOCK": LINES}


def _compile(
    name: str, kernel: Any, x: torch.dtype, k: torch.dtype | None = None, D: int = 128, **constants: Any
) -> Compile:
    """A kernel for rows of x and keys (None: of x's type) with D columns, in x's precision, and tiles as launched."""
    k = k or x
    line = next_power_of_2(D)
    sizes: dict[str, Any] = {"D": D, "stride_x": D, "stride_k": D, "stride_a": D, "COMPUTE": DTYPES[x]}
    sizes |= {"BLOCK_D": line, "BLOCK_R": max(1, min(64, 4096 // line))}
    warps, stages = 4, 3  # Triton's own
    if kernel in (forward_kernel, cosine_kernel, gradient_kernel):
        choose = {forward_kernel: forward_tile, cosine_kernel: cosine_tile}.get(kernel, gradient_tile)
        tile = choose(D, x, "ieee", max(x.itemsize, k.itemsize))
        warps, stages = tile.num_warps, tile.num_stages
        sizes |= {"BLOCK_N": tile.own, "BLOCK_M": tile.stream, "BLOCK_O": tile.own, "BLOCK_S": tile.stream}
        sizes |= {"BLOCK_D": tile.columns, "BLOCK_K": tile.step}
    given = _CONSTANTS | sizes | constants
    if not given["HAS_INSTANCE"]:
        given |= dict.fromkeys(("instance_ptr", "key_instance_ptr"))
    types = _TYPES | {"x_ptr": f"*{DTYPES[x]}", "k_ptr": f"*{DTYPES[k]}", "a_ptr": f"*{DTYPES[k]}"}
    if kernel is cosine_kernel or not given.get("DIRECT"):
        types["out_ptr"] = "*fp32"
    elif given.get("DIRECT"):
        types["out_ptr"] = f"*{DTYPES[x if given['OWN_ROWS'] else k]}"
    types["grad_ptr"] = types["a_ptr"]
    values = {
        key: value for key, value in given.items() if key in kernel.arg_names and (key not in types or value is None)
    }
    signature = {key: types.get(key, "*fp32") for key in kernel.arg_names if key not in values}
    return Compile(name, kernel, signature, values, num_warps=warps, num_stages=stages)


_ROWS: dict[str, Any] = {"OWN_ROWS": True, "DIRECT": False}
_KEYS: dict[str, Any] = {"OWN_ROWS": False, "DIRECT": False}
AOT = (
    _compile("forward in bf16", forward_kernel, BF16),
    _compile("forward in bf16, ArcFace, hard", forward_kernel, BF16, HARD=True, MARGIN=2, HAS_INSTANCE=False),
    _compile("forward in bf16, keys in fp32", forward_kernel, BF16, FP32, HARD=True),
    _compile("forward in fp16, keys in fp32", forward_kernel, FP16, FP32, HARD=True),
    _compile("forward in fp32", forward_kernel, FP32, HARD=True),
    _compile("forward of 256-d rows in bf16", forward_kernel, BF16, D=256, HARD=True),
    _compile("forward of 2048-d rows in bf16", forward_kernel, BF16, D=2048, HARD=True),
    _compile("combination", combine_kernel, BF16, HARD=True),
    _compile("cosines in bf16", cosine_kernel, BF16),
    _compile("cosines in fp32", cosine_kernel, FP32),
    _compile("gradient of rows in bf16", gradient_kernel, BF16, **_ROWS),
    _compile("gradient of rows in bf16, ArcFace, hard", gradient_kernel, BF16, HARD=True, MARGIN=2, **_ROWS),
    _compile("gradient of rows in fp16, keys in fp32", gradient_kernel, FP16, FP32, HARD=True, **_ROWS),
    _compile("gradient of rows in fp32", gradient_kernel, FP32, HARD=True, **_ROWS),
    _compile("gradient of 256-d rows in bf16", gradient_kernel, BF16, D=256, HARD=True, **_ROWS),
    _compile("gradient of 2048-d rows in bf16", gradient_kernel, BF16, D=2048, HARD=True, **_ROWS),
    # Triton 3.6 keeps to 128 registers on sm_100, two numbers too few.
    replace(
        _compile("gradient of keys in bf16, finished", gradient_kernel, BF16, OWN_ROWS=False, DIRECT=True),
        max_spill_bytes=8,
    ),
    _compile("gradient of keys in bf16, ArcFace, hard", gradient_kernel, BF16, HARD=True, MARGIN=2, **_KEYS),
    _compile("gradient of keys in fp16", gradient_kernel, FP16, HARD=True, **_KEYS),
    _compile("gradient of 256-d keys in bf16", gradient_kernel, BF16, D=256, HARD=True, **_KEYS),
    _compile("gradient of 256-d keys in fp32", gradient_kernel, FP32, D=256, HARD=True, **_KEYS),
    _compile("norms in bf16", norm_kernel, BF16),
    _compile("projection of rows in bf16", project_kernel, BF16, upstream_ptr=None, radial_ptr=None),
)
