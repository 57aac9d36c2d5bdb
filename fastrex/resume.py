"""What a run saves, how it continues from that, and how a new run starts from another's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from . import checkpoint, distributed, export, rundir, schedule
from . import config as config_module
from .data.dataset import Dataset
from .errors import FastrexError
from .model.resnet import match_channels
from .optim import load_tensors
from .step import Trainer


def save(trainer: Trainer, data: Dataset, run: Path, step: int) -> None:
    """Rank 0 writes; the others wait, so that nobody runs ahead of a checkpoint that failed."""
    if trainer.world.main:
        config = trainer.config
        state = {
            "epoch": step / data.steps_per_epoch,
            "seed": config.run.seed,
            "schedule": dataclasses.asdict(schedule.from_config(config.optim, data.steps_per_epoch)),
            "world_size": trainer.world.size,
            "data": data.fingerprint,
            "classes": list(data.classes),
            "fastrex": rundir.version(),
            "torch": torch.__version__,
            "config": config_module.to_toml(config),
        }
        checkpoint.save(run, step, trainer.parts(), state, config.checkpoint.keep_last)
    distributed.barrier(trainer.world)


def restore(trainer: Trainer, data: Dataset, run: Path) -> tuple[int, list[str]]:
    """Load the newest good checkpoint on every rank; a run that was killed before its first one starts from step 0."""
    world, lines = trainer.world, list[str]()
    newest = checkpoint.newest_good(run, lines.append) if world.main else None
    step = distributed.from_main(newest[1] if newest else -1, world)
    if step < 0:
        if checkpoint.had_any(run):
            raise FastrexError(
                f"resume: {run / 'checkpoints'} must hold a good checkpoint, all are damaged; start a new --out"
            )
        return 0, ["no checkpoint yet: starting from step 0"]
    parts, state = checkpoint.load(checkpoint.folder(run, step))
    if state["data"] != data.fingerprint:
        raise FastrexError(
            f"resume: the images must be those of the run, but {data.config.data.path or 'the data set'} has changed "
            f"since; start a new run with --init-from {run}"
        )
    trainer.load(parts)
    if state["world_size"] != world.size:
        lines.append(f"resuming a run of {state['world_size']} ranks with {world.size}: same batches, other rounding")
    return step, [*lines, f"resumed from {checkpoint.folder(run, step).name}"]


def init_from(trainer: Trainer, source: Path | str) -> str:
    """Start the encoder (and its momentum copy) from other weights; projector and bank start fresh."""
    loaded = export.load_source(source)
    encoder = trainer.model.encoder
    own = {n: t for n, t in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}
    given = {n: t for n, t in loaded.state.items() if not n.endswith("num_batches_tracked")}
    given, words = match_channels(given, own)
    try:
        load_tensors(own, given, "encoder")
    except FastrexError:
        raise FastrexError(
            f"train: --init-from must hold a {trainer.config.model.arch} (stem {trainer.config.model.stem}, "
            f"width {trainer.config.model.width}) like the recipe, got {_kind(loaded.arch)}; set model.* to that"
        ) from None
    if trainer.ema is not None:
        trainer.ema.encoder.load_state_dict(encoder.state_dict())
    trainer.refresh_copies()
    return f"encoder starts from {source}{f' ({words})' if words else ''}"


def _kind(arch: Mapping[str, object]) -> str:
    return f"{arch['arch']} (stem {arch['stem']}, width {arch['width']})"
