"""How a run is doing, for people and for scripts: what it says of itself, its last sign of life, which of its
checkpoints are good. Nothing is changed."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Any

from . import checkpoint, rundir, untrusted

# What a run appends to or replaces while it lives.
SIGNS = ("metrics.jsonl", "train.log", rundir.STATUS)
TAIL = 2**16  # bytes at the end of metrics.jsonl that hold its last whole line
# State -> what to do next.
UNFINISHED = ("preempted", "killed", "failed")


def examine(run: Path, verify: bool = False) -> dict[str, Any]:
    """status.json, and what the files of ``run`` show.

    Returns:
        ``state`` (running, completed, preempted, failed, diverged, killed), and as far as known ``step``, ``rank`` and
        ``error``, ``host``, ``pid``, ``world_size``; ``logged_step``: the last one in metrics.jsonl; ``silent_s``:
        seconds since the last sign of life; ``checkpoint``: the newest good one's step; ``damaged``: step -> why;
        ``good``: steps, with ``verify`` those that match their checksums, else those whose files have their sizes;
        ``set_aside``: folders of damaged ones; ``continue``: the command that goes on, where there is something to do.

    Raises:
        FastrexError: ``run`` is no run directory.
    """
    facts = rundir.read_status(run)
    facts["world_size"] = _world_size(run)
    facts["logged_step"] = _logged_step(run / "metrics.jsonl")
    facts["silent_s"] = _silence(run)
    good, damaged = [], {}
    for step in checkpoint.steps(run):
        try:
            (checkpoint.verify if verify else checkpoint.check_sizes)(checkpoint.folder(run, step))
            good.append(step)
        except checkpoint.BadCheckpoint as error:
            damaged[step] = str(error)
    facts |= {"checkpoint": good[-1] if good else None, "good": good, "damaged": damaged, "verified": verify}
    facts["set_aside"] = sorted(p.name for p in (run / "checkpoints").glob("bad.*"))
    facts["continue"] = _way_on(run, facts)
    return facts


def lines(facts: dict[str, Any]) -> list[str]:
    """What :func:`examine` found, for a person: one line per fact that is there."""
    shown = dict(facts)
    silent, good, damaged = shown.pop("silent_s"), shown.pop("good"), shown.pop("damaged")
    verified, aside, way_on = shown.pop("verified"), shown.pop("set_aside"), shown.pop("continue")
    newest = shown.pop("checkpoint")
    text = [f"{name}: {value}" for name, value in shown.items() if value is not None]
    if silent is not None:
        text.append(f"last sign of life: {_age(silent)} ago")
    how = "verified" if verified else "its files are complete; --verify reads them"
    text.append(f"checkpoint: {newest} ({how})" if newest is not None else "checkpoint: none")
    if verified and good:
        text.append(f"good checkpoints: {', '.join(map(str, good))}")
    text += [f"damaged checkpoint: {step}: {why}" for step, why in damaged.items()]
    if aside:
        text.append(f"set aside: {', '.join(aside)}")
    return [*text, f"continue: {way_on}"] if way_on else text


def _way_on(run: Path, facts: dict[str, Any]) -> str | None:
    place, ranks = shlex.quote(str(run)), facts["world_size"] or 1
    if facts["state"] == "diverged":
        return f"fastrex train --init-from {place} --out NEW, with a lower optim.lr or --precision fp32"
    if facts["state"] not in UNFINISHED:
        return None
    if ranks > 1:
        return f"fastrex train --out {place} --resume must, on {ranks} ranks as before (torchrun -m fastrex ..., srun)"
    return f"fastrex train --out {place} --resume must"


def _world_size(run: Path) -> int | None:
    try:
        size = untrusted.read_json(run / rundir.ENV, rundir.MAX_STATUS)["world_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return size if isinstance(size, int) else None


def _logged_step(path: Path) -> int | None:
    """The step of the last whole line: a kill may have cut the one after it."""
    try:
        with untrusted.opened(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            tail = file.read(TAIL).splitlines()
    except (OSError, ValueError):
        return None
    for line in reversed(tail):
        try:
            return int(untrusted.parse_json(line.decode("utf-8"))["step"])
        except (ValueError, LookupError, TypeError):
            continue
    return None


def _silence(run: Path) -> float | None:
    times = [path.stat().st_mtime for path in (run / name for name in SIGNS) if path.is_file()]
    return round(max(0.0, time.time() - max(times)), 1) if times else None


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
