"""The whole training step beside the step that researchers write: images per second, their share of the roofline, what
the time goes to, memory, launches.

Each implementation lives in a process (a rank) of its own for the whole benchmark and runs only in its rounds; between
them it is stopped. All begin with the same weights and the same batch: before any time is taken, the losses of the
first steps are compared.
"""

from __future__ import annotations

import contextlib
import math
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastrex import config as config_module
from fastrex import rundir
from fastrex.config import Config
from fastrex.data.dataset import DTYPES
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.model.resnet import ARCHS
from fastrex.step import Trainer

from . import measure, roofline
from .processes import Answer, Ended, Team
from .rivals.eager_step import EAGER
from .step_subjects import FASTREX, IMPLS, Spec

KEYS = (
    "op", "impl", "allocator", "device", "threads", "ranks", "batch", "crops", "model", "objective", "bn", "precision",
    "images_per_s_p20", "images_per_s_p50", "images_per_s_p80", "ratio", "peak_mib", "roofline_share", "parts_ms",
    "communication_share", "kernels", "bytes", "flops", "loss", "rounds", "notices", "error", "versions", "commit",
    "command",
)  # fmt: skip
ALLOCATORS = ("pooled", "default")
ROUND_S = 8.0
# For the split of a step: the median of so many, but of two at least.
SPLIT_STEPS, SPLIT_S = 5, 8.0
# Of the losses of the first steps, relative, by the coarser of the two precisions: means over all rows, so that single
# roundings do not show, and a wrong gradient, momentum or bank does in the second and third.
TOLERANCE = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 2e-2}

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured. ``words`` are ``section.key=value``; ``seconds`` go to each implementation, in rounds;
    ``batch`` is that of all ranks; ``limit_mib``: memory of an attempt of ``find_batch``, 0 for what is free."""

    recipe: str = "trex"
    words: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    ranks: int = 1
    batch: int = 8
    classes: int = 1000
    impl: tuple[str, ...] = IMPLS
    allocator: str = "both"
    seconds: float = 30.0
    limit_mib: float = 0.0
    command: str = ""

    @property
    def configuration(self) -> tuple[str, ...]:
        return (*self.words, f"optim.batch_size={self.batch}", "optim.accumulate=1")

    def config(self) -> Config:
        return config_module.load(self.recipe, self.configuration)

    def subjects(self) -> list[Subject]:
        """All implementations under the first allocator, then, with "both", the plain one as it is shipped."""
        first = "cuda" if self.device == "cuda" else "pooled" if self.allocator == "both" else self.allocator
        found = [Subject(impl, first, impl) for impl in IMPLS if impl in self.impl]
        if self.device == "cpu" and self.allocator == "both" and EAGER in self.impl:
            found.append(Subject(EAGER, "default", f"{EAGER}_default"))
        return found

    def start(self, subject: Subject, state: str, folder: str) -> Team:
        """Its processes."""
        spec = Spec(
            subject.impl, self.recipe, self.configuration, self.device, self.threads, subject.allocator, self.classes,
            state, self.limit_mib,
        )  # fmt: skip
        return Team(subject.name, "step_worker", [spec.to_json()] * self.ranks, folder, environments(self))


@dataclass
class Subject:
    """An implementation under an allocator, and what has been found out about it; ``error``: why there is no more."""

    impl: str
    allocator: str
    name: str
    sample: Answer = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    peak_mib: float | None = None
    split: Answer = field(default_factory=dict)
    error: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Of every step of every round."""
        return [seconds for one in self.rounds for seconds in one]

    def ask(self, team: Team, do: str, **more: Any) -> Answer | None:
        """The answer of rank 0; None where there is none, for the reason in ``error``."""
        try:
            answer = team.ask(do, **more)[0]
        except Ended as error:
            self.error = f"absent: {error}"
            return None
        if "absent" in answer:
            self.error = f"absent: {answer['absent']}"
            return None
        return answer


def environments(settings: Settings) -> list[dict[str, str]]:
    """Of each rank: what torchrun would say."""
    threads = str(max(1, settings.threads // settings.ranks))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(settings.ranks)
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads,
        }
        for rank in range(settings.ranks)
    ]  # fmt: skip


def check(settings: Settings) -> Config:
    """The configuration.

    Raises:
        FastrexError: it cannot be, or not on so many ranks.
    """
    config = settings.config()
    if config.objective.name not in roofline.OBJECTIVES or not config.projector.enabled:
        raise FastrexError(
            f"bench step: its rivals must have a projector and objective {' or '.join(roofline.OBJECTIVES)}, got "
            f"objective.name={config.objective.name}, projector.enabled={config.projector.enabled}; choose another "
            "configuration"
        )
    if not config.projector.batch_norm or config.projector.activation != "gelu":
        raise FastrexError(
            "bench step: its rivals must have a projector of BatchNorm and GELU, got projector.batch_norm="
            f"{config.projector.batch_norm}, projector.activation={config.projector.activation}; choose another "
            "configuration"
        )
    if settings.batch % settings.ranks or settings.batch // settings.ranks < 2:
        raise FastrexError(
            f"bench step: --batch must be a multiple of --ranks, with 2 images or more for each, got {settings.batch} "
            f"for {settings.ranks}"
        )
    if settings.device == "cuda" and settings.ranks > torch.cuda.device_count():
        raise FastrexError(
            f"bench step: --ranks must be at most the {torch.cuda.device_count()} GPUs, got {settings.ranks}"
        )
    return config


def run(
    settings: Settings,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[list[Record]], None] = lambda _: None,
) -> list[Record]:
    """Measure; ``say`` is told what is being measured, ``keep`` given what is known so far. One record per
    implementation.

    Raises:
        FastrexError: an unusable configuration.
    """
    config = check(settings)
    subjects = settings.subjects()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        state = str(Path(folder) / "state.safetensors")
        say("making the first weights")
        save_first_weights(config, settings.classes, state)
        teams: dict[str, Team] = {}
        for subject in subjects:
            say(f"starting {subject.name}")
            teams[subject.name] = settings.start(subject, state, folder)
            stack.callback(teams[subject.name].close)
            subject.sample = subject.ask(teams[subject.name], "sample") or {}
        compare(subjects)
        abilities = [_abilities(subjects, teams)]
        count = max(1, round(settings.seconds / ROUND_S / 2)) * 2
        for number in range(count):
            for name in measure.order([s.name for s in subjects], number):
                subject = next(s for s in subjects if s.name == name)
                if subject.error is None:
                    say(f"round {number + 1} of {count}: {name}")
                    _round(subject, teams[name], settings.seconds / count)
            keep(_records(settings, config, subjects, best_abilities(abilities)))
        abilities.append(_abilities(subjects, teams))
        for subject in (s for s in subjects if s.error is None):
            say(f"parts of {subject.name}")
            peak = subject.ask(teams[subject.name], "peak")
            subject.peak_mib = None if peak is None else peak["peak_mib"]
            steps = min(SPLIT_STEPS, max(2, round(SPLIT_S / subject.sample["seconds"])))
            subject.split = subject.ask(teams[subject.name], "parts", steps=steps) or {}
    return _records(settings, config, subjects, best_abilities(abilities))


def save_first_weights(config: Config, classes: int, path: str) -> None:
    """Write what every implementation starts from: ours as they are drawn from the seed, under their names."""
    plain = ["model.bn=torch", "model.recompute=none", "optim.impl=torch", "optim.precision=fp32", "run.compile=false"]
    trainer = Trainer(config_module.override(config, plain), classes, World(0, 1, 0, 1, torch.device("cpu")))
    tensors = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    tensors |= {f"objective.{name}": tensor for name, tensor in trainer.objective.state_dict().items()}
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def compare(subjects: Sequence[Subject]) -> None:
    """Mark those whose first losses are not those of the plain step (or, without it, of the first that is there)."""
    there = [s for s in subjects if s.error is None]
    truth = next((s for s in there if s.impl == EAGER), there[0] if there else None)
    if truth is None:
        return
    for subject in there:
        allowed = max(TOLERANCE[s.sample["precision"]] for s in (subject, truth))
        pairs = zip(subject.sample["losses"], truth.sample["losses"], strict=True)
        for place, (mine, its) in enumerate(pairs):
            if not abs(mine - its) <= allowed * (1 if place == 0 else 3) * abs(its):
                subject.error = f"wrong: loss {mine:.5g} in step {place + 1}, not {its:.5g} as {truth.name}"
                break


def _round(subject: Subject, team: Team, seconds: float) -> None:
    """Its turn. The number of steps is agreed beforehand, so that all ranks do as many."""
    answer = subject.ask(team, "round", steps=max(1, round(seconds / subject.sample["seconds"])))
    if answer is None:
        return
    subject.rounds.append(answer["seconds"])
    if not math.isfinite(answer["loss"]):
        subject.error = "wrong: its loss is no number any more"


def _abilities(subjects: Sequence[Subject], teams: Mapping[str, Team]) -> Answer:
    """What the machine can do, measured by the first implementation that is there; {} where none is."""
    there = [s for s in subjects if s.error is None]
    if not there:
        return {}
    dtypes = list(dict.fromkeys(s.sample["precision"] for s in there))
    return there[0].ask(teams[there[0].name], "abilities", dtypes=dtypes) or {}


def best_abilities(answers: Sequence[Answer]) -> Answer:
    """The better of several measurements: a shared machine is twice as fast in one minute as in another."""
    found: Answer = {"peaks": {}, "bandwidth": 0.0}
    for answer in filter(None, answers):
        found["bandwidth"] = max(found["bandwidth"], answer["bandwidth"])
        for dtype, peak in answer["peaks"].items():
            found["peaks"][dtype] = max(found["peaks"].get(dtype, 0.0), peak)
    return found


def _records(settings: Settings, config: Config, subjects: Sequence[Subject], able: Answer) -> list[Record]:
    version, commit = rundir.version(), rundir.commit()
    base: Record = dict.fromkeys(KEYS) | {
        "op": "step", "device": settings.device, "threads": settings.threads, "ranks": settings.ranks,
        "batch": settings.batch, "crops": config.data.crops_text, "model": config.model.arch,
        "objective": config.objective.name, "commit": commit, "command": settings.command,
    }  # fmt: skip
    records = [{**base, **_found(settings, config, subject, able)} for subject in subjects]
    speeds = {s.name: r["images_per_s_p50"] for s, r in zip(subjects, records, strict=True)}
    for subject, record in zip(subjects, records, strict=True):
        record["versions"] = {"fastrex": version, **record["versions"]}
        if subject.impl == FASTREX and record["images_per_s_p50"] is not None:
            rivals = {name: speed for name, speed in speeds.items() if name != subject.name and speed is not None}
            record["ratio"] = {name: round(record["images_per_s_p50"] / speed, 4) for name, speed in rivals.items()}
    return records


def _found(settings: Settings, config: Config, subject: Subject, able: Answer) -> Record:
    """What there is to say of one implementation."""
    sample, split = subject.sample, subject.split
    found: Record = {
        "impl": subject.impl, "allocator": subject.allocator, "error": subject.error, "peak_mib": subject.peak_mib,
        "precision": sample.get("precision"), "bn": sample.get("bn"), "notices": sample.get("notices"),
        "loss": sample.get("losses"), "versions": sample.get("facts", {}),
        "images_per_s_p50": None,
    }  # fmt: skip
    if not subject.rounds or (subject.error or "").startswith("wrong"):
        return found
    batch = settings.batch
    found |= {
        f"images_per_s_p{p}": round(batch / measure.quantile(subject.seconds, 1 - p / 100), 3) for p in (20, 50, 80)
    }
    found["rounds"] = [round(batch * len(one) / sum(one), 3) for one in subject.rounds]
    if split:
        found |= {"parts_ms": split["parts"], "kernels": split["kernels"]}
    if split.get("communication"):
        talking, whole = split["communication"]
        found["communication_share"] = round(talking / whole, 4)
    if config.model.arch in ARCHS:
        found |= _roofline(settings, config, sample["precision"], found["images_per_s_p50"], able)
    return found


def _roofline(settings: Settings, config: Config, precision: str, speed: float, able: Answer) -> Record:
    """FLOPs and bytes per image, and the share of what this machine can do, by level."""
    bounds = roofline.bounds(
        config, settings.classes, settings.batch // settings.ranks, torch.finfo(DTYPES[precision]).bits // 8
    )
    found: Record = {
        "flops": bounds["L0"].flops(), "bytes": {level: round(bound.bytes()) for level, bound in bounds.items()}
    }  # fmt: skip
    if (peak := able["peaks"].get(precision)) and able["bandwidth"]:
        most = {level: settings.ranks * bound.images_per_s(peak, able["bandwidth"]) for level, bound in bounds.items()}
        found["roofline_share"] = {level: round(speed / bound, 4) for level, bound in most.items()}
    return found
