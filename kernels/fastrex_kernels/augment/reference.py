"""Photometric augmentation in eager PyTorch: the definition of the op.

Works on planar [C, n, H, W] pieces: channels and rows are then contiguous slices. Brightness, contrast and saturation
are all ``a x + s grey + d`` with scalars per row, so they go together, whatever their order; hue is not, so rows are
sorted by where it stands in their order, and it takes one contiguous slice per position. A row depends on itself alone,
to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_FLIP, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SOLARIZE = range(9)
_ORDERS = torch.tensor(tuple(itertools.permutations(range(4))))
_LUMA = (0.299, 0.587, 0.114)
_PIXELS = 1 << 18  # of a piece: keeps memory small, is large enough to hide the cost of a call


def augment_reference(out: Tensor, images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """See :func:`fastrex_kernels.augment.augment`; on a GPU, parameters that lie there cost a sync."""
    channels, (_, height, width, _) = out.shape[1], images.shape
    work = torch.float64 if out.dtype == torch.float64 else torch.float32
    table = params.detach().to("cpu", work)
    if channels == 1:
        table = table.clone()
        table[:, _SATURATION], table[:, _HUE], table[:, _GRAY] = 1, 0, 0
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    # Where hue stands in each row's order: 0 to 3, or 4 for rows that only blend, or 5 for rows without any jitter.
    orders = _ORDERS[table[:, _ORDER].long()]
    place = (orders == 3).int().argmax(dim=1)
    still = table[:, _HUE] == 0
    place[still] = 4
    place[still & (table[:, _BRIGHTNESS : _SATURATION + 1] == 1).all(dim=1)] = 5
    target = out.permute(0, 2, 3, 1)
    for rows in torch.split(place.argsort(stable=True), max(1, _PIXELS // (height * width))):
        x = _load(images, rows, table[rows, _FLIP], work)
        if channels == 1:
            x = _gray(x)[None]
        _jitter(x, table[rows], orders[rows], place[rows])
        _grayscale(x, table[rows, _GRAY])
        _blur(x, table[rows, _BLUR])
        _solarize(x, table[rows, _SOLARIZE])
        for plane, middle, spread in zip(x, mean, std, strict=True):
            plane.div_(255).sub_(middle).div_(spread)
        target.index_copy_(0, rows.to(out.device), x.permute(1, 2, 3, 0).to(out.dtype))


def _load(images: Tensor, rows: Tensor, flip: Tensor, dtype: torch.dtype) -> Tensor:
    piece = images[rows.to(images.device)]
    flipped = flip.nonzero().flatten().to(images.device)
    if len(flipped):
        piece[flipped] = piece[flipped].flip(2)
    return piece.permute(3, 0, 1, 2).to(dtype, memory_format=torch.contiguous_format)


def _column(values: Tensor, x: Tensor) -> Tensor:
    """One scalar per row, shaped to meet a [n, H, W] plane."""
    return values.to(x.device, x.dtype).view(-1, 1, 1)


def _gray(x: Tensor) -> Tensor:
    """ITU-R 601-2 luma of [3, n, H, W], as Pillow's mode L, not rounded; what is grey already is copied."""
    if len(x) == 1:
        return x[0].clone()
    return (x[0] * _LUMA[0]).add_(x[1], alpha=_LUMA[1]).add_(x[2], alpha=_LUMA[2])


def _jitter(x: Tensor, table: Tensor, orders: Tensor, place: Tensor) -> None:
    ends = torch.bincount(place, minlength=6).cumsum(0).tolist()
    for position in range(4):
        start, end = (ends[position - 1] if position else 0), ends[position]
        # The jittered rows before and after those that turn their hue now.
        for part in (slice(0, start), slice(end, ends[4])):
            _blend(x[:, part], table[part], orders[part, position])
        _rotate_hue(x[:, start:end], table[start:end, _HUE])


def _blend(x: Tensor, table: Tensor, op: Tensor) -> None:
    """Brightness, contrast or saturation, as ``op`` names per row: blends with 0, with the mean grey, with the grey."""
    if x.shape[1] == 0:
        return
    factor = table.gather(1, op.view(-1, 1) + _BRIGHTNESS).flatten().masked_fill(op == 3, 1)
    contrast, saturation = (op == 1) & (factor != 1), (op == 2) & (factor != 1)
    if bool((factor == 1).all()):
        return
    scale = _column(factor, x)
    if not bool((contrast | saturation).any()):
        x.mul_(scale).clamp_(0, 255)
        return
    gray = _gray(x)
    # A mean along W, then along H: the sum of a row never depends on how many rows there are.
    level = gray.mean(dim=2, keepdim=True).mean(dim=1, keepdim=True).add_(0.5).floor_()
    gray.mul_(_column((1 - factor) * saturation, x)).add_(level.mul_(_column((1 - factor) * contrast, x)))
    for plane in x:
        plane.mul_(scale).add_(gray).clamp_(0, 255)


def _rotate_hue(x: Tensor, turns: Tensor) -> None:
    """Rotate the hue of HSV; value and chroma stay, so a channel is ``min + chroma * trapezium(hue)``."""
    if not len(turns):
        return
    red, green, blue = x
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    inverse = chroma.clamp(min=1e-6).reciprocal_()  # where chroma is 0 the hue does not matter
    hue = (red - green).mul_(inverse).add_(4)
    hue = torch.where(high == green, (blue - red).mul_(inverse).add_(2), hue)
    hue = torch.where(high == red, (green - blue).mul_(inverse), hue)
    hue.add_(_column(turns * 6, x))
    hue.sub_(hue.div(6).floor_().mul_(6))  # to [0, 6)
    for plane, centre in zip(x, (3, 2, 4), strict=True):
        distance = (hue - centre).abs_()
        ramp = distance.sub_(1) if centre == 3 else distance.neg_().add_(2)
        torch.addcmul(low, ramp.clamp_(0, 1), chroma, out=plane)
    x.clamp_(0, 255)


def _grayscale(x: Tensor, flag: Tensor) -> None:
    rows = flag.nonzero().flatten().to(x.device)
    if len(rows):
        gray = _gray(x.index_select(1, rows))
        for plane in x:
            plane.index_copy_(0, rows, gray)


def _blur(x: Tensor, radius: Tensor) -> None:
    """Pillow's GaussianBlur: three extended box blurs (Gwosdek et al. 2011), as one kernel; edge pixels repeat.

    Pillow repeats the edge anew before each box, so the rims differ a little: about 1 level at radius 2.
    """
    variance = radius.double().square() / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor().long()
    for full in sorted(set(whole[radius > 0].tolist())):
        rows = ((whole == full) & (radius > 0)).nonzero().flatten()
        taps = _blur_taps(variance[rows], full).to(x.device, x.dtype).view(len(rows), -1, 1, 1)
        rows = rows.to(x.device)
        part = x.index_select(1, rows)
        for _ in range(2):
            # Along H, where a shifted piece is contiguous; transposed before each pass: first along W, then along H.
            part = _convolve(part.transpose(2, 3), taps)
        x.index_copy_(1, rows, part.clamp_(0, 255))


def _convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Convolve [C, n, H, W] along H with the symmetric ``taps`` [n, T, 1, 1]."""
    height, reach = x.shape[2], taps.shape[1] // 2
    padded = pad(x, (0, 0, reach, reach), mode="replicate")
    out = padded[:, :, reach : reach + height] * taps[:, reach]
    pair = torch.empty_like(out)
    for i in range(reach):
        torch.add(padded[:, :, i : i + height], padded[:, :, 2 * reach - i : 2 * reach - i + height], out=pair)
        out.addcmul_(pair, taps[:, i])
    return out


def _blur_taps(variance: Tensor, full: int) -> Tensor:
    """Kernels [n, 6 full + 7] of three boxes of ``variance`` [n]: weight 1 up to distance ``full``, less beyond."""
    rim = (2 * full + 1) * (full * (full + 1) - 3 * variance) / (6 * (variance - (full + 1) ** 2))
    box = torch.ones(len(variance), 2 * full + 3, dtype=torch.float64)
    box[:, 0] = box[:, -1] = rim
    box /= box.sum(dim=1, keepdim=True)
    kernel = box
    for _ in range(2):
        wide = torch.zeros(len(box), kernel.shape[1] + 2 * full + 2, dtype=torch.float64)
        for i, weight in enumerate(box.unbind(1)):
            wide[:, i : i + kernel.shape[1]] += weight[:, None] * kernel
        kernel = wide
    return kernel


def _solarize(x: Tensor, threshold: Tensor) -> None:
    rows = (threshold < 256).nonzero().flatten()
    if not len(rows):
        return
    level = _column(threshold[rows], x)
    rows = rows.to(x.device)
    part = x.index_select(1, rows)
    x.index_copy_(1, rows, torch.where(part >= level, 255 - part, part))
