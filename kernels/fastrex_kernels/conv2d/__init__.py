"""A convolution that keeps its weight in float32 and computes in the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .._op import choose, define, in_cpp, raw
from .reference import conv2d_reference


def _channels_last(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake_forward(input: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    height, width = (_output_size(size, weight.shape[2], stride, padding) for size in input.shape[2:])
    return _channels_last(input, input.shape[0], weight.shape[0], height, width)


def _fake_input_grad(grad: Tensor, weight: Tensor, height: int, width: int, stride: int, padding: int) -> Tensor:
    return _channels_last(grad, grad.shape[0], weight.shape[1], height, width)


def _fake_weight_grad(grad: Tensor, input: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    return _channels_last(grad, grad.shape[1], input.shape[1], kernel, kernel, dtype=torch.float32)


def _output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


# All tensors are channels-last and bfloat16, the gradient of the weight float32. ``conv`` is the forward with its
# gradients, which csrc/conv_autograd.cpp makes of the others.
define(
    __name__,
    "conv(Tensor input, Tensor weight, Tensor rounded, int stride, int padding) -> Tensor",
    lambda input, weight, rounded, stride, padding: _fake_forward(input, rounded, stride, padding),
    triton=False,
)
define(
    __name__,
    "conv_forward(Tensor input, Tensor weight, int stride, int padding) -> Tensor",
    _fake_forward,
    triton=False,
)
define(
    __name__,
    "conv_input_grad(Tensor grad, Tensor weight, int height, int width, int stride, int padding) -> Tensor",
    _fake_input_grad,
    triton=False,
)
define(
    __name__,
    "conv_weight_grad(Tensor grad, Tensor input, int kernel, int stride, int padding) -> Tensor",
    _fake_weight_grad,
    triton=False,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    weight_copy: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Convolution with square kernels, one group and no bias, of a weight that stays in float32.

    The same as this PyTorch, but that the weight's gradient need not pass through the input's dtype::

        F.conv2d(input, weight.to(input.dtype), stride=stride, padding=padding)

    Args:
        input: [N, I, H, W] of any floating dtype; the result has its dtype. Autocast changes nothing here.
        weight: [O, I, k, k] of any floating dtype; its gradient has this dtype.
        stride, padding: of both axes; ``padding`` zeros on all four sides.
        weight_copy: ``weight`` already rounded to the input's dtype. Then ``weight`` is not read, it only receives the
            gradient. No gradient flows to the copy.
        impl: "auto", "reference" or "cpp". C++ takes channels-last bfloat16 on CPUs with AVX512-BF16 and without AMX
            and sums the weight's gradient in float32; "auto" leaves anything else to torch's own convolution (oneDNN,
            cuDNN), which is also the reference. C++ is differentiable once.

    Returns:
        [N, O, (H + 2 padding - k) // stride + 1, likewise W] in the input's dtype; channels-last for such an input.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a shape, device, memory format or scalar is wrong.
        RuntimeError: this installation or this CPU has no such implementation.
    """
    _check(input, weight, stride, padding, weight_copy)
    if _choose(impl, input) == "reference":
        return conv2d_reference(input, weight, weight_copy, stride, padding)
    if weight_copy is None:
        weight_copy = weight.detach().to(input.dtype)
    weight_copy = weight_copy.contiguous(memory_format=torch.channels_last)
    output: Tensor = raw(__name__, "conv", "cpp")(input, weight, weight_copy, stride, padding)
    return output


def _check(input: Tensor, weight: Tensor, stride: int, padding: int, weight_copy: Tensor | None) -> None:
    shape, size = weight.shape, input.shape
    if len(size) != 4:
        raise ValueError(f"conv2d: input must be [N, I, H, W], got shape {list(size)}")
    if not input.is_floating_point():
        raise TypeError(f"conv2d: input must be floating point, got {input.dtype}; cast it first")
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"conv2d: weight must be [O, I, k, k] with a square kernel, got shape {list(shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"conv2d: weight must be floating point, got {weight.dtype}")
    if shape[1] != size[1]:
        raise ValueError(f"conv2d: weight must have input's {size[1]} channels (one group), got shape {list(shape)}")
    if weight.device != input.device:
        raise ValueError(f"conv2d: weight must be on {input.device} like input, got {weight.device}")
    if weight_copy is not None:
        if weight_copy.shape != shape:
            raise ValueError(
                f"conv2d: weight_copy must have weight's shape {list(shape)}, got {list(weight_copy.shape)}"
            )
        if weight_copy.dtype != input.dtype:
            raise TypeError(f"conv2d: weight_copy must have input's dtype {input.dtype}, got {weight_copy.dtype}")
        if weight_copy.device != input.device:
            raise ValueError(f"conv2d: weight_copy must be on {input.device} like input, got {weight_copy.device}")
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"conv2d: stride must be an integer of at least 1, got {stride!r}")
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(f"conv2d: padding must be an integer of at least 0, got {padding!r}")
    if min(size[2], size[3]) + 2 * padding < shape[2]:
        raise ValueError(
            f"conv2d: input must with its padding be at least as large as the kernel of {shape[2]}, "
            f"got {size[2]} x {size[3]} and padding {padding}"
        )


def _choose(impl: str, input: Tensor) -> str:
    """The implementation for ``input``: C++ needs its instructions, and channels side by side."""
    chosen = choose("conv2d", impl, input, kernels=("cpp",), dtypes=(torch.bfloat16,))
    if chosen == "reference":
        return chosen
    if not in_cpp("conv"):
        if impl == "auto":
            return "reference"
        raise RuntimeError(
            "conv2d: impl='cpp' needs a CPU with AVX512-BF16 and without AMX, got one without; use impl='reference'"
        )
    if input.is_contiguous(memory_format=torch.channels_last):
        return chosen
    if impl == "auto":
        return "reference"
    raise ValueError(
        f"conv2d: input must be channels-last for impl='cpp', got strides {list(input.stride())}; "
        f"use input.contiguous(memory_format=torch.channels_last) or impl='reference'"
    )
