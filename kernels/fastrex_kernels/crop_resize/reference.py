"""The definition: Pillow's crop and antialiased cubic resize, in whole numbers, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ONE = 1 << 22  # a coefficient of 1 in fixed point


def crop_resize_reference(out: Tensor, images: Sequence[Tensor], boxes: Tensor) -> None:
    """Every box of ``boxes`` [N, 4], cut from ``images[n % B]``, into ``out`` [N, S, S, 3]."""
    size = out.shape[1]
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = images[row % len(images)][top : top + height, left : left + width]
        # Whole numbers below 2^53: a matrix product in float64 adds them without rounding, in any order, on any device.
        crop = _pass(_coefficients(width, size).to(crop.device), crop.double())
        crop = _pass(_coefficients(height, size).to(crop.device), crop.flatten(1)).view(size, size, 3)
        out[row] = crop.to(torch.uint8)


def _pass(coefficients: Tensor, values: Tensor) -> Tensor:
    """One direction of the resize; a byte is rounded after each."""
    return torch.matmul(coefficients, values).add_(ONE // 2).div_(ONE).floor_().clamp_(0, 255)


def _coefficients(length: int, size: int) -> Tensor:
    """[size, length] in fixed point. Every step rounds in float64 as it does in Pillow, also the order of the sum."""
    scale = length / size
    support, inverse = 2 * max(scale, 1.0), 1 / max(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5).mul_(scale).unsqueeze(1)
    place = torch.arange(length, dtype=torch.float64)
    inside = (place >= (centre - support + 0.5).trunc_()) & (place < (centre + support + 0.5).trunc_())
    weight = torch.where(inside, _cubic((place - centre + 0.5) * inverse), 0.0)
    weight /= weight.cumsum(1)[:, -1:]  # one tap after another; `sum` would add them as a tree
    return (weight * ONE + torch.where(weight < 0, -0.5, 0.5)).trunc_()


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, Horner's scheme."""
    x = x.abs()
    near = ((1.5 * x - 2.5) * x).mul_(x).add_(1)
    far = (((x - 5) * x).add_(8).mul_(x).sub_(4)).mul_(-0.5)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
