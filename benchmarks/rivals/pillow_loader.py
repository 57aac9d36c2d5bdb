"""What researchers load images with: torch's DataLoader, a worker process per core, Pillow, the list of operations of
DINO and t-ReX.

Two of them. ``torchvision`` is torchvision's own transforms. ``pillow`` makes the same calls on the same PIL images in
a few lines, so that it runs where torchvision does not, and leaves out what torchvision pays beyond them: a copy of an
image that is already RGB, random numbers from one-element tensors, copies on the way to floats (``ToTensor`` and
``Normalize`` allocate four times, this once), arrays where Pillow can merge bands. Decoding is full (``draft`` mode
would change pixels), and no file or image is kept between epochs. Both get the images in the order of fastrex's plan
and epochs without a gap between them, and nobody joins their crops by size, which the model would do.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fastrex.config import Config
from fastrex.data import plan as planner
from fastrex.data.index import Index
from fastrex.data.plan import BatchPlan, CropGroup, Plan

from ._absent import Absent

NAME, TORCHVISION = "pillow", "torchvision"
NAMES = (NAME, TORCHVISION)
STAGES = ("decode", "crop", "jitter", "blur", "to_tensor", "collate")
BICUBIC = Image.Resampling.BICUBIC
Picture = Any  # PIL.Image.Image; Pillow is an optional dependency
View = Callable[[Picture], list[Tensor]]


@dataclass(frozen=True)
class Draw:
    """What is done to one crop. ``box`` is (left, top, right, bottom); ``jitter`` pairs of operation and factor in the
    order of application; ``blur`` the radius; ``solarize`` the threshold, 256 = off."""

    size: int
    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[tuple[int, float], ...]
    gray: bool
    blur: float
    solarize: int


class PillowViews:
    """All crops of an image, as normalised float32 [3, S, S], the large ones first."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.groups = planner.crop_groups(config.data, config.augment)
        self.steps = (("crop", cut), ("jitter", jittered), ("blur", blurred), ("to_tensor", self.tensor))
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (config.data.mean, config.data.std))

    def __call__(self, image: Picture) -> list[Tensor]:
        return [self.view(image, self.draw(image.size, g)) for g in self.groups for _ in range(g.crops)]

    def view(self, picture: Any, draw: Draw) -> Tensor:
        for _, step in self.steps:
            picture = step(picture, draw)
        return picture  # type: ignore[no-any-return]

    def draw(self, size: tuple[int, int], group: CropGroup) -> Draw:
        a = self.config.augment
        jitter: list[tuple[int, float]] = []
        if random.random() < a.jitter:
            strengths = (a.brightness, a.contrast, a.saturation)
            jitter = [(op, random.uniform(max(0.0, 1.0 - s), 1.0 + s)) for op, s in enumerate(strengths) if s]
            if a.hue:
                jitter.append((3, random.uniform(-a.hue, a.hue)))
            random.shuffle(jitter)
        return Draw(
            size=group.size,
            box=random_box(*size, group.scale, self.config.data.ratio),
            flip=random.random() < a.flip,
            jitter=tuple(jitter),
            gray=random.random() < a.grayscale,
            blur=random.uniform(*a.blur_radius) if random.random() < group.blur else 0.0,
            solarize=a.solarize_threshold if random.random() < group.solarize else planner.SOLARIZE_OFF,
        )

    def tensor(self, picture: Picture, _: Draw) -> Tensor:
        """torchvision's ``to_tensor`` and ``normalize``: to planes, to floats, scaled."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)


def planned(size: int, box: Sequence[int], params: Sequence[float]) -> Draw:
    """The draws of a plan (see :class:`fastrex.data.plan.GroupPlan`) as this file's."""
    top, left, height, width = (int(v) for v in box)
    order = planner.ORDERS[int(params[planner.ORDER])]
    factors = [float(params[planner.BRIGHTNESS + op]) for op in range(4)]
    neutral = (1.0, 1.0, 1.0, 0.0)
    return Draw(
        size=size,
        box=(left, top, left + width, top + height),
        flip=bool(params[planner.FLIP]),
        jitter=tuple((op, factors[op]) for op in order if factors[op] != neutral[op]),
        gray=bool(params[planner.GRAY]),
        blur=float(params[planner.BLUR]),
        solarize=int(params[planner.SOLARIZE]),
    )


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's ``RandomResizedCrop.get_params``."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(planner.TRIES):
        area, aspect = width * height * random.uniform(*scale), math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def cut(image: Picture, draw: Draw) -> Picture:
    return image.crop(draw.box).resize((draw.size, draw.size), BICUBIC)


def jittered(picture: Picture, draw: Draw) -> Picture:
    """Flip, the colour jitters and grey."""
    if draw.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op, factor in draw.jitter:
        picture = ADJUST[op](picture, factor)
    if draw.gray:
        level = picture.convert("L")
        picture = Image.merge("RGB", (level, level, level))
    return picture


def adjust_hue(picture: Picture, factor: float) -> Picture:
    """torchvision's: the hue plane in 256 steps, which wraps around."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = np.array(hue)
    turned += np.int32(factor * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


ADJUST: tuple[Callable[[Picture, float], Picture], ...] = (
    lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    adjust_hue,
)


def blurred(picture: Picture, draw: Draw) -> Picture:
    """Gaussian blur and solarisation."""
    if draw.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(draw.blur))
    if draw.solarize < planner.SOLARIZE_OFF:
        picture = ImageOps.solarize(picture, draw.solarize)
    return picture


class _Maybe:
    """DINO's random blur and solarisation, which torchvision's users write themselves."""

    def __init__(self, probability: float, apply: Callable[[Picture], Picture]) -> None:
        self.probability, self.apply = probability, apply

    def __call__(self, picture: Picture) -> Picture:
        return self.apply(picture) if random.random() < self.probability else picture


def torchvision_views(config: Config) -> View:
    """The same list in torchvision's transforms, as DINO and t-ReX compose them.

    Raises:
        Absent: torchvision cannot be imported.
    """
    try:
        t = import_module("torchvision.transforms")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
        raise Absent(f"torchvision cannot be imported ({str(error).splitlines()[0]})") from None
    data, a = config.data, config.augment
    jitter = t.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)

    def blur(picture: Picture) -> Picture:
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(*a.blur_radius)))

    def solarize(picture: Picture) -> Picture:
        return ImageOps.solarize(picture, a.solarize_threshold)

    transforms = [
        (
            group.crops,
            t.Compose(
                [
                    t.RandomResizedCrop(group.size, group.scale, data.ratio, interpolation=t.InterpolationMode.BICUBIC),
                    t.RandomHorizontalFlip(a.flip),
                    t.RandomApply([jitter], a.jitter),
                    t.RandomGrayscale(a.grayscale),
                    _Maybe(group.blur, blur),
                    _Maybe(group.solarize, solarize),
                    t.ToTensor(),
                    t.Normalize(data.mean, data.std),
                ]
            ),
        )
        for group in planner.crop_groups(data, a)
    ]
    return lambda image: [transform(image) for count, transform in transforms for _ in range(count)]


def load(index: Index, row: int) -> Picture:
    """torchvision's ``pil_loader``: the decoded file in RGB. EXIF orientation is left alone, as there."""
    path, first, size = index.locate(row)
    with open(path, "rb") as file:
        file.seek(first)
        image = Image.open(io.BytesIO(file.read(size)))
        image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


class Images(Dataset[tuple[list[Tensor], int]]):
    """The crops of index rows."""

    def __init__(self, index: Index, views: View) -> None:
        self.index, self.views = index, views

    def __getitem__(self, row: int) -> tuple[list[Tensor], int]:
        return self.views(load(self.index, row)), int(self.index.labels[row])


class Endless:
    """Whole batches of the plan's permutations, epoch after epoch: a workers' queue that runs dry at the end of a short
    epoch is no property of the rival."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[list[int]]:
        size = self.plan.batch_size
        for epoch in itertools.count():
            order = self.plan.permutation(epoch)
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size].tolist()


def open_views(name: str, config: Config) -> View:
    """The transform of ``name``. Raises :class:`Absent`."""
    data = config.data
    if (data.sampling, data.repeats, data.channels) != ("uniform", 1, 3):
        raise Absent("it has data.sampling=uniform, data.repeats=1 and data.channels=3 only")
    return torchvision_views(config) if name == TORCHVISION else PillowViews(config)


def open_loader(name: str, config: Config, index: Index, plan: Plan, device: str) -> DataLoader[Any]:
    """Endless batches: a list of one tensor [B, 3, S, S] per crop, and labels. ``data.threads`` is the workers.

    Raises:
        Absent: it cannot run here.
    """
    views, workers = open_views(name, config), config.data.threads
    shared = os.statvfs("/dev/shm")
    crops = sum(group.crops * group.size**2 for group in plan.groups)
    # A batch in each slot of the queue, one in each worker's hands and one in the consumer's.
    needed = (3 * workers + 1) * plan.batch_size * crops * 3 * 4
    if shared.f_bavail * shared.f_frsize < needed:
        raise Absent(f"its workers need {needed / 1e6:.0f} MB in /dev/shm; lower --batch")
    return DataLoader(
        Images(index, views),
        batch_sampler=Endless(plan),
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device == "cuda",
    )


def planned_crops(config: Config, index: Index, part: BatchPlan, count: int) -> list[Tensor]:
    """The crops of a plan's first ``count`` images [K, count, 3, S, S] per group, made as :class:`PillowViews` does."""
    views = PillowViews(config)
    images = [load(index, row) for row in part.samples[:count].tolist()]
    return [
        torch.stack(
            [
                torch.stack(
                    [
                        views.view(image, planned(g.group.size, box, params))
                        for image, box, params in zip(images, g.boxes[crop], g.params[crop], strict=False)
                    ]
                )
                for crop in range(g.group.crops)
            ]
        )
        for g in part.groups
    ]


def profile(config: Config, index: Index, plan: Plan, seconds: float) -> dict[str, list[float]]:
    """Seconds per image of each stage in batch after batch: one worker's work, in this process, which it changes as a
    DataLoader does its workers."""
    torch.set_num_threads(1)
    views = PillowViews(config)
    spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
    begun = time.perf_counter()
    for number, rows in enumerate(Endless(plan)):
        taken = dict.fromkeys(STAGES, 0.0)
        batch = []
        for row in rows:
            last = time.perf_counter()
            image = load(index, row)
            last, taken["decode"] = time.perf_counter(), taken["decode"] + time.perf_counter() - last
            crops = []
            for group in views.groups:
                for _ in range(group.crops):
                    draw: Draw = views.draw(image.size, group)
                    picture = image
                    for stage, step in views.steps:
                        picture = step(picture, draw)
                        now = time.perf_counter()
                        taken[stage] += now - last
                        last = now
                    crops.append(picture)
            batch.append((crops, 0))
        last = time.perf_counter()
        default_collate(batch)
        taken["collate"] = time.perf_counter() - last
        for stage, value in taken.items():
            spent[stage].append(value / len(rows))
        if number and time.perf_counter() - begun > seconds:
            return spent
    raise AssertionError("an endless sampler ended")
