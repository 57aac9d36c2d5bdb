"""Cutting and resizing against Pillow, to the bit: every implementation, instruction set and kind of box."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import environment
from PIL import Image
from torch import Tensor

from fastrex_kernels import _cpp, crop_resize
from fastrex_kernels._op import INTERPRETED

CPP = pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded"))
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off"))
both = pytest.mark.parametrize("impl", ["reference", CPP])
every = pytest.mark.parametrize("impl", ["reference", CPP, TRITON])
CUBIC = Image.Resampling.BICUBIC


def pillow(image: np.ndarray, box: Sequence[int], size: int) -> np.ndarray:
    """Rows, then columns, in two calls: alone, Pillow 13 chooses the order by itself."""
    top, left, height, width = map(int, box)
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, height), CUBIC).resize((size, size), CUBIC))


def noise(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Bytes of any value, or black and white alone, which overshoots the most."""
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if random.random() < 0.3 else image


def draw(random: np.random.Generator, height: int, width: int) -> list[int]:
    high, wide = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
    return [int(random.integers(0, height - high + 1)), int(random.integers(0, width - wide + 1)), high, wide]


def check(images: Sequence[np.ndarray], boxes: Sequence[Sequence[int]], size: int, impl: str) -> None:
    tensors = [torch.tensor(image) for image in images]
    got = crop_resize(tensors, torch.tensor(boxes, dtype=torch.int32).view(-1, 4), size, impl=impl)
    assert got.shape == (len(boxes), size, size, 3)
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    for row, box in enumerate(boxes):
        image = images[row % len(images)]
        assert np.array_equal(got[row].numpy(), pillow(image, box, size)), (image.shape, box, size)


@every
def test_by_hand(impl: str) -> None:
    """Six columns become three: the taps are -3, -9, 29, 111, 111, 29, -9, -3; those inside share the weight."""
    row = torch.tensor([0, 0, 0, 255, 255, 0, 200, 200], dtype=torch.uint8)
    image = row.view(1, 8, 1).expand(4, 8, 3).contiguous()
    got = crop_resize([image], torch.tensor([[0, 0, 3, 6]], dtype=torch.int32), 3, impl=impl)
    # Columns 3 and 4 have the last two taps of five, the middle two of six, the third and fourth of five.
    expected = [0, round(255 * (111 + 29) / 262), round(255 * (29 + 111) / 239)]
    assert got.tolist() == [[[[value] * 3 for value in expected]] * 3]


@every
def test_a_few_boxes_of_every_kind(impl: str) -> None:
    random = np.random.default_rng(0)
    images = [noise(random, 41, 58), noise(random, 30, 17)]
    boxes = [
        *([3, 5, 33, 47], [0, 0, 30, 17]),  # both directions shrink; a whole image
        *([1, 2, 7, 9], [4, 3, 24, 5]),  # both grow; one of each
        *([10, 10, 16, 16], [6, 0, 16, 17]),  # the size itself; one direction keeps it
        *([40, 57, 1, 1], [29, 0, 1, 17]),  # one pixel, one row, at the rim
    ]
    check(images, boxes, 16, impl)


@both
def test_thousands_of_sizes(impl: str) -> None:
    random = np.random.default_rng(1)
    for _ in range(1500):
        height, width = random.integers(1, 70, 2)
        size = int(random.integers(1, 70))
        check([noise(random, height, width)], [draw(random, height, width) for _ in range(2)], size, impl)


@both
def test_coefficients_of_long_lines(impl: str) -> None:
    """One row or one column of any length: 150 pairs of length and size, each with its own coefficients."""
    random = np.random.default_rng(2)
    for turn in range(150):
        length, size = int(random.integers(1, 3000)), int(random.integers(1, 260))
        shape = (1, length) if turn % 2 else (length, 1)
        check([noise(random, *shape)], [[0, 0, *shape]], size, impl)


@both
@pytest.mark.parametrize(("shape", "size"), [((20_000, 10), 32), ((10, 20_000), 32), ((3000, 20), 1), ((20, 3000), 1)])
def test_thousands_of_taps(impl: str, shape: tuple[int, int], size: int) -> None:
    image = noise(np.random.default_rng(3), *shape)
    check([image, 255 - image], [[0, 0, *shape], [1, 1, shape[0] - 1, shape[1] - 1]], size, impl)


def photographs(folder: Path, step: int) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*/*"))[::step]]


def crops(images: Sequence[np.ndarray], number: int, area: tuple[float, float]) -> list[list[int]]:
    """As RandomResizedCrop draws them."""
    random, boxes = np.random.default_rng(4), []
    for row in range(number * len(images)):
        height, width, _ = images[row % len(images)].shape
        pixels, ratio = random.uniform(*area) * height * width, np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        high, wide = min(height, round(np.sqrt(pixels / ratio))), min(width, round(np.sqrt(pixels * ratio)))
        corner = random.integers(0, height - high + 1), random.integers(0, width - wide + 1)
        boxes.append([*map(int, corner), int(high), int(wide)])
    return boxes


@both
@pytest.mark.parametrize(("size", "number", "area"), [(224, 1, (0.25, 1.0)), (96, 4, (0.05, 0.25))])
def test_photographs(impl: str, imagenet_sample: Path, size: int, number: int, area: tuple[float, float]) -> None:
    images = photographs(imagenet_sample, 40)
    check(images, crops(images, number, area), size, impl)


def test_one_call_of_any_pillow_is_near(imagenet_sample: Path) -> None:
    """Whichever pass Pillow begins with."""
    images = photographs(imagenet_sample, 10)
    boxes = crops(images, 2, (0.1, 1.0))
    got = crop_resize([torch.tensor(image) for image in images], torch.tensor(boxes, dtype=torch.int32), 96).numpy()
    far = []
    for row, (top, left, high, wide) in enumerate(boxes):
        crop = Image.fromarray(images[row % len(images)]).crop((left, top, left + wide, top + high))
        far.append(np.abs(np.asarray(crop.resize((96, 96), CUBIC)).astype(int) - got[row]).mean())
    assert np.mean(far) <= 0.1
    assert max(far) <= 1


@both
def test_crops_are_ordered_by_crop_then_image(impl: str) -> None:
    images = [torch.full((5, 4 + i, 3), 10 * i, dtype=torch.uint8) for i in range(3)]
    boxes = torch.tensor([[0, 0, 5, 4], [1, 1, 2, 3], [2, 0, 1, 1]] * 2, dtype=torch.int32)
    assert crop_resize(images, boxes, 7, impl=impl)[:, 3, 3, 0].tolist() == [0, 10, 20, 0, 10, 20]


@every
def test_rows_apart_and_views(impl: str) -> None:
    """A window of a larger image is an image; boxes may be a view as well."""
    random = np.random.default_rng(5)
    whole = noise(random, 30, 40)
    window = torch.tensor(whole)[4:25, 7:36]
    table = torch.tensor([[2, 3, 17, 20, 9], [20, 28, 1, 1, 9]], dtype=torch.int32)
    got = crop_resize([window], table[:, :4], 11, impl=impl)
    inside = np.ascontiguousarray(whole[4:25, 7:36])
    for row in range(2):
        assert np.array_equal(got[row].numpy(), pillow(inside, table[row, :4].tolist(), 11))


@both
def test_out_is_written_and_nothing_else(impl: str) -> None:
    random = np.random.default_rng(6)
    image = torch.tensor(noise(random, 20, 30))
    boxes = torch.tensor([draw(random, 20, 30) for _ in range(3)], dtype=torch.int32)
    expected = crop_resize([image], boxes, 9, impl=impl)
    larger = torch.full((5, 9, 9, 3), 77, dtype=torch.uint8)
    version = larger._version
    out = larger[1:4]
    assert crop_resize([image], boxes, 9, out=out, impl=impl) is out
    assert torch.equal(out, expected)
    assert (larger[[0, 4]] == 77).all()
    assert larger._version > version
    # One crop of each image in turn, as a loader has them: crops are dense, and lie apart.
    apart = torch.full((3, 2, 9, 9, 3), 77, dtype=torch.uint8)
    crop_resize([image], boxes, 9, out=apart[:, 1], impl=impl)
    assert torch.equal(apart[:, 1], expected)
    assert (apart[:, 0] == 77).all()


@both
def test_an_empty_batch(impl: str) -> None:
    image = torch.zeros(4, 4, 3, dtype=torch.uint8)
    assert crop_resize([image], torch.empty(0, 4, dtype=torch.int32), 8, impl=impl).shape == (0, 8, 8, 3)


BOX = [[0, 0, 4, 5]]
INSIDE = "boxes[0] must lie inside its image of 4 x 5, got top"


@both
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"images": []}, ValueError, "images must be at least one tensor, got none"),
        ({"images": [torch.zeros(4, 5, 3)]}, ValueError,
         "images[0] must be uint8 [H, W, 3], got torch.float32 (4, 5, 3)"),
        ({"images": [torch.zeros(4, 5, 4, dtype=torch.uint8)]}, ValueError, "images[0] must be uint8 [H, W, 3], got "),
        ({"images": [torch.zeros(3, 4, 5, dtype=torch.uint8).permute(1, 2, 0)]}, ValueError,
         "images[0] must be contiguous within each row, got strides (5, 1, 20)"),
        ({"boxes": torch.tensor(BOX)}, TypeError, "boxes must be int32, got torch.int64"),
        ({"boxes": torch.tensor(BOX[0], dtype=torch.int32)}, ValueError, "boxes must be [N, 4], got (4,)"),
        ({"images": [torch.zeros(4, 5, 3, dtype=torch.uint8)] * 2}, ValueError,
         "boxes must be a multiple of the 2 images, got 1"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"boxes": [[-1, 0, 2, 2]]}, ValueError, f"{INSIDE} -1, left 0, height 2, width 2"),
        ({"boxes": [[0, 0, 0, 2]]}, ValueError, f"{INSIDE} 0, left 0, height 0, width 2"),
        ({"boxes": [[1, 0, 4, 2]]}, ValueError, f"{INSIDE} 1, left 0, height 4, width 2"),
        ({"boxes": [[0, 2**31 - 1, 1, 2**31 - 1]]}, ValueError, f"{INSIDE} 0, left 2147483647"),
        ({"out": torch.empty(1, 6, 6, 3)}, ValueError,
         "out must be uint8 (1, 6, 6, 3), got torch.float32 (1, 6, 6, 3)"),
        ({"out": torch.empty(2, 6, 6, 3, dtype=torch.uint8)}, ValueError, "out must be uint8 (1, 6, 6, 3), got "),
        ({"out": torch.empty(1, 3, 6, 6, dtype=torch.uint8).permute(0, 2, 3, 1)}, ValueError,
         "out must be contiguous within each crop, got strides (108, 6, 1, 36)"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, cpp, triton, got 'fast'"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_the_fact(impl: str, change: dict[str, Any], kind: type, message: str) -> None:
    arguments: dict[str, Any] = {"images": [torch.zeros(4, 5, 3, dtype=torch.uint8)], "boxes": BOX, "size": 6}
    arguments |= {"impl": impl, **change}
    if not isinstance(arguments["boxes"], Tensor):
        arguments["boxes"] = torch.tensor(arguments["boxes"], dtype=torch.int32)
    with pytest.raises(kind) as raised:
        crop_resize(**arguments)
    assert str(raised.value).startswith(f"crop_resize: {message}")


@both
def test_a_bad_image_or_box_further_on_is_named(impl: str) -> None:
    good = torch.zeros(4, 5, 3, dtype=torch.uint8)
    boxes = torch.tensor([*BOX, *BOX, *BOX, [3, 0, 2, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"crop_resize: boxes\[3\] must lie inside its image of 4 x 5, got top 3"):
        crop_resize([good, good], boxes, 6, impl=impl)
    with pytest.raises(ValueError, match=r"crop_resize: images\[1\] must be uint8 \[H, W, 3\], got"):
        crop_resize([good, good.float()], boxes, 6, impl=impl)
    with pytest.raises(ValueError, match=r"crop_resize: images\[1\] must be contiguous within each row, got strides"):
        crop_resize([good, good.repeat(1, 2, 1)[:, ::2]], boxes, 6, impl=impl)


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", None])
def test_every_instruction_set_gives_the_same_bytes(isa: str | None) -> None:
    """Read once per process, hence one of its own; None is the best, VNNI on CPUs that have it. The image ends where
    the process may read no further."""
    code = """
import ctypes, mmap, sys
import torch
from fastrex_kernels import _cpp, crop_resize
for library in sys.argv[1:]:
    torch.ops.load_library(library)
_cpp.LOADED = True
g = torch.Generator().manual_seed(0)
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert not ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + 2 * page), page, 0)
def number(low, high):
    return int(torch.randint(low, high, (), generator=g))
for turn in range(300):
    height, width, size = number(1, 45), number(1, 55), number(1, 60)
    pixels = 3 * height * width
    image = torch.frombuffer(memory, dtype=torch.uint8, count=pixels, offset=2 * page - pixels).view(height, width, 3)
    image.copy_(torch.randint(256, image.shape, generator=g))
    high, wide = number(1, height + 1), number(1, width + 1)
    boxes = torch.tensor([[height - high, width - wide, high, wide], [0, 0, height, width]], dtype=torch.int32)
    expected = crop_resize([image], boxes, size, impl="reference")
    assert torch.equal(crop_resize([image], boxes, size, impl="cpp"), expected), (height, width, boxes, size)
"""
    env = {k: v for k, v in environment().items() if k != "FASTREX_ISA"} | ({"FASTREX_ISA": isa} if isa else {})
    command = [sys.executable, "-W", "ignore", "-c", code, *torch.ops.loaded_libraries]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
