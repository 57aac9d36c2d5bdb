"""Processes that answer questions, a line of JSON each on their standard input and output, and rest in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrex.errors import FastrexError

from . import FOREIGN, ROOT

# A start with a cold compiler cache or a slow disk, and still an end.
LIMIT_S = 900
# What an outer torchrun says to its own processes.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
Answer = dict[str, Any]


class Ended(FastrexError):
    """A process ended, or does not answer."""


class Team:
    """The processes of one subject, stopped except while they answer.

    Args:
        name: of the subject. module: of this package, run with one of ``specs`` per process. folder: for their output.
        env: more environment, per process.
    """

    def __init__(
        self, name: str, module: str, specs: Sequence[str], folder: str, env: Sequence[Mapping[str, str]]
    ) -> None:
        self.name = name
        foreign = (*FOREIGN, *RANKS)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        # A checkout works from any folder; an installation needs no path.
        path = [str(ROOT)] if __package__ == "benchmarks" else []
        path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in path if p))
        # Whether one has failed for which others may be waiting.
        self.broken = False
        self.logs = [Path(folder) / f"{name}-{rank}.log" for rank in range(len(specs))]
        self.members: list[subprocess.Popen[str]] = []
        for spec, more, log in zip(specs, env, self.logs, strict=True):
            # A group, not a session, of their own: the kernel ends a stopped group whose parent has died.
            group = self.members[0].pid if self.members else 0
            with log.open("w", encoding="utf-8") as output:
                member = subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}.{module}", spec], env={**kept, **more}, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, process_group=group,
                )  # fmt: skip
            self.members.append(member)

    def ask(self, do: str, **more: Any) -> list[Answer]:
        """Every process's answer to a question; of one that cannot, {"absent": why} alone (the others may be waiting
        for it, and the team is of no more use).

        Raises:
            Ended: a process did.
        """
        self._signal(signal.SIGCONT)
        for member in self.members:
            assert member.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                member.stdin.write(json.dumps({"do": do, **more}) + "\n")
                member.stdin.flush()
        waiting: dict[Any, int] = {member.stdout: rank for rank, member in enumerate(self.members)}
        answers: dict[int, Answer] = {}
        self.broken = True
        deadline = time.monotonic() + LIMIT_S
        while waiting:
            ready = select.select(list(waiting), [], [], max(deadline - time.monotonic(), 0))[0]
            if not ready:
                raise Ended(f"{self.name} has not answered for {LIMIT_S} s")
            for stream in ready:
                line = stream.readline()
                rank = waiting.pop(stream)
                if not line:
                    raise Ended(f"{self.name} ended: {self._last_words(rank)}")
                answers[rank] = json.loads(line)
                if "absent" in answers[rank]:
                    return [answers[rank]]
        self.broken = False
        self._signal(signal.SIGSTOP)
        return [answers[rank] for rank in sorted(answers)]

    def close(self) -> None:
        """End the processes and what they have started."""
        for member in self.members:
            assert member.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                member.stdin.close()
        self._signal(signal.SIGCONT)
        deadline = time.monotonic() + (0 if self.broken else 20)
        for member in self.members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.wait(max(deadline - time.monotonic(), 0))
        self._signal(signal.SIGKILL)
        for member in self.members:
            member.wait()
            assert member.stdout is not None
            member.stdout.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.members[0].pid, number)

    def _last_words(self, rank: int) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.members[rank].wait(20)
        code = self.members[rank].returncode
        if (code or 0) < 0:
            return f"killed by signal {-code}"
        words = self.logs[rank].read_text(encoding="utf-8", errors="replace")
        last = (words.strip().splitlines() or ["no message"])[-1]
        kind, _, text = last.partition(": ")
        return text if kind.rpartition(".")[2] in ("FastrexError", "UsageError", "BadSample") else last
