"""What each part of the command for a GPU runs: its processes, their share of the time and where their records go."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import ROOT
from .gpu_facts import Facts
from .gpu_tests import Spec

PARTS = ("tests", "kernels", "loader", "step", "run")
TESTS = ("tests/test_gpu.py", "tests/test_contract.py")
# A step on 256 images keeps 27 GiB of activations; the rivals keep more, and convolutions want workspaces. Less memory
# gets fewer images.
BATCH, BATCH_GIB = 256, 48
NO_DALI = "NVIDIA DALI cannot be imported; pip install 'fastrex[train]'"


@dataclass(frozen=True)
class Settings:
    """What was asked for. ``work`` is a folder for what is not kept; the last two narrow it down, for tests."""

    out: Path
    work: Path
    minutes: float = 9.0
    data: str | None = None
    device: str = "cuda"
    batch: int | None = None
    only: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One process. ``weight``: its share of what is left of the part's time. ``extra``: what is nice to have, in the
    time that the others have left. ``record``: the JSON that it writes; ``target``: the file in the output folder that
    takes its records, together with those of the jobs before it with the same target."""

    name: str
    module: str
    words: tuple[str, ...]
    record: Path | None = None
    target: str = ""
    weight: float = 1.0
    extra: bool = False
    env: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.words]


@dataclass(frozen=True)
class Part:
    """``weight``: its share of the time. ``absent``: why it cannot run here. ``jobs``: what it runs in so many
    seconds."""

    name: str
    weight: float
    absent: str
    jobs: Callable[[float], list[Job]]


def parts(settings: Settings, facts: Facts) -> list[Part]:
    """In the order in which they run."""
    images = "" if facts["dali"] else NO_DALI
    if not images and settings.data is None and not facts["pillow"]:
        images = "no --data was given, and to make images needs Pillow"
    tests = ""
    if __package__ != "benchmarks" or not (ROOT / TESTS[0]).is_file():
        tests = "the tests come with a checkout of fastrex, this is an installation"
    elif not facts["pytest"]:
        tests = "pytest cannot be imported; pip install pytest"
    every = (
        Part("tests", 0.26, tests, lambda seconds: _tests(settings, facts, seconds)),
        Part("kernels", 0.28, facts.get("no_kernels", ""), lambda seconds: _kernels(settings, facts, seconds)),
        Part("loader", 0.14, images, lambda seconds: _loader(settings, seconds)),
        Part("step", 0.24, "", lambda seconds: _step(settings, facts, seconds)),
        Part("run", 0.08, images, lambda seconds: _run(settings, facts, seconds)),
    )
    return [part for part in every if not settings.only or part.name in settings.only]


def _between(low: float, value: float, high: float) -> str:
    return f"{min(max(value, low), high):.2f}"


def _bench(
    settings: Settings, name: str, words: Sequence[str], target: str, weight: float = 1.0, extra: bool = False
) -> Job:
    """A job of the benchmarks' own command line."""
    record = settings.work / f"{name}.json"
    line = (words[0], "--device", settings.device, *words[1:], "--json", str(record))
    return Job(name, str(__package__), line, record, target, weight, extra)


def _tests(settings: Settings, facts: Facts, seconds: float) -> list[Job]:
    # Most of their time is the compiler's, which uses one core a process.
    processes = max(1, min(4, int(facts["cores"]) // 3))
    record = settings.work / "tests.json"
    spec = Spec(
        settings.tests or TESTS, processes, min(max(seconds / 2, 20.0), 120.0), str(record),
        str(settings.out / "tests"),
    )  # fmt: skip
    # What cuBLAS asks for where the contract asks for the same bits; too little space for it elsewhere.
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return [Job("tests", f"{__package__}.gpu_tests", (spec.to_json(),), record, "tests.json", env=env)]


def _kernels(settings: Settings, facts: Facts, seconds: float) -> list[Job]:
    """The cases that a bar is set for, then the others; or what was named."""
    calls: list[tuple[tuple[str, ...], float, bool]] = []
    if settings.kernels:
        calls.append((settings.kernels, 1.0, False))
    else:
        for judged in (True, False):
            for op, dtypes, cases, weight in _rectangles(facts["cases"], judged):
                words = [*(("--case", name) for name in cases), *(("--dtype", name) for name in dtypes)]
                calls.append((("--op", op, *itertools.chain(*words)), weight, not judged))
    share = _between(0.05, 0.3 * seconds / max(len(facts["cases"]), 1), 8.0)
    common = ("--direction", "fwd_bwd", "--allocator", "pooled", "--seconds", share)
    target = f"kernels-{settings.device}.json"
    return [
        _bench(settings, f"kernels-{number}", ("kernels", *line, *common), target, weight=weight, extra=extra)
        for number, (line, weight, extra) in enumerate(calls, 1)
    ]


def _rectangles(
    cases: Sequence[Sequence[object]], judged: bool
) -> Iterator[tuple[str, list[str], tuple[str, ...], float]]:
    """(operator, dtypes, cases, work): what one call of ``kernels`` can be told, cases times dtypes."""
    rows: dict[tuple[str, str], list[str]] = {}
    work: dict[str, int] = {}
    for op, case, dtype, count, bar in cases:
        if bar == judged:
            rows.setdefault((str(op), str(dtype)), []).append(str(case))
            work[str(op)] = int(str(count))
    columns: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (op, dtype), names in rows.items():
        columns.setdefault((op, tuple(names)), []).append(dtype)
    for (op, chosen), dtypes in columns.items():
        yield op, dtypes, chosen, float(work[op] * len(chosen) * len(dtypes))


def _images(settings: Settings) -> tuple[str, list[Job]]:
    """Where the images are, and the job that makes them where none were given."""
    if settings.data is not None:
        return settings.data, []
    folder = settings.work / "images"
    if folder.is_dir():
        return str(folder), []
    return str(folder), [Job("images", f"{__package__}.gpu_images", (str(folder),), weight=0.3)]


def _loader(settings: Settings, seconds: float) -> list[Job]:
    data, jobs = _images(settings)
    # Three loaders in turns, then their stages for half as long; the starts of both take more than they do.
    words = ("loader", "--data", data, "--batch", "128", "--seconds", _between(2, (seconds - 50) / 6, 24))
    return [*jobs, _bench(settings, "loader", words, f"loader-{settings.device}.json")]


def batch(settings: Settings, facts: Facts) -> int:
    """Images in a step."""
    if settings.batch is not None:
        return settings.batch
    fitting = BATCH
    while fitting > 16 and fitting * BATCH_GIB > BATCH * facts.get("memory_gib", 0):
        fitting //= 2
    return fitting


def _step(settings: Settings, facts: Facts, seconds: float) -> list[Job]:
    """Beside the rivals; then alone without the graph, and with PyTorch's BatchNorm."""
    common = ("step", "--batch", str(batch(settings, facts)), "--seconds", _between(2, 0.06 * seconds, 12))
    stem = f"step-{settings.device}"
    picture = ("--png", str(settings.out / f"{stem}.png"))
    alone = ("--impl", "fastrex")
    wanted = (
        ("", 3.0, ("model.bn=fused", "run.cuda_graph=on", *picture)),
        ("-graph-off", 1.0, (*alone, "model.bn=fused", "run.cuda_graph=off")),
        ("-bn-torch", 1.0, (*alone, "model.bn=torch", "run.cuda_graph=on")),
    )
    return [
        _bench(settings, f"step{suffix}", (*common, *words), f"{stem}{suffix}.json", weight=weight)
        for suffix, weight, words in wanted
    ]


def _run(settings: Settings, facts: Facts, seconds: float) -> list[Job]:
    data, jobs = _images(settings)
    words = ("run", "--data", data, "--batch", str(batch(settings, facts)), "--seconds", _between(2, 0.3 * seconds, 20))
    return [*jobs, _bench(settings, "run", words, f"run-{settings.device}.json")]
