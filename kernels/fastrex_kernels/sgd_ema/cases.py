"""Sizes at which the optimiser step is tested and measured, and its rival in eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._op import Call, Case, Cost, Op
from . import sgd_ema_


def resnet50() -> tuple[tuple[int, ...], ...]:
    """The shapes of ResNet50's 161 parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if not block:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return (*shapes, (1000, 2048), (1000,))


def eager(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    ema_params: Sequence[Tensor | None],
    *,
    lr: Tensor,
    momentum: float | Tensor,
    weight_decay: Sequence[float],
    ema_momentum: float | Tensor = 0.999,
    inv_scale: Tensor | None = None,
    skip: Tensor | None = None,
    param_copies: Sequence[Tensor | None] | None = None,
    ema_copies: Sequence[Tensor | None] | None = None,
) -> None:
    """What ``torch.optim.SGD(fused=True).step()`` calls, one group per weight decay, then one lerp of the EMA."""
    if skip is not None and bool(skip):
        return
    if inv_scale is not None:
        grads = torch._foreach_mul([grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)], inv_scale)
    for decay in dict.fromkeys(weight_decay):
        chosen = [index for index, value in enumerate(weight_decay) if value == decay]
        torch._fused_sgd_(
            [params[i] for i in chosen],
            [grads[i].to(params[i].dtype) for i in chosen],
            [momentum_buffers[i] for i in chosen],
            weight_decay=decay,
            momentum=float(momentum),
            lr=float(lr),
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
    pairs = [(ema, param) for ema, param in zip(ema_params, params, strict=True) if ema is not None]
    if pairs:
        torch._foreach_lerp_([ema for ema, _ in pairs], [param for _, param in pairs], 1 - float(ema_momentum))
    for copies, sources in ((param_copies, params), (ema_copies, ema_params)):
        both = [(c, s) for c, s in zip(copies or (), sources, strict=False) if c is not None and s is not None]
        if both:
            torch._foreach_copy_([copy for copy, _ in both], [source for _, source in both])


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """Parameters and what belongs to them; ``dtype`` is that of the gradients and copies, all else is float32.

    ``sizes``: shapes; ``copies``, ``channels_last``, ``mixed`` (every tensor of a parameter in another layout),
    ``no_ema`` (every second parameter has none), ``scaled`` (by 1024), ``tensors`` (every scalar on the device),
    ``skip``, ``momentum``, ``ema_momentum``.
    """
    g = torch.Generator().manual_seed(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    low = torch.bfloat16 if dtype == torch.float32 else dtype

    def draw(scale: float, kind: torch.dtype, twist: bool) -> list[Tensor]:
        drawn = []
        for shape in sizes["shapes"]:
            x = (torch.randn(shape, generator=g) * scale).to(device, kind)
            if x.ndim == 4 and bool(sizes.get("channels_last")) != twist:
                x = x.contiguous(memory_format=torch.channels_last)
            if twist and x.ndim == 2:
                x = x.T.contiguous().T
            drawn.append(x)
        return drawn

    twist = bool(sizes.get("mixed"))
    scale = 1024.0 if sizes.get("scaled") else 1.0
    params = draw(1, state, False)
    ema: list[Tensor | None] = [*draw(1, state, False)]
    if sizes.get("no_ema"):
        ema[1::2] = [None] * len(ema[1::2])
    tensors: dict[str, Any] = {
        "params": params,
        "grads": draw(0.1 * scale, dtype, twist),
        "momentum_buffers": draw(0.1, state, twist),
        "ema_params": ema,
        "lr": torch.tensor(0.1, device=device),
    }
    options: dict[str, Any] = {
        "weight_decay": [1e-4 if param.ndim > 1 else 0.0 for param in params],
        "momentum": sizes.get("momentum", 0.9),
        "ema_momentum": sizes.get("ema_momentum", 0.99),
    }
    writes = ["params", "momentum_buffers", "ema_params"]
    if sizes.get("scaled"):
        tensors["inv_scale"] = torch.tensor(1 / scale, device=device)
    if "skip" in sizes:
        tensors["skip"] = torch.tensor(sizes["skip"], device=device)
    if sizes.get("tensors"):
        for name in ("momentum", "ema_momentum"):
            tensors[name] = torch.tensor(options.pop(name), device=device)
    if sizes.get("copies"):
        tensors["param_copies"] = draw(1, low, twist)
        tensors["ema_copies"] = [None if e is None else c for e, c in zip(ema, draw(1, low, twist), strict=True)]
        writes += ["param_copies", "ema_copies"]
    return Call(tensors, options, writes=writes)


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """Parameter, buffer and EMA are read and written, the gradient is read, copies are written."""
    values = sum(torch.Size(shape).numel() for shape in sizes["shapes"])
    low = 2 if dtype == torch.float32 else dtype.itemsize
    return Cost(values * (6 * 4 + dtype.itemsize + (2 * low if sizes.get("copies") else 0)), 9 * values)


SMALL = ((5, 3), (3,), (2, 3, 3, 3), (1,), (0,), (), (70, 33))

CASES = (
    Case("small", "a scalar, an empty tensor, odd sizes", {"shapes": SMALL}),
    Case("copies", "rounded copies of both", {"shapes": SMALL, "copies": True}),
    Case("no ema", "parameters without an EMA", {"shapes": SMALL, "no_ema": True, "copies": True}),
    Case("channels last", "dense tensors that are not contiguous",
         {"shapes": ((8, 6, 3, 3), (16, 8, 1, 1), (4, 3, 5, 5)), "channels_last": True, "copies": True}),
    Case("mixed layouts", "the tensors of one parameter differ in their strides",
         {"shapes": ((8, 6, 3, 3), (5, 7), (9,)), "mixed": True, "copies": True}),
    Case("scaled", "loss scaling, every scalar a tensor", {"shapes": SMALL, "scaled": True, "tensors": True}),
    Case("skipped", "nothing changes", {"shapes": SMALL, "copies": True, "skip": True}),
    Case("found no inf", "skip as torch.amp's number", {"shapes": SMALL, "skip": 0.0}),
    Case("found inf", "skip as torch.amp's number", {"shapes": SMALL, "skip": 1.0}),
    Case("ema is the parameter", "an EMA momentum of 0", {"shapes": SMALL, "ema_momentum": 0.0}),
    Case("blocks", "longer than one block of the rounding and one program",
         {"shapes": ((3, 2500),), "copies": True}),
    Case("resnet50", "the encoder's parameters", {"shapes": resnet50(), "channels_last": True}, bench=True),
    Case("resnet50 with copies", "bfloat16 copies of weights and EMA",
         {"shapes": resnet50(), "channels_last": True, "copies": True}, bench=True),
)  # fmt: skip

OP = Op(name="sgd_ema_", function=sgd_ema_, eager=eager, make=make, cases=CASES, cost=cost)
