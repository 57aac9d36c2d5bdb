"""What a batch is: a pure function of (seed, epoch, step). Samples, crop boxes and every augmentation draw; numpy only.

The random words come from Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). Key: the 64-bit seed. Counter: (index row, block | crop << 16, epoch, purpose). So the draws of one
crop of one image in one epoch depend on nothing else: not on batch size, order, rank, world size or loader threads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import AugmentConfig, DataConfig
from ..errors import FastrexError

# Columns of the photometric parameters; kernels/fastrex_kernels/augment holds the same numbers.
FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SOLARIZE = range(9)
NUM_PARAMS = 9
SOLARIZE_OFF = 256
# ORDER indexes this tuple; entry j is the op applied as j-th: 0 brightness, 1 contrast, 2 saturation, 3 hue.
ORDERS = tuple(itertools.permutations(range(4)))

TRIES = 10
SWITCH_BLOCK, FACTOR_BLOCK, FILTER_BLOCK = TRIES, TRIES + 1, TRIES + 2
PERMUTATION_PURPOSE, CROP_PURPOSE = 0, 1
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


@dataclass(frozen=True)
class CropGroup:
    """Crops of one size: number per image, side in pixels, share of the image's area, blur and solarise probability."""

    name: str
    crops: int
    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float


@dataclass(frozen=True)
class GroupPlan:
    """Draws of one group: ``boxes`` int32 [K, B, 4] (top, left, height, width) and ``params`` float32 [K, B, 9].

    Columns of ``params``: FLIP and GRAY 0 or 1; ORDER 0..23 (see ORDERS); BRIGHTNESS, CONTRAST, SATURATION factors
    (1 = off); HUE in turns (0 = off); BLUR radius = standard deviation in pixels (0 = off); SOLARIZE threshold
    (256 = off).
    """

    group: CropGroup
    boxes: NDArray[np.int32]
    params: NDArray[np.float32]


@dataclass(frozen=True)
class BatchPlan:
    """One rank's share of one micro-batch: ``samples`` int64 [B] index rows, one plan per crop group.

    ``step`` counts within the epoch; ``repeats`` counts the padding repeats in the whole global batch.
    """

    epoch: int
    step: int
    micro: int
    samples: NDArray[np.int64]
    repeats: int
    groups: tuple[GroupPlan, ...]


def crop_groups(data: DataConfig, augment: AugmentConfig) -> tuple[CropGroup, ...]:
    """The group "global", and "local" unless ``data.local_crops`` is 0."""
    large = CropGroup(
        "global", data.global_crops, data.global_size, data.global_scale, augment.global_blur, augment.global_solarize
    )
    small = CropGroup(
        "local", data.local_crops, data.local_size, data.local_scale, augment.local_blur, augment.local_solarize
    )
    return (large, small) if small.crops else (large,)


def philox(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10: ``counter`` uint64 [4, ...], each below 2^32 -> four 32-bit random words, uint64 [4, ...]."""
    a, b, c, d = counter
    for turn in range(10):
        key_a = np.uint64((seed + turn * WEYL[0]) & 0xFFFFFFFF)
        key_b = np.uint64(((seed >> 32) + turn * WEYL[1]) & 0xFFFFFFFF)
        product_a, product_c = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = (product_c >> HALF) ^ b ^ key_a, product_c & LOW, (product_a >> HALF) ^ d ^ key_b, product_a & LOW
    return np.stack((a, b, c, d))


def _uniforms(seed: int, rows: NDArray[np.int64], block: NDArray[np.int64], epoch: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2^-32, float64 [4, ...]; ``rows`` and ``block`` are broadcast."""
    counter = np.empty((4, *np.broadcast_shapes(rows.shape, block.shape)), np.uint64)
    counter[0], counter[1], counter[2], counter[3] = rows, block, epoch, CROP_PURPOSE
    return np.ldexp(philox(counter, seed).astype(np.float64), -32)


class Plan:
    """All batches of a training run.

    seed: 0..2^64-1; batch_size: images of the global batch; samples: int64 [N], the index rows that are trained on;
    heights, widths: of all index rows. ``data.last_batch``: "drop" leaves out the short last batch of an epoch, "pad"
    fills it with the first images of the epoch's permutation (a repeated image has the same crops there).
    FastrexError where "drop" leaves no batch.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        samples: NDArray[np.int64],
        heights: NDArray[np.int32],
        widths: NDArray[np.int32],
        data: DataConfig,
        augment: AugmentConfig,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"Plan: seed must lie in [0, 2**64), got {seed}")
        if batch_size < 1:
            raise ValueError(f"Plan: batch_size must be positive, got {batch_size}")
        if data.last_batch not in ("drop", "pad"):
            raise ValueError(f'Plan: last_batch must be "drop" or "pad", got {data.last_batch!r}')
        if len(samples) == 0:
            raise FastrexError("no training image is left; lower data.held_out or give a folder with more images")
        if min(heights[samples].min(), widths[samples].min()) < 1:
            raise ValueError("Plan: samples must name rows with a known height and width, got one of size 0")
        self.seed, self.batch_size = seed, batch_size
        self.samples, self.heights, self.widths = samples, heights, widths
        self.data, self.augment = data, augment
        self.groups = crop_groups(data, augment)
        whole, rest = divmod(len(samples), batch_size)
        self.steps_per_epoch = whole + (rest > 0 and data.last_batch == "pad")
        if not self.steps_per_epoch:
            fact = f"optim.batch_size={batch_size} is more than the {len(samples)} training images"
            raise FastrexError(f"{fact}; set a smaller optim.batch_size, or data.last_batch=pad to repeat images")
        self._latest: tuple[int, NDArray[np.int64]] | None = None

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The index rows in this epoch's order, int64 [N], read-only: sorted by a random 64-bit key per row."""
        latest = self._latest
        if latest is None or latest[0] != epoch:
            keys = np.empty(len(self.samples), np.uint64)
            for start in range(0, len(keys), 1 << 14):  # in pieces that stay in the processor's cache
                part = slice(start, start + (1 << 14))
                counter = np.zeros((4, len(keys[part])), np.uint64)
                counter[0], counter[2], counter[3] = self.samples[part], epoch, PERMUTATION_PURPOSE
                high, low, *_ = philox(counter, self.seed)
                keys[part] = high << HALF | low
            order = self.samples[np.argsort(keys, kind="stable")].astype(np.int64)
            order.setflags(write=False)
            self._latest = latest = (epoch, order)
        return latest[1]

    def batch(
        self, epoch: int, step: int, *, rank: int = 0, world: int = 1, micro: int = 0, micros: int = 1
    ) -> BatchPlan:
        """Rank ``rank``'s contiguous share of micro-batch ``micro`` of the global batch ``step`` of ``epoch``."""
        if not (0 <= epoch < 1 << 32 and 0 <= step < self.steps_per_epoch):
            raise ValueError(
                f"Plan.batch: step must lie in [0, {self.steps_per_epoch}), got epoch {epoch}, step {step}"
            )
        if not (0 <= rank < world and 0 <= micro < micros):
            raise ValueError(f"Plan.batch: rank must lie below world and micro below micros, got {rank=} {micro=}")
        if self.batch_size % (world * micros):
            fact = f"got {self.batch_size} for {world} x {micros}"
            raise ValueError(f"Plan.batch: batch_size must be divisible by world x micros, {fact}")
        share = self.batch_size // (world * micros)
        first = step * self.batch_size + (micro * world + rank) * share
        order = self.permutation(epoch)
        rows = order[np.arange(first, first + share) % len(order)]
        repeats = max(0, (step + 1) * self.batch_size - len(order))
        groups, crop = [], 0
        for group in self.groups:
            ids = np.arange(crop, crop + group.crops)
            groups.append(self._draw(group, ids, rows, epoch))
            crop += group.crops
        return BatchPlan(epoch, step, micro, rows, repeats, tuple(groups))

    def _draw(self, group: CropGroup, ids: NDArray[np.int64], rows: NDArray[np.int64], epoch: int) -> GroupPlan:
        flat = np.tile(rows, len(ids))
        crops = np.repeat(ids << 16, len(rows))
        blocks = np.array([[0], [SWITCH_BLOCK], [FACTOR_BLOCK], [FILTER_BLOCK]], np.int64)
        uniforms = _uniforms(self.seed, flat, blocks | crops, epoch)
        first, switches, factors, filters = uniforms.swapaxes(0, 1)
        heights, widths = self.heights[flat].astype(np.int64), self.widths[flat].astype(np.int64)
        boxes, found = try_boxes(first, heights, widths, group.scale, self.data.ratio)
        for attempt in range(1, TRIES):
            todo = np.flatnonzero(~found)
            if not len(todo):
                break
            uniforms = _uniforms(self.seed, flat[todo], crops[todo] | attempt, epoch)
            boxes[todo], found[todo] = try_boxes(uniforms, heights[todo], widths[todo], group.scale, self.data.ratio)
        if not found.all():
            boxes[~found] = central_boxes(heights[~found], widths[~found], self.data.ratio)
        shape = (len(ids), len(rows))
        params = draw_params(switches, factors, filters, group, self.augment)
        return GroupPlan(group, boxes.astype(np.int32).reshape(*shape, 4), params.reshape(*shape, NUM_PARAMS))


def try_boxes(
    uniforms: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """One try of torchvision's RandomResizedCrop per row, from ``uniforms`` [4, N] (area, log-ratio, top, left).

    Returns boxes int64 [N, 4] (top, left, height, width) and whether each fits its image (else it means nothing).
    """
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * uniforms[0])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * uniforms[1])
    width = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    found = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    top = (uniforms[2] * (heights - height + 1)).astype(np.int64)
    left = (uniforms[3] * (widths - width + 1)).astype(np.int64)
    return np.stack((top, left, height, width), 1), found


def central_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], ratio: tuple[float, float]
) -> NDArray[np.int64]:
    """torchvision's fallback: the largest centred box whose aspect ratio lies within ``ratio``, at least one pixel."""
    shape = widths / heights
    height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights)
    width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths)
    height, width = np.clip(height, 1, heights).astype(np.int64), np.clip(width, 1, widths).astype(np.int64)
    return np.stack(((heights - height) // 2, (widths - width) // 2, height, width), 1)


def draw_params(
    switches: NDArray[np.float64],
    factors: NDArray[np.float64],
    filters: NDArray[np.float64],
    group: CropGroup,
    augment: AugmentConfig,
) -> NDArray[np.float32]:
    """Photometric parameters float32 [N, 9] from uniforms [4, N] each; what is turned off has its neutral value.

    switches: flip, jitter, order, grey; factors: brightness, contrast, saturation, hue; filters: blur, radius,
    solarise.
    """
    params = np.empty((switches.shape[1], NUM_PARAMS), np.float32)
    params[:, FLIP] = switches[0] < augment.flip
    params[:, ORDER] = np.floor(switches[2] * len(ORDERS))
    params[:, GRAY] = switches[3] < augment.grayscale
    jitter = switches[1] < augment.jitter
    strengths = ((BRIGHTNESS, augment.brightness), (CONTRAST, augment.contrast), (SATURATION, augment.saturation))
    for uniform, (column, strength) in zip(factors, strengths, strict=False):
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        params[:, column] = np.where(jitter, low + (high - low) * uniform, 1.0)
    params[:, HUE] = np.where(jitter, augment.hue * (2.0 * factors[3] - 1.0), 0.0)
    low, high = augment.blur_radius
    params[:, BLUR] = np.where(filters[0] < group.blur, low + (high - low) * filters[1], 0.0)
    params[:, SOLARIZE] = np.where(filters[2] < group.solarize, augment.solarize_threshold, SOLARIZE_OFF)
    return params
