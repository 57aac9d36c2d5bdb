"""The largest batch whose step fits into memory: doubled until one does not, then bisected to a sixteenth.

Every attempt is a process of its own whose memory is limited, so that the host never has to choose whom to kill.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastrex import config as config_module
from fastrex import rundir
from fastrex.budget import activations, state_bytes
from fastrex.config import Config
from fastrex.data.dataset import DTYPES
from fastrex.distributed import World
from fastrex.step import Trainer, resolve_precision

from . import machine
from .processes import Ended
from .step import Record, Settings, check
from .step_subjects import FASTREX

KEYS = (
    "op", "impl", "allocator", "device", "threads", "batch", "crops", "model", "objective", "bn", "recompute",
    "precision", "peak_mib", "limit_mib", "attempts", "versions", "commit", "command",
)  # fmt: skip
LARGEST = 2**16


def run(settings: Settings, say: Callable[[str], None] = lambda _: None) -> list[Record]:
    """One record: ``batch`` is the largest that fits on one device, None where not even 2 images do; ``attempts`` is
    what was tried, in order.

    Raises:
        FastrexError: an unusable configuration.
    """
    settings = dataclasses.replace(settings, ranks=1, impl=(FASTREX,))
    config = check(settings)
    attempts: list[dict[str, Any]] = []

    def fits(batch: int) -> bool:
        say(f"a step on {batch} images")
        estimate = round(expected(batch) / machine.MIB, 1)
        found = attempt(dataclasses.replace(settings, batch=batch))
        attempts.append({"batch": batch, "estimate_mib": estimate, **found})
        return attempts[-1]["error"] is None

    device = torch.device(settings.device)
    precision = resolve_precision(config.optim.precision, device)
    expected = estimator(config, settings.classes, precision)
    best = largest(fits, settings.batch)
    (subject,) = settings.subjects()
    return [
        dict.fromkeys(KEYS)
        | {
            "op": "find_batch", "impl": FASTREX, "allocator": subject.allocator, "device": settings.device,
            "threads": settings.threads, "batch": best, "crops": config.data.crops_text, "model": config.model.arch,
            "objective": config.objective.name, "bn": config.model.bn, "recompute": config.model.recompute,
            "precision": precision, "attempts": attempts,
            "peak_mib": next((a["peak_mib"] for a in attempts if a["batch"] == best), None),
            "limit_mib": settings.limit_mib or None, "commit": rundir.commit(), "command": settings.command,
            "versions": {"fastrex": rundir.version(), **machine.facts(settings.device, subject.allocator)},
        }
    ]  # fmt: skip


def largest(fits: Callable[[int], bool], start: int) -> int | None:
    """The largest batch that fits, to a sixteenth of it and at most ``LARGEST``; None where 2 images do not."""
    low, high, batch = 0, 0, max(start, 2)
    while not (low and high) and batch <= LARGEST:
        if fits(batch):
            low, batch = batch, 2 * batch
        elif batch == 2:
            return None
        else:
            high, batch = batch, max(2, batch // 2)
    while high and high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def estimator(config: Config, classes: int, precision: str) -> Callable[[int], int]:
    """What gives the bytes that a step on so many images is expected to need: activations and state, without the
    workspaces of its operators."""
    plain = [f"optim.precision={precision}", "optim.impl=torch", "run.compile=false", "run.cuda_graph=off"]
    if config.model.bn == "apex":
        plain.append("model.bn=fused")  # on a CPU, and keeps as much
    trainer = Trainer(config_module.override(config, plain), classes, World(0, 1, 0, 1, torch.device("cpu")))
    state = state_bytes(nn.ModuleList([trainer.model, trainer.objective]), trainer.ema)

    def expected(images: int) -> int:
        kept = activations(trainer.model, trainer.crops, images, config.data.channels, DTYPES[precision])
        return sum(kept.values()) + state

    return expected


def attempt(settings: Settings) -> dict[str, Any]:
    """The peak of a step in a process of its own, or why there is none."""
    (subject,) = settings.subjects()
    with tempfile.TemporaryDirectory() as folder:
        team = settings.start(subject, "", folder)
        try:
            (answer,) = team.ask("attempt")
        except Ended as error:
            answer = {"absent": str(error)}
        finally:
            team.close()
    return {"peak_mib": answer.get("peak_mib"), "error": answer.get("absent")}


def table(records: Sequence[Record]) -> str:
    """The attempts by size, and the largest that fits."""
    (record,) = records
    limit = "what is free" if record["limit_mib"] is None else f"{record['limit_mib']:.0f} MiB"
    lines = [
        f"\nlargest batch within {limit} ({record['device']}): {record['model']}, {record['crops']} crops, "
        f"{record['precision']}, bn {record['bn']}, recompute {record['recompute']}",
        f"{'batch':>7}{'estimate MiB':>14}{'peak MiB':>11}",
    ]
    for one in sorted(record["attempts"], key=lambda a: a["batch"]):
        reached = f"{one['peak_mib']:>11.0f}" if one["error"] is None else f"  {one['error']}"
        lines.append(f"{one['batch']:>7}{one['estimate_mib']:>14.0f}{reached}")
    best = record["batch"]
    return "\n".join([*lines, "not even 2 images fit" if best is None else f"{best} images fit"])
