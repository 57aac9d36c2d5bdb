"""Sizes at which cutting and resizing is tested and measured, and its rival in eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Call, Case, Cost, Op
from . import crop_resize


def eager(images: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """What ``torchvision.transforms.v2`` does, box after box. PyTorch resizes bytes on a CPU only."""
    crops = []
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        crop = images[row % len(images)][top : top + height, left : left + width].permute(2, 0, 1)[None]
        if crop.is_cuda:
            crop = crop.float()
        crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)
        if crop.is_floating_point():
            crop = crop.round_().clamp_(0, 255).to(torch.uint8)
        crops.append(crop[0].permute(1, 2, 0))
    return torch.stack(crops) if crops else boxes.new_empty((0, size, size, 3), dtype=torch.uint8)


def _boxes(sizes: Mapping[str, Any], seed: int) -> list[Sequence[int]]:
    """Those of the case, or ``crops`` of each image as RandomResizedCrop draws them with scale ``area``."""
    if "boxes" in sizes:
        return list(sizes["boxes"])
    g = torch.Generator().manual_seed(seed)
    low, high = sizes["area"]
    boxes: list[Sequence[int]] = []
    for row in range(sizes["crops"] * len(sizes["images"])):
        full_height, full_width = sizes["images"][row % len(sizes["images"])]
        area, shape, down, right = torch.rand(4, generator=g, dtype=torch.float64).tolist()
        area = (low + (high - low) * area) * full_height * full_width
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        height = min(round(math.sqrt(area / ratio)), full_height)
        width = min(round(math.sqrt(area * ratio)), full_width)
        boxes.append((int(down * (full_height - height + 1)), int(right * (full_width - width + 1)), height, width))
    return boxes


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """Images of noise, which hides no wrong pixel; bytes, whatever ``dtype`` says.

    ``sizes``: images ((H, W), ...), size; boxes ((top, left, height, width), ...), or crops and area; ``apart`` (bytes
    between the rows of an image).
    """
    g = torch.Generator().manual_seed(seed)
    images = []
    for height, width in sizes["images"]:
        pitch = 3 * width + sizes.get("apart", 0)
        pixels = torch.randint(256, (height, pitch), generator=g, dtype=torch.uint8).to(device)
        images.append(pixels.as_strided((height, width, 3), (pitch, 3, 1)))
    boxes = torch.tensor(_boxes(sizes, seed), dtype=torch.int32).view(-1, 4)
    return Call({"images": images, "boxes": boxes}, {"size": sizes["size"]})


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """Each box is read once and each crop written once; a tap of each pass is a product and a sum."""
    size, boxes = sizes["size"], _boxes(sizes, 0)
    moved, flops = len(boxes) * (3 * size * size + 16), 0.0
    for _, _, height, width in boxes:
        moved += 3 * height * width
        flops += 6 * size * (height * 4 * max(width / size, 1) + size * 4 * max(height / size, 1))
    return Cost(moved, int(flops))


PHOTOS = ((375, 500), (500, 375), (333, 500), (500, 500)) * 8

CASES = (
    Case("odd", "no size is a multiple of a vector; a box that shrinks and one that grows, of images of other sizes",
         {"images": ((37, 53), (61, 29)), "size": 23,
          "boxes": ((2, 5, 31, 47), (0, 0, 61, 29), (30, 1, 7, 9), (60, 28, 1, 1))}),
    Case("no box", "an empty batch", {"images": ((4, 4),), "size": 8, "boxes": ()}),
    Case("one pixel", "the smallest image, grown", {"images": ((1, 1),), "size": 5, "boxes": ((0, 0, 1, 1),)}),
    Case("to one pixel", "one output that sees the whole box", {"images": ((13, 11),), "size": 1,
         "boxes": ((0, 0, 13, 11), (3, 4, 1, 7))}),
    Case("lines", "one row and one column, at the rim", {"images": ((19, 70),), "size": 16,
         "boxes": ((18, 0, 1, 70), (0, 69, 19, 1))}),
    Case("same size", "neither pass changes anything, and only one of them does", {"images": ((50, 60),), "size": 32,
         "boxes": ((9, 13, 32, 32), (0, 0, 32, 60), (1, 2, 45, 32))}),
    Case("long", "a hundred taps in one direction, a few in the other",
         {"images": ((151, 3), (4, 152)), "size": 5, "boxes": ((0, 0, 151, 3), (0, 0, 4, 152))}),
    Case("apart", "rows of the images lie apart",
         {"images": ((45, 31), (28, 64)), "size": 17, "crops": 3, "area": (0.3, 1.0), "apart": 7}),
    Case("many", "crop-major order over images of several sizes",
         {"images": ((90, 70), (33, 80), (64, 65)), "size": 36, "crops": 3, "area": (0.1, 1.0)}),
    Case("global", "the large crop of a batch of photographs",
         {"images": PHOTOS, "size": 224, "crops": 1, "area": (0.25, 1.0)}, bench=True),
    Case("local", "its eight small crops",
         {"images": PHOTOS, "size": 96, "crops": 8, "area": (0.05, 0.25)}, bench=True),
)  # fmt: skip

# The tensors hold bytes: float32 stands for all dtypes, so that each case runs once.
OP = Op(
    name="crop_resize",
    function=crop_resize,
    eager=eager,
    make=make,
    cases=CASES,
    cost=cost,
    dtypes=(torch.float32,),
)
