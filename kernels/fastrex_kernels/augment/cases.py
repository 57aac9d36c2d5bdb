"""Sizes and draws at which the augmentation is tested and measured, and its rival in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._op import Call, Case, Cost, Op
from . import BLUR, BRIGHTNESS, CONTRAST, FLIP, GRAY, HUE, OFF, ORDER, SATURATION, SOLARIZE, augment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLUMNS = {
    "flip": FLIP,
    "order": ORDER,
    "brightness": BRIGHTNESS,
    "contrast": CONTRAST,
    "saturation": SATURATION,
    "hue": HUE,
    "gray": GRAY,
    "blur": BLUR,
    "solarize": SOLARIZE,
}


def eager(
    images: Tensor,
    params: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels: int = 3,
) -> Tensor:
    """The definition itself: sorted, batched eager PyTorch, which rounds once, at the end. Users' own code calls one
    function per image and operation, and rounds to uint8 after each."""
    return augment(images, params, mean=mean, std=std, dtype=dtype, channels=channels, impl="reference")


def recipe(count: int, g: torch.Generator, blur: float, solarize: float) -> Tensor:
    """Draws as t-ReX has them; ``blur`` and ``solarize`` are the probabilities, which differ between crop sizes."""
    uniform = torch.rand(12, count, generator=g)
    params = torch.tensor(OFF).repeat(count, 1)
    params[:, FLIP] = (uniform[0] < 0.5).float()
    params[:, ORDER] = (uniform[1] * 24).floor()
    jitter = uniform[2] < 0.8
    for row, column, strength in ((3, BRIGHTNESS, 0.4), (4, CONTRAST, 0.4), (5, SATURATION, 0.2)):
        params[:, column] = torch.where(jitter, 1 + strength * (2 * uniform[row] - 1), 1)
    params[:, HUE] = torch.where(jitter, 0.1 * (2 * uniform[6] - 1), 0)
    params[:, GRAY] = (uniform[7] < 0.2).float()
    params[:, BLUR] = torch.where(uniform[8] < blur, 0.1 + 1.9 * uniform[9], 0)
    params[:, SOLARIZE] = torch.where(uniform[10] < solarize, 128, 256)
    return params


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """Crops and draws; ``dtype`` is the output's.

    ``sizes``: rows, height, width; channels (3); ``recipe`` (probabilities of blur and solarisation); columns by name
    with one value, or with several that the rows take in turn; ``flat`` (each row has one colour); ``apart`` (rows do
    not follow one another), ``transposed`` (nor do pixels).
    """
    g = torch.Generator().manual_seed(seed)
    rows, height, width = sizes["rows"], sizes["height"], sizes["width"]
    step = 2 if sizes.get("apart") else 1
    fine = (1, 1) if sizes.get("flat") else (height, width)
    images = torch.randint(256, (rows * step, *fine, 3), generator=g, dtype=torch.uint8)
    images = images.expand(-1, height, width, -1).contiguous()[::step]
    if sizes.get("transposed"):
        images = images.transpose(1, 2).contiguous().transpose(1, 2)
    params = recipe(rows, g, *sizes["recipe"]) if "recipe" in sizes else torch.tensor(OFF).repeat(rows, 1)
    for name, column in COLUMNS.items():
        if name in sizes:
            values = torch.tensor(sizes[name], dtype=torch.float32).reshape(-1)
            params[:, column] = values.repeat(rows)[:rows]
    options = {"mean": MEAN, "std": STD, "dtype": dtype, "channels": sizes.get("channels", 3)}
    return Call({"images": images.to(device), "params": params.to(device)}, options)


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """The bytes read and the output written, each once; about 100 operations for a pixel with the recipe's draws."""
    pixels = math.prod(sizes[name] for name in ("rows", "height", "width"))
    channels = sizes.get("channels", 3)
    return Cost(pixels * (3 + channels * dtype.itemsize) + sizes["rows"] * 36, 100 * pixels)


JITTER = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.07}
ALL = {"order": tuple(range(24)), **JITTER}
SOME = {"order": tuple(range(0, 24, 4)), **JITTER}
ODD = {"height": 13, "width": 37}

# Two steps jump: the level of the contrast is a whole number, and solarisation inverts from its threshold on. The draws
# leave the mean grey and, where a step before computes, all pixels away from these places.
CASES = (
    Case("recipe", "all ops with the draws of a training, every vector width has a rest",
         {"rows": 24, "height": 19, "width": 29, "recipe": (0.5, 0.2)}),
    Case("off", "nothing but the normalisation", {"rows": 3, **ODD}),
    Case("flip", "alone, with a rest of each line", {"rows": 3, **ODD, "flip": (1, 0)}),
    Case("brightness", "alone; black, darker, brighter, saturated", {"rows": 4, **ODD, "brightness": (0, 0.6, 1.4, 9)}),
    Case("contrast", "alone; grey, weaker, stronger, extreme", {"rows": 4, **ODD, "contrast": (0, 0.6, 1.4, 9)}),
    Case("saturation", "alone; grey, weaker, stronger, extreme", {"rows": 4, **ODD, "saturation": (0, 0.8, 1.4, 9)}),
    Case("hue", "alone, half a turn and back",
         {"rows": 8, **ODD, "hue": (-0.5, -0.3, -0.1, -1e-3, 0.01, 0.2, 0.4, 0.5)}),
    Case("gray", "alone", {"rows": 2, **ODD, "gray": 1}),
    Case("blur", "alone, both sides of each change of the number of taps",
         {"rows": 8, **ODD, "blur": (0.1, 0.5, 1.41, 1.42, 2, 2.44, 2.45, 3)}),
    Case("solarize", "alone, from whole numbers on, which the bytes meet",
         {"rows": 4, **ODD, "solarize": (0, 1, 128, 255)}),
    Case("orders", "every order of the four jitters", {"rows": 24, "height": 7, "width": 21, **ALL}),
    Case("orders without contrast", "one pass", {"rows": 24, "height": 5, "width": 18, **ALL, "contrast": 1}),
    Case("orders without hue", "blends alone", {"rows": 24, "height": 6, "width": 11, **ALL, "hue": 0}),
    Case("orders, gray, blurred", "one blurred plane for three channels",
         {"rows": 12, "height": 9, "width": 17, **SOME, "gray": (1, 0, 1), "blur": (0.8, 1.7)}),
    Case("one channel", "the colour jitters do nothing",
         {"rows": 24, "height": 11, "width": 35, "channels": 1, "recipe": (0.5, 0.2)}),
    Case("one channel, orders", "contrast before and after brightness",
         {"rows": 24, "height": 8, "width": 33, "channels": 1, **ALL, "flip": (0, 1), "gray": 1, "blur": (0, 0, 0, 1)}),
    Case("pixel", "one pixel, smaller than any blur",
         {"rows": 6, "height": 1, "width": 1, **SOME, "flip": 1, "blur": (0, 2, 16)}),
    Case("column", "one pixel wide", {"rows": 6, "height": 40, "width": 1, **SOME, "flip": 1, "blur": (0, 1, 2)}),
    Case("line", "one pixel high", {"rows": 6, "height": 1, "width": 50, **SOME, "flip": (0, 1), "blur": (0, 1, 2)}),
    Case("lower than the blur", "both edges within reach of every pixel",
         {"rows": 4, "height": 3, "width": 70, "blur": (0.5, 1.5, 4, 16)}),
    Case("narrower than the blur", "both edges within reach of every pixel",
         {"rows": 4, "height": 66, "width": 5, "blur": (0.5, 1.5, 4, 16)}),
    Case("largest blur", "97 taps over more than their reach",
         {"rows": 3, "height": 110, "width": 103, "blur": (16, 15.9, 7.3), "gray": (0, 1, 0)}),
    Case("flat", "no chroma and no contrast: every colour stays what the blends make of it",
         {"rows": 12, "height": 4, "width": 20, **SOME, "blur": (0, 1), "flat": True}),
    Case("large factors", "most values are clamped, some between two jitters",
         {"rows": 24, "height": 6, "width": 22, **ALL, "brightness": 2.5, "contrast": 3, "saturation": 4}),
    Case("whole vectors", "no rest in any line", {"rows": 6, "height": 16, "width": 64, "recipe": (0.5, 0)}),
    Case("none", "no rows", {"rows": 0, **ODD}),
    Case("apart", "rows of a larger batch", {"rows": 5, **ODD, "recipe": (0.5, 0.2), "apart": True}),
    Case("transposed", "a layout that is copied", {"rows": 3, **ODD, "recipe": (0.5, 0.2), "transposed": True}),
    Case("global", "the large crops of 64 images", {"rows": 64, "height": 224, "width": 224, "recipe": (0.2, 0.2)},
         bench=True),
    Case("local", "the small crops of 64 images", {"rows": 512, "height": 96, "width": 96, "recipe": (0.5, 0.0)},
         bench=True),
)  # fmt: skip

OP = Op(name="augment", function=augment, eager=eager, make=make, cases=CASES, cost=cost)
