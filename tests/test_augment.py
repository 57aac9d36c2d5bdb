"""The augment op against Pillow, torchvision and its own promises, in every implementation of the CPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import environment
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torchvision_shim import import_torchvision

from fastrex_kernels import _cpp
from fastrex_kernels.augment import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    NUM_PARAMS,
    OFF,
    ORDER,
    SATURATION,
    SOLARIZE,
    augment,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORDERS = tuple(itertools.permutations(range(4)))
CPP = pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded"))
both = pytest.mark.parametrize("impl", ["reference", CPP])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Photographs and smooth random fields, uint8 [n, 96, 96, 3]: noise alone would hide a wrong blur or hue."""
    root = os.environ.get("FASTREX_TEST_DATA")
    if not root or not (Path(root) / "imagenet-sample").is_dir():
        pytest.skip("FASTREX_TEST_DATA has no imagenet-sample")
    files = sorted((Path(root) / "imagenet-sample").glob("n*/*.JPEG"))[::34]
    photos = [np.asarray(ImageOps.fit(Image.open(file).convert("RGB"), (96, 96))) for file in files]
    coarse = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    fields = [np.asarray(Image.fromarray(field).resize((96, 96), Image.Resampling.BICUBIC)) for field in coarse]
    return np.stack(photos + fields)


def table(count: int, **values: float) -> Tensor:
    params = torch.tensor(OFF).repeat(count, 1)
    for name, value in values.items():
        params[:, globals()[name]] = value
    return params


def levels(images: np.ndarray, params: Tensor, impl: str, channels: int = 3) -> np.ndarray:
    """The op's result on the scale 0..255, [N, H, W, channels]."""
    rows = torch.from_numpy(images)
    out = augment(rows, params, mean=(0, 0, 0), std=(1, 1, 1), channels=channels, impl=impl)
    return out.permute(0, 2, 3, 1).numpy() * 255


def errors(
    images: np.ndarray, params: Tensor, impl: str, pillow: Callable[[Image.Image], Image.Image]
) -> tuple[float, float]:
    wanted = np.stack([np.asarray(pillow(Image.fromarray(image))) for image in images]).astype(np.float32)
    difference = np.abs(levels(images, params, impl) - wanted)
    return float(difference.mean()), float(np.percentile(difference, 99))


def hue_turn(image: Image.Image, steps: int) -> Image.Image:
    """Turn by whole steps of Pillow's 8-bit hue, 255 to the turn."""
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(int) + steps) % 255
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


OPS: list[tuple[str, dict[str, float], Callable[[Image.Image], Image.Image]]] = [
    ("flip", {"FLIP": 1}, ImageOps.mirror),
    ("gray", {"GRAY": 1}, lambda image: image.convert("L").convert("RGB")),
    ("solarize 128", {"SOLARIZE": 128}, lambda image: ImageOps.solarize(image, 128)),
    ("solarize 0", {"SOLARIZE": 0}, ImageOps.invert),
    *(
        (f"brightness {f}", {"BRIGHTNESS": f}, lambda image, f=f: ImageEnhance.Brightness(image).enhance(f))
        for f in (0, 0.6, 1.4)
    ),
    *(
        (f"contrast {f}", {"CONTRAST": f}, lambda image, f=f: ImageEnhance.Contrast(image).enhance(f))
        for f in (0, 0.6, 1.4)
    ),
    *(
        (f"saturation {f}", {"SATURATION": f}, lambda image, f=f: ImageEnhance.Color(image).enhance(f))
        for f in (0, 0.8, 1.4)
    ),
    *((f"hue {s}", {"HUE": s / 255}, lambda image, s=s: hue_turn(image, s)) for s in (-120, -26, 10, 26)),
    *(
        (f"blur {r}", {"BLUR": r}, lambda image, r=r: image.filter(ImageFilter.GaussianBlur(r)))
        for r in (0.1, 0.5, 1, 1.4, 1.5, 2)
    ),
]


@both
@pytest.mark.parametrize(("values", "pillow"), [op[1:] for op in OPS], ids=[op[0] for op in OPS])
def test_each_op_is_pillows(
    images: np.ndarray, values: dict[str, float], pillow: Callable[[Image.Image], Image.Image], impl: str
) -> None:
    mean, p99 = errors(images, table(len(images), **values), impl, pillow)
    assert mean <= 1
    assert p99 <= 3


@both
@pytest.mark.parametrize("values", [{"FLIP": 1}, {"SOLARIZE": 128}, {"SOLARIZE": 256}])
def test_ops_without_arithmetic_are_exact(images: np.ndarray, values: dict[str, float], impl: str) -> None:
    pillow = ImageOps.mirror if "FLIP" in values else lambda image: ImageOps.solarize(image, values["SOLARIZE"])
    assert errors(images, table(len(images), **values), impl, pillow)[0] < 1e-4


def pillow_chain(image: Image.Image, row: list[float]) -> Image.Image:
    if row[FLIP]:
        image = ImageOps.mirror(image)
    jitters = (
        lambda image: ImageEnhance.Brightness(image).enhance(row[BRIGHTNESS]),
        lambda image: ImageEnhance.Contrast(image).enhance(row[CONTRAST]),
        lambda image: ImageEnhance.Color(image).enhance(row[SATURATION]),
        lambda image: hue_turn(image, round(row[HUE] * 255)),
    )
    for op in ORDERS[int(row[ORDER])]:
        image = jitters[op](image)
    if row[GRAY]:
        image = image.convert("L").convert("RGB")
    if row[BLUR]:
        image = image.filter(ImageFilter.GaussianBlur(row[BLUR]))
    return ImageOps.solarize(image, row[SOLARIZE]) if row[SOLARIZE] < 256 else image


def draws(count: int, seed: int = 0, *, solarize: bool = False) -> Tensor:
    """Rows as a plan would draw them, with every order in turn and hues that Pillow's 8 bits can hold."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, NUM_PARAMS, generator=generator)
    params = table(count)
    params[:, FLIP] = (uniform[:, FLIP] < 0.5).float()
    jittered = uniform[:, ORDER] < 0.8
    params[:, ORDER] = torch.arange(count) % 24
    for column, strength in ((BRIGHTNESS, 0.4), (CONTRAST, 0.4), (SATURATION, 0.2)):
        params[jittered, column] = 1 + strength * (2 * uniform[jittered, column] - 1)
    params[jittered, HUE] = (uniform[jittered, HUE] * 51 - 25.5).round() / 255
    params[:, GRAY] = (uniform[:, GRAY] < 0.2).float()
    params[:, BLUR] = torch.where(uniform[:, BLUR] < 0.5, uniform[:, BLUR] * 4, 0)
    if solarize:
        params[:, SOLARIZE] = torch.where(uniform[:, SOLARIZE] < 0.5, 128, 256)
    return params


@both
def test_whole_chain_is_pillows(images: np.ndarray, impl: str) -> None:
    """Without solarisation, whose jump at the threshold turns a rounding into any difference."""
    rows = 72
    many = images[np.arange(rows) % len(images)]
    params = draws(rows)
    wanted = np.stack(
        [np.asarray(pillow_chain(Image.fromarray(i), r)) for i, r in zip(many, params.tolist(), strict=True)]
    )
    assert np.abs(levels(many, params, impl) - wanted).mean() <= 2


@both
def test_one_channel_is_pillows_mode_l(images: np.ndarray, impl: str) -> None:
    """The same draws on grey images: what only turns or takes away colour does nothing there."""
    rows = 48
    many = images[np.arange(rows) % len(images)]
    params = draws(rows, 1)
    pillow = params.clone()
    pillow[:, [SATURATION, HUE, GRAY]] = torch.tensor([1.0, 0, 0])
    wanted = [
        np.asarray(pillow_chain(Image.fromarray(image).convert("L").convert("RGB"), row))[..., :1]
        for image, row in zip(many, pillow.tolist(), strict=True)
    ]
    got = levels(many, params, impl, channels=1)
    assert got.shape == (rows, 96, 96, 1)
    assert np.abs(got - np.stack(wanted)).mean() <= 2
    flipped = levels(images, table(len(images), FLIP=1), impl, channels=1)
    gray = np.stack([np.asarray(ImageOps.mirror(Image.fromarray(image)).convert("L")) for image in images])
    assert np.abs(flipped[..., 0] - gray).max() <= 0.51


@both
def test_one_channel_has_the_average_normalisation(impl: str) -> None:
    rows = torch.full((1, 2, 2, 3), 51, dtype=torch.uint8)
    got = augment(rows, table(1), mean=(0.1, 0.2, 0.6), std=(0.2, 0.2, 0.5), channels=1, impl=impl)
    assert np.allclose(got, (0.2 - 0.3) / 0.3)


@both
def test_solarisation_comes_last(images: np.ndarray, impl: str) -> None:
    params = table(len(images), BRIGHTNESS=1.4, SOLARIZE=128, BLUR=1)
    without = levels(images, table(len(images), BRIGHTNESS=1.4, BLUR=1), impl)
    assert np.allclose(levels(images, params, impl), np.where(without >= 128, 255 - without, without), atol=1e-3)


@both
@pytest.mark.parametrize("order", range(0, 24, 5))
def test_jitter_is_torchvisions(images: np.ndarray, order: int, impl: str) -> None:
    import_torchvision()
    from torchvision.transforms import functional

    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    factors = (0.8, 1.3, 1.2, 20.5 / 255)  # torchvision truncates the turn to steps of 1/255

    def torchvision(image: Image.Image) -> Image.Image:
        for op in ORDERS[order]:
            image = adjust[op](image, factors[op])
        return image

    params = table(len(images), ORDER=order, BRIGHTNESS=0.8, CONTRAST=1.3, SATURATION=1.2, HUE=20 / 255)
    assert errors(images, params, impl, torchvision)[0] <= 2


@both
def test_off_is_torchvisions_normalisation(images: np.ndarray, impl: str) -> None:
    rows = torch.from_numpy(images)
    wanted = (rows.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    for order in (0, 23):
        got = augment(rows, table(len(rows), ORDER=order), mean=MEAN, std=STD, impl=impl)
        # The kernels multiply and add once, the definition has the same bits.
        assert torch.equal(got, wanted) if impl == "reference" else (got - wanted).abs().max() < 1e-6
        assert got.is_contiguous(memory_format=torch.channels_last)


@both
def test_hue_is_the_rotation_of_hsv(impl: str) -> None:
    """A third of a turn permutes the channels; a whole half twice is the identity; grey has no hue."""
    rows = torch.randint(0, 256, (2, 5, 7, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    rows[:, 0] = rows[:, 0, :, :1]
    third = levels(rows.numpy(), table(2, HUE=1 / 3), impl)
    assert np.allclose(third, rows.numpy()[..., [2, 0, 1]], atol=1e-3)
    half = levels(rows.numpy(), table(2, HUE=0.5), impl)
    assert np.allclose(half, levels(rows.numpy(), table(2, HUE=-0.5), impl), atol=1e-3)
    assert np.allclose(half[:, 0], rows.numpy()[:, 0], atol=1e-3)


@both
@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_depends_on_itself_alone(channels: int, impl: str) -> None:
    """Bitwise: another batch, another order of rows, a piece of its own change nothing. Odd sides leave odd tails."""
    rows = torch.randint(0, 256, (60, 37, 51, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    params = draws(60, 3, solarize=True)

    def run(rows: Tensor, params: Tensor) -> Tensor:
        return augment(rows, params, mean=MEAN, std=STD, channels=channels, impl=impl)

    whole = run(rows, params)
    assert torch.equal(whole, run(rows.flip(0), params.flip(0)).flip(0))
    pieces = zip(rows.split(7), params.split(7), strict=True)
    assert torch.equal(whole, torch.cat([run(*piece) for piece in pieces]))


@both
def test_float32_agrees_with_float64(impl: str) -> None:
    rows = torch.randint(0, 256, (96, 24, 20, 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    params = draws(96, 5)
    exact = augment(rows, params, mean=MEAN, std=STD, dtype=torch.float64)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, augment(rows, params.double(), mean=MEAN, std=STD, dtype=torch.float64))
    error = (augment(rows, params, mean=MEAN, std=STD, impl=impl) - exact).abs()
    # The mean grey of a contrast may round the other way: half a level in 255, but in few rows.
    assert error.max() < 0.02
    assert error.quantile(0.9) < 1e-5


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_dtypes_round_once_at_the_end(dtype: torch.dtype, impl: str) -> None:
    rows = torch.randint(0, 256, (24, 9, 8, 3), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    params = draws(24, 7, solarize=True)
    got = augment(rows, params, mean=MEAN, std=STD, dtype=dtype, impl=impl)
    assert torch.equal(got, augment(rows, params, mean=MEAN, std=STD, impl=impl).to(dtype))


@both
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_is_a_part_of_a_larger_batch(channels: int, dtype: torch.dtype, impl: str) -> None:
    rows = torch.randint(0, 256, (5, 9, 19, 3), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    params = draws(5, 9)
    options: dict[str, Any] = {"mean": MEAN, "std": STD, "channels": channels, "impl": impl}
    batch = torch.full((16, 9, 19, channels), 7, dtype=dtype).permute(0, 3, 1, 2)
    part = batch[3:13:2]
    assert augment(rows, params, out=part, **options) is part
    assert torch.equal(part, augment(rows, params, dtype=dtype, **options))
    others = [n for n in range(16) if n not in range(3, 13, 2)]
    assert bool((batch[others] == 7).all())


@both
def test_edge_shapes(impl: str) -> None:
    """No rows; one pixel, smaller than any blur; and the input stays as it was."""
    empty = torch.empty(0, 4, 4, 3, dtype=torch.uint8)
    assert augment(empty, table(0), mean=MEAN, std=STD, impl=impl).shape == (0, 3, 4, 4)
    dot = torch.tensor([10, 200, 90], dtype=torch.uint8).view(1, 1, 1, 3)
    before = dot.clone()
    assert np.allclose(levels(dot.numpy(), table(1, BLUR=2, FLIP=1), impl), [10, 200, 90], atol=1e-3)
    assert torch.equal(dot, before)


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = """
import sys, torch
from fastrex_kernels import _cpp
if not _cpp.LOADED:
    for path in sys.argv[1:]: torch.ops.load_library(path)
    _cpp.LOADED = True
from fastrex_kernels.augment.cases import OP
for case in OP.cases:
    if case.bench: continue
    for dtype in OP.dtypes:
        call = OP.make(case.sizes, dtype, "cpu", 1)
        exact = OP.function(**call.tensors, **{**call.options, "dtype": torch.float64})
        got = OP.function(**call.tensors, **call.options, impl="cpp")
        error = (got - exact).abs().amax(dim=(1, 2, 3)) if len(got) else torch.zeros(1)
        # A mean grey that rounds the other way, or a pixel that is solarised, is no error of the instruction set.
        bound = 2e-5 + 3 * torch.finfo(dtype).eps
        assert (error > bound).sum() <= len(got) // 20, (case.name, dtype, error)
"""
    env = {**environment(), "FASTREX_ISA": isa}
    command = [sys.executable, "-W", "ignore", "-c", code, *torch.ops.loaded_libraries]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


ROWS = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
OUT = torch.zeros(2, 4, 4, 3).permute(0, 3, 1, 2)


@both
@pytest.mark.parametrize(
    ("rows", "params", "options", "error", "message"),
    [
        (ROWS[0], table(2), {}, ValueError, r"images must be \[N, H, W, 3\], got \(4, 4, 3\)"),
        (ROWS.permute(0, 3, 1, 2), table(2), {}, ValueError, "permute channels to the end"),
        (ROWS.float(), table(2), {}, TypeError, "images must be uint8, got torch.float32"),
        (ROWS[:, :0], table(2), {}, ValueError, "at least one pixel"),
        (ROWS, table(3), {}, ValueError, r"params must be \[2, 9\], got \(3, 9\)"),
        (ROWS, table(2).double(), {}, TypeError, "params must be float32, got torch.float64"),
        (ROWS, table(2), {"std": (1, 1)}, ValueError, "mean and std must have 3 values"),
        (ROWS, table(2), {"std": (1, 0, 1)}, ValueError, "std must be positive"),
        (ROWS, table(2), {"dtype": torch.uint8}, TypeError, "dtype must be one of"),
        (ROWS, table(2), {"impl": "fast"}, ValueError, "impl must be one of"),
        (ROWS, table(2), {"channels": 2}, ValueError, "channels must be 3 or 1, got 2"),
        (ROWS, table(2), {"out": OUT[:1]}, ValueError, r"out must be \[2, 3, 4, 4\], got \(1, 3, 4, 4\)"),
        (ROWS, table(2), {"out": OUT.contiguous()}, ValueError, "rows of out must be channels-last"),
        (ROWS, table(2), {"out": OUT[:1].expand(2, 3, 4, 4)}, ValueError, "rows of out must be channels-last"),
        (ROWS, table(2), {"out": OUT.int()}, TypeError, "out must be one of"),
        (ROWS, table(2, HUE=0.6), {}, ValueError, r"column HUE must be in \[-0.5, 0.5\], got 0.6"),
        (ROWS, table(2, ORDER=24), {}, ValueError, "column ORDER must be in"),
        (ROWS, table(2, BLUR=float("nan")), {}, ValueError, "column BLUR must be in"),
    ],
)
def test_arguments_are_checked(
    rows: Tensor, params: Tensor, options: dict[str, Any], error: type[Exception], message: str, impl: str
) -> None:
    with pytest.raises(error, match=message):
        augment(rows, params, **{"mean": MEAN, "std": STD, "impl": impl, **options})


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "loaded")
def test_the_kernels_do_not_take_float64() -> None:
    with pytest.raises(ValueError, match="impl='cpp' takes float32, bfloat16, float16"):
        augment(ROWS, table(2), mean=MEAN, std=STD, dtype=torch.float64, impl="cpp")
