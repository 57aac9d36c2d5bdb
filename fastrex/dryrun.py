"""``fastrex train --dry-run``: all that can be found out before the first step, on every rank. Nothing is written into
the run directory; an index of the images is built and kept in the cache folder, as a training does."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from . import checkpoint, distributed, manifest, memory, objectives, preflight, rundir, schedule, trainer, untrusted
from . import resume as resume_module
from .config import Config
from .data.dataset import Dataset, check_batch, open_dataset
from .distributed import World
from .errors import FastrexError, UsageError, explain
from .metrics import check_writers
from .preflight import ERROR, NOTE, OK, Finding
from .step import Trainer

LEVELS = (OK, NOTE, preflight.WARNING, ERROR)


class Report:
    """What this rank has found."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.findings: list[Finding] = []

    def note(self, level: str, text: str) -> None:
        self.add(Finding(level, text))

    def add(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)

    @contextlib.contextmanager
    def check(self) -> Iterator[None]:
        """Errors of the block become findings; usage errors end the program with their own exit code."""
        try:
            yield
        except UsageError:
            raise
        except FastrexError as error:
            self.note(ERROR, str(error))
        except OSError as error:
            self.note(ERROR, explain(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.note(ERROR, f"memory: {str(error).splitlines()[0] if str(error) else 'none left'}")

    def good(self) -> bool:
        """Whether no rank has an error; every rank asks."""
        return not distributed.any_true(any(f.level == ERROR for f in self.findings), self.world)

    def gathered(self) -> list[tuple[int, Finding]]:
        """(rank, finding) of all ranks: rank 0's, and of the others what is not well and rank 0 does not say."""
        lines = "".join(json.dumps([self.world.rank, f.level, f.text]) + "\n" for f in self.findings)
        packed = torch.from_numpy(np.frombuffer(lines.encode("ascii"), np.uint8).copy()).to(self.world.device)
        every = distributed.gather_ragged(packed, self.world).cpu().numpy().tobytes().decode("ascii")
        found = [(rank, Finding(level, text)) for rank, level, text in map(json.loads, every.splitlines())]
        own = [finding for rank, finding in found if rank == 0]
        return [(r, f) for r, f in found if r == 0 or (f.level in LEVELS[2:] and f not in own)]


def dry_run(
    config: Config | None = None,
    *,
    out: Path | str | None = None,
    resume: str = "never",
    init_from: Path | str | None = None,
    max_steps: int | None = None,
    device: str = "auto",
    allow_world_size_change: bool = False,
) -> list[tuple[int, Finding]]:
    """Check what :func:`fastrex.train` would meet before its first step; arguments as there.

    Returns:
        (rank, finding) of all ranks. The training would start when none is an error.

    Raises:
        UsageError: a recipe or setting is off.
        FastrexError: the ranks cannot meet, or the device is not there.
    """
    with distributed.world(device) as world:
        report = Report(world)
        config = None if config is None else trainer.resolve(config, world)
        report.note(OK, f"device: {preflight.device(world)}")
        path = Path(out) if out is not None else rundir.default_out(config if resume == "never" else None, world)
        resuming = False
        if world.main:
            report.add(preflight.writable(path))
        if report.good() and world.main:
            with report.check():
                rundir.prepare(path, config, resume)
        # The other ranks need not see the directory: they hear from rank 0, once it has something good to say.
        if report.good():
            with report.check():
                config, resuming = rundir.decide(path, config, resume, world)
                init_from = trainer.starting_weights(init_from, resuming, resume)
        if config is None or not report.good():
            report.note(NOTE, "images, model, memory and disk: not looked at before --out is right")
            return report.gathered()
        kind = f"{path} would be resumed" if resuming else f"a new run would be written to {path}"
        report.note(OK, f"settings: recipe {config.recipe}, precision {config.optim.precision}; {kind}")
        for finding in (preflight.open_files, preflight.processes):
            report.add(finding(config, world))
        report.add(preflight.shared_memory(world))
        with report.check():
            check_writers(config)
        data = _data(report, config, world, path / rundir.INDEX if resuming else None)
        if not report.good() or data is None:
            report.note(NOTE, "model, memory, disk and first batch: not looked at before the above is right")
        else:
            # Where several ranks build it together, one that cannot must not go on alone.
            with report.check() if world.size == 1 else contextlib.nullcontext():
                _model(report, config, data, path, resuming, init_from, max_steps, allow_world_size_change)
            # Last: a batch of crops that no memory holds would be the end of this process.
            if report.good():
                with report.check():
                    _batch(report, data)
        return report.gathered()


def _data(report: Report, config: Config, world: World, stored: Path | None) -> Dataset | None:
    """The data set; None after an error."""
    data: Dataset | None = None
    with report.check():
        check_batch(config, world)
    # Not as one of several ranks: one that finds an error here must not leave the others waiting.
    alone = dataclasses.replace(world, rank=0, size=1)
    with distributed.main_first(world), report.check():
        data = open_dataset(config, alone, stored, labelled=objectives.needs_labels(config))
    if data is None or any(f.level == ERROR for f in report.findings):
        return None
    images, epoch = int(data.class_counts.sum()), data.steps_per_epoch
    facts = f"{images} images, {len(data.classes)} classes, {data.held_out} held out, {epoch} steps per epoch"
    report.note(OK, f"images: {config.data.path or 'digits'}: {facts}")
    for line in data.notices:
        report.note(NOTE, line)
    return data


def _batch(report: Report, data: Dataset) -> None:
    """The first batch of every rank, as training would get it."""
    with data.batches(0, 1, report.world) as loader:
        sizes = [tuple(crops.shape) for crops in next(iter(loader)).crops]
        news = list(loader.news)
    for line in news:
        report.note(preflight.WARNING, line)
    shown = ", ".join("x".join(map(str, size)) for size in sizes)
    report.note(OK, f"first batch: decoded and augmented, crops {shown}")


def _model(
    report: Report,
    config: Config,
    data: Dataset,
    path: Path,
    resuming: bool,
    init_from: Path | str | None,
    max_steps: int | None,
    allow_world_size_change: bool,
) -> None:
    """Model, objective and optimiser on the device; what they would load, need and write."""
    world = report.world
    built = Trainer(config, len(data.classes), world)
    weights = sum(p.numel() for p in built.model.encoder.parameters())
    facts = f"{config.model.arch}, {weights / 1e6:.2f}M weights, objective {config.objective.name}"
    report.note(OK, f"model: {facts}, on {world.device}")
    mine = built.part_shapes()
    existing = len(checkpoint.steps(path)) if resuming else 0
    with report.check():
        if resuming and world.main:
            _resumes(report, built, data, mine, path, allow_world_size_change)
        elif not resuming and init_from is not None:
            report.note(OK, resume_module.init_from(built, init_from))
    if (kept := preflight.step_memory(built)) is None:
        report.note(NOTE, f"memory: not known for {config.model.arch}")
    else:
        need = sum(kept[0].values()) + kept[2]
        report.add(preflight.memory(need, memory.available(world.device), world))
    plan = schedule.from_config(config.optim, data.steps_per_epoch)
    steps = plan.total if max_steps is None else min(max_steps, plan.total)
    parts = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in mine.items()}
    export = sum(t.nbytes for t in built.model.encoder.state_dict().values())
    if world.main:
        report.add(preflight.disk(path, config, sum(parts.values()), export, existing=existing, steps=steps))
        report.add(preflight.file_size(max(parts.values())))
    built.close()


def _resumes(
    report: Report, built: Trainer, data: Dataset, mine: checkpoint.Parts, path: Path, allow_world_size_change: bool
) -> None:
    """What the training would continue from. Damaged checkpoints are named, and left where they are."""
    if (path / rundir.LOCK).is_file():
        with untrusted.opened(path / rundir.LOCK) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                raise FastrexError(f"train: --out {path} is being written by another process; stop it") from None
    found = checkpoint.newest_good(path)
    for step in checkpoint.steps(path):
        if found is None or step > found.step:
            report.note(preflight.WARNING, f"resume: checkpoint step {step} is damaged and would be set aside")
    if found is not None:
        for line in manifest.check(found.state, built.config, data, report.world, path, allow_world_size_change):
            report.note(NOTE, line)
        resume_module.check_parts(mine, found.parts, found.path, path)
        built.objective.check(found.parts["bank"])
        report.note(OK, f"resume: from step {found.step}, its checksums are right")
    elif checkpoint.had_any(path):
        raise FastrexError(f"resume: {path} must hold a good checkpoint, all are damaged; start a new --out")
    else:
        report.note(NOTE, "resume: no checkpoint yet, training would start from step 0")
