"""mixup and CutMix: whom the plan pairs and how, what the loader makes of it, and trainings with it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import settings_for
from numpy.typing import NDArray
from test_distributed import distance, run

import fastrex
from fastrex import config as c
from fastrex.config import AugmentConfig, DataConfig
from fastrex.data import mixes, show
from fastrex.data.dataset import check_batch
from fastrex.data.draws import philox
from fastrex.data.index import Index, build
from fastrex.data.loader import Batch, TrainLoader
from fastrex.data.mixes import MixPlan, draw_mixes
from fastrex.data.mixing import mix_, mix_targets, weights
from fastrex.data.plan import MIX_PURPOSE, Plan
from fastrex.distributed import World
from fastrex.errors import FastrexError

BOTH = AugmentConfig(mixup=0.2, cutmix=1.0)
DATA = DataConfig(threads=2, global_size=24, local_crops=2, local_size=16, local_scale=(0.1, 0.3))


def make_plan(count: int = 64, batch: int = 16, augment: AugmentConfig = BOTH, **data: Any) -> Plan:
    labels = np.arange(count, dtype=np.int32) % 4
    sides = np.full(count, 300, np.int32)
    return Plan(7, batch, np.arange(count), sides, sides, DataConfig(**data), augment, labels=labels)


def mix_of(plan: Plan, epoch: int, step: int, **share: int) -> MixPlan:
    mix = plan.batch(epoch, step, **share).mix
    assert mix is not None
    return mix


def joined(parts: list[MixPlan]) -> list[bytes]:
    return [
        np.concatenate([getattr(part, name) for part in parts]).tobytes()
        for name in ("own_shares", "own_cuts", "boxes", "cut", "shares")
    ]


@pytest.mark.parametrize(("world", "micros"), [(2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("repeats", [1, 2])
def test_shares_of_ranks_and_micro_batches_join_to_the_global_batch(world: int, micros: int, repeats: int) -> None:
    whole = mix_of(make_plan(repeats=repeats), 2, 1)
    parts = [
        mix_of(make_plan(repeats=repeats), 2, 1, rank=rank, world=world, micro=micro, micros=micros)
        for micro in range(micros)
        for rank in range(world)
    ]
    assert joined(parts) == joined([whole])
    size = 16 // (world * micros)
    partners = [part.partners + number * size for number, part in enumerate(parts)]
    assert np.array_equal(np.concatenate(partners), whole.partners)


def test_a_pairs_draw_depends_on_seed_epoch_and_place_alone() -> None:
    plan = make_plan()
    first = joined([mix_of(plan, 1, 2)])
    assert joined([mix_of(make_plan(), 1, 2)]) == first
    # Other images, and batches of another size, over the same places.
    assert joined([mix_of(make_plan(count=640, batch=8), 1, step) for step in (4, 5)]) == first
    seen = {bytes(joined([mix_of(plan, epoch, step)])[0]) for epoch in (0, 1, 2) for step in range(4)}
    assert len(seen) == 12
    other = Plan(8, 16, plan.samples, plan.heights, plan.widths, plan.data, BOTH)
    assert joined([mix_of(other, 1, 2)]) != first


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_partners_are_mutual_and_never_two_views_of_one_image(repeats: int, sampling: str) -> None:
    plan = make_plan(count=48, batch=12, repeats=repeats, sampling=sampling)
    for step in range(plan.steps_per_epoch):
        batch = plan.batch(0, step)
        assert batch.mix is not None
        partners = batch.mix.partners
        assert np.array_equal(partners[partners], np.arange(12))
        assert np.abs(partners - np.arange(12)).tolist() == [repeats] * 12
        assert (batch.samples != batch.samples[partners]).all()
        # All views of an image meet views of the same other one, each in its own way.
        assert np.array_equal(batch.views % repeats, batch.views[partners] % repeats)


@pytest.mark.parametrize("repeats", [1, 2])
def test_balanced_partners_are_of_other_classes(repeats: int) -> None:
    """Four classes here, in blocks that no pair crosses."""
    words = "data.sampling=balanced: images are mixed with those of other classes alone"
    alike = {}
    for sampling in ("balanced", "uniform"):
        plan = make_plan(count=240, batch=12, repeats=repeats, sampling=sampling)
        assert (words in plan.notices()) == (sampling == "balanced")
        classes = [plan.batch(0, step).samples % 4 for step in range(plan.steps_per_epoch)]
        partners = mix_of(plan, 0, 0).partners
        alike[sampling] = sum(int((rows == rows[partners]).sum()) for rows in classes)
    assert alike["balanced"] == 0
    assert alike["uniform"] > 0


def test_mixing_changes_no_other_draw_and_is_none_where_it_is_off() -> None:
    mixed, plain = make_plan().batch(1, 2), make_plan(augment=AugmentConfig()).batch(1, 2)
    assert plain.mix is None
    assert np.array_equal(mixed.samples, plain.samples)
    for one, other in zip(mixed.groups, plain.groups, strict=True):
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.params, other.params)


def test_the_log_says_how_images_are_mixed() -> None:
    (both,) = make_plan().notices()
    wanted = "images are mixed in pairs: mixup 0.2 or CutMix 1 (CutMix with probability 0.5); train/top1 is of the "
    assert both == f"{wanted}larger share"
    one = make_plan(augment=AugmentConfig(mixup=0.4)).notices()
    assert one == ["images are mixed in pairs: mixup 0.4; train/top1 is of the larger share"]
    assert make_plan(augment=AugmentConfig()).notices() == []


def draws(count: int, seed: int = 11, **augment: float) -> MixPlan:
    return draw_mixes(seed, 0, 0, 2 * count, 1, MIX_PURPOSE, AugmentConfig(**augment), 224)


@pytest.mark.parametrize("a", [0.01, 0.2, 0.5, 1.0])
def test_shares_have_the_moments_of_their_beta_distribution(a: float) -> None:
    """Mean 1/2, variance 1/(4(2a+1)), and E|s - 1/2|^4 = 3/(16(2a+1)(2a+3)); within four standard errors."""
    count = 40000
    shares = draws(count, mixup=a).shares.astype(np.float64) - 0.5
    moments = {1: 0.0, 2: 1 / (4 * (2 * a + 1)), 4: 3 / (16 * (2 * a + 1) * (2 * a + 3))}
    eighth = 105 / (256 * (2 * a + 1) * (2 * a + 3) * (2 * a + 5) * (2 * a + 7))
    errors = {1: moments[2], 2: moments[4] - moments[2] ** 2, 4: eighth - moments[4] ** 2}
    for power, expected in moments.items():
        assert abs((shares**power).mean() - expected) < 4 * math.sqrt(errors[power] / count) + 1e-12


def scalar_johnk(a: float, numbers: list[tuple[float, float]]) -> float:
    """The method as it is written, on Python's numbers."""
    for u, v in numbers:
        x, y = u ** (1 / a), v ** (1 / a)
        if x + y <= 1:
            return x / (x + y)
    return 0.5


def test_beta_is_johnks_method_and_gives_a_half_where_all_tries_fail() -> None:
    random = np.random.default_rng(0)
    numbers = random.random((2, 4, 300))
    numbers[:, :, 7] = 0.999
    a = np.repeat([0.3, 0.7, 1.0], 100)
    wanted = [scalar_johnk(a[i], list(zip(*(numbers[:, :, i] + 2.0**-33), strict=True))) for i in range(300)]
    found = mixes.beta(a, numbers)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found[7] == 0.5
    # Powers far below the smallest double.
    tiny = mixes.beta(np.array([1e-4, 1e-4]), np.array([[[0.5, 0.0]], [[0.25, 0.0]]]))
    assert tiny.tolist() == [1.0, 0.5]


def test_tries_come_from_the_counters_of_their_pair() -> None:
    (epoch, pair), seed = (3, 5), 11
    words = [philox(np.array([pair, block, epoch, MIX_PURPOSE], np.uint64), seed) / 2**32 for block in range(9)]
    tries = [(w[0], w[1]) for w in words[1:]] + [(w[2], w[3]) for w in words[1:]]
    plan = draw_mixes(seed, epoch, 8, 8, 1, MIX_PURPOSE, AugmentConfig(mixup=0.4), 224)
    assert plan.shares[pair - 4] == pytest.approx(scalar_johnk(0.4, tries), rel=1e-6)


def test_cutmix_pastes_a_uniform_share_around_a_uniform_middle() -> None:
    plan = draws(20000, cutmix=1.0)
    assert plan.cut.all()
    top, left, bottom, right = plan.boxes.T
    assert min(top.min(), left.min()) >= 0
    assert max(bottom.max(), right.max()) <= 1
    whole = (top > 0) & (left > 0) & (bottom < 1) & (right < 1)  # not clipped: square, as the crop
    assert (bottom - top)[whole] == pytest.approx((right - left)[whole], abs=1e-9)
    # Of a side s = sqrt(u) around a uniform middle the crop has s - s^2 / 4 on average, along each axis by itself.
    sides = np.sqrt(np.linspace(0, 1, 200001))
    expected = ((sides - sides**2 / 4) ** 2).mean()
    pasted = (bottom - top) * (right - left)
    assert abs(pasted.mean() - expected) < 4 * pasted.std() / math.sqrt(len(pasted))
    middle = ((top + bottom) / 2)[whole]
    assert abs(middle.mean() - 0.5) < 4 * middle.std() / math.sqrt(len(middle))


@pytest.mark.parametrize(("mixup", "cutmix", "switch", "share"), [(0.2, 0, 0.9, 0), (0, 1, 0.1, 1), (0.2, 1, 0.3, 0.3)])
def test_which_of_the_two_it_is(mixup: float, cutmix: float, switch: float, share: float) -> None:
    plan = draws(10000, mixup=mixup, cutmix=cutmix, mix_switch=switch)
    assert abs(plan.cut.mean() - share) <= 4 * math.sqrt(share * (1 - share) / 10000)
    assert (plan.boxes[~plan.cut] == 0).all()


def by_hand(crops: NDArray[np.float32], plan: MixPlan) -> NDArray[np.float64]:
    """Crops [K, B, C, S, S] mixed one by one."""
    out, side = crops.astype(np.float64), crops.shape[-1]
    for place, partner in enumerate(plan.partners):
        pair = place // (2 * plan.distance) * plan.distance + place % plan.distance
        own, other = crops[:, place].astype(np.float64), crops[:, partner].astype(np.float64)
        if plan.cut[pair]:
            top, left, bottom, right = (round(float(edge) * side) for edge in plan.boxes[pair])
            out[:, place, :, top:bottom, left:right] = other[..., top:bottom, left:right]
        else:
            share = float(plan.shares[pair])
            out[:, place] = share * own + (1 - share) * other
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1, 3])
def test_crops_are_mixed_as_numpy_does_it(dtype: torch.dtype, distance: int) -> None:
    torch.manual_seed(0)
    plan = draw_mixes(1, 0, 0, 24, distance, MIX_PURPOSE, BOTH, 20)
    assert 0 < plan.cut.sum() < 12
    for side, pieces in ((20, 12), (9, 3)):
        crops = torch.randn(2 * 24, 3, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        wanted = by_hand(crops.float().numpy().reshape(2, 24, 3, side, side), plan).reshape(48, 3, side, side)
        for first in range(0, 12, pieces):
            mix_(crops, plan, *weights(plan, side), slice(first, first + pieces))
        assert crops.is_contiguous(memory_format=torch.channels_last)
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
        np.testing.assert_allclose(crops.float().numpy(), wanted, rtol=rounding, atol=1e-6)
        # What CutMix leaves or pastes keeps its bits.
        cut = np.tile(plan.own_cuts, 2)
        assert np.array_equal(crops.float().numpy()[cut], wanted[cut].astype(np.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
def test_a_gpu_mixes_as_a_cpu_does() -> None:
    torch.manual_seed(0)
    plan = draw_mixes(1, 0, 0, 24, 3, MIX_PURPOSE, BOTH, 20)
    crops = torch.randn(2 * 24, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    there, given = crops.cuda(), weights(plan, 20)
    mix_(there, plan, *(values.cuda() for values in given), slice(0, 12))
    mix_(crops, plan, *given, slice(0, 12))
    torch.testing.assert_close(there.cpu(), crops, rtol=1e-6, atol=1e-6)
    cut = torch.from_numpy(np.tile(plan.own_cuts, 2))
    assert torch.equal(there.cpu()[cut], crops[cut])


def test_targets_by_hand() -> None:
    target, shares = torch.tensor([2, 0, 1, 1]), torch.tensor([0.75, 0.75, 0.5, 0.5])
    mixed = mix_targets(target, shares, torch.tensor([1, 0, 3, 2]), 3)
    assert mixed.tolist() == [[0.25, 0, 0.75], [0.75, 0, 0.25], [0, 1, 0], [0, 1, 0]]
    assert mixed.dtype == torch.float32


@pytest.fixture(scope="module")
def index(stripes: Path) -> Index:
    return build(stripes)


def batches(index: Index, augment: AugmentConfig, data: DataConfig = DATA, **options: Any) -> list[Batch]:
    rows = index.rows("train", 0.0)
    plan = Plan(7, 12, rows, index.heights, index.widths, data, augment, labels=index.labels)
    words = {"device": "cpu", "dtype": torch.float32, "start": 0, "stop": 3, **options}
    with TrainLoader(index, plan, data, **words) as loader:
        return list(loader)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("cutter", ["fastrex", "dali"])
def test_the_loader_mixes_what_it_would_have_shown(index: Index, repeats: int, cutter: str) -> None:
    data = dataclasses.replace(DATA, repeats=repeats, resize=cutter)
    for mixed, plain in zip(batches(index, BOTH, data), batches(index, AugmentConfig(), data), strict=True):
        assert mixed.plan.mix is not None
        assert torch.equal(mixed.images, plain.images)
        for ours, theirs in zip(mixed.crops, plain.crops, strict=True):
            split = theirs.unflatten(0, (-1, 12)).numpy()
            np.testing.assert_allclose(ours.unflatten(0, (-1, 12)).numpy(), by_hand(split, mixed.plan.mix), atol=2e-6)
        assert mixed.target.shape == (12, 4)
        assert mixed.target.dtype == torch.float32
        assert torch.allclose(mixed.target.sum(1), torch.ones(12))


def test_cutmix_targets_are_the_share_of_the_pixels(index: Index) -> None:
    """Counted in the first global crop: what of it is another image's."""
    augment = AugmentConfig(cutmix=1.0)
    for mixed, plain in zip(batches(index, augment), batches(index, AugmentConfig()), strict=True):
        assert mixed.plan.mix is not None
        other = (mixed.crops[0] != plain.crops[0]).any(1).flatten(1).float().mean(1)
        for place, partner in enumerate(mixed.plan.mix.partners):
            own, strange = plain.target[place], plain.target[int(partner)]
            wanted = 1.0 if own == strange else 1 - other[place].item()
            # A pixel of both may be equal by chance: these are stripes.
            assert mixed.target[place, own].item() == pytest.approx(wanted, abs=0.02)


def test_ranks_and_micro_batches_together_are_the_global_batch(index: Index) -> None:
    for whole, first, second in zip(
        batches(index, BOTH), *(batches(index, BOTH, rank=rank, world=2) for rank in (0, 1)), strict=True
    ):
        assert torch.equal(whole.target, torch.cat((first.target, second.target)))
        for crops, *parts in zip(whole.crops, first.crops, second.crops, strict=True):
            by_image = [part.unflatten(0, (-1, 6)) for part in parts]
            assert torch.equal(crops.unflatten(0, (-1, 12)), torch.cat(by_image, dim=1))
    micros = batches(index, BOTH, micros=3)
    for step, whole in enumerate(batches(index, BOTH)):
        assert torch.equal(whole.target, torch.cat([micros[3 * step + m].target for m in range(3)]))


def test_shows_images_as_they_are_mixed(index: Index) -> None:
    rows = index.rows("train", 0.0)
    data = dataclasses.replace(DATA, repeats=2)
    plan = Plan(7, 12, rows, index.heights, index.widths, data, BOTH, labels=index.labels)
    (batch, *_) = batches(index, BOTH, data)
    samples = show.of_batch(index, plan, data, 0, 0, 3)
    assert len(samples) == 3
    mix = batch.plan.mix
    assert mix is not None
    for place, sample in enumerate(samples):
        kind = "CutMix" if mix.own_cuts[place] else "mixup"
        assert sample.note.endswith(f", {mix.own_shares[place]:.0%} of it in a {kind} with place {mix.partners[place]}")
        shown = np.asarray(sample.crops[0].picture).astype(np.float64)
        level = batch.crops[0][place].permute(1, 2, 0).numpy() * np.array(data.std) + np.array(data.mean)
        assert np.abs(shown - 255 * level.clip(0, 1)).max() <= 0.51
    (sample, _) = show.of_names(index, plan, data, 0, [index.name(int(rows[0]))])
    assert sample.note.endswith(", not mixed here")


def test_a_batch_that_cannot_be_paired_names_one_that_can() -> None:
    world = World(0, 2, 0, 2, torch.device("cpu"))

    def check(batch: int, **augment: float) -> None:
        optim = c.OptimConfig(batch_size=batch, accumulate=2)
        data = DataConfig(repeats=3)
        check_batch(c.Config(data=data, augment=AugmentConfig(**augment), optim=optim), world)

    check(36)
    check(48, mixup=0.2)
    with pytest.raises(
        FastrexError, match=r"x 2 x data.repeats = 24 for augment.mixup .* got 36; set optim.batch_size=24"
    ):
        check(36, mixup=0.2)
    with pytest.raises(ValueError, match="must be multiples of 6 "):
        make_plan(count=48, batch=12, repeats=3).batch(0, 0, rank=0, world=4)


MIXED = ["augment.mixup=0.2", "augment.cutmix=1.0", "data.repeats=2"]


def test_a_training_with_the_binary_loss(stripes: Path, tmp_path: Path) -> None:
    settings = [*settings_for("softmax"), *MIXED, "objective.loss=binary", f"data.path={json.dumps(str(stripes))}"]
    result = fastrex.train(c.load("demo", settings), out=tmp_path / "run", device="cpu")
    assert result.state == "completed"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[0] == pytest.approx(4 * math.log(2), rel=0.2)
    assert sum(losses[-4:]) < sum(losses[:4])
    with pytest.raises(FastrexError, match=r"augment.mixup and cutmix must go with an objective that takes mixed"):
        fastrex.train(
            c.load("demo", [*settings_for("ncm"), *MIXED, f"data.path={json.dumps(str(stripes))}"]),
            out=tmp_path / "other",
            device="cpu",
        )


def test_two_ranks_equal_one_in_double_precision(stripes: Path, tmp_path: Path) -> None:
    settings = [*settings_for("softmax"), *MIXED, "objective.loss=binary", "optim.lr=0.1"]
    (one,), (log_one,) = run(tmp_path / "one", 1, stripes, "float64", 6, settings)
    two, logs = run(tmp_path / "two", 2, stripes, "float64", 6, settings)
    assert all(torch.equal(two[0][name], two[1][name]) for name in two[0])
    assert logs[0]["losses"] == pytest.approx(log_one["losses"], rel=1e-8)
    assert distance(one, two[0]) < 1e-8
