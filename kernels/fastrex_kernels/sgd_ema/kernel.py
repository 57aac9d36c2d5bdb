"""Triton kernel of one optimiser step over many tensors. For every value, in one pass,

    b = momentum * b + (g * inv_scale + decay * p);   p = p - lr * b;   e = e + (1 - ema_momentum) * (p - e)

and rounded copies of p and e. One program owns BLOCK values of one parameter. A table on the device tells it where the
tensors are; it reads four values and writes three, each once, and the scalars. Where ``skip`` is set it reads nothing
else and writes nothing.

The table holds addresses: it is built and sent, from pinned memory and without a sync, when tensors moved, and kept
while they stay. What it costs to look at a thousand tensors in Python hides behind the GPU's own work.

Assumed: parameters, buffers and EMAs in fp32, and all tensors of one parameter as flat memory in one dense layout.
Others are worked on in copies that have the parameter's.
"""

# Triton types the kernels.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .._triton import Compile, cdiv

# Untuned: eight values of each stream per thread, two 16-byte loads of each under way; no GPU figure yet.
BLOCK = 2048
WARPS = 8
KEPT = 8  # plans, and tables of each
FULL, LOW = (torch.float32,), (torch.bfloat16, torch.float16)
# Rows of the table, and what its tensors may be. Then follow the number of values and the bits of the decay.
ROLES = (
    ("params", FULL),
    ("grads", FULL + LOW),
    ("momentum_buffers", FULL),
    ("ema_params", FULL),
    ("param_copies", LOW),
    ("ema_copies", LOW),
)
GRAD = 1
_dtype = attrgetter("dtype")
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, None: None}


@triton.jit
def place(table_ptr, role, tensors, first, dtype: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the program's values of a tensor are, and whether there is such a tensor."""
    address = tl.load(table_ptr + role * tensors)
    at = address.to(tl.pointer_type(dtype)) + first + tl.arange(0, BLOCK)
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at, tl.broadcast_to(address, (BLOCK,)) != 0


@triton.jit
def advance(
    p_at, g_at, b_at, e_at, has_e, p_copy_at, has_p_copy, e_copy_at, has_e_copy, here,
    lr, momentum, rate, inv_scale, decay,
):  # fmt: skip
    p = tl.load(p_at, mask=here, other=0.0)
    g = tl.load(g_at, mask=here, other=0.0).to(tl.float32)
    b = tl.load(b_at, mask=here, other=0.0)
    e = tl.load(e_at, mask=here & has_e, other=0.0)
    if inv_scale is not None:
        g = g * inv_scale
    b = b * momentum + tl.where(decay == 0.0, g, g + decay * p)
    p = p - lr * b
    # As torch's lerp: from the nearer end, so that a rate of 1 gives the parameter itself.
    e = tl.where(rate < 0.5, e + rate * (p - e), p - (1.0 - rate) * (p - e))
    tl.store(p_at, p, mask=here)
    tl.store(b_at, b, mask=here)
    tl.store(e_at, e, mask=here & has_e)
    if p_copy_at is not None:
        tl.store(p_copy_at, p.to(p_copy_at.dtype.element_ty), mask=here & has_p_copy)
    if e_copy_at is not None:
        tl.store(e_copy_at, e.to(e_copy_at.dtype.element_ty), mask=here & has_e_copy)


@triton.jit(do_not_specialize=["tensors"])
def sgd_ema_kernel(
    table_ptr, block_ptr, lr_ptr, momentum_ptr, ema_momentum_ptr, inv_scale_ptr, skip_ptr, tensors, momentum, rate,
    GRAD_TYPE: tl.constexpr, PARAM_COPY_TYPE: tl.constexpr, EMA_COPY_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if skip_ptr is not None:  # noqa: SIM102 - one known when compiling, the other on the device
        if tl.load(skip_ptr).to(tl.float32) != 0.0:
            return
    block_ptr += tl.program_id(0) * 2
    table_ptr += tl.load(block_ptr)
    first = tl.load(block_ptr + 1).to(tl.int64) * BLOCK
    p_at, _ = place(table_ptr, 0, tensors, first, tl.float32, ALIGNED, BLOCK)
    g_at, _ = place(table_ptr, 1, tensors, first, GRAD_TYPE, GRAD_ALIGNED, BLOCK)
    b_at, _ = place(table_ptr, 2, tensors, first, tl.float32, ALIGNED, BLOCK)
    e_at, has_e = place(table_ptr, 3, tensors, first, tl.float32, ALIGNED, BLOCK)
    p_copy_at, has_p_copy = None, None
    if PARAM_COPY_TYPE is not None:
        p_copy_at, has_p_copy = place(table_ptr, 4, tensors, first, PARAM_COPY_TYPE, ALIGNED, BLOCK)
    e_copy_at, has_e_copy = None, None
    if EMA_COPY_TYPE is not None:
        e_copy_at, has_e_copy = place(table_ptr, 5, tensors, first, EMA_COPY_TYPE, ALIGNED, BLOCK)
    left = tl.load(table_ptr + 6 * tensors) - first
    decay = tl.load(table_ptr + 7 * tensors).to(tl.int32).to(tl.float32, bitcast=True)
    lr = tl.load(lr_ptr).to(tl.float32)
    if momentum_ptr is not None:
        momentum = tl.load(momentum_ptr).to(tl.float32)
    if ema_momentum_ptr is not None:
        rate = (1.0 - tl.load(ema_momentum_ptr)).to(tl.float32)
    inv_scale = None
    if inv_scale_ptr is not None:
        inv_scale = tl.load(inv_scale_ptr).to(tl.float32)
    offset = tl.arange(0, BLOCK)
    if left >= BLOCK:  # without a mask by the number of values, which would take the vector loads apart
        advance(p_at, g_at, b_at, e_at, has_e, p_copy_at, has_p_copy, e_copy_at, has_e_copy, offset >= 0,
                lr, momentum, rate, inv_scale, decay)  # fmt: skip
    else:
        advance(p_at, g_at, b_at, e_at, has_e, p_copy_at, has_p_copy, e_copy_at, has_e_copy, offset < left,
                lr, momentum, rate, inv_scale, decay)  # fmt: skip


class Plan:
    """What follows from shapes, layouts and dtypes: the launches, and which tensors need a copy in another layout.

    Tensors are known by their place in the list of all, ``places[role][parameter]``, -1 for none.
    """

    def __init__(
        self, tensors: Sequence[Tensor], places: Sequence[Sequence[int]], decay: Sequence[float], device: torch.device
    ) -> None:
        self.places, self.device = places, device
        params = [tensors[place] for place in places[0]]
        numels = [param.numel() for param in params]
        self.tail = [*numels, *torch.tensor(decay, dtype=torch.float32).view(torch.int32).tolist()]
        # (place, parameter, whether it is written)
        self.misfits: list[tuple[int, int, bool]] = []
        for role, ((name, dtypes), row) in enumerate(zip(ROLES, places, strict=True)):
            for index, place in enumerate(row):
                if place >= 0:
                    _check(f"{name}[{index}]", tensors[place], dtypes)
                    if not (_dense(params[index]) and _same_layout(params[index], tensors[place])):
                        self.misfits.append((place, index, role != GRAD))
        # A parameter without a copy joins those that have one.
        rows = [places[role] for role in (GRAD, 4, 5)]
        first = [next((tensors[place].dtype for place in row if place >= 0), None) for row in rows]
        groups: dict[tuple[torch.dtype | None, ...], list[int]] = {}
        for index in range(len(params)):
            own = zip(rows, first, strict=True)
            kind = tuple(tensors[row[index]].dtype if row[index] >= 0 else other for row, other in own)
            groups.setdefault(kind, []).append(index)
        self.launches = [(kind, _blocks(numels, indices, device)) for kind, indices in groups.items()]
        self.tables: dict[tuple[int, ...], tuple[Tensor, bool, bool]] = {}

    def table(self, tensors: Sequence[Tensor]) -> tuple[Tensor, bool, bool]:
        """The table for tensors at these addresses; whether all but the gradients, and they, start at 16 bytes."""
        key = tuple(map(Tensor.data_ptr, tensors))
        found = self.tables.get(key)
        if found is None:
            if len(set(map(Tensor.get_device, tensors))) > 1:
                raise ValueError(f"sgd_ema_: {self._elsewhere(tensors)}")
            rows = [[key[place] if place >= 0 else 0 for place in row] for row in self.places]
            aligned = [not any(address % 16 for address in row) for row in rows]
            state = all(fits for role, fits in enumerate(aligned) if role != GRAD)
            # Through an array: from a list it would take a millisecond.
            host = torch.frombuffer(array("q", [*chain(*rows), *self.tail]), dtype=torch.int64)
            found = _send(host, self.device), state, aligned[GRAD]
            _keep(self.tables, key, found)
        return found

    def _elsewhere(self, tensors: Sequence[Tensor]) -> str:
        for (name, _), row in zip(ROLES, self.places, strict=True):
            for index, place in enumerate(row):
                if place >= 0 and tensors[place].device != self.device:
                    return f"{name}[{index}] must be on {self.device} like params[0], got {tensors[place].device}"
        return f"all tensors must be on {self.device}, got others"


_PLANS: dict[Any, Plan] = {}
# What a captured graph reads must outlive it, and nothing says when that ends.
_CAPTURED: list[Tensor] = []


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= KEPT:
        del cache[next(iter(cache))]
    cache[key] = value


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _send(host: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return host
    if _capturing(device):
        raise RuntimeError(
            "sgd_ema_: the tensors must have the addresses of an earlier call while a CUDA graph is captured, got new "
            "ones; run a step before, keep the gradients with zero_grad(set_to_none=False), and give every tensor of a "
            "parameter the same strides"
        )
    return host.pin_memory().to(device, non_blocking=True)


def _check(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"sgd_ema_: {name} must be {names}, got {tensor.dtype}")


def _dense(tensor: Tensor) -> bool:
    """Whether the values fill their memory without gaps or overlaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_layout(param: Tensor, tensor: Tensor) -> bool:
    """The stride of an axis of length 1 says nothing."""
    strides = zip(param.shape, param.stride(), tensor.stride(), strict=True)
    return all(size == 1 or mine == other for size, mine, other in strides)


def _blocks(numels: Sequence[int], indices: Sequence[int], device: torch.device) -> Tensor:
    """For each program of a launch the parameter and the block in it, int32 [programs, 2]."""
    counts = torch.tensor([cdiv(numels[index], BLOCK) for index in indices])
    owner = torch.repeat_interleave(torch.tensor(indices), counts)
    start = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return _send(torch.stack((owner, torch.arange(len(owner)) - start), 1).to(torch.int32), device)


def sgd_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_params: Sequence[Tensor],
    ema_index: Sequence[int],
    param_copies: Sequence[Tensor],
    param_copy_index: Sequence[int],
    ema_copies: Sequence[Tensor],
    ema_copy_index: Sequence[int],
    weight_decay: Sequence[float],
    lr: Tensor,
    momentum: float,
    momentum_scalar: Tensor | None,
    ema_momentum: float,
    ema_momentum_scalar: Tensor | None,
    inv_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """Launcher of ``fastrex::sgd_ema_``: one launch for each dtype of gradients and copies, usually one in all.

    A CUDA graph holds the addresses of its capture: every tensor must have been seen, at its place, in a call before.
    """
    device = params[0].device
    with torch.cuda.device_of(params[0]):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        tensors = [*params, *grads, *momentum_buffers, *ema_params, *param_copies, *ema_copies]
        # A table sent on another stream may not have arrived for this one.
        key = (
            device, stream, tuple(map(Tensor.size, params)), tuple(map(Tensor.stride, tensors)),
            tuple(map(_dtype, tensors)), tuple(weight_decay),
            tuple(ema_index), tuple(param_copy_index), tuple(ema_copy_index),
        )  # fmt: skip
        plan = _PLANS.get(key)
        if plan is None:
            places = _places(len(params), len(ema_params), len(param_copies), key[-3:])
            plan = Plan(tensors, places, weight_decay, device)
            _keep(_PLANS, key, plan)
        borrowed: list[tuple[Tensor, Tensor]] = []
        for place, index, written in plan.misfits:
            owner = tensors[place]
            tensors[place] = torch.empty_like(params[index], dtype=owner.dtype).copy_(owner)
            if written:
                borrowed.append((owner, tensors[place]))
        table, aligned, grad_aligned = plan.table(tensors)
        if _capturing(device):
            _CAPTURED.extend((table, *(blocks for _, blocks in plan.launches)))
        scalars = [
            x if x is None or x.device == device else x.to(device, non_blocking=True)
            for x in (lr, momentum_scalar, ema_momentum_scalar, inv_scale, skip)
        ]
        for (grad, param_copy, ema_copy), blocks in plan.launches:
            if blocks.shape[0]:
                sgd_ema_kernel[(blocks.shape[0],)](
                    table, blocks, *scalars, len(params), momentum, 1 - ema_momentum,
                    GRAD_TYPE=DTYPES[grad], PARAM_COPY_TYPE=DTYPES[param_copy], EMA_COPY_TYPE=DTYPES[ema_copy],
                    ALIGNED=aligned, GRAD_ALIGNED=grad_aligned, BLOCK=BLOCK, num_warps=WARPS,
                )  # fmt: skip
        for owner, copy in borrowed:
            owner.copy_(copy)
    # The kernels write behind autograd's back: a backward that still needs an old value must notice.
    increment_version([*params, *momentum_buffers, *ema_params, *param_copies, *ema_copies])


def _places(
    count: int, emas: int, copies: int, indices: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
) -> list[list[int]]:
    """Where each role's tensor of each parameter stands in the list of all, -1 for none."""
    starts = (3 * count, 3 * count + emas, 3 * count + emas + copies)
    rows = [list(range(start, start + count)) for start in (0, count, 2 * count)]
    for start, index in zip(starts, indices, strict=True):
        rows.append([start + i if i >= 0 else -1 for i in index] if index else [-1] * count)
    # The copy of an EMA that is not there is nobody's.
    rows[5] = [copy if ema >= 0 else -1 for ema, copy in zip(rows[3], rows[5], strict=True)]
    return rows


_SIGNATURE = (
    dict.fromkeys(("lr_ptr", "momentum_ptr", "ema_momentum_ptr", "inv_scale_ptr", "skip_ptr"), "*fp32")
    | {"table_ptr": "*i64", "block_ptr": "*i32", "tensors": "i32", "momentum": "fp32", "rate": "fp32"}
)  # fmt: skip
AOT = tuple(
    Compile(
        name,
        sgd_ema_kernel,
        _SIGNATURE,
        {"GRAD_TYPE": grad, "PARAM_COPY_TYPE": copy, "EMA_COPY_TYPE": copy, "ALIGNED": aligned}
        | {"GRAD_ALIGNED": aligned, "BLOCK": BLOCK},
        num_warps=WARPS,
        num_stages=3,
        max_registers=128,
    )
    for name, grad, copy, aligned in (
        ("gradients in fp32", tl.float32, None, True),
        ("gradients and copies in bf16", tl.bfloat16, tl.bfloat16, True),
        ("gradients in fp16, any address", tl.float16, None, False),
    )
)
