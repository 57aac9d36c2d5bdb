"""Boxes cut from images and resized as Pillow does it, all of a batch at once: uint8 in, uint8 out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._op import choose, define, raw, readable
from .reference import crop_resize_reference


def _fake(out: Tensor, images: list[Tensor], boxes: Tensor) -> None:
    return None


define(__name__, "crop_resize_(Tensor(a!) out, Tensor[] images, Tensor boxes) -> ()", _fake)


def crop_resize(
    images: Sequence[Tensor], boxes: Tensor, size: int, *, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Cut box ``n`` from ``images[n % B]`` and resize it to ``size`` x ``size``, for all N boxes.

    Every implementation gives the bytes of Pillow's ``image.crop((left, top, left + width, top + height)).resize((size,
    size), Image.Resampling.BICUBIC)``, which is what torchvision's ``RandomResizedCrop`` does with a PIL image: the
    antialiased cubic filter (a = -0.5) sees nothing outside the box, first along rows, then along columns, with
    coefficients of 22 binary digits and a rounding to bytes after each. Since version 13 Pillow takes the columns first
    where the height shrinks much more than the width: one in ten of RandomResizedCrop's boxes then differs, by 0.2
    levels in the mean. ``.resize((size, height)).resize((size, size))`` is the order above in every version.

    Args:
        images: B tensors uint8 [H, W, 3] of any sizes on one device; rows may lie apart, each is contiguous.
        boxes: int32 [N, 4], (top, left, height, width) in pixels, each inside its image; N is a multiple of B. On the
            CPU: from a GPU they are fetched, which waits for it.
        size: S, at least 1.
        out: uint8 [N, S, S, 3] to write into, each crop contiguous, such as a slice of a larger tensor.
        impl: "auto", "reference", "cpp" or "triton".

    Returns:
        uint8 [N, S, S, 3], contiguous, or ``out``.

    Raises:
        ValueError, TypeError: naming the argument and the fact. Boxes are checked where they are on the CPU.
    """
    if not images:
        raise ValueError("crop_resize: images must be at least one tensor, got none")
    first = images[0]
    if boxes.dtype != torch.int32:
        raise TypeError(f"crop_resize: boxes must be int32, got {boxes.dtype}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"crop_resize: boxes must be [N, 4], got {tuple(boxes.shape)}")
    count = boxes.shape[0]
    if count % len(images):
        raise ValueError(f"crop_resize: boxes must be a multiple of the {len(images)} images, got {count}")
    if boxes.device.type != "cpu" and boxes.device != first.device:
        raise ValueError(f"crop_resize: boxes must be on cpu or {first.device} like images, got {boxes.device}")
    if size < 1:
        raise ValueError(f"crop_resize: size must be at least 1, got {size}")
    if out is None:
        out = torch.empty(count, size, size, 3, dtype=torch.uint8, device=first.device)
    else:
        _check_out(out, (count, size, size, 3), first.device)
    _check_image(0, first, first.device)
    impl = choose("crop_resize", impl, first, dtypes=(torch.uint8,))
    readably = readable(boxes)
    boxes = boxes.cpu().contiguous()
    if impl != "cpp":  # which checks for itself, at no cost
        for index, image in enumerate(images):
            _check_image(index, image, first.device)
        if readably:
            _check_boxes(images, boxes)
    if count:
        (crop_resize_reference if impl == "reference" else raw(__name__, "crop_resize_", impl))(out, images, boxes)
    return out


def _check_image(index: int, image: Tensor, device: torch.device) -> None:
    name = f"crop_resize: images[{index}] must be"
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{name} uint8 [H, W, 3], got {image.dtype} {tuple(image.shape)}")
    if image.device != device:
        raise ValueError(f"{name} on {device} like the others, got {image.device}")
    if image.stride(2) != 1 or (image.shape[1] > 1 and image.stride(1) != 3):
        raise ValueError(f"{name} contiguous within each row, got strides {image.stride()}")


def _check_boxes(images: Sequence[Tensor], boxes: Tensor) -> None:
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        high, wide = images[row % len(images)].shape[:2]
        if min(top, left) < 0 or min(height, width) < 1 or top + height > high or left + width > wide:
            raise ValueError(
                f"crop_resize: boxes[{row}] must lie inside its image of {high} x {wide}, "
                f"got top {top}, left {left}, height {height}, width {width}"
            )


def _check_out(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if out.dtype != torch.uint8 or out.shape != shape:
        raise ValueError(f"crop_resize: out must be uint8 {shape}, got {out.dtype} {tuple(out.shape)}")
    if out.device != device:
        raise ValueError(f"crop_resize: out must be on {device} like images, got {out.device}")
    size = shape[1]
    if out.numel() and out.stride()[1:] != (3 * size, 3, 1):
        raise ValueError(f"crop_resize: out must be contiguous within each crop, got strides {out.stride()}")
