"""Images per second of the training loader beside what researchers use: decode, all crops, all augmentations.

Every loader lives in a process of its own for the whole benchmark and makes batches only in its rounds: between them
its process group is stopped, so that no two ever run together and nothing is made in advance for the next round. What
had been begun when it was stopped is not counted either. Before any time is taken their batches are compared.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrex import config as config_module
from fastrex import rundir
from fastrex.cli_options import located
from fastrex.data.index import Index
from fastrex.data.plan import Plan
from fastrex.distributed import world
from fastrex.errors import FastrexError

from . import machine, measure
from .loader_worker import FASTREX, IMPLS, Answer, Spec, open_images
from .processes import Team

KEYS = (
    "op", "impl", "stage", "device", "threads", "batch", "crops", "images_per_s_p20", "images_per_s_p50",
    "images_per_s_p80", "ratio", "share", "rounds", "data", "error", "versions", "commit", "command",
)  # fmt: skip
ROUND_S = 4.0
# Mean difference of two pictures of one crop, normalised: 3.5 levels of 255; Pillow rounds after each operation.
PICTURE_TOLERANCE = 0.06
# Other draws for the same images change a crop's mean and deviation by about 0.5; so much for one crop.
DRAW_TOLERANCE = 3.0
BAR = 4.0
GPU_BAR = 3500.0  # images/s on an H200, the loader alone

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured. ``words`` are ``section.key=value``; ``seconds`` go to each loader, in rounds."""

    data: str
    recipe: str = "trex"
    words: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    batch: int = 32
    seconds: float = 24.0
    command: str = ""
    impls: tuple[str, ...] = IMPLS

    @property
    def configuration(self) -> tuple[str, ...]:
        here = (*located(self.data), f"optim.batch_size={self.batch}", f"data.threads={self.threads}")
        return (*self.words, *here, "optim.accumulate=1")


def start(impl: str, settings: Settings, folder: str) -> Team:
    """A process with one loader."""
    spec = Spec(impl, settings.recipe, settings.configuration, settings.device, settings.threads, folder)
    return Team(impl, "loader_worker", [spec.to_json()], folder, [{"OMP_NUM_THREADS": str(settings.threads)}])


def run(settings: Settings, say: Callable[[str], None] = lambda _: None) -> list[Record]:
    """Measure; ``say`` is told what is being measured.

    Raises:
        FastrexError: no usable images, a loader that ended, or a rival whose batches are not ours.
    """
    with world("cpu") as alone:
        _, index, plan = open_images(config_module.load(settings.recipe, settings.configuration), alone)
    base: Record = dict.fromkeys(KEYS) | {
        "op": "loader", "device": settings.device, "threads": settings.threads, "batch": settings.batch,
        "crops": crops_text(plan), "data": facts(index, plan), "commit": rundir.commit(), "command": settings.command,
    }  # fmt: skip
    answers, speeds, absent = _rounds(settings, say)
    stages: dict[str, Answer] = {}
    for impl in answers:
        say(f"stages of {impl}")
        with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
            worker = start(impl, settings, folder)
            stack.callback(worker.close)
            (stages[impl],) = worker.ask("stages", seconds=settings.seconds / 2)
    records = _records(base, settings.impls, answers, speeds, absent)
    for impl, answer in stages.items():
        # The profile of the rival is one worker's.
        threads = settings.threads if impl == FASTREX else 1
        records += _stage_records({**base, "impl": impl, "threads": threads}, answer)
    version = rundir.version()
    for record in records:
        record["versions"] = {"fastrex": version, **(record["versions"] or {})}
    return records


def _rounds(
    settings: Settings, say: Callable[[str], None]
) -> tuple[dict[str, Answer], dict[str, list[float]], dict[str, str]]:
    """First batches, images per second by round, and why the others are absent."""
    count = max(1, round(settings.seconds / ROUND_S / 2)) * 2
    answers: dict[str, Answer] = {}
    absent: dict[str, str] = {}
    workers: dict[str, Team] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for impl in settings.impls:
            say(f"starting {impl}")
            workers[impl] = start(impl, settings, folder)
            stack.callback(workers[impl].close)
            (answer,) = workers[impl].ask("sample")
            if "absent" in answer:
                absent[impl] = answer["absent"]
            else:
                answers[impl] = answer
        if FASTREX in answers:
            for impl in answers:
                compare(impl, answers[FASTREX], answers[impl], settings.batch)
        speeds: dict[str, list[float]] = {impl: [] for impl in answers}
        for number in range(count):
            for impl in measure.order(list(answers), number):
                say(f"round {number + 1} of {count}: {impl}")
                (done,) = workers[impl].ask("round", seconds=settings.seconds / count)
                speeds[impl].append(done["images"] / done["seconds"])
    return answers, speeds, absent


def compare(impl: str, ours: Answer, other: Answer, batch: int) -> None:
    """Whether ``impl`` makes what we make, of the first batch, whose images are the same.

    Shapes and dtypes, and mean and deviation as far as the draws are different ones; where the rival can be given the
    plan's draws, the pictures themselves.

    Raises:
        FastrexError: it does not.
    """
    wrong = f"bench loader: {impl} does not make what {FASTREX} makes"
    for mine, its in zip(ours["groups"], other["groups"], strict=True):
        for key in ("shape", "dtype"):
            if mine[key] != its[key]:
                raise FastrexError(f"{wrong}: {key} {its[key]}, not {mine[key]}")
        if mine["dtype"] != "float32":
            raise FastrexError(f"bench loader: crops must be float32, got {mine['dtype']}")
        for key in ("mean", "std"):
            if not abs(mine[key] - its[key]) <= DRAW_TOLERANCE / math.sqrt(batch):
                raise FastrexError(f"{wrong}: {key} {its[key]:.3f}, not {mine[key]:.3f} of {mine['shape']}")
    if ours["pictures"] is None or other["pictures"] is None:
        return
    with np.load(ours["pictures"]) as left, np.load(other["pictures"]) as right:
        for name in left.files:
            # The median, since one that turns images as EXIF says differs from one that does not.
            apart = float(np.median(np.abs(left[name] - right[name]).mean(axis=(2, 3, 4))))
            if not apart <= PICTURE_TOLERANCE:
                fact = f"{apart:.3f} on average between crops with the same draws"
                raise FastrexError(f"{wrong}: {fact}, more than {PICTURE_TOLERANCE}")


def crops_text(plan: Plan) -> str:
    """Such as "1x224 + 8x96"."""
    return " + ".join(f"{group.crops}x{group.size}" for group in plan.groups)


def facts(index: Index, plan: Plan) -> Record:
    """What the images are, and whether they lie in memory: read here, where they take no more than a quarter of it, so
    that whoever begins does not read them from the disk for the others."""
    rows = plan.samples
    pixels = index.heights[rows].astype(np.int64) * index.widths[rows]
    fits = int(index.sizes[rows].sum()) < machine.free_bytes() / 4
    if fits:
        for place in {index.locate(int(row))[0] for row in rows}:
            with open(place, "rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass
    mean_bytes, mean_pixels = round(float(index.sizes[rows].mean())), round(float(pixels.mean()))
    return {"files": len(rows), "mean_bytes": mean_bytes, "mean_pixels": mean_pixels, "in_memory": fits}


def _records(
    base: Record,
    impls: Sequence[str],
    answers: Mapping[str, Answer],
    speeds: Mapping[str, list[float]],
    absent: Mapping[str, str],
) -> list[Record]:
    """One per loader. ``ratio`` is its median over that of the fastest rival."""
    medians = {impl: measure.quantile(values, 0.5) for impl, values in speeds.items()}
    rival = max((m for impl, m in medians.items() if impl != FASTREX), default=None)
    records = []
    for impl in impls:
        record = {**base, "impl": impl}
        if impl in absent:
            records.append(record | {"error": f"absent: {absent[impl]}"})
            continue
        record |= _quantiles(speeds[impl])
        record["rounds"] = [round(speed, 2) for speed in speeds[impl]]
        record["ratio"] = None if rival is None else round(record["images_per_s_p50"] / rival, 4)
        records.append(record | {"versions": answers[impl]["facts"]})
    return records


def _stage_records(base: Record, answer: Answer) -> list[Record]:
    """One per stage. ``share`` is its median time over the sum of all stages'."""
    if "absent" in answer:
        return []
    spent: dict[str, list[float]] = answer["stages"]
    medians = {stage: measure.quantile(seconds, 0.5) for stage, seconds in spent.items()}
    return [
        {
            **base,
            "stage": stage,
            **_quantiles([1 / max(one, 1e-9) for one in seconds]),
            "share": round(medians[stage] / sum(medians.values()), 4),
            "versions": answer["facts"],
        }
        for stage, seconds in spent.items()
    ]


def _quantiles(speeds: Sequence[float]) -> Record:
    return {f"images_per_s_p{p}": round(measure.quantile(speeds, p / 100), 2) for p in (20, 50, 80)}
