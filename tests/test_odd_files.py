"""The golden table of odd files: what the index says of each, what the decoder, and which pixels training gets."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import odd_files as make
import pytest
import torch
from conftest import environment
from numpy.typing import NDArray
from odd_files import COLOURS, GREY, LA, NOISE, PICTURE, RGB, RGBA, encode, film, netpbm, png, turned
from PIL import Image, ImageOps

from fastrex.config import AugmentConfig, DataConfig
from fastrex.data import dali
from fastrex.data.check import check, quiet_decoder
from fastrex.data.index import Index, Status, build
from fastrex.data.loader import TrainLoader
from fastrex.data.plan import Plan

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

JPEG = encode("JPEG", quality=90)
LARGE = encode("JPEG", NOISE, quality=90)
WIDE = np.zeros((10, 20000, 3), np.uint8) + np.array((9, 201, 30), np.uint8)


@dataclass(frozen=True)
class Odd:
    """A file: its status in the index and after the check, and its pixels where they are not Pillow's (None: nobody's
    business)."""

    name: str
    data: bytes
    index: Status = Status.OK
    check: Status | None = None
    pixels: NDArray[np.uint8] | str | None = "Pillow's"

    @property
    def checked(self) -> Status:
        return self.index if self.check is None else self.check


def grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(pixels[..., None], 3, axis=2)


EMPTY, HEADER, FORMAT, LARGE_, CUT, DECODE, UNREADABLE = (
    Status.EMPTY,
    Status.HEADER,
    Status.FORMAT,
    Status.TOO_LARGE,
    Status.TRUNCATED,
    Status.DECODE,
    Status.UNREADABLE,
)
GREY16, RGB16 = GREY.astype(np.uint16) * 257, RGB.astype(np.uint16) * 257
ODD = (
    # JPEG
    Odd("plain.jpg", JPEG),
    Odd("no_subsampling.JPEG", encode("JPEG", subsampling=0, quality=95)),
    Odd("progressive.jpg", encode("JPEG", progressive=True)),
    Odd("restarts.jpg", encode("JPEG", restart_marker_blocks=2)),
    Odd("grey.jpg", encode("JPEG", PICTURE.convert("L"))),
    Odd("grey_progressive.jpg", encode("JPEG", PICTURE.convert("L"), progressive=True)),
    Odd("cmyk.jpg", encode("JPEG", PICTURE.convert("CMYK"), quality=95)),
    Odd("ycck.jpg", make.ycck_jpeg()),
    Odd("rgb.jpg", encode("JPEG", keep_rgb=True)),
    Odd("zeros_behind.jpg", JPEG + bytes(5000)),
    Odd("twice.jpg", JPEG + JPEG),
    Odd("film.jpg", film("MPO")),
    Odd("bad_exif.jpg", encode("JPEG", exif=b"Exif\0\0garbage")),
    Odd("exif_9.jpg", encode("JPEG", exif=turned(9))),
    *(Odd(f"exif_{n}.jpg", encode("JPEG", quality=90, exif=turned(n))) for n in range(1, 9)),
    Odd("one_pixel.jpg", encode("JPEG", Image.fromarray(RGB[:1, :1]))),
    Odd("wide.jpg", encode("JPEG", Image.fromarray(WIDE), quality=100)),
    Odd("claims_more.jpg", make.sized_jpeg(2 * make.WIDTH, make.HEIGHT)),  # the rest becomes grey, for Pillow too
    Odd("rotten.jpg", make.rotten_jpeg()),  # nobody can tell
    Odd("cut_with_an_end.jpg", make.whole_behind_a_cut_jpeg()),  # nobody can tell
    Odd("cut_half.jpg", LARGE[: len(LARGE) // 2], CUT),
    Odd("cut_1000.jpg", LARGE[:-1000], CUT),
    Odd("cut_2.jpg", LARGE[:-2], CUT),
    Odd("cut_header.jpg", JPEG[:100], HEADER),
    Odd("cut_20.jpg", JPEG[:20], HEADER),
    Odd("only_ends.jpg", b"\xff\xd8\xff\xd9", HEADER),
    Odd("zeros_before.jpg", bytes(2) + JPEG, HEADER),
    Odd("claims_nothing.jpg", make.sized_jpeg(0, 0), HEADER),
    Odd("claims_65500.jpg", make.sized_jpeg(65500, 65500), LARGE_),
    # PNG
    Odd("rgb.png", encode("PNG")),
    Odd("rgba.png", encode("PNG", RGBA)),
    Odd("palette.png", encode("PNG", COLOURS)),
    Odd("palette_transparent.png", encode("PNG", COLOURS, transparency=3)),
    Odd("palette_2_bit.png", encode("PNG", PICTURE.quantize(4), bits=2)),
    Odd("rgb_transparent.png", encode("PNG", transparency=(20, 30, 255))),
    Odd("one_bit.png", encode("PNG", PICTURE.convert("1"))),
    Odd("grey.png", encode("PNG", PICTURE.convert("L"))),
    Odd("grey_alpha.png", encode("PNG", LA)),
    Odd("grey_16.png", png(50, 30, 16, 0, make.lines(GREY16.astype(">u2"))), pixels=grey(GREY)),
    Odd("dark_16.png", png(50, 30, 16, 0, make.lines(GREY.astype(">u2"))), pixels=grey((GREY > 128).astype(np.uint8))),
    Odd("rgb_16.png", png(50, 30, 16, 2, make.lines(RGB16.astype(">u2")))),
    Odd("interlaced.png", make.interlaced_png()),
    Odd("film.png", film("PNG", duration=100)),
    Odd("exif_6.png", encode("PNG", exif=turned(6))),
    Odd("tall.png", encode("PNG", Image.fromarray(WIDE.transpose(1, 0, 2)))),
    Odd("one_pixel.png", encode("PNG", Image.fromarray(RGB[:1, :1]))),
    Odd("text_behind.png", encode("PNG") + b"x" * 500),
    Odd("named.jpg", encode("PNG")),
    Odd("cut.png", encode("PNG")[:-40], CUT),
    Odd("wrong_checksum.png", make.wrong_checksum_png(), check=DECODE),
    Odd("bomb.png", png(30000, 30000, 1, 0, bytes(30000)), LARGE_),
    # WebP
    Odd("lossy.webp", encode("WEBP")),
    Odd("lossless.webp", encode("WEBP", lossless=True)),
    Odd("alpha.webp", encode("WEBP", RGBA, lossless=True, exact=True)),
    Odd("film.webp", film("WEBP", lossless=True)),
    Odd("exif_8.webp", encode("WEBP", exif=turned(8))),
    Odd("cut.webp", encode("WEBP")[:-40], HEADER),
    # BMP
    Odd("24.bmp", encode("BMP")),
    Odd("8.bmp", encode("BMP", COLOURS)),
    Odd("32.bmp", encode("BMP", RGBA)),
    Odd("1.bmp", encode("BMP", PICTURE.convert("1"))),
    Odd("run_lengths.bmp", make.packed_bmp()),
    Odd("top_down.bmp", make.upside_down_bmp()),
    Odd("16.bmp", make.short_bmp(), check=DECODE),
    Odd("cut.bmp", encode("BMP")[:-500], CUT),
    # TIFF
    Odd("raw.tif", encode("TIFF")),
    Odd("lzw.tiff", encode("TIFF", compression="tiff_lzw")),
    Odd("deflate.tif", encode("TIFF", compression="tiff_adobe_deflate")),
    Odd("jpeg.tif", encode("TIFF", compression="jpeg")),
    Odd("fax.tif", encode("TIFF", PICTURE.convert("1"), compression="group4")),
    Odd("cmyk.tif", encode("TIFF", PICTURE.convert("CMYK"))),
    Odd("rgba.tif", encode("TIFF", RGBA)),
    Odd("palette.tif", encode("TIFF", COLOURS)),
    Odd("pages.tif", film("TIFF")),
    Odd("exif_6.tif", encode("TIFF", exif=turned(6))),
    Odd("grey_16.tif", encode("TIFF", Image.fromarray(GREY16)), pixels=grey(GREY)),
    Odd("float.tif", encode("TIFF", Image.fromarray(GREY / np.float32(255))), pixels=grey(GREY)),
    Odd("lab.tif", encode("TIFF", Image.merge("LAB", PICTURE.split())), pixels=None),  # colours are off
    Odd("grey_alpha.tif", encode("TIFF", LA), FORMAT),  # the decoder would read past its end
    Odd("one_bit.tif", encode("TIFF", PICTURE.convert("1")), check=DECODE),
    Odd("int_32.tif", encode("TIFF", Image.fromarray(GREY16.astype(np.int32))), check=DECODE),
    Odd("cut.tif", encode("TIFF")[:-500], CUT),
    # JPEG 2000, Netpbm
    Odd("rgb.jp2", encode("JPEG2000")),
    Odd("rgba.jp2", encode("JPEG2000", RGBA)),
    Odd("grey.jp2", encode("JPEG2000", PICTURE.convert("L"))),
    Odd("grey_16.jp2", encode("JPEG2000", Image.fromarray(GREY16)), pixels=grey(GREY)),
    Odd("grey_alpha.jp2", encode("JPEG2000", LA), check=DECODE),
    Odd("cut.jp2", encode("JPEG2000")[:-5], CUT),
    Odd("rgb.ppm", encode("PPM")),
    Odd("grey.pgm", encode("PPM", PICTURE.convert("L"))),
    Odd("rgb_16.ppm", netpbm(6, 65535, RGB16)),
    Odd("up_to_100.ppm", netpbm(6, 100, RGB // 3), pixels=RGB // 3),  # the decoder does not scale it
    Odd("cut.ppm", encode("PPM")[:-50], CUT),
    # What is none of these
    Odd("empty.jpg", b"", EMPTY),
    Odd("zeros.jpg", bytes(5000), HEADER),
    Odd("text.jpg", b"hello\n", HEADER),
    Odd("html.jpg", b"<!doctype html><html>404 Not Found</html>", HEADER),
    Odd("gif.jpg", encode("GIF"), FORMAT),
    Odd("film_gif.png", film("GIF"), FORMAT),
    Odd("avif.jpg", encode("AVIF"), FORMAT),
    Odd("icon.png", encode("ICO", sizes=[(16, 16)]), FORMAT),
    Odd("heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), HEADER),
    Odd("drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='5' height='5'></svg>", HEADER),
    # Names
    Odd("two words.jpg", JPEG),
    Odd("été.jpg", JPEG),
    Odd("日本.jpg", JPEG),
    Odd("\N{CAT FACE}.jpg", JPEG),
    Odd("line\nbreak.jpg", JPEG),
    Odd(os.fsdecode(b"caf\xe9\xff.jpg"), JPEG),
    Odd("a'b\"c$(d);e.jpg", JPEG),
)
GOOD = [odd for odd in ODD if odd.checked == Status.OK]
IGNORED = {"film.gif": film("GIF"), "picture.avif": encode("AVIF"), "notes.txt": b"", "no_extension": JPEG}
IGNORED |= {".hidden.jpg": JPEG, "._mac.jpg": JPEG}
LINKS = {"dangling.jpg": "nowhere.jpg", "loop.jpg": "loop.jpg", "linked.jpg": "plain.jpg"}


def expected(odd: Odd) -> NDArray[np.uint8]:
    """What Pillow makes of it: turned as EXIF says, alpha dropped."""
    if isinstance(odd.pixels, np.ndarray):
        return odd.pixels
    with Image.open(io.BytesIO(odd.data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for name in ("odd", "other"):
        (root / name).mkdir()
        (root / name / "0.jpg").write_bytes(JPEG)
    for name, data in {**{odd.name: odd.data for odd in ODD}, **IGNORED}.items():
        (root / "odd" / name).write_bytes(data)
    for name, target in LINKS.items():
        (root / "odd" / name).symlink_to(target)
    os.mkfifo(root / "odd" / "pipe.jpg")
    (root / "odd" / "folder.jpg").mkdir()
    return root


@pytest.fixture(scope="module")
def built(folder: Path) -> Index:
    return build(folder)


@pytest.fixture(scope="module")
def checked(built: Index) -> Index:
    with quiet_decoder():
        return check(built, threads=2).index


def statuses(index: Index) -> dict[str, Status]:
    found = {index.name(row): Status(index.status[row]) for row in range(len(index))}
    del found["other/0.jpg"], found["odd/0.jpg"]
    return {name.removeprefix("odd/"): status for name, status in found.items()}


ENTRIES = {"dangling.jpg": UNREADABLE, "loop.jpg": UNREADABLE, "pipe.jpg": UNREADABLE, "linked.jpg": Status.OK}


def test_the_table_is_long_enough_and_names_are_unique() -> None:
    assert len({odd.name for odd in ODD}) == len(ODD) >= 100
    assert len(GOOD) >= 60


def test_index(built: Index) -> None:
    assert statuses(built) == {odd.name: odd.index for odd in ODD} | ENTRIES
    # Hidden files are not even counted.
    assert built.ignored == len(IGNORED) - 2


def test_check(built: Index, checked: Index) -> None:
    """Only the decoder's own refusals are new; they keep their row."""
    assert statuses(checked) == {odd.name: odd.checked for odd in ODD} | ENTRIES
    assert checked.fingerprint != built.fingerprint
    assert checked.blob == built.blob


def test_shapes_are_those_of_the_decoded_images(built: Index) -> None:
    shapes = {built.name(row): (built.heights[row], built.widths[row]) for row in range(len(built))}
    for odd in GOOD:
        assert odd.pixels is None or shapes[f"odd/{odd.name}"] == expected(odd).shape[:2], odd.name


def test_pixels() -> None:
    """The training decoder gives Pillow's pixels, or those that the table says."""
    requests = []
    for odd in GOOD:
        shape = (make.HEIGHT, make.WIDTH) if odd.pixels is None else expected(odd).shape[:2]
        requests.append(dali.Request([odd.name], [np.frombuffer(odd.data, np.uint8)], np.array([shape])))
    decoder = dali.Decoder(1, 1, torch.device("cpu"), lambda request, bad: pytest.fail(f"{request.names}: {bad}"))
    with quiet_decoder():
        decoded = [images[0].numpy().astype(int) for _, images in dali.decoded(iter(requests), decoder)]
    for odd, pixels in zip(GOOD, decoded, strict=True):
        if odd.pixels is None:
            continue
        wanted = expected(odd).astype(int)
        assert pixels.shape == wanted.shape, odd.name
        # One level where 16 bits become 8, in greys and in a TIFF's palette.
        assert np.abs(pixels - wanted).max() <= 1, odd.name


def test_16_bit_grey_is_scaled_where_pillow_clips() -> None:
    """The one kind of file that is better off here than in a loader on Pillow."""
    data = next(odd.data for odd in ODD if odd.name == "grey_16.png")
    with Image.open(io.BytesIO(data)) as image:
        assert np.asarray(image.convert("RGB")).min() == 255


def test_one_epoch_of_training_takes_every_good_file(checked: Index) -> None:
    still = AugmentConfig(flip=0, jitter=0, grayscale=0, global_blur=0, global_solarize=0)
    data = DataConfig(threads=2, global_size=16, global_scale=(1.0, 1.0), local_crops=0, last_batch="pad")
    rows = checked.rows("train", 0.0)
    plan = Plan(0, 8, rows, checked.heights, checked.widths, data, still)
    steps = plan.steps_per_epoch
    seen: dict[int, torch.Tensor] = {}
    with (
        quiet_decoder(),
        TrainLoader(checked, plan, data, device="cpu", dtype=torch.float32, start=0, stop=steps) as loader,
    ):
        for batch in loader:
            seen.update(zip(batch.samples.tolist(), batch.crops[0], strict=True))
    assert sorted(seen) == rows.tolist()
    assert all(crop.isfinite().all() for crop in seen.values())
    # A crop covers nearly all of a picture, so that its mean level is near the picture's.
    names = {f"odd/{odd.name}": odd for odd in GOOD if odd.pixels is not None and "wide" not in odd.name}
    mean, std = (torch.tensor(values).view(3, 1) for values in (data.mean, data.std))
    for row, crop in seen.items():
        if odd := names.get(checked.name(row)):
            level = (crop.flatten(1) * std + mean).mean(1) * 255
            wanted = torch.tensor(expected(odd).mean((0, 1)))
            assert (level - wanted).abs().max() < 30, odd.name


def test_a_bomb_is_refused_without_being_decoded(tmp_path: Path) -> None:
    """Time and memory of index and check together, in a process of their own."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(JPEG)
    (tmp_path / "a" / "bomb.png").write_bytes(png(30000, 30000, 1, 0, bytes(30000 * 3751)))
    code = (
        "import sys, resource, time; from fastrex.data.check import check; from fastrex.data.index import build\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "check(build(sys.argv[1], empty_classes='error')); before = peak(), time.perf_counter()\n"
        "result = check(build(sys.argv[1])); print(len(result.bad), result.bad[0].reason, sep='|')\n"
        "print(peak() - before[0], time.perf_counter() - before[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "1|more than 178956970 pixels"
    memory, seconds = map(float, second.split())
    assert memory < 50
    assert seconds < 5  # decoding it takes 46


def test_a_file_without_permission() -> None:
    """Root may read every file, so that the test becomes nobody for a moment."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for folder in "ab":
            (root / folder).mkdir()
            (root / folder / "0.jpg").write_bytes(JPEG)
        locked = root / "a" / "locked.jpg"
        locked.write_bytes(JPEG)
        locked.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            built = build(root)
        finally:
            os.seteuid(user)
    assert [(name, "no permission" in reason) for name, reason in built.bad()] == [("a/locked.jpg", True)]


def test_the_header_of_a_png_says_what_the_table_means() -> None:
    bomb = next(odd.data for odd in ODD if odd.name == "bomb.png")
    assert struct.unpack(">II", bomb[16:24]) == (30000, 30000)
    assert len(bomb) < 200
