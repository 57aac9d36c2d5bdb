"""Photometric augmentation of cut crops (t-ReX, Sariyildiz et al., ICLR 2023): uint8 in, normalised floats out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._op import choose
from .reference import augment_reference

# Columns of the parameters. The planner of a data pipeline may not import torch, so it repeats these numbers.
FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SOLARIZE = range(9)
NUM_PARAMS = 9
OFF = (0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 256.0)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def augment(
    images: Tensor,
    params: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Flip, colour jitter, greyscale, blur, solarisation and normalisation, each row with its own draws.

    The ops are Pillow's and torchvision's, in float, clamped to [0, 255] after each but never rounded. In this order:
    horizontal flip; the four jitters in the row's own order (with grey = .299 R + .587 G + .114 B: brightness ``f x``,
    contrast ``f x + (1 - f) floor(mean(grey) + 1/2)``, saturation ``f x + (1 - f) grey``, hue a rotation in HSV);
    greyscale; Gaussian blur as three extended box blurs (Gwosdek et al. 2011); solarisation (``v >= t -> 255 - v``);
    ``(v / 255 - mean) / std``.

    Args:
        images: uint8 [N, H, W, 3], RGB.
        params: float32 [N, 9], on the images' device or on the CPU, where choosing the rows of an op needs no sync.
            Columns: FLIP 0 or 1; ORDER 0..23, an index into ``tuple(itertools.permutations(range(4)))`` of the ops
            0 brightness, 1 contrast, 2 saturation, 3 hue; the factors BRIGHTNESS, CONTRAST, SATURATION (1 = off);
            HUE in turns, [-0.5, 0.5] (0 = off); GRAY 0 or 1; BLUR standard deviation in pixels, at most 16 (0 = off);
            SOLARIZE threshold, 0..256 (256 = off). ``OFF`` is the row that changes nothing. On the CPU a value out of
            range raises.
        mean, std: per channel, in units of [0, 1].
        dtype: of the output; float64 also computes in float64, all others in float32.
        impl: "auto" or "reference".

    Returns:
        [N, 3, H, W] in channels-last memory format. No gradient flows.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    _check(images, params, mean, std, dtype)
    choose("augment", impl, images, kernels=())
    return augment_reference(images, params, tuple(mean), tuple(std), dtype)


def _check(images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"augment: images must be [N, H, W, 3], got {tuple(images.shape)}; permute channels to the end"
        )
    if images.dtype != torch.uint8:
        raise TypeError(f"augment: images must be uint8, got {images.dtype}")
    if 0 in images.shape[1:]:
        raise ValueError(f"augment: images must have at least one pixel, got {tuple(images.shape)}")
    if params.shape != (images.shape[0], NUM_PARAMS):
        raise ValueError(f"augment: params must be [{images.shape[0]}, {NUM_PARAMS}], got {tuple(params.shape)}")
    if params.dtype != torch.float32:
        raise TypeError(f"augment: params must be float32, got {params.dtype}")
    if params.device not in (images.device, torch.device("cpu")):
        raise ValueError(f"augment: params must be on {images.device} or the CPU, got {params.device}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"augment: mean and std must have 3 values, got {len(mean)} and {len(std)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"augment: std must be positive, got {tuple(std)}")
    if dtype not in DTYPES:
        raise TypeError(f"augment: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if params.device.type == "cpu":
        _check_values(params)


def _check_values(params: Tensor) -> None:
    bounds = (
        ("FLIP", FLIP, 0, 1),
        ("ORDER", ORDER, 0, 23),
        ("BRIGHTNESS", BRIGHTNESS, 0, float("inf")),
        ("CONTRAST", CONTRAST, 0, float("inf")),
        ("SATURATION", SATURATION, 0, float("inf")),
        ("HUE", HUE, -0.5, 0.5),
        ("GRAY", GRAY, 0, 1),
        ("BLUR", BLUR, 0, 16),
        ("SOLARIZE", SOLARIZE, 0, 256),
    )
    low = torch.tensor([low for *_, low, _ in bounds], dtype=params.dtype)
    high = torch.tensor([high for *_, high in bounds], dtype=params.dtype)
    good = (params >= low) & (params <= high) & torch.isfinite(params)
    if not bool(good.all()):
        row, column = (int(i) for i in torch.nonzero(~good)[0])
        name, _, at_least, at_most = bounds[column]
        got = f"got {float(params[row, column])} in row {row}"
        raise ValueError(f"augment: params column {name} must be in [{at_least}, {at_most}], {got}")
