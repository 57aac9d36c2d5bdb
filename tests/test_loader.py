"""The loaders: the same batches however they are made, errors that reach the consumer, no thread left behind."""

from __future__ import annotations

import dataclasses
import importlib
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrex.config import AugmentConfig, DataConfig
from fastrex.data import dali
from fastrex.data import plan as planner
from fastrex.data.ahead import Ahead
from fastrex.data.index import Index, build
from fastrex.data.loader import Batch, EvalLoader, TrainLoader
from fastrex.data.plan import Plan
from fastrex.data.synthetic import SyntheticLoader
from fastrex.errors import FastrexError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

op = importlib.import_module("fastrex_kernels.augment")  # the package re-exports a function of the same name
DATA = DataConfig(
    threads=2, global_size=24, local_crops=2, local_size=16, eval_resize=24, eval_size=20, local_scale=(0.1, 0.3)
)
AUGMENT = AugmentConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of seven JPEGs with a gradient of their own each, of different sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir()
        for i in range(7):
            coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            size = (int(random.integers(20, 60)), int(random.integers(20, 60)))
            coarse.resize(size, Image.Resampling.BICUBIC).save(root / name / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return build(folder)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def make_plan(index: Index, batch_size: int = 4, data: DataConfig = DATA) -> Plan:
    return Plan(7, batch_size, index.rows("train", 0.0), index.heights, index.widths, data, AUGMENT)


def load(index: Index, data: DataConfig = DATA, *, start: int = 0, stop: int = 7, **options: int) -> list[Batch]:
    plan = make_plan(index)
    with TrainLoader(
        index, plan, data, device="cpu", dtype=torch.float32, start=start, stop=stop, **options
    ) as batches:
        return list(batches)


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.epoch, one.step, one.micro) == (other.epoch, other.step, other.micro)
        assert np.array_equal(one.samples, other.samples)
        assert torch.equal(one.target, other.target)
        assert all(torch.equal(a, b) for a, b in zip(one.crops, other.crops, strict=True))


def test_batches_have_the_promised_shapes_and_labels(index: Index) -> None:
    batches = load(index)
    assert [(batch.epoch, batch.step, batch.plan.step) for batch in batches] == [
        *((0, step, step) for step in range(5)),
        (1, 5, 0),
        (1, 6, 1),
    ]
    for batch in batches:
        large, small = batch.crops
        assert large.shape == (4, 3, 24, 24)
        assert small.shape == (2 * 4, 3, 16, 16)
        for crops in batch.crops:
            assert crops.is_contiguous(memory_format=torch.channels_last)
        assert batch.target.tolist() == index.labels[batch.samples].tolist()
        assert batch.last_micro


def test_crops_are_those_of_the_plan(index: Index) -> None:
    """Each crop, cut by Pillow at its box and augmented alone, is the loader's row k * B + b."""
    (batch,) = load(index, stop=1)
    for crops, group in zip(batch.crops, batch.plan.groups, strict=True):
        side = group.group.size
        for k, b in np.ndindex(group.boxes.shape[:2]):
            top, left, height, width = (int(v) for v in group.boxes[k, b])
            with Image.open(index.path(batch.samples[b])) as image:
                box = (left, top, left + width, top + height)
                cut = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box)
            params = torch.from_numpy(group.params[k, b][None])
            wanted = op.augment(torch.from_numpy(np.array(cut))[None], params, mean=DATA.mean, std=DATA.std)
            # Rounding in the resize, magnified by 1 / std and by the jitters.
            assert (crops[k * len(batch.samples) + b] - wanted[0]).abs().mean() < 0.03


@pytest.mark.parametrize("change", [{"threads": 1}, {"prefetch": 1}, {"prefetch": 4, "threads": 3}])
def test_threads_and_prefetch_change_no_bit(index: Index, change: dict[str, int]) -> None:
    assert_same(load(index), load(index, dataclasses.replace(DATA, **change)))


def test_resume_is_the_tail(index: Index) -> None:
    assert_same(load(index)[3:], load(index, start=3))


def test_a_loader_can_be_iterated_again_also_after_a_break(index: Index) -> None:
    loader = TrainLoader(index, make_plan(index), DATA, device="cpu", dtype=torch.float32, start=0, stop=3)
    for _ in loader:
        break
    with loader:
        assert_same(list(loader), list(loader))


def test_ranks_and_micro_batches_together_are_the_global_batch(index: Index) -> None:
    """The union over two ranks, and over two micro-batches, in order, is one process's batch, bit for bit."""
    for whole, first, second in zip(load(index), *(load(index, rank=r, world=2) for r in (0, 1)), strict=True):
        assert np.array_equal(whole.samples, np.concatenate((first.samples, second.samples)))
        for crops, *parts in zip(whole.crops, first.crops, second.crops, strict=True):
            by_image = [part.unflatten(0, (-1, 2)) for part in parts]
            assert torch.equal(crops.unflatten(0, (-1, 4)), torch.cat(by_image, dim=1))
    micros = load(index, micros=2)
    assert [(batch.step, batch.micro, batch.last_micro) for batch in micros[:4]] == [
        (0, 0, False),
        (0, 1, True),
        (1, 0, False),
        (1, 1, True),
    ]
    for step, whole in enumerate(load(index)):
        assert np.array_equal(whole.samples, np.concatenate([micros[2 * step + m].samples for m in (0, 1)]))


def test_eval_batches_are_in_order_normalised_and_complete(index: Index) -> None:
    rows = index.rows("train", 0.0)[::-1].copy()
    loader = EvalLoader(index, rows, DATA, batch_size=8, device="cpu", dtype=torch.float32)
    batches = list(loader)
    assert [len(images) for images, _, _ in batches] == [8, 8, 5]
    assert len(loader) == 3
    assert np.array_equal(np.concatenate([part for _, _, part in batches]), rows)
    assert torch.cat([target for _, target, _ in batches]).tolist() == index.labels[rows].tolist()
    images = torch.cat([images for images, _, _ in batches])
    assert images.shape == (21, 3, 20, 20)
    levels = (images * torch.tensor(DATA.std).view(3, 1, 1) + torch.tensor(DATA.mean).view(3, 1, 1)) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    assert levels.min() >= -1e-3
    assert levels.max() <= 255.001
    again = torch.cat(
        [images for images, _, _ in EvalLoader(index, rows, DATA, batch_size=21, device="cpu", dtype=torch.float32)]
    )
    assert torch.equal(images, again)


def test_dtype_of_the_crops(index: Index) -> None:
    plan = make_plan(index)
    with TrainLoader(index, plan, DATA, device="cpu", dtype=torch.bfloat16, start=0, stop=1) as loader:
        (batch,) = loader
    assert {crops.dtype for crops in batch.crops} == {torch.bfloat16}
    assert torch.equal(batch.crops[0], load(index, stop=1)[0].crops[0].bfloat16())


def copy_of(folder: Path, destination: Path) -> Path:
    for path in folder.glob("*/*.jpg"):
        (destination / path.parent.name).mkdir(exist_ok=True)
        (destination / path.parent.name / path.name).write_bytes(path.read_bytes())
    return destination


@pytest.mark.parametrize("damage", ["truncated", "removed", "garbage of the same size"])
def test_a_file_damaged_after_indexing_is_named_in_the_consumer(folder: Path, tmp_path: Path, damage: str) -> None:
    root = copy_of(folder, tmp_path)
    index = build(root)
    victim = root / "bee" / "3.jpg"
    content = victim.read_bytes()
    if damage == "removed":
        victim.unlink()
    else:
        victim.write_bytes(content[:-100] if damage == "truncated" else b"\x00" * len(content))
    with (
        TrainLoader(index, make_plan(index), DATA, device="cpu", dtype=torch.float32, start=0, stop=6) as loader,
        pytest.raises(FastrexError) as caught,
    ):
        list(loader)
    message = str(caught.value)
    assert repr(str(victim)) in message
    assert f"run `fastrex data check {root}`" in message
    assert message.count(".jpg") == 1


def test_closing_early_does_not_hang_and_waiting_is_counted(index: Index) -> None:
    loader = TrainLoader(index, make_plan(index), DATA, device="cpu", dtype=torch.float32, start=0, stop=10**6)
    iterator = iter(loader)
    next(iterator)
    assert loader.wait_s > 0
    loader.close()
    loader.close()


def test_arguments_of_the_loaders_are_checked(index: Index) -> None:
    with pytest.raises(ValueError, match="batch_size must be divisible by world x micros, got 4 for 3 x 1"):
        load(index, world=3)
    with pytest.raises(ValueError, match="EvalLoader: batch_size must be positive, got 0"):
        EvalLoader(index, index.rows("train", 0.0), DATA, batch_size=0, device="cpu", dtype=torch.float32)


def test_ahead_works_ahead_but_not_too_far_and_passes_errors_in_order() -> None:
    made: list[int] = []

    def items() -> Generator[int, None, None]:
        for i in range(5):
            made.append(i)
            yield i
        raise OSError("gone")

    ahead = Ahead(items(), 2, "ahead")
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2]  # one taken, two waiting
    assert [next(ahead) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    ahead.close()


def test_the_background_thread_leaves_torchs_threads_to_others() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def items() -> Generator[int, None, None]:
        yield torch.get_num_threads()

    assert list(Ahead(items(), 1, "one")) == [1]
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert torch.get_num_threads() == before
    assert seen == [before]


def test_planner_and_op_agree_on_the_columns() -> None:
    names = ("FLIP", "ORDER", "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "GRAY", "BLUR", "SOLARIZE", "NUM_PARAMS")
    assert [getattr(op, name) for name in names] == [getattr(planner, name) for name in names]
    assert op.OFF[op.SOLARIZE] == planner.SOLARIZE_OFF
    still = dataclasses.replace(AUGMENT, flip=0, jitter=0, grayscale=0, global_blur=0, global_solarize=0)
    group = planner.crop_groups(DATA, still)[0]
    half = np.full((4, 1), 0.5)
    params = planner.draw_params(half, half, half, group, still)
    params[:, planner.ORDER] = 0
    assert params[0].tolist() == list(op.OFF)


def test_synthetic_batches_look_like_real_ones() -> None:
    options = {"device": "cpu", "dtype": torch.float32, "start": 3, "stop": 7, "micros": 2, "world": 2}
    with SyntheticLoader(DATA, AUGMENT, 10, 8, rank=1, steps_per_epoch=4, **options) as loader:
        batches = list(loader)
    assert [(b.epoch, b.step, b.plan.step, b.micro, b.last_micro) for b in batches[:3]] == [
        (0, 3, 3, 0, False),
        (0, 3, 3, 1, True),
        (1, 4, 0, 0, False),
    ]
    assert len(batches) == 8
    large, small = batches[0].crops
    assert large.shape == (2, 3, 24, 24)
    assert small.shape == (4, 3, 16, 16)
    assert large.is_contiguous(memory_format=torch.channels_last)
    assert batches[0].target.shape == (2,)
    other = next(iter(SyntheticLoader(DATA, AUGMENT, 10, 8, rank=0, **options)))
    again = next(iter(SyntheticLoader(DATA, AUGMENT, 10, 8, rank=1, **options)))
    assert torch.equal(large, again.crops[0])
    assert not torch.equal(large, other.crops[0])


def test_an_image_that_a_batch_shows_twice_is_decoded_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated augmentation: the same crops as where every place decodes for itself (DALI's path), up to rounding."""
    sent: list[int] = []
    decoded = dali.decoded

    def counted(requests: Iterator[dali.Request], decoder: dali.Decoder) -> Iterator[object]:
        for request, images in decoded(requests, decoder):
            sent.append(len(images))
            yield request, images

    monkeypatch.setattr(dali, "decoded", counted)
    batches = {}
    for cutter in ("fastrex", "dali"):
        data = dataclasses.replace(DATA, repeats=2, resize=cutter)
        with TrainLoader(
            index, make_plan(index, data=data), data, device="cpu", dtype=torch.float32, start=0, stop=3
        ) as loader:
            batches[cutter] = list(loader)
    assert sent == [2, 2, 2]
    for ours, theirs in zip(batches["fastrex"], batches["dali"], strict=True):
        assert np.array_equal(ours.samples, theirs.samples)
        assert len(set(ours.samples)) == 2
        for a, b in zip(ours.crops, theirs.crops, strict=True):
            assert (a - b).abs().mean() < 0.03
