"""What a batch is: a pure function of (seed, epoch, step). Samples, crop boxes and every augmentation draw; numpy only.

The random words come from a counter-based generator (draws.py). Key: the 64-bit seed. Counter: (index row, block | crop
<< 16, epoch, purpose | view << 4), where view counts an image's occurrences in the epoch from 0. So the draws of one
crop of one view of one image in one epoch depend on nothing else: not on batch size, order, rank, world size or loader
threads.

An epoch is a sequence of draws of images. ``data.sampling = uniform``: a permutation of all rows, from its beginning
again where padding needs more. ``balanced``: blocks of C draws, each a permutation of the C classes; a class gives its
rows in an order of the epoch's own, again and again when it is small; a large one shows others in another epoch.
``data.repeats = R`` fills R neighbouring places of a batch with each draw (repeated augmentation: Hoffer et al. 2020;
Berman et al. 2019; RSB-A1 has R = 3). The batch and the steps of an epoch stay, so an epoch draws a share 1 / R.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..config import AugmentConfig, DataConfig
from ..errors import FastrexError
from .draws import central_boxes, random_keys, try_boxes, uniforms
from .mixes import MixPlan, draw_mixes, mix_notices

# Columns of the photometric parameters; kernels/fastrex_kernels/augment holds the same numbers.
FLIP, ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SOLARIZE = range(9)
NUM_PARAMS = 9
SOLARIZE_OFF = 256
# ORDER indexes this tuple; entry j is the op applied as j-th: 0 brightness, 1 contrast, 2 saturation, 3 hue.
ORDERS = tuple(itertools.permutations(range(4)))

# To be raised when the same (seed, epoch, step) gives other samples, boxes or draws: a run is not resumed across that.
VERSION = 1

TRIES = 10  # as torchvision
KEPT_ORDERS = 256  # of a class, for the replacement of bad images
SWITCH_BLOCK, FACTOR_BLOCK, FILTER_BLOCK = TRIES, TRIES + 1, TRIES + 2
PERMUTATION_PURPOSE, CROP_PURPOSE, BLOCK_PURPOSE, SUBSTITUTE_PURPOSE, STRANGER_PURPOSE, MIX_PURPOSE = range(6)
VIEW_SHIFT = 4  # purposes below, the view's number above


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

    ``step`` counts within the epoch; ``repeats`` counts the padding repeats in the whole global batch. ``views`` int64
    [B] counts each image's occurrences in the epoch from 0. ``planned`` int64 [B] are the rows that the plan drew:
    ``samples``, except where :meth:`Plan.redraw` put another image. ``mix``: which images are mixed, if any.
    """

    epoch: int
    step: int
    micro: int
    samples: NDArray[np.int64]
    repeats: int
    groups: tuple[GroupPlan, ...]
    views: NDArray[np.int64]
    planned: NDArray[np.int64]
    mix: MixPlan | None = None


def crop_groups(data: DataConfig, augment: AugmentConfig) -> tuple[CropGroup, ...]:
    """The group "global", and "local" unless ``data.local_crops`` is 0."""
    large = CropGroup(
        "global", data.global_crops, data.global_size, data.global_scale, augment.global_blur, augment.global_solarize
    )
    small = CropGroup(
        "local", data.local_crops, data.local_size, data.local_scale, augment.local_blur, augment.local_solarize
    )
    return (large, small) if small.crops else (large,)


def effective(data: DataConfig, augment: AugmentConfig) -> AugmentConfig:
    """``augment`` without what changes nothing: the colour operations on grey images (``data.channels = 1``)."""
    return augment if data.channels == 3 else dataclasses.replace(augment, saturation=0.0, hue=0.0, grayscale=0.0)


def notices(data: DataConfig, augment: AugmentConfig) -> list[str]:
    """What a user should know about settings that do not do what they seem to; for the log."""
    if data.channels == 3:
        return []
    jitters = [name for name in ("saturation", "hue") if augment.jitter and getattr(augment, name)]
    dead = [f"augment.{name}" for name in (*jitters, *(["grayscale"] if augment.grayscale else []))]
    mean, std = sum(data.mean) / 3, sum(data.std) / 3
    effect = f"; {', '.join(dead)} without effect" if dead else ""
    return [f"data.channels=1: grey images, normalised with mean {mean:.4g} and deviation {std:.4g}{effect}"]


class Plan:
    """All batches of a training run.

    seed: 0..2^64-1; batch_size: places of the global batch (with ``data.repeats = R`` a multiple of R, and batch_size /
    R different draws); samples: int64 [N], the index rows that are trained on; heights, widths: of all index rows, and
    labels too, which "balanced" needs and :meth:`substitute` uses. ``steps_per_epoch`` is N / batch_size whatever R:
    ``data.last_batch`` "drop" leaves out the short last batch of an epoch, "pad" fills it with further draws (of images
    that the epoch has had already, as another view).
    FastrexError where "drop" leaves no batch, or R does not divide the batch.
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
        *,
        labels: NDArray[np.int32] | None = None,
    ) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"Plan: seed must lie in [0, 2**64), got {seed}")
        if batch_size < 1:
            raise ValueError(f"Plan: batch_size must be positive, got {batch_size}")
        if data.last_batch not in ("drop", "pad"):
            raise ValueError(f'Plan: last_batch must be "drop" or "pad", got {data.last_batch!r}')
        if data.sampling not in ("uniform", "balanced"):
            raise ValueError(f'Plan: sampling must be "uniform" or "balanced", got {data.sampling!r}')
        if data.sampling == "balanced" and labels is None:
            raise ValueError('Plan: labels must be given for sampling "balanced"')
        if len(samples) == 0:
            raise FastrexError("no training image is left; lower data.held_out or give a folder with more images")
        if min(heights[samples].min(), widths[samples].min()) < 1:
            raise ValueError("Plan: samples must name rows with a known height and width, got one of size 0")
        if batch_size % data.repeats:
            way_out = f"set optim.batch_size={max(1, batch_size // data.repeats) * data.repeats}"
            fact = f"optim.batch_size must be a multiple of data.repeats={data.repeats}, got {batch_size}"
            raise FastrexError(f"{fact}; {way_out}")
        self.seed, self.batch_size = seed, batch_size
        self.samples, self.heights, self.widths = samples, heights, widths
        self.data, self.augment, self._configured = data, effective(data, augment), augment
        self._labels = labels
        self.groups = crop_groups(data, augment)
        whole, rest = divmod(len(samples), batch_size)
        self.steps_per_epoch = whole + (rest > 0 and data.last_batch == "pad")
        if not self.steps_per_epoch:
            fact = f"optim.batch_size={batch_size} is more than the {len(samples)} training images"
            raise FastrexError(f"{fact}; set a smaller optim.batch_size, or data.last_batch=pad to repeat images")
        self._draws = self.steps_per_epoch * batch_size // data.repeats  # of an epoch
        self._orders: dict[tuple[int, int], tuple[NDArray[np.int64], int]] = {}
        self._latest: tuple[int, NDArray[np.int64], NDArray[np.int64] | None] | None = None

    def notices(self) -> list[str]:
        """What a user should know about this plan; for the log."""
        lines, count, repeats, classes = list[str](), len(self.samples), self.data.repeats, 0
        if self.data.sampling == "balanced":
            classes = len(sizes := self._classes[2])
            large, small = (self._draws / classes / size for size in (sizes.max(), sizes.min()))
            lines.append(
                f"data.sampling=balanced: {classes} classes equally often; an epoch draws an image of the largest "
                f"class ({sizes.max()}) {large:.2g} times, one of the smallest ({sizes.min()}) {small:.2g} times"
            )
        if repeats > 1:
            drawn = f"an epoch draws {self._draws} of {count} images, {repeats} views each"
            lines.append(f"data.repeats={repeats}: {drawn}")
        if self.batch_size // repeats > count:
            shown = f"a batch of {self.batch_size} shows each of {count} images {self.batch_size / count:.2g} times"
            lines.append(f"data.last_batch=pad: {shown}; set optim.batch_size lower")
        elif (padded := self._padded(self.steps_per_epoch - 1)) > 0:
            lines.append(f"data.last_batch=pad repeats {padded} images in every epoch")
        return [*lines, *mix_notices(self.augment, classes), *notices(self.data, self._configured)]

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The index rows in the order in which this epoch draws them, int64 [N], read-only."""
        return self._order(epoch)[0][: len(self.samples)]

    def batch(
        self, epoch: int, step: int, *, rank: int = 0, world: int = 1, micro: int = 0, micros: int = 1
    ) -> BatchPlan:
        """Rank ``rank``'s contiguous share of micro-batch ``micro`` of the global batch ``step`` of ``epoch``."""
        if not (0 <= epoch < 1 << 32 and 0 <= step < self.steps_per_epoch):
            fact = f"got epoch {epoch}, step {step}"
            raise ValueError(f"Plan.batch: step must lie in [0, {self.steps_per_epoch}), {fact}")
        if not (0 <= rank < world and 0 <= micro < micros):
            raise ValueError(f"Plan.batch: rank must lie below world and micro below micros, got {rank=} {micro=}")
        if self.batch_size % (world * micros):
            fact = f"got {self.batch_size} for {world} x {micros}"
            raise ValueError(f"Plan.batch: batch_size must be divisible by world x micros, {fact}")
        share = self.batch_size // (world * micros)
        first = step * self.batch_size + (micro * world + rank) * share
        rows, views = self._at(epoch, np.arange(first, first + share))
        groups, mix = self.draw(rows, views, epoch), None
        if self.augment.mixes:
            side, distance = self.groups[0].size, self.data.repeats
            mix = draw_mixes(self.seed, epoch, first, share, distance, MIX_PURPOSE, self.augment, side)
        return BatchPlan(epoch, step, micro, rows, self._padded(step), groups, views, rows, mix)

    def occurrences(self, row: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where ``row`` occurs in ``epoch``: its places, counted over the global batches, and its views, int64 [n]."""
        places = np.arange(self._draws * self.data.repeats)
        rows, views = self._at(epoch, places)
        found = np.flatnonzero(rows == row)
        return places[found], views[found]

    def substitute(self, row: int, epoch: int, attempt: int) -> int:
        """Another training row in place of ``row``, which has gone bad; ``attempt`` counts from 0.

        The attempts go through the other rows of its class in a random order, each once, and then give rows of any
        other class; ``row`` itself only where it is all there is.
        """
        if attempt < 0:
            raise ValueError(f"Plan.substitute: attempt must be at least 0, got {attempt}")
        rows = self._classes[0]
        others, start = self._others(row, epoch)
        size = len(others) + 1
        strangers = len(rows) - size
        if attempt < size - 1 or (size > 1 and not strangers):
            return int(others[attempt % len(others)])
        if not strangers:
            return row
        key = int(random_keys(self.seed, np.array([row]), attempt, epoch, STRANGER_PURPOSE)[0])
        chosen = key * strangers >> 64
        return int(rows[chosen if chosen < start else chosen + size])

    def _others(self, row: int, epoch: int) -> tuple[NDArray[np.int64], int]:
        """The other rows of a row's class in random order, and where the class begins; kept for the next attempts."""
        if (row, epoch) not in self._orders:
            rows, starts, sizes = self._classes
            places = np.flatnonzero(rows == row)
            if not len(places):
                raise ValueError(f"Plan.substitute: row must be one that is trained on, got {row}")
            place = int(places[0])
            own = int(np.searchsorted(starts, place, side="right")) - 1
            start, size = int(starts[own]), int(sizes[own])
            others = np.delete(rows[start : start + size], place - start)
            keys = random_keys(self.seed, others, row, epoch, SUBSTITUTE_PURPOSE)
            if len(self._orders) >= KEPT_ORDERS:
                self._orders.pop(next(iter(self._orders)))
            self._orders[row, epoch] = others[np.argsort(keys, kind="stable")], start
        return self._orders[row, epoch]

    def redraw(self, part: BatchPlan, samples: NDArray[np.int64]) -> BatchPlan:
        """``part`` with ``samples`` int64 [B] in place of its own; where they are the same, no bit changes.

        A place keeps its draws when another image comes there (so they are no other occurrence's): only its boxes
        follow the shape of the image.
        """
        changed = np.flatnonzero(samples != part.samples)
        fresh = self.draw(part.planned[changed], part.views[changed], part.epoch, shapes=samples[changed])
        groups = []
        for old, new in zip(part.groups, fresh, strict=True):
            boxes = old.boxes.copy()
            boxes[:, changed] = new.boxes
            groups.append(dataclasses.replace(old, boxes=boxes))
        return dataclasses.replace(part, samples=samples.copy(), groups=tuple(groups))

    def draw(
        self,
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        epoch: int,
        shapes: NDArray[np.int64] | None = None,
    ) -> tuple[GroupPlan, ...]:
        """The draws of ``views`` [B] of the images ``rows`` [B] in ``epoch``, per group; the boxes lie in the images
        ``shapes`` [B] where these are given."""
        groups, crop = [], 0
        for group in self.groups:
            ids = np.arange(crop, crop + group.crops)
            groups.append(self._draw(group, ids, rows, views, epoch, rows if shapes is None else shapes))
            crop += group.crops
        return tuple(groups)

    @cached_property
    def _classes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """All rows sorted by class, and of each class its first place there and its size; one class without labels."""
        rows = np.sort(self.samples).astype(np.int64)
        labels = np.zeros(len(rows), np.int32) if self._labels is None else self._labels[rows]
        order = np.argsort(labels, kind="stable")
        _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        return rows[order], starts, sizes

    def _padded(self, step: int) -> int:
        """How many places of the global batch ``step`` show images that the epoch has run out of."""
        repeats = self.data.repeats
        return max(0, (step + 1) * self.batch_size // repeats - len(self.samples)) * repeats

    def _at(self, epoch: int, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and views at ``places``, which are counted over the global batches of ``epoch``."""
        draws, copies = np.divmod(places, self.data.repeats)
        order, views = self._order(epoch)
        if views is None:
            rounds, draws = np.divmod(draws, len(order))
        else:
            rounds = views[draws]
        return order[draws], rounds * self.data.repeats + copies

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """The rows in this epoch's order, and how often each was drawn before; None where that is never."""
        if self._latest is None or self._latest[0] != epoch:
            keys = random_keys(self.seed, self.samples, 0, epoch, PERMUTATION_PURPOSE)
            order, views = self.samples[np.argsort(keys, kind="stable")].astype(np.int64), None
            if self.data.sampling == "balanced":
                order, views = self._balanced(order, epoch)
            order.setflags(write=False)
            self._latest = (epoch, order, views)
        return self._latest[1:]

    def _balanced(self, order: NDArray[np.int64], epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Blocks of all classes, each in an order of its own; block b has each class's b-th row, in cycles."""
        assert self._labels is not None
        by_class = order[np.argsort(self._labels[order], kind="stable")]
        classes, starts, sizes = np.unique(self._labels[by_class], return_index=True, return_counts=True)
        length = max(len(order), self._draws)
        blocks = np.arange(-(-length // len(classes)))
        pairs = np.tile(classes, len(blocks)).astype(np.int64), np.repeat(blocks, len(classes)).astype(np.int64)
        keys = random_keys(self.seed, *pairs, epoch, BLOCK_PURPOSE)
        turns = np.argsort(keys.reshape(len(blocks), -1), axis=1, kind="stable")
        rounds, places = np.divmod(blocks[:, None], sizes[turns])
        return by_class[starts[turns] + places].ravel()[:length], rounds.ravel()[:length]

    def _draw(
        self,
        group: CropGroup,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        epoch: int,
        shapes: NDArray[np.int64],
    ) -> GroupPlan:
        flat, crops = np.tile(rows, len(ids)), np.repeat(ids << 16, len(rows))
        counter = np.empty((4, 4, len(flat)), np.uint64)
        counter[0], counter[2], counter[3] = flat, epoch, CROP_PURPOSE | np.tile(views, len(ids)) << VIEW_SHIFT
        counter[1] = np.array([[0], [SWITCH_BLOCK], [FACTOR_BLOCK], [FILTER_BLOCK]]) | crops
        first, switches, factors, filters = uniforms(counter, self.seed).swapaxes(0, 1)
        shown = np.tile(shapes, len(ids))
        heights, widths = self.heights[shown].astype(np.int64), self.widths[shown].astype(np.int64)
        boxes, found = try_boxes(first, heights, widths, group.scale, self.data.ratio)
        for attempt in range(1, TRIES):
            todo = np.flatnonzero(~found)
            if not len(todo):
                break
            again = counter[:, 0, todo]
            again[1] = crops[todo] | attempt
            numbers = uniforms(again, self.seed)
            boxes[todo], found[todo] = try_boxes(numbers, heights[todo], widths[todo], group.scale, self.data.ratio)
        if not found.all():
            boxes[~found] = central_boxes(heights[~found], widths[~found], self.data.ratio)
        shape = (len(ids), len(rows))
        params = draw_params(switches, factors, filters, group, self.augment)
        return GroupPlan(group, boxes.astype(np.int32).reshape(*shape, 4), params.reshape(*shape, NUM_PARAMS))


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
