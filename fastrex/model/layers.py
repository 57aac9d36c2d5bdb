"""Convolution and linear layer with low-precision copies of their weights, and the pool at an encoder's end.

Under autocast, PyTorch casts every weight in every step. Here the optimiser keeps a rounded copy of each weight beside
its fp32 master: the layers compute with the copy, and the gradient goes to the master.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastrex_kernels import conv2d


def padded_channels(channels: int, device: str) -> int:
    """How many input channels a convolution of images computes with, on a device type.

    On a GPU a pixel of 3 (or 1) channels is no unit that tensor cores can load; the fourth is zero.
    """
    return 4 if device == "cuda" and channels < 4 else channels


class _Copied(nn.Module):
    """Copies are the training step's, not the layer's state: they do not outlive a move, a cast or a copy of it."""

    weight_copy: Tensor | None = None
    bias_copy: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "weight_copy": None, "bias_copy": None}  # type: ignore[no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.weight_copy = self.bias_copy = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class Conv2d(_Copied, nn.Conv2d):
    """The convolutions of the encoders: a square kernel, as much padding as keeps the size, no bias.

    ``weight_copy`` is None or the weight in a lower precision.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        copy = self.weight_copy
        if copy is None or not _autocasts(input, copy.dtype):
            return super().forward(input)
        input = input.to(copy.dtype)
        weight: Tensor = self.weight
        extra = padded_channels(self.in_channels, input.device.type) - self.in_channels
        if extra:
            # The copy too, in every pass: it is small, and the optimiser writes it where its master's layout is.
            input, copy = (F.pad(tensor, (0, 0, 0, 0, 0, extra)) for tensor in (input, copy))
        stride, padding = self.stride[0], self.kernel_size[0] // 2
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return conv2d(input, copy, stride=stride, padding=padding)
        if extra:
            weight = _Wider.apply(weight, extra)  # type: ignore[no-untyped-call]
        return conv2d(input, weight, stride=stride, padding=padding, weight_copy=copy)


class Linear(_Copied, nn.Linear):
    """``nn.Linear``; ``weight_copy`` and ``bias_copy`` are None or the parameters in a lower precision."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight_copy, self.bias_copy
        if weight is None or input.dim() != 2 or not _autocasts(input, weight.dtype):
            return super().forward(input)
        input = input.to(weight.dtype)
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters.values() if p is not None)):
            return F.linear(input, weight, bias)
        out: Tensor = _Linear.apply(input, self.weight, self.bias, weight, bias)  # type: ignore[no-untyped-call]
        return out


def global_average(x: Tensor) -> Tensor:
    """Means [B, C] of images [B, C, H, W], whose gradient is channels-last (PyTorch's own divides in another layout,
    which then has to be transposed)."""
    out: Tensor = _GlobalAverage.apply(x)  # type: ignore[no-untyped-call]
    return out


def attach_copies(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give every layer of ours below ``module`` copies of its parameters in ``dtype``.

    Returns:
        The copies by the parameters' names in ``module.named_parameters()``, of the parameters' shapes and strides.
        Whoever changes a parameter must write its copy as well, or call :func:`refresh_copies`. fp32 takes the copies
        away.
    """
    copies: dict[str, Tensor] = {}
    for prefix, layer in module.named_modules():
        if not isinstance(layer, Conv2d | Linear):
            continue
        layer.weight_copy = layer.bias_copy = None
        if dtype == torch.float32:
            continue
        layer.weight_copy = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False)
        if layer.bias is not None:
            layer.bias_copy = torch.empty_like(layer.bias, dtype=dtype, requires_grad=False)
        _refresh(layer)
        for name, copy in _copies(layer).items():
            copies[f"{prefix}.{name}".removeprefix(".")] = copy
    return copies


def refresh_copies(module: nn.Module) -> None:
    """Round the parameters into their copies again, after they were loaded or changed by hand."""
    for layer in module.modules():
        if isinstance(layer, Conv2d | Linear):
            _refresh(layer)


def _copies(layer: Conv2d | Linear) -> dict[str, Tensor]:
    found = {"weight": layer.weight_copy, "bias": layer.bias_copy}
    return {name: copy for name, copy in found.items() if copy is not None}


@torch.no_grad()
def _refresh(layer: Conv2d | Linear) -> None:
    for name, copy in _copies(layer).items():
        copy.copy_(getattr(layer, name))


def _autocasts(input: Tensor, dtype: torch.dtype) -> bool:
    device = input.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == dtype


# These save in the forward: PyTorch binds the arguments of a function with setup_context by name, in 25 us per call.
class _GlobalAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        pixels = (grad / (ctx.shape[2] * ctx.shape[3]))[:, :, None, None].expand(ctx.shape)
        dense: Tensor = pixels.contiguous(memory_format=torch.channels_last)
        return dense


class _Wider(torch.autograd.Function):
    """A stand-in of a weight [O, I, k, k] with more input channels. It is never read, only its gradient counts."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, extra: int) -> Tensor:
        outputs, ctx.channels, *kernel = weight.shape
        return weight.new_empty((outputs, ctx.channels + extra, *kernel))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, : ctx.channels].contiguous(memory_format=torch.channels_last), None


class _Linear(torch.autograd.Function):
    """Rows times the copy of a weight; gradients in the dtype of the master."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, weight_copy: Tensor, bias_copy: Tensor | None
    ) -> Tensor:
        ctx.dtype = weight.dtype
        ctx.save_for_backward(input, weight_copy)
        return F.linear(input, weight_copy, bias_copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        dinput = grad @ weight if ctx.needs_input_grad[0] else None
        dweight = (grad.t() @ input).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        dbias = grad.sum(0).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return dinput, dweight, dbias, None, None
