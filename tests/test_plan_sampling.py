"""The plan's samplings: balanced classes, repeated augmentation, views, substitutes for bad files, grey images."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from fastrex.config import AugmentConfig, DataConfig
from fastrex.data import plan
from fastrex.data.plan import BatchPlan, Plan
from fastrex.errors import FastrexError

SIZES = (1, 2, 5, 40, 17)  # images per class, scattered over the rows
AUGMENT = AugmentConfig()
GOLDEN = [(25, 0), (25, 1), (1, 10), (1, 11), (17, 0), (17, 1), (30, 4), (30, 5), (15, 0), (15, 1), (5, 2), (5, 3)]
GOLDEN_BOXES = [[0, 126, 100, 133], [1, 221, 83, 106]]
GOLDEN_SUBSTITUTES = [20, 64, 5, 30, 19, 2]


def make(batch: int = 10, seed: int = 7, sizes: tuple[int, ...] = SIZES, left_out: int = 0, **data: object) -> Plan:
    """A plan over images of different shapes; every class also has ``left_out`` rows that are not trained on."""
    random = np.random.default_rng(3)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), np.array(sizes) + left_out)).astype(np.int32)
    rows = np.concatenate([np.flatnonzero(labels == label)[:size] for label, size in enumerate(sizes)])
    heights, widths = random.integers(20, 400, (2, len(labels))).astype(np.int32)
    config = DataConfig(**{"local_crops": 2, **data})  # type: ignore[arg-type]
    return Plan(seed, batch, np.sort(rows), heights, widths, config, AUGMENT, labels=labels)


def labels_of(made: Plan, rows: np.ndarray) -> np.ndarray:
    assert made._labels is not None
    return made._labels[rows]


def epoch_of(made: Plan, epoch: int = 0) -> list[BatchPlan]:
    return [made.batch(epoch, step) for step in range(made.steps_per_epoch)]


def rows_of(parts: list[BatchPlan]) -> np.ndarray:
    return np.concatenate([part.samples for part in parts])


def draws_of(part: BatchPlan) -> list[tuple[int, int, bytes]]:
    """Row, view and everything that is drawn, per place."""
    drawn = [
        b"".join(g.boxes[:, i].tobytes() + g.params[:, i].tobytes() for g in part.groups)
        for i in range(len(part.samples))
    ]
    return list(zip(part.samples.tolist(), part.views.tolist(), drawn, strict=True))


@pytest.mark.parametrize("last_batch", ["drop", "pad"])
@pytest.mark.parametrize("batch", [1, 3, 10, 32, 64])
@pytest.mark.parametrize("repeats", [1, 3])
def test_balanced_classes_come_equally_often_in_every_epoch(last_batch: str, batch: int, repeats: int) -> None:
    if last_batch == "drop" and batch * repeats > sum(SIZES):
        batch = sum(SIZES) // repeats
    made = make(batch * repeats, sampling="balanced", last_batch=last_batch, repeats=repeats)
    for epoch in (0, 1, 5):
        rows = rows_of(epoch_of(made, epoch))
        counts = np.bincount(labels_of(made, rows), minlength=len(SIZES))
        assert counts.max() - counts.min() <= repeats
        # Within a class every image comes before one of them comes again.
        for label, size in enumerate(SIZES):
            own = rows[labels_of(made, rows) == label][::repeats]
            for start in range(0, len(own), size):
                part = own[start : start + size]
                assert len(set(part)) == len(part)


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("last_batch", ["drop", "pad"])
def test_steps_do_not_depend_on_the_sampling_and_padding_is_counted(
    sampling: str, repeats: int, last_batch: str
) -> None:
    count = sum(SIZES)
    for batch in (2, 6, 32, 64, 128):
        options = {"sampling": sampling, "repeats": repeats, "last_batch": last_batch}
        if last_batch == "drop" and batch > count:
            with pytest.raises(FastrexError, match="more than the 65 training images"):
                make(batch, **options)  # type: ignore[arg-type]
            continue
        made = make(batch, **options)  # type: ignore[arg-type]
        assert made.steps_per_epoch == (count // batch if last_batch == "drop" else -(-count // batch))
        draws = made.steps_per_epoch * batch // repeats
        assert sum(part.repeats for part in epoch_of(made)) == max(0, draws - count) * repeats
        assert all(len(part.samples) == batch for part in epoch_of(made))


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
@pytest.mark.parametrize("last_batch", ["drop", "pad"])
@pytest.mark.parametrize("repeats", [1, 4])
def test_no_image_has_the_same_draws_twice_in_an_epoch(sampling: str, last_batch: str, repeats: int) -> None:
    made = make(batch=28, sampling=sampling, repeats=repeats, last_batch=last_batch)
    places = [draws for part in epoch_of(made) for draws in draws_of(part)]
    assert len({(row, view) for row, view, _ in places}) == len(places)
    assert len({drawn for _, _, drawn in places}) == len(places)
    for row, found in itertools.groupby(sorted(places), key=lambda place: place[0]):
        views = [view for _, view, _ in found]
        assert views == list(range(len(views)))  # counted from 0, none left out
        where, there = made.occurrences(row, 0)
        assert there.tolist() == sorted(there.tolist())
        assert [places[place][:2] for place in where] == [(row, view) for view in there.tolist()]


def test_view_0_is_the_stream_of_an_image_that_comes_once() -> None:
    plain = {row: drawn for part in epoch_of(make(batch=1)) for row, _, drawn in draws_of(part)}
    for options in ({"sampling": "balanced"}, {"repeats": 5}, {"last_batch": "pad", "batch": 64}):
        made = make(**{"batch": 10, **options})  # type: ignore[arg-type]
        first = [draws for part in epoch_of(made) for draws in draws_of(part) if draws[1] == 0]
        assert first
        assert all(plain[row] == drawn for row, _, drawn in first)


def test_uniform_order_is_the_same_with_and_without_labels_and_repeats() -> None:
    made = make(batch=10)
    bare = Plan(7, 10, made.samples, made.heights, made.widths, made.data, AUGMENT)
    assert [draws_of(part) for part in epoch_of(made)] == [draws_of(part) for part in epoch_of(bare)]
    repeated = rows_of(epoch_of(make(batch=10, repeats=2)))
    drawn = repeated[::2]
    assert (repeated == np.repeat(drawn, 2)).all()
    assert (drawn == made.permutation(0)[: len(drawn)]).all()


def test_repeated_images_fill_neighbouring_places_of_one_batch() -> None:
    for part in epoch_of(make(batch=12, repeats=3, sampling="balanced")):
        assert (part.samples.reshape(-1, 3) == part.samples[::3, None]).all()
        assert (part.views.reshape(-1, 3) % 3 == [0, 1, 2]).all()


@pytest.mark.parametrize(("world", "micros"), [(2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
@pytest.mark.parametrize("options", [{"sampling": "balanced"}, {"repeats": 2}, {"sampling": "balanced", "repeats": 4}])
@pytest.mark.parametrize("last_batch", ["drop", "pad"])
def test_shares_join_to_the_global_batch(world: int, micros: int, options: dict[str, object], last_batch: str) -> None:
    whole = make(batch=16, last_batch=last_batch, **options)  # type: ignore[arg-type]
    for epoch, step in ((0, 0), (2, whole.steps_per_epoch - 1)):
        parts = [
            make(batch=16, last_batch=last_batch, **options).batch(  # type: ignore[arg-type]
                epoch, step, rank=rank, world=world, micro=micro, micros=micros
            )
            for micro in range(micros)
            for rank in range(world)
        ]
        assert [draws for part in parts for draws in draws_of(part)] == draws_of(whole.batch(epoch, step))
        assert {part.repeats for part in parts} == {whole.batch(epoch, step).repeats}


def test_balanced_order_is_random_and_differs_between_epochs_and_seeds() -> None:
    orders = [make(sizes=(50,) * 20, sampling="balanced").permutation(epoch) for epoch in (0, 1)]
    orders += [make(sizes=(50,) * 20, sampling="balanced", seed=8).permutation(0)]
    for order in orders:
        assert len(set(order.tolist())) == 1000  # equal classes: a permutation
        assert np.abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 4 / np.sqrt(1000)
    for first, second in itertools.combinations(orders, 2):
        assert (first == second).sum() < 10
    made = make(sizes=(50,) * 20, sampling="balanced")
    blocks = labels_of(made, made.permutation(0)).reshape(50, 20)
    assert (np.sort(blocks, axis=1) == np.arange(20)).all()
    assert len({block.tobytes() for block in blocks}) == 50
    # Each class stands at every place of a block about equally often: chi-squared, 19 degrees of freedom, 0.1 %.
    many = make(sizes=(400,) * 20, sampling="balanced")
    places = np.argsort(labels_of(many, many.permutation(0)).reshape(400, 20), axis=1)
    for label in range(20):
        assert ((np.bincount(places[:, label], minlength=20) - 20.0) ** 2 / 20).sum() < 43.9


def test_a_large_class_shows_other_images_in_another_epoch() -> None:
    made = make(batch=5, sampling="balanced")
    big = [
        set(rows_of(epoch_of(made, epoch))[labels_of(made, rows_of(epoch_of(made, epoch))) == 3]) for epoch in (0, 1)
    ]
    assert all(len(rows) == 13 for rows in big)  # of 40
    assert big[0] != big[1]


def test_classes_without_a_training_image_are_no_classes() -> None:
    made = make(sampling="balanced")
    some = made.samples[labels_of(made, made.samples) != 2]
    fewer = Plan(7, 10, some, made.heights, made.widths, made.data, AUGMENT, labels=made._labels)
    counts = np.bincount(labels_of(made, rows_of(epoch_of(fewer))), minlength=5)
    assert counts[2] == 0
    assert np.ptp(counts[[0, 1, 3, 4]]) <= 1


def test_substitutes_are_the_other_images_of_the_class_and_then_of_others() -> None:
    made = make(left_out=3)
    for row in made.samples.tolist():
        label = int(labels_of(made, np.array([row]))[0])
        own = made.samples[labels_of(made, made.samples) == label].tolist()
        tried = [made.substitute(row, 4, attempt) for attempt in range(len(own) + 20)]
        assert tried == [make(left_out=3).substitute(row, 4, attempt) for attempt in range(len(own) + 20)]
        assert sorted([row, *tried[: len(own) - 1]]) == own
        others = tried[len(own) - 1 :]
        assert set(others) <= set(made.samples.tolist()) - set(own)
        assert len(set(others)) > 5


def test_substitutes_depend_on_seed_and_epoch_and_are_spread() -> None:
    made = make(sizes=(200, 3))
    row = int(made.samples[labels_of(made, made.samples) == 0][0])
    first = {made.substitute(row, epoch, 0) for epoch in range(300)}
    assert len(first) > 120  # of 199; 155 expected
    assert [made.substitute(row, e, 0) for e in range(9)] != [
        make(sizes=(200, 3), seed=8).substitute(row, e, 0) for e in range(9)
    ]


def test_substitutes_where_there_is_little_to_choose_from() -> None:
    pair = make(batch=1, sizes=(2,))
    one, other = pair.samples.tolist()
    assert [pair.substitute(one, 0, attempt) for attempt in range(3)] == [other] * 3
    single = make(batch=1, sizes=(1,))
    assert single.substitute(int(single.samples[0]), 0, 0) == int(single.samples[0])
    bare = make(batch=1, sizes=(3, 3))
    unlabelled = Plan(7, 1, bare.samples, bare.heights, bare.widths, bare.data, AUGMENT)
    tried = [unlabelled.substitute(0, 0, attempt) for attempt in range(5)]
    assert sorted(tried) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="row must be one that is trained on, got 99"):
        pair.substitute(99, 0, 0)
    with pytest.raises(ValueError, match="attempt must be at least 0, got -1"):
        pair.substitute(one, 0, -1)


def test_redraw_changes_the_named_places_only() -> None:
    made = make(batch=8)
    part = made.batch(1, 2, rank=1, world=2)
    before = draws_of(part)
    samples = part.samples.copy()
    samples[[1, 3]] = [made.substitute(int(row), 1, 0) for row in samples[[1, 3]]]
    new = made.redraw(part, samples)
    assert draws_of(part) == before
    assert new.samples.tolist() == samples.tolist()
    assert new.planned.tolist() == part.samples.tolist()
    after = draws_of(new)
    assert [after[i] for i in (0, 2)] == [before[i] for i in (0, 2)]
    for group, old in zip(new.groups, part.groups, strict=True):
        assert group.params.tobytes() == old.params.tobytes()  # a place keeps its draws
        top, left, height, width = np.moveaxis(group.boxes, -1, 0)
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= made.heights[samples]).all()
        assert (left + width <= made.widths[samples]).all()
        assert (group.boxes[:, [1, 3]] != old.boxes[:, [1, 3]]).any()
    # Once more, from the replaced part: as if from the first one; and back again.
    samples[3] = made.substitute(int(part.samples[3]), 1, 1)
    assert draws_of(made.redraw(new, samples)) == draws_of(made.redraw(part, samples))
    assert draws_of(made.redraw(new, part.samples)) == before
    assert draws_of(made.redraw(part, part.samples)) == before


def test_a_substitute_never_repeats_the_crops_that_it_has_elsewhere() -> None:
    made = make(batch=64, sizes=(32, 32))
    part = made.batch(0, 0)
    samples = part.samples.copy()
    samples[5] = samples[9]
    new = made.redraw(part, samples)
    assert new.samples[5] == new.samples[9]
    params = [group.params[:, [5, 9]] for group in new.groups]
    assert all((both[:, 0] != both[:, 1]).any() for both in params)


def test_golden_values_of_the_samplings() -> None:
    """Frozen numbers: a change here changes every run that is resumed or repeated, so it needs a new major version."""
    part = make(batch=12, seed=0x123456789ABCDEF0, sampling="balanced", repeats=2).batch(5, 4)
    assert list(zip(part.samples.tolist(), part.views.tolist(), strict=True)) == GOLDEN
    assert [group.boxes[-1, 1].tolist() for group in part.groups] == GOLDEN_BOXES
    assert [make(seed=5).substitute(int(row), 5, 0) for row in make().samples[:6]] == GOLDEN_SUBSTITUTES


def test_grey_images_have_no_draws_of_colour() -> None:
    strong = AugmentConfig(jitter=1.0, saturation=0.5, hue=0.5, grayscale=1.0)
    made = make(channels=1)
    grey = Plan(7, 10, made.samples, made.heights, made.widths, made.data, strong)
    colour = Plan(7, 10, made.samples, made.heights, made.widths, dataclasses.replace(made.data, channels=3), strong)
    for one, other in zip(grey.batch(0, 0).groups, colour.batch(0, 0).groups, strict=True):
        assert (one.params[..., plan.SATURATION] == 1).all()
        assert (one.params[..., [plan.HUE, plan.GRAY]] == 0).all()
        rest = [plan.FLIP, plan.ORDER, plan.BRIGHTNESS, plan.CONTRAST, plan.BLUR, plan.SOLARIZE]
        assert (one.params[..., rest] == other.params[..., rest]).all()
        assert (one.boxes == other.boxes).all()
        assert (other.params[..., plan.GRAY] == 1).all()


def test_notices_say_what_the_settings_do() -> None:
    assert make().notices() == []
    assert make(batch=32, last_batch="pad").notices() == ["data.last_batch=pad repeats 31 images in every epoch"]
    # More than there are: not one image is shown once.
    (short,) = make(batch=256, last_batch="pad").notices()
    assert short == "data.last_batch=pad: a batch of 256 shows each of 65 images 3.9 times; set optim.batch_size lower"
    balanced, repeated = make(sampling="balanced", repeats=2).notices()
    assert balanced == (
        "data.sampling=balanced: 5 classes equally often; an epoch draws an image of the largest class (40) 0.15 "
        "times, one of the smallest (1) 6 times"
    )
    assert repeated == "data.repeats=2: an epoch draws 30 of 65 images, 2 views each"
    (grey,) = make(channels=1).notices()
    assert grey == (
        "data.channels=1: grey images, normalised with mean 0.449 and deviation 0.226; augment.saturation, "
        "augment.hue, augment.grayscale without effect"
    )
    quiet = AugmentConfig(jitter=0.0, grayscale=0.0)
    assert "without effect" not in plan.notices(DataConfig(channels=1), quiet)[0]
    assert plan.notices(DataConfig(), AUGMENT) == []


def test_impossible_settings_are_named() -> None:
    with pytest.raises(FastrexError, match=r"optim\.batch_size must be a multiple of data\.repeats=3, got 10; .*=9$"):
        make(batch=10, repeats=3)
    with pytest.raises(ValueError, match="labels must be given"):
        Plan(0, 1, np.arange(2), np.ones(2, np.int32), np.ones(2, np.int32), DataConfig(sampling="balanced"), AUGMENT)
    with pytest.raises(ValueError, match="sampling must be"):
        make(sampling="weighted")
