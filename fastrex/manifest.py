"""What a checkpoint says of its run beside the tensors: written at a save, held against the run at a resume."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, rundir, schedule
from . import config as config_module
from .config import Config
from .data import plan
from .data.dataset import Dataset
from .digests import StateDigest
from .distributed import World
from .errors import FastrexError

KEYS = ("epoch", "seed", "schedule", "world_size", "data", "classes", "config", "plan", "versions", "digest")
# Where the images lie is not what they are (``data`` tells that); this machine has chosen the batch norm's backend.
_OF_THE_MACHINE = ("data.path", "model.bn")


def digested(config: Config, data: Dataset, step: int) -> dict[str, Any]:
    """What the state digest covers beside the tensors."""
    return {"step": step, "seed": config.run.seed, "schedule": _schedule(config, data)}


def facts(config: Config, data: Dataset, world: World, step: int, digest: StateDigest) -> dict[str, Any]:
    """All of ``KEYS`` for the checkpoint of a step."""
    return {
        "epoch": step / data.steps_per_epoch,
        "seed": config.run.seed,
        "schedule": _schedule(config, data),
        "world_size": world.size,
        "data": data.fingerprint,
        "classes": list(data.classes),
        "plan": plan.VERSION,
        "versions": versions(),
        "digest": str(digest),
        "config": config_module.to_toml(config),
    }


def versions() -> dict[str, str]:
    """What the bits of a run may depend on."""
    dali = [d for d in ("nvidia-dali-cuda130", "nvidia-dali-cuda120") if _installed(d)]
    return {
        "fastrex": rundir.version(),
        "torch": torch.__version__,
        "dali": metadata.version(dali[0]) if dali else "absent",
        "python": platform.python_version(),
    }


def check(
    state: Mapping[str, Any], config: Config, data: Dataset, world: World, run: Path, allow_world_size_change: bool
) -> list[str]:
    """Lines for the log about what may change the bits of a resumed run.

    Raises:
        FastrexError: the checkpoint is not one of this run, or of a version whose runs this one cannot continue.
    """
    way_out = f"start a new run with --init-from {run}"
    known = state.get("versions", state)
    writer = f"fastrex {known.get('fastrex', 'of an earlier version') if isinstance(known, dict) else 'unknown'}"
    if state["format"] != checkpoint.FORMAT:
        raise FastrexError(
            f"resume: checkpoints must have format {checkpoint.FORMAT}, got {state['format']}, written by {writer}; "
            f"finish the run with that version, or {way_out}"
        )
    if missing := [key for key in KEYS if key not in state]:
        raise FastrexError(
            f"resume: {checkpoint.STATE} of step {state['step']} must hold {missing[0]!r}, it was written by {writer}; "
            f"finish the run with that version, or {way_out}"
        )
    if state["plan"] != plan.VERSION:
        raise FastrexError(
            f"resume: the run's batches must be those of plan version {plan.VERSION}, got {state['plan']}, written by "
            f"{writer}; finish the run with that version, or {way_out}"
        )
    if state["data"] != data.fingerprint:
        raise FastrexError(
            f"resume: the images must be those of the run, but {config.data.path or 'the data set'} has changed "
            f"since; {way_out}"
        )
    mine = {"classes": list(data.classes), "seed": config.run.seed, "schedule": _schedule(config, data)}
    for key, value in mine.items():
        if state[key] != value:
            got = f"{_short(value)}, got {_short(state[key])}"
            raise FastrexError(f"resume: the checkpoint's {key} must be the run's, {got}; {way_out}")
    if changes := _changed_settings(state["config"], config):
        raise FastrexError(f"resume: the checkpoint is of another configuration: {'; '.join(changes[:5])}; {way_out}")
    lines = [
        f"the checkpoint was written with {name} {then}, this is {now}: bits may differ from those of the whole run"
        for name, now in versions().items()
        if (then := known.get(name, "unknown") if isinstance(known, dict) else "unknown") != now
    ]
    if state["world_size"] != world.size:
        if not allow_world_size_change:
            raise FastrexError(
                f"resume: the number of ranks must be the run's, {state['world_size']}, got {world.size}; start "
                f"{state['world_size']}, or pass --allow-world-size-change (same batches, other rounding)"
            )
        lines.append(f"resuming a run of {state['world_size']} ranks with {world.size}: same batches, other rounding")
    return lines


def _changed_settings(text: object, config: Config) -> list[str]:
    try:
        then = config_module.from_toml(str(text), checkpoint.STATE)
    except FastrexError as error:
        return [str(error)]
    changes = config_module.diff(config_module.resumed(then, config), config)
    return [change for change in changes if not change.startswith(_OF_THE_MACHINE)]


def _schedule(config: Config, data: Dataset) -> dict[str, Any]:
    return dataclasses.asdict(schedule.from_config(config.optim, data.steps_per_epoch))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
