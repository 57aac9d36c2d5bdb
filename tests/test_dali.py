"""Decoding and cutting with DALI against Pillow and torchvision."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
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


def no_amends(request: dali.Request, bad: dict[int, str]) -> dali.Request:
    raise FastrexError(f"bad: {bad}")


def decoder(batch_size: int, threads: int = 2, amend: dali.Amend = no_amends) -> dali.Decoder:
    return dali.Decoder(batch_size, threads, CPU, amend)


def request(paths: list[Path], boxes: list[np.ndarray] = [], token: object = None) -> dali.Request:  # noqa: B006
    shapes = np.array([shown(path) for path in paths])
    names, files = [str(path) for path in paths], [np.fromfile(path, np.uint8) for path in paths]
    return dali.Request(names, files, shapes, dali.crop_arguments(boxes), token)


def shown(path: Path) -> tuple[int, int]:
    """Height and width as decoded; those of a text are anybody's guess."""
    try:
        with Image.open(path) as image:
            width, height = ImageOps.exif_transpose(image).size
            return height, width
    except OSError:
        return 100, 100


def crops(
    requests: list[dali.Request], groups: list[tuple[int, int]], threads: int = 2
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The crops of each group, joined crop-major."""
    size = max(len(request.files) for request in requests)
    sides = [side for count, side in groups for _ in range(count)]
    for _, pieces in dali.crops(iter(requests), sides, decoder(size, threads)):
        parts = iter(pieces)
        yield tuple(torch.cat([next(parts) for _ in range(count)]) for count, _ in groups)


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
        cut = []
        for k, b in np.ndindex(count, len(photos)):
            top, left, height, width = (int(v) for v in group[k, b])
            image, corners = rgb(photos[b]), (left, top, left + width, top + height)
            cut.append(np.asarray(image.crop(corners).resize((side, side), Image.Resampling.BICUBIC)))
        error = np.abs(tensor.numpy().astype(int) - np.stack(cut))
        assert error.mean() <= 0.3
        assert np.percentile(error[:, 4:-4, 4:-4], 99) <= 1


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
            shapes = np.stack((heights[part], widths[part]), axis=1)
            arguments = dali.centre_arguments(heights[part], widths[part], resize, size)
            yield dali.Request([str(path) for path in photos[part]], files, shapes, arguments)

    cut = dali.centre_crops(requests(), size, decoder(8))
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
    start, end, extent, place = (argument[0].tolist() for argument in arguments)
    assert (start, extent, place) == ([0, 0], [10, 14], [-2, 0])
    assert end == pytest.approx([20, 14 * 31 / 15])
    one = dali.Request(["white"], [np.frombuffer(data.getvalue(), np.uint8)], np.array([[20, 31]]), arguments)
    _, image = next(dali.centre_crops(iter([one]), 14, decoder(1)))
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
        start, _, _, place = dali.centre_arguments(np.array([side]), np.array([side]), side, 11)
        left = int(start[0, 1] + place[0, 1])
        wanted = [at + 1 if 0 <= at < side else 0 for at in range(left, left + 11)]
        assert cut.tolist() == wanted


def test_decoded_images_are_pillows_and_keep_their_memory(photos: list[Path]) -> None:
    parts = [photos[:3], photos[3:8], photos[8:9]]
    held = [images for _, images in dali.decoded(iter([request(part) for part in parts]), decoder(5, threads=1))]
    for images, part in zip(held, parts, strict=True):
        for image, path in zip(images, part, strict=True):
            assert torch.equal(image, torch.from_numpy(np.array(rgb(path))))


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


def broken(tmp_path: Path, photos: list[Path]) -> list[Path]:
    """Good, good, cut in half, good, no image."""
    paths = [*photos[:2], tmp_path / "cut.jpg", photos[2], tmp_path / "text.jpg"]
    whole = photos[3].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])
    paths[4].write_text("<html>")
    return paths


def test_images_that_cannot_be_used_are_found_and_the_others_come_in_order(tmp_path: Path, photos: list[Path]) -> None:
    """A bad image in the middle of a stream: its request is amended, decoded again, and nothing else changes."""
    parts = [photos[:5], broken(tmp_path, photos), photos[8:13], broken(tmp_path, photos)[3:], photos[2:4]]
    seen: list[tuple[int, dict[int, str]]] = []

    def amend(request: dali.Request, bad: dict[int, str]) -> dali.Request:
        seen.append((request.token, bad))
        kept = [i for i in range(len(request.files)) if i not in bad]
        files, names = [request.files[i] for i in kept], [request.names[i] for i in kept]
        return dali.Request(names, files, request.shapes[kept], (), request.token)

    requests = iter([request(part, token=number) for number, part in enumerate(parts)])
    results = list(dali.decoded(requests, decoder(5, amend=amend)))
    assert sorted(seen) == [(1, {2: "cannot be decoded", 4: "cannot be decoded"}), (3, {1: "cannot be decoded"})]
    assert [one.token for one, _ in results] == [0, 1, 2, 3, 4]
    good = [photos[:5], photos[:3], photos[8:13], photos[2:3], photos[2:4]]
    for (_, images), paths in zip(results, good, strict=True):
        for image, path in zip(images, paths, strict=True):
            assert torch.equal(image, torch.from_numpy(np.array(rgb(path))))


def test_an_image_of_another_shape_than_indexed_is_not_used(photos: list[Path]) -> None:
    one = request(photos[:3])
    one.shapes[1] += 1
    with pytest.raises(FastrexError, match=r"1: 'has \d+x\d+ pixels, but had \d+x\d+ when it was indexed'"):
        list(dali.decoded(iter([one]), decoder(3)))


def test_what_the_amends_raise_comes_out(tmp_path: Path, photos: list[Path]) -> None:
    boxes = [np.full((1, 5, 4), 10, np.int32)]
    with pytest.raises(FastrexError, match=re.escape("bad: {2: 'cannot be decoded', 4: 'cannot be decoded'}")):
        list(crops([request(broken(tmp_path, photos), boxes)], [(1, 16)]))


def test_decodable_names_what_the_decoder_does_not_take(tmp_path: Path, photos: list[Path]) -> None:
    """Also a request that has no good image at all, in its place among the others."""
    bad = broken(tmp_path, photos)
    parts = [photos[:4], [bad[2], bad[4]], bad, photos[4:6], [bad[4]]]
    results = list(dali.decodable([request(part) for part in parts], batch_size=5, threads=2))
    places = [
        {},
        {0: "cannot be decoded", 1: "cannot be decoded"},
        {2: "cannot be decoded", 4: "cannot be decoded"},
        {},
    ]
    assert results == [*places, {0: "cannot be decoded"}]


def test_a_missing_dali_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(FastrexError, match=r"pip install 'fastrex\[train\]'"):
        next(dali.crops(iter([]), [16], decoder(1)))
