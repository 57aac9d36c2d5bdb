"""Decoding and cutting with DALI against Pillow and torchvision."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision_shim import import_torchvision

from fastrex.data import dali
from fastrex.errors import FastrexError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    root = os.environ.get("FASTREX_TEST_DATA")
    if not root or not (Path(root) / "imagenet-sample").is_dir():
        pytest.skip("FASTREX_TEST_DATA has no imagenet-sample")
    return sorted((Path(root) / "imagenet-sample").glob("n*/*.JPEG"))[::20]


def rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def request(paths: list[Path], boxes: list[np.ndarray]) -> dali.Request:
    return dali.Request(paths, [np.fromfile(path, np.uint8) for path in paths], dali.crop_arguments(boxes))


def crops(
    requests: list[dali.Request], groups: list[tuple[int, int]], threads: int = 2
) -> Iterator[tuple[torch.Tensor, ...]]:
    size = max(len(request.files) for request in requests)
    root = Path("the folder")
    for _, tensors in dali.crops(iter(requests), groups, batch_size=size, threads=threads, device=CPU, root=root):
        yield tensors


def random_boxes(paths: list[Path], count: int) -> np.ndarray:
    """[K, B, 4] boxes from a twentieth of the side to the whole image, even for the last pixel of a side."""
    random = np.random.default_rng(0)
    boxes = np.empty((count, len(paths), 4), np.int32)
    for b, path in enumerate(paths):
        width, height = rgb(path).size
        for k in range(count):
            h, w = random.integers(height // 20, height + 1), random.integers(width // 20, width + 1)
            boxes[k, b] = random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w
    return boxes


def test_crops_are_pillows_and_crop_major(photos: list[Path]) -> None:
    boxes = [random_boxes(photos, 1), random_boxes(photos, 3)]
    groups = [(1, 224), (3, 96)]
    (tensors,) = crops([request(photos, boxes)], groups)
    for tensor, group, (count, side) in zip(tensors, boxes, groups, strict=True):
        assert tensor.shape == (count * len(photos), side, side, 3)
        assert tensor.dtype == torch.uint8
        cut, boxed = [], []
        for k, b in np.ndindex(count, len(photos)):
            top, left, height, width = (int(v) for v in group[k, b])
            image, corners = rgb(photos[b]), (left, top, left + width, top + height)
            cut.append(np.asarray(image.crop(corners).resize((side, side), Image.Resampling.BICUBIC)))
            boxed.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=corners)))
        error = np.abs(tensor.numpy().astype(int) - np.stack(cut))
        assert error.mean() <= 0.3
        # The filter sees the pixels just outside a box, as Pillow's does with box=: only the rim differs from a crop.
        assert np.percentile(error[:, 4:-4, 4:-4], 99) <= 1
        assert np.abs(tensor.numpy().astype(int) - np.stack(boxed)).mean() <= 0.2


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (64, 64)])
def test_centre_crops_are_torchvisions(photos: list[Path], resize: int, size: int) -> None:
    import_torchvision()
    from torchvision import transforms

    images = [rgb(path) for path in photos]
    heights, widths = np.array([i.height for i in images]), np.array([i.width for i in images])

    def requests() -> Iterator[dali.Request]:
        for start in range(0, len(photos), 8):  # 20 photos: the last batch is short
            part = slice(start, start + 8)
            files = [np.fromfile(path, np.uint8) for path in photos[part]]
            yield dali.Request(photos[part], files, dali.centre_arguments(heights[part], widths[part], resize, size))

    cut = dali.centre_crops(requests(), size, batch_size=8, threads=2, device=CPU, root=Path())
    got = [tensor for _, tensor in cut]
    assert [len(tensor) for tensor in got] == [8, 8, 4]
    whole = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
    wanted = np.stack([np.asarray(whole(image)) for image in images])
    assert np.abs(torch.cat(got).numpy().astype(int) - wanted).mean() <= 1


def test_images_smaller_than_the_centre_crop_are_padded_with_zeros() -> None:
    """20 x 31 to 10 x 15, then to 14: two rows above and below, and the columns 0 to 14 of 15 (round(1 / 2) is 0)."""
    data = io.BytesIO()
    Image.new("RGB", (31, 20), (255, 255, 255)).save(data, "png")
    arguments = dali.centre_arguments(np.array([20]), np.array([31]), 10, 14)
    assert [argument.tolist() for argument in arguments] == [[[10, 15]], [[-2, 0]]]
    one = dali.Request([Path("white")], [np.frombuffer(data.getvalue(), np.uint8)], arguments)
    _, image = next(dali.centre_crops(iter([one]), 14, batch_size=1, threads=1, device=CPU, root=Path()))
    assert image[0, 2:12].eq(255).all()
    assert image[0, :2].eq(0).all()
    assert image[0, 12:].eq(0).all()


def test_corner_of_the_centre_crop_is_torchvisions() -> None:
    """Ties round to even, on both sides of the size; torchvision's own functional gives the same corner."""
    import_torchvision()
    from torchvision.transforms import functional

    for side in range(1, 24):
        ramp = torch.arange(1, side + 1).view(1, 1, side).expand(1, side, side)
        cut = functional.center_crop(ramp, [11, 11])[0, 5]
        _, corner = dali.centre_arguments(np.array([side]), np.array([side]), side, 11)
        wanted = [left + 1 if 0 <= left < side else 0 for left in range(corner[0, 1], corner[0, 1] + 11)]
        assert cut.tolist() == wanted


def test_batches_keep_their_order_and_their_memory(photos: list[Path]) -> None:
    """All results are held while later batches are cut; a short batch and one image twice; any number of threads."""
    parts = [photos[:5], photos[5:8], [photos[8], photos[8]], photos[9:14]]
    requests = [request(part, [random_boxes(part, 2)]) for part in parts]
    held = list(crops(requests, [(2, 32)], threads=1))
    assert [len(tensor) for (tensor,) in held] == [10, 6, 4, 10]
    for one, (tensor,) in zip(requests, held, strict=True):
        ((alone,),) = crops([one], [(2, 32)], threads=3)
        assert torch.equal(tensor, alone)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "jpeg"),
        ("CMYK", "jpeg"),
        ("RGB", "png"),
        ("RGBA", "png"),
        ("L", "png"),
        ("P", "png"),
        ("1", "png"),
        ("RGB", "webp"),
    ],
)
def test_every_mode_arrives_as_rgb(tmp_path: Path, mode: str, format: str) -> None:
    smooth = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((64, 48), Image.Resampling.BICUBIC).convert(mode)
    path = tmp_path / "image"
    image.save(path, format, **({"lossless": True} if format == "webp" else {}))
    box = np.array([[[0, 0, 48, 64]]], np.int32)
    ((tensor,),) = crops([request([path], [box])], [(1, 48)])
    wanted = np.asarray(rgb(path).resize((48, 48), Image.Resampling.BICUBIC))
    assert np.abs(tensor[0].numpy().astype(int) - wanted).mean() <= 1


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    """Orientation 6: the stored top left, white, is the shown top right."""
    stored = Image.new("L", (40, 20))
    stored.paste(255, (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    box = np.array([[[0, 0, 40, 20]]], np.int32)
    ((tensor,),) = crops([request([tmp_path / "turned.jpg"], [box])], [(1, 20)])
    quarters = tensor[0, :, :, 0].float().view(2, 10, 2, 10).mean(dim=(1, 3))
    assert (quarters > 128).tolist() == [[False, True], [False, False]]


def test_files_that_cannot_be_decoded_are_named(tmp_path: Path, photos: list[Path]) -> None:
    paths = [*photos[:2], tmp_path / "cut.jpg", photos[2], tmp_path / "text.jpg"]
    whole = photos[3].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])
    paths[4].write_text("<html>")
    boxes = [np.full((1, len(paths), 4), 10, np.int32)]
    with pytest.raises(FastrexError) as caught:
        list(crops([request(paths, boxes)], [(1, 16)]))
    message = str(caught.value)
    assert message.startswith(
        f"cannot decode {str(paths[2])!r}, {str(paths[4])!r}; restore it to resume this run, "
        "or run `fastrex data index 'the folder'`"
    )
    assert "\n" not in message
    assert not any(str(path) in message for path in photos)


def test_a_missing_dali_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(FastrexError, match=r"pip install 'fastrex\[train\]'"):
        next(dali.crops(iter([]), [(1, 16)], batch_size=1, threads=1, device=CPU, root=Path()))
