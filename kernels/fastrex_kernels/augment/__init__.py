"""Photometric augmentation of cut crops (t-ReX, Sariyildiz et al., ICLR 2023): uint8 in, normalised floats out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._op import choose, define, raw, readable
from .reference import augment_reference

# Columns of the parameters. The planner of a data pipeline may not import torch, so it repeats these numbers.
FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SOLARIZE = range(9)
NUM_PARAMS = 9
OFF = (0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 256.0)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Name, least and largest value of each column, checked on the CPU; the C++ operator repeats them.
_COLUMNS = (
    ("FLIP", 0, 1),
    ("ORDER", 0, 23),
    ("BRIGHTNESS", 0, float("inf")),
    ("CONTRAST", 0, float("inf")),
    ("SATURATION", 0, float("inf")),
    ("HUE", -0.5, 0.5),
    ("GRAY", 0, 1),
    ("BLUR", 0, 16),
    ("SOLARIZE", 0, 256),
)
_LOW = torch.tensor([low for _, low, _ in _COLUMNS], dtype=torch.float64)
# An infinite factor is not in range.
_HIGH = torch.tensor([high for *_, high in _COLUMNS], dtype=torch.float64).clamp(max=torch.finfo(torch.float32).max)


def _fake(out: Tensor, images: Tensor, params: Tensor, mean: list[float], std: list[float]) -> None:
    return None


define(__name__, "augment_(Tensor(a!) out, Tensor images, Tensor params, float[] mean, float[] std) -> ()", _fake)


def augment(
    images: Tensor,
    params: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels: int = 3,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Flip, colour jitter, greyscale, blur, solarisation and normalisation, each row with its own draws.

    The ops are Pillow's and torchvision's, in float, clamped to [0, 255] after each but never rounded. In this order:
    horizontal flip; the four jitters in the row's own order (with grey = .299 R + .587 G + .114 B: brightness ``f x``,
    contrast ``f x + (1 - f) floor(mean(grey) + 1/2)``, saturation ``f x + (1 - f) grey``, hue a rotation in HSV);
    greyscale; Gaussian blur as three extended box blurs (Gwosdek et al. 2011); solarisation (``v >= t -> 255 - v``);
    ``(v / 255 - mean) / std``. A row depends on itself alone: neither the other rows nor the number of threads change
    a bit of it.

    Args:
        images: uint8 [N, H, W, 3], RGB. Rows may lie apart; any other layout costs a copy.
        params: float32 [N, 9] (float64 where the output is), on the images' device or on the CPU. Columns: FLIP 0 or 1;
            ORDER 0..23, an index into ``tuple(itertools.permutations(range(4)))`` of the ops 0 brightness, 1 contrast,
            2 saturation, 3 hue; the factors BRIGHTNESS, CONTRAST, SATURATION (1 = off); HUE in turns, [-0.5, 0.5]
            (0 = off); GRAY 0 or 1; BLUR standard deviation in pixels, at most 16 (0 = off); SOLARIZE threshold, 0..256
            (256 = off). ``OFF`` is the row that changes nothing. On the CPU a value out of range raises.
        mean, std: per colour, in units of [0, 1].
        dtype: of the output; float64 also computes in float64, all others in float32.
        channels: 3, or 1: the images become grey after the flip, SATURATION, HUE and GRAY are ignored, and the
            averages of ``mean`` and ``std`` normalise them.
        out: [N, channels, H, W], written and returned; each row in channels-last memory, rows may lie apart. Its dtype
            counts, not ``dtype``.
        impl: "auto", "reference", "cpp" or "triton".

    Returns:
        [N, channels, H, W] in channels-last memory format. No gradient flows.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    _check(images, params, mean, std)
    if channels != 3 and channels != 1:
        raise ValueError(f"augment: channels must be 3 or 1, got {channels}")
    count, height, width, _ = images.shape
    if out is None:
        if dtype not in DTYPES:
            raise TypeError(f"augment: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        out = torch.empty((count, height, width, channels), dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    else:
        _check_out(out, (count, channels, height, width), images.device)
    if params.dtype != torch.float32 and not params.dtype == out.dtype == torch.float64:
        raise TypeError(f"augment: params must be float32, got {params.dtype}")
    impl = choose("augment", impl, out)
    if impl != "cpp" and readable(params):  # the C++ operator checks for itself, at no cost
        _check_values(params)
    with torch.no_grad():
        if impl == "reference":
            augment_reference(out, images, params, mean, std)
            return out
        if not _rows_are_contiguous(images.shape, images.stride()):
            images = images.contiguous()
        params = params.to(images.device, non_blocking=True).contiguous()
        raw(__name__, "augment_", impl)(out, images, params, mean, std)
    return out


def _check(images: Tensor, params: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
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
    if params.device.type != "cpu" and params.device != images.device:
        raise ValueError(f"augment: params must be on {images.device} or the CPU, got {params.device}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"augment: mean and std must have 3 values, got {len(mean)} and {len(std)}")
    if not min(std) > 0:
        raise ValueError(f"augment: std must be positive, got {tuple(std)}")


def _check_out(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if out.shape != shape:
        raise ValueError(f"augment: out must be {list(shape)}, got {tuple(out.shape)}")
    if out.dtype not in DTYPES:
        raise TypeError(f"augment: out must be one of {', '.join(map(str, DTYPES))}, got {out.dtype}")
    if out.device != device:
        raise ValueError(f"augment: out must be on {device} like images, got {out.device}")
    (count, channels, height, width), (row, *rest) = shape, out.stride()
    inner = _rows_are_contiguous((count, height, width, channels), (row, rest[1], rest[2], rest[0]))
    if not inner or (count > 1 and row < channels * height * width):
        raise ValueError(
            f"augment: the rows of out must be channels-last and apart, got strides {out.stride()};"
            " allocate it with memory_format=torch.channels_last"
        )


def _rows_are_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether each row of the first axis is one stretch of memory; the stride of an axis of length 1 says nothing."""
    expected = 1
    for axis in (3, 2, 1):
        if shape[axis] != 1 and stride[axis] != expected:
            return False
        expected *= shape[axis]
    return True


def _check_values(params: Tensor) -> None:
    good = (params >= _LOW.to(params.device)) & (params <= _HIGH.to(params.device))
    if bool(good.all()):
        return
    row, column = (int(i) for i in torch.nonzero(~good)[0])
    name, low, high = _COLUMNS[column]
    got = f"got {float(params[row, column])} in row {row}"
    raise ValueError(f"augment: params column {name} must be in [{low}, {high}], {got}")
