"""The plan of batches: random numbers, crop geometry, photometric draws, order of the samples."""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest

from fastrex.config import AugmentConfig, DataConfig
from fastrex.data import plan
from fastrex.data.draws import philox
from fastrex.data.plan import Plan
from fastrex.errors import FastrexError

MASK = 0xFFFFFFFF


def scalar_philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers, written from the paper's round function."""
    c, k0, k1 = list(counter), seed & MASK, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return tuple(c)


def scalar_crop(height: int, width: int, scale, ratio, uniforms) -> tuple[int, int, int, int]:
    """RandomResizedCrop of torchvision as a loop; ``uniforms(t)`` are the four numbers of try t."""
    for attempt in range(10):
        u = uniforms(attempt)
        target = height * width * (scale[0] + u[0] * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + u[1] * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u[2] * (height - h + 1)), math.floor(u[3] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def make(count=64, batch=16, seed=7, size=(300, 400), samples=None, augment=None, **data) -> Plan:
    samples = np.arange(count) if samples is None else samples
    heights = np.full(int(samples.max()) + 1, size[0], np.int32)
    widths = np.full(int(samples.max()) + 1, size[1], np.int32)
    return Plan(seed, batch, samples, heights, widths, DataConfig(**data), augment or AugmentConfig())


def draws(count: int, size=(3000, 4000), augment=None, **data):
    """One batch of ``count`` images with one global and one local crop: boxes [2, count, 4], params [2, count, 9]."""
    data = {"local_crops": 1} | data
    groups = make(count, count, size=size, augment=augment, **data).batch(0, 0).groups
    return np.stack([g.boxes[0] for g in groups]), np.stack([g.params[0] for g in groups])


def assert_uniform(values: np.ndarray) -> None:
    """Kolmogorov-Smirnov against U(0, 1) at the level 0.1 %; the seeds are fixed, so this passes always or never."""
    values = np.sort(values)
    grid = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(values - grid[1:]).max(), np.abs(values - grid[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(values))


def assert_share(hits: np.ndarray, probability: float) -> None:
    """A binomial share within four standard deviations."""
    assert abs(hits.mean() - probability) <= 4 * math.sqrt(probability * (1 - probability) / hits.size)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, words):
    seed = key[0] | key[1] << 32
    assert tuple(philox(np.array(counter, np.uint64), seed)) == words
    assert scalar_philox(counter, seed) == words
    many = np.repeat(np.array(counter, np.uint64)[:, None], 5, axis=1)
    assert (philox(many, seed) == np.array(words, np.uint64)[:, None]).all()


# Sizes: ordinary, exactly square, too long both ways (the fallback), single pixels, and small enough for sides of 0.
SIZES = [(333, 500), (256, 256), (20000, 10), (10, 20000), (1, 1), (1, 7), (3, 2), (64, 100), (2, 2)]


def test_boxes_equal_torchvisions_loop_fed_with_the_same_numbers():
    count, seed, epoch = 40 * len(SIZES), 0xDEADBEEF12345678, 3
    heights, widths = np.array(SIZES * 40, np.int32).T
    data, rows = DataConfig(), np.arange(count)
    batch = Plan(seed, count, rows, heights, widths, data, AugmentConfig()).batch(epoch, 0)
    crop = 0
    for group, scale in zip(batch.groups, (data.global_scale, data.local_scale), strict=True):
        for boxes in group.boxes:
            for row, box in zip(batch.samples.tolist(), boxes.tolist(), strict=True):

                def uniforms(block, row=row, crop=crop):
                    return [word / 2**32 for word in scalar_philox((row, block | crop << 16, epoch, 1), seed)]

                expected = scalar_crop(int(heights[row]), int(widths[row]), scale, data.ratio, uniforms)
                assert tuple(box) == expected
            crop += 1
    assert crop == 9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.1, 0.2), (3.0, 4.0)])
def test_boxes_lie_in_their_image_and_hold_a_pixel(size, ratio):
    boxes, _ = draws(200, size=size, ratio=ratio)
    top, left, height, width = np.moveaxis(boxes, -1, 0)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]


def test_long_images_fall_back_to_the_central_box_of_the_nearest_ratio():
    # No try can fit: 5 % of 20000 x 10 pixels at a ratio of at most 4/3 is at least 86 pixels wide and high.
    wide, _ = draws(50, size=(10, 20000))
    assert (wide == [0, (20000 - 13) // 2, 10, 13]).all()
    high, _ = draws(50, size=(20000, 10))
    assert (high == [(20000 - 13) // 2, 0, 13, 10]).all()
    single, _ = draws(50, size=(1, 1))
    assert (single == [0, 0, 1, 1]).all()


def test_area_ratio_and_place_are_uniform_where_every_box_fits():
    # At most 0.5 of the area of a square and ratios up to 4/3: the longest side is 0.82 of the image's, all fit.
    scale = (0.1, 0.5)
    boxes, _ = draws(4000, size=(4000, 4000), global_scale=scale, local_scale=scale)
    for top, left, height, width in (group.T.astype(float) for group in boxes):
        assert_uniform((height * width / 4000**2 - scale[0]) / (scale[1] - scale[0]))
        assert_uniform((np.log(width / height) - math.log(3 / 4)) / math.log(16 / 9))
        assert_uniform((top + 0.5) / (4000 - height + 1))
        assert_uniform((left + 0.5) / (4000 - width + 1))


def test_crops_of_one_image_and_neighbouring_images_are_uncorrelated():
    boxes, params = draws(4000)
    area = (boxes[..., 2] * boxes[..., 3]).astype(float)
    top, left = boxes[0, :, 0] / (3001 - boxes[0, :, 2]), boxes[0, :, 1] / (4001 - boxes[0, :, 3])
    pairs = [(area[0], area[1]), (area[0][1:], area[0][:-1]), (top, left), (top, area[0])]
    pairs += [(params[0, :, plan.FLIP], params[1, :, plan.FLIP]), (area[0], params[0, :, plan.BRIGHTNESS])]
    for first, second in pairs:
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(first))


def test_photometric_probabilities_and_ranges_are_those_of_the_recipe():
    _, params = draws(6000)
    for group, blur, solarize in ((params[0], 0.2, 0.2), (params[1], 0.5, 0.0)):
        assert_share(group[:, plan.FLIP] == 1, 0.5)
        assert_share(group[:, plan.GRAY] == 1, 0.2)
        assert_share(group[:, plan.BLUR] > 0, blur)
        assert_share(group[:, plan.SOLARIZE] == 128, solarize)
        assert set(group[:, plan.SOLARIZE]) <= {128, 256}
        assert set(group[:, plan.FLIP]) | set(group[:, plan.GRAY]) == {0, 1}
        factors = group[:, [plan.BRIGHTNESS, plan.CONTRAST, plan.SATURATION, plan.HUE]]
        jittered = factors[:, 0] != 1
        assert_share(jittered, 0.8)
        assert (factors[~jittered] == [1, 1, 1, 0]).all()
        for column, low, high in zip(factors[jittered].T, (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1), strict=True):
            assert_uniform((column.astype(float) - low) / (high - low))
        radius = group[:, plan.BLUR]
        assert_uniform((radius[radius > 0].astype(float) - 0.1) / 1.9)
        counts = np.bincount(group[:, plan.ORDER].astype(int), minlength=24)
        assert len(counts) == 24
        # Chi-squared with 23 degrees of freedom exceeds 49.7 in 0.1 % of all cases.
        assert ((counts - 250) ** 2 / 250).sum() < 49.7


def test_the_draws_of_one_crop_are_uncorrelated():
    columns = draws(4000, augment=AugmentConfig(local_solarize=0.3))[1][1].T.copy()
    columns[plan.SOLARIZE] = columns[plan.SOLARIZE] < 256
    applied = np.stack((columns[plan.BRIGHTNESS] != 1, columns[plan.BLUR] > 0))
    correlation = np.corrcoef(np.concatenate((columns, applied)))
    independent = np.abs(correlation[np.ix_([*range(9)], [*range(9)])] - np.eye(9)).max()
    assert independent < 4 / math.sqrt(4000)
    switches = [plan.FLIP, plan.ORDER, plan.GRAY, plan.SOLARIZE, 9, 10]
    assert np.abs(correlation[np.ix_(switches, switches)] - np.eye(6)).max() < 4 / math.sqrt(4000)


def test_factors_below_zero_are_cut_and_zero_strength_is_off():
    _, params = draws(500, augment=AugmentConfig(jitter=1.0, brightness=1.5, contrast=0.0, hue=0.0))
    brightness = params[..., plan.BRIGHTNESS]
    assert 0 <= brightness.min() < 0.05
    assert 2.4 < brightness.max() <= 2.5
    assert (params[..., plan.CONTRAST] == 1).all()
    assert (params[..., plan.HUE] == 0).all()


def test_probability_zero_and_one_are_never_and_always():
    off = AugmentConfig(flip=0, jitter=0, grayscale=0, global_blur=0, local_blur=0, global_solarize=0)
    _, params = draws(300, augment=off)
    params[..., plan.ORDER] = 0
    assert (params == [0, 0, 1, 1, 1, 0, 0, 0, 256]).all()
    on = AugmentConfig(flip=1, jitter=1, grayscale=1, global_blur=1, local_blur=1, global_solarize=1, local_solarize=1)
    _, params = draws(300, augment=on)
    assert (params[..., [plan.FLIP, plan.GRAY, plan.SOLARIZE]] == [1, 1, 128]).all()
    assert (params[..., plan.BLUR] >= 0.1 - 1e-6).all()


def test_orders_list_every_permutation_once_in_lexicographic_order():
    assert list(itertools.permutations((0, 1, 2, 3))) == list(plan.ORDERS)
    assert sorted((plan.FLIP, plan.ORDER, plan.BRIGHTNESS, plan.CONTRAST, plan.SATURATION)) == [0, 1, 2, 3, 4]
    assert (plan.HUE, plan.GRAY, plan.BLUR, plan.SOLARIZE, plan.NUM_PARAMS) == (5, 6, 7, 8, 9)


def test_the_kernels_agree_on_the_columns():
    # The function of the same name hides the module from a plain import.
    augment = importlib.import_module("fastrex_kernels.augment")
    names = "FLIP ORDER BRIGHTNESS CONTRAST SATURATION HUE GRAY BLUR SOLARIZE NUM_PARAMS"
    for name in names.split():
        assert getattr(augment, name) == getattr(plan, name), name


def test_groups_follow_the_configuration():
    groups = plan.crop_groups(DataConfig(global_crops=2), AugmentConfig())
    assert [(g.name, g.crops, g.size, g.scale, g.blur, g.solarize) for g in groups] == [
        ("global", 2, 224, (0.25, 1.0), 0.2, 0.2),
        ("local", 8, 96, (0.05, 0.25), 0.5, 0.0),
    ]
    assert [g.name for g in plan.crop_groups(DataConfig(local_crops=0), AugmentConfig())] == ["global"]


def joined(plans: list[plan.BatchPlan]):
    """Samples, and boxes and params per group, of several shares set side by side."""
    samples = np.concatenate([p.samples for p in plans])
    groups = zip(*(p.groups for p in plans), strict=True)
    return samples, [
        (np.concatenate([g.boxes for g in gs], 1), np.concatenate([g.params for g in gs], 1)) for gs in groups
    ]


@pytest.mark.parametrize(("world", "micros"), [(2, 1), (4, 1), (1, 4), (2, 4), (16, 1)])
def test_shares_of_ranks_and_micro_batches_join_to_the_global_batch(world, micros):
    whole = make().batch(2, 1)
    shares = [
        make().batch(2, 1, rank=rank, world=world, micro=micro, micros=micros)
        for micro in range(micros)
        for rank in range(world)
    ]
    samples, groups = joined(shares)
    assert samples.tobytes() == whole.samples.tobytes()
    for (boxes, params), group in zip(groups, whole.groups, strict=True):
        assert boxes.tobytes() == group.boxes.tobytes()
        assert params.tobytes() == group.params.tobytes()
    assert [share.micro for share in shares] == [micro for micro in range(micros) for _ in range(world)]


def test_batch_size_changes_no_order_and_no_crop():
    small, large = make(batch=4), make(batch=32)
    samples, groups = joined([small.batch(1, step) for step in range(8)])
    whole = large.batch(1, 0)
    assert (samples == whole.samples).all()
    for (boxes, params), group in zip(groups, whole.groups, strict=True):
        assert (boxes == group.boxes).all()
        assert (params == group.params).all()


def test_other_images_and_more_crops_change_no_draw_of_an_image():
    data = {"local_crops": 2, "local_scale": (0.25, 1.0)}
    few = make(samples=np.array([3, 11, 60]), batch=3, **data).batch(0, 0)
    more = make(count=64, batch=64, global_crops=2, local_crops=1, local_scale=(0.25, 1.0)).batch(0, 0)
    places = [int(np.flatnonzero(more.samples == row)[0]) for row in few.samples]
    # Crop numbers run over the groups: the first local crop of 1 + 2 is the second global crop of 2 + 1.
    assert (few.groups[1].boxes[0] == more.groups[0].boxes[1][places]).all()
    assert (few.groups[0].params[0] == more.groups[0].params[0][places]).all()


def test_a_plan_asked_in_any_order_gives_the_same():
    one, two = make(), make()
    ahead = [one.batch(epoch, step).groups[1].boxes for epoch in (0, 1) for step in range(4)]
    back = [two.batch(epoch, step).groups[1].boxes for epoch in (1, 0) for step in (3, 2, 1, 0)][::-1]
    assert all((a == b).all() for a, b in zip(ahead, back, strict=True))


def test_drop_uses_each_sample_at_most_once_and_pad_counts_its_repeats():
    samples = np.arange(0, 100, 2)
    dropping = make(samples=samples, batch=16)
    assert dropping.steps_per_epoch == 3
    seen = [row for step in range(3) for row in dropping.batch(0, step).samples.tolist()]
    assert len(set(seen)) == 48
    assert set(seen) <= set(samples.tolist())
    padding = make(samples=samples, batch=16, last_batch="pad")
    assert padding.steps_per_epoch == 4
    assert [padding.batch(0, step).repeats for step in range(4)] == [0, 0, 0, 14]
    seen = [row for step in range(4) for row in padding.batch(0, step).samples.tolist()]
    assert set(seen[:50]) == set(samples.tolist())
    assert seen[50:] == seen[:14]
    assert padding.batch(0, 3, rank=1, world=2).repeats == 14


def test_pad_goes_round_when_the_batch_is_larger_than_the_data():
    padding = make(count=3, batch=8, last_batch="pad")
    batch = padding.batch(0, 0)
    order = padding.permutation(0).tolist()
    assert padding.steps_per_epoch == 1
    assert batch.samples.tolist() == (order * 3)[:8]
    assert batch.repeats == 5


def test_pad_without_a_remainder_repeats_nothing():
    padding = make(count=32, batch=16, last_batch="pad")
    assert padding.steps_per_epoch == 2
    assert padding.batch(0, 1).repeats == 0


def test_permutations_depend_on_seed_and_epoch_and_are_not_biased():
    base = make(count=2000, batch=10)
    orders = [base.permutation(epoch) for epoch in range(3)] + [make(2000, 10, seed=8).permutation(0)]
    for order in orders:
        assert (np.sort(order) == np.arange(2000)).all()
    for first, second in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(2000)
        assert (first == second).sum() < 10
    assert abs(np.corrcoef(orders[0], np.arange(2000))[0, 1]) < 4 / math.sqrt(2000)
    # Seeds that differ in the upper 32 bits only differ too.
    assert (make(2000, 10, seed=7 + (1 << 32)).permutation(0) != orders[0]).sum() > 1900


def test_seeds_and_epochs_change_the_crops():
    rows = np.array([5])
    boxes = {
        make(samples=rows, batch=1, seed=seed).batch(epoch, 0).groups[1].boxes.tobytes()
        for seed in (0, 1, 1 << 40)
        for epoch in (0, 1)
    }
    assert len(boxes) == 6


GOLDEN_SAMPLES = [756, 775, 818, 924]
GOLDEN_BOXES = [[16, 89, 221, 281], [134, 175, 107, 87]]
GOLDEN_PARAMS = [
    [0, 9, 0.7257556, 0.8430181, 1.192469, -0.02601133, 0, 0, 256],
    [0, 3, 1.023441, 1.303159, 0.9108056, 0.01078122, 1, 0.9142249, 256],
]


def test_golden_values_of_the_stream():
    """Frozen numbers: a change here changes every run that is resumed or repeated, so it needs a new major version."""
    batch = make(count=1000, batch=4, seed=0x123456789ABCDEF0).batch(5, 17)
    assert batch.samples.tolist() == GOLDEN_SAMPLES
    assert [group.boxes[-1, 0].tolist() for group in batch.groups] == GOLDEN_BOXES
    assert np.allclose([group.params[-1, 1] for group in batch.groups], GOLDEN_PARAMS, rtol=1e-6, atol=0)


def test_shapes_and_types():
    batch = make().batch(0, 0, rank=1, world=2)
    assert batch.samples.dtype == np.int64
    assert batch.samples.shape == (8,)
    assert [group.boxes.shape for group in batch.groups] == [(1, 8, 4), (8, 8, 4)]
    assert [group.params.shape for group in batch.groups] == [(1, 8, 9), (8, 8, 9)]
    assert {group.boxes.dtype for group in batch.groups} == {np.dtype(np.int32)}
    assert {group.params.dtype for group in batch.groups} == {np.dtype(np.float32)}
    assert (batch.epoch, batch.step, batch.micro, batch.repeats) == (0, 0, 0, 0)


def test_wrong_calls_and_impossible_settings_are_named():
    with pytest.raises(FastrexError, match=r"optim\.batch_size=16 .*5 training images.*smaller.*last_batch=pad"):
        make(count=5, batch=16)
    with pytest.raises(FastrexError, match="no training image"):
        Plan(0, 1, np.arange(0), np.ones(1, np.int32), np.ones(1, np.int32), DataConfig(), AugmentConfig())
    with pytest.raises(ValueError, match="seed must"):
        make(seed=1 << 64)
    with pytest.raises(ValueError, match="size 0"):
        make(size=(0, 4))
    with pytest.raises(ValueError, match="divisible"):
        make().batch(0, 0, rank=0, world=3)
    with pytest.raises(ValueError, match="step must"):
        make().batch(0, 4)
    with pytest.raises(ValueError, match="rank must"):
        make().batch(0, 0, rank=2, world=2)
