"""The command ``fastrex`` with accidents: ``faulty.py [--fault KIND:rank=R,step=S]... [--hash DIR] -- train ...``.

Real processes of the real program; what goes wrong is patched in here, so that the program itself knows nothing of
tests. A fault happens on rank ``rank`` (default: all) right before the step numbered ``step`` (from 0), or as its kind
says; with ``once=FILE`` only as long as that file does not exist, so that a restarted job gets past it. ``--hash DIR``
makes every rank write the sha256 of all its state to ``DIR/rank<R>.txt`` when a run ends well.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrex import checkpoint, cli
from fastrex import step as step_module
from fastrex.errors import FastrexError

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


# What happens before a step. Kinds that patch something else are functions of their own in PATCHES.
BEFORE_STEP: dict[str, Callable[[Words], None]] = {
    "kill": kill,
    "leave": leave,
    "raise": fail,
    "stall": stall,
    "signal": send,
}
PATCHES: dict[str, Callable[[Words], None]] = {}


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


def before_steps(faults: list[tuple[str, Words]]) -> None:
    original = step_module.Trainer.step

    def step(self: Any, number: int, *arguments: Any, **named: Any) -> Any:
        for kind, words in faults:
            if int(words["step"]) == number and first_time(words):
                BEFORE_STEP[kind](words)
        return original(self, number, *arguments, **named)

    step_module.Trainer.step = step  # type: ignore[method-assign]


def hash_at_end(folder: Path) -> None:
    original = step_module.Trainer.close

    def close(self: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{RANK}.txt").write_text(checkpoint.state_hash(self.parts()), encoding="utf-8")
        original(self)

    step_module.Trainer.close = close  # type: ignore[method-assign]


def parse(text: str) -> tuple[str, Words]:
    kind, _, rest = text.partition(":")
    return kind, dict(word.split("=", 1) for word in rest.split(",") if word)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", action="append", default=[])
    parser.add_argument("--hash", type=Path)
    split = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:split])
    faults = [(kind, words) for kind, words in map(parse, options.fault) if mine(words)]
    for kind, words in faults:
        if kind not in BEFORE_STEP:
            PATCHES[kind](words)
    before_steps([fault for fault in faults if fault[0] in BEFORE_STEP])
    if options.hash:
        hash_at_end(options.hash)
    sys.argv = ["fastrex", *sys.argv[split + 1 :]]
    cli.main()


if __name__ == "__main__":
    main()
