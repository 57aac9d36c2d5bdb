"""The command ``fastrex`` with accidents: ``faulty.py [--fault KIND:rank=R,step=S]... [--hash DIR] -- train ...``.

Real processes of the real program; what goes wrong is patched in here, so that the program itself knows nothing of
tests. A fault happens on rank ``rank`` (default: all) right before the step numbered ``step`` (from 0), or as its kind
says; with ``once=FILE`` only as long as that file does not exist, so that a restarted job gets past it. ``--hash DIR``
makes every rank write the sha256 of all its state (every tensor, steps done, seed, schedule) to ``DIR/rank<R>.txt``
when a run ends well; ``--batches DIR`` appends, for every micro-batch that a step takes, its step, its number, the
rows of the index in it and the sha256 of its crops and targets to ``DIR/rank<R>.txt``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faulty_checkpoint
import faulty_numbers
import faulty_processes
import torch

from fastrex import checkpoint, cli, schedule
from fastrex import step as step_module
from fastrex.data import dataset
from fastrex.errors import FastrexError
from fastrex.model import resnet

Words = dict[str, str]
RANK = int(os.environ.get("RANK", "0"))


def kill(words: Words) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(words: Words) -> None:
    os._exit(0)


def fail(words: Words) -> None:
    raise FastrexError("faulty: this rank fails on purpose")


def stall(words: Words) -> None:
    time.sleep(float(words.get("seconds", "3600")))


def send(words: Words) -> None:
    os.kill(os.getpid(), getattr(signal, words["signal"]))


def kill_in_save(words: Words) -> None:
    """SIGKILL at flush number ``at`` (from 0) of what lies below ``checkpoints``, counted from before ``step``."""
    flush, seen = os.fsync, 0
    armed: list[bool] = []

    def counting(handle: int) -> None:
        nonlocal seen
        if armed and "/checkpoints" in os.readlink(f"/proc/self/fd/{handle}"):
            if seen == int(words["at"]) and first_time(words):
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
        flush(handle)

    os.fsync = counting
    original = step_module.Trainer.step

    def step(self: Any, number: int, *arguments: Any, **named: Any) -> Any:
        # Also in a process that has been resumed beyond that step.
        armed[:] = [True] * (number >= int(words["step"]))
        return original(self, number, *arguments, **named)

    step_module.Trainer.step = step  # type: ignore[method-assign]


def loss_scale(words: Words) -> None:
    """fp16's loss scale becomes ``scale`` before the step."""
    original = step_module.Trainer.step

    def step(self: Any, number: int, *arguments: Any, **named: Any) -> Any:
        if number == int(words["step"]):
            self.guard.scale.fill_(float(words["scale"]))
        return original(self, number, *arguments, **named)

    step_module.Trainer.step = step  # type: ignore[method-assign]


def shallow(words: Words) -> None:
    """ResNet-18 with one block in all: for runs of thousands of steps over ranks that share two cores."""
    resnet.ARCHS["resnet18"] = (False, (1, 0, 0, 0))


def shell(words: Words) -> None:
    """Run ``command`` (words without commas)."""
    subprocess.run(words["command"].split(), check=True)


def images(words: Words) -> None:
    """This rank finds the images of ``path`` where the others find theirs."""
    original = dataset.open_index

    def open_index(config: Any, *arguments: Any) -> Any:
        data = dataclasses.replace(config.data, path=words["path"])
        return original(dataclasses.replace(config, data=data), *arguments)

    dataset.open_index = open_index


def timm(words: Words) -> None:
    """Let timm be imported where torchvision's compiled operators do not fit torch."""
    from torchvision_shim import import_timm  # which imports pytest

    import_timm()


# What happens before a step. Kinds that patch something else are functions of their own in PATCHES.
BEFORE_STEP: dict[str, Callable[[Words], None]] = {
    "kill": kill,
    "leave": leave,
    "raise": fail,
    "stall": stall,
    "signal": send,
    "shell": shell,
}
PATCHES: dict[str, Callable[[Words], None]] = {
    "kill-in-save": kill_in_save,
    "shallow": shallow,
    "loss-scale": loss_scale,
    "images": images,
    "timm": timm,
    **faulty_checkpoint.PATCHES,
    **faulty_numbers.PATCHES,
    **faulty_processes.PATCHES,
}


def mine(words: Words) -> bool:
    return words.get("rank", str(RANK)) == str(RANK)


def first_time(words: Words) -> bool:
    if "once" not in words:
        return True
    try:
        Path(words["once"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def happen(kind: str, words: Words) -> None:
    if first_time(words):
        BEFORE_STEP[kind](words)


def before_step(wanted: int, happens: Callable[[], object]) -> None:
    original = step_module.Trainer.step

    def step(self: Any, number: int, *arguments: Any, **named: Any) -> Any:
        if number == wanted:
            happens()
        return original(self, number, *arguments, **named)

    step_module.Trainer.step = step  # type: ignore[method-assign]


def hash_at_end(folder: Path) -> None:
    original, original_schedule = step_module.Trainer.close, schedule.from_config
    plans = []

    def from_config(*arguments: Any) -> schedule.Schedule:
        plans.append(original_schedule(*arguments))
        return plans[-1]

    def close(self: Any) -> None:
        facts = {"seed": self.config.run.seed, "steps": int(self.number) + 1, **dataclasses.asdict(plans[-1])}
        text = checkpoint.state_hash(self.parts()) + json.dumps(facts, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{RANK}.txt").write_text(hashlib.sha256(text.encode()).hexdigest(), encoding="utf-8")
        original(self)

    step_module.Trainer.close = close  # type: ignore[method-assign]
    schedule.from_config = from_config


def note_batches(folder: Path) -> None:
    original = step_module.Trainer.step
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"rank{RANK}.txt").open("a", encoding="utf-8")

    def step(self: Any, number: int, micros: Any, *arguments: Any, **named: Any) -> Any:
        for batch in micros:
            total = hashlib.sha256()
            for tensor in (*batch.crops, batch.target):
                total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            rows = ",".join(map(str, batch.samples.tolist()))
            print(number, batch.micro, rows, total.hexdigest(), file=file, flush=True)
        return original(self, number, micros, *arguments, **named)

    step_module.Trainer.step = step  # type: ignore[method-assign]


def parse(text: str) -> tuple[str, Words]:
    kind, _, rest = text.partition(":")
    return kind, dict(word.split("=", 1) for word in rest.split(",") if word)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--hash", type=Path)
    parser.add_argument("--batches", type=Path)
    split = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:split])
    faults = [(kind, words) for kind, words in map(parse, options.fault) if mine(words)]
    for kind, words in faults:
        if kind not in BEFORE_STEP:
            PATCHES[kind](words)
    # Innermost: a batch that a fault keeps from being trained on is not noted.
    if options.batches:
        note_batches(options.batches)
    for kind, words in faults:
        if kind in BEFORE_STEP:
            before_step(int(words["step"]), partial(happen, kind, words))
    if options.hash:
        hash_at_end(options.hash)
    sys.argv = ["fastrex", *sys.argv[split + 1 :]]
    cli.main()


if __name__ == "__main__":
    main()
