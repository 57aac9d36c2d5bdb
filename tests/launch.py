"""Jobs of real ``fastrex`` processes for the fault tests: started as a user would, never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from conftest import ROOT, environment

FAULTY = ROOT / "tests" / "faulty.py"


@dataclass
class Job:
    """Processes of one job, each in a session of its own; leaving the ``with`` block kills whatever still lives.

    ``output``: what all of them have written so far.
    """

    processes: list[subprocess.Popen[bytes]]
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit codes; a job that outlives ``timeout`` seconds is killed and fails the test."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(max(0.0, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job hung for {timeout} s:\n{self.output}") from None

    def until(self, happened: Callable[[], object], timeout: float = 60) -> None:
        """Wait until ``happened`` is true; the job must live until then."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert any(p.poll() is None for p in self.processes), f"the job ended too early:\n{self.output}"
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"nothing happened for {timeout} s:\n{self.output}")
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """To the started processes only (the launcher, where there is one), not to their children."""
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            # torchrun gives its workers sessions of their own: the group alone would leave them.
            for pid in descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def faulty(
    arguments: Iterable[str | Path],
    faults: Sequence[str] = (),
    hashes: Path | None = None,
    batches: Path | None = None,
) -> list[str]:
    """Words for python: the program with accidents, or the plain one where none are wanted."""
    if not faults and hashes is None and batches is None:
        return ["-m", "fastrex", *map(str, arguments)]
    words = [str(FAULTY), *(w for fault in faults for w in ("--fault", fault))]
    for option, folder in (("--hash", hashes), ("--batches", batches)):
        words += [option, str(folder)] if folder else []
    return [*words, "--", *map(str, arguments)]


def one(log: Path, words: Sequence[str], **more: str) -> Job:
    """One process without a launcher."""
    return _start(log, [[sys.executable, *words]], [more])


def command(log: Path, words: Sequence[str], **more: str) -> Job:
    """One process of any program."""
    return _start(log, [words], [more])


def torchrun(
    log: Path, ranks: int, words: Sequence[str], options: Sequence[str] = ("--standalone",), **more: str
) -> Job:
    """``ranks`` processes under one torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={ranks}"]
    return _start(log, [[*launch, *words]], [more])


def ranks(log: Path, count: int, words: Sequence[str], **more: str) -> Job:
    """``count`` processes without a launcher, as srun starts them: several seconds faster than torchrun."""
    port = str(free_port())
    own = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        for r in range(count)
    ]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    return _start(log, [[sys.executable, *words]] * count, [{**shared, **o} for o in own])


def free_port() -> int:
    with socket.socket() as box:
        box.bind(("127.0.0.1", 0))
        return int(box.getsockname()[1])


def _start(log: Path, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> Job:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return Job(
            [
                subprocess.Popen(
                    command, env={**environment(), **more}, stdout=file, stderr=file, start_new_session=True
                )
                for command, more in zip(commands, environments, strict=True)
            ],
            log,
        )


def alive(pids: Iterable[int]) -> list[int]:
    """Those of ``pids`` that still run (a zombie does not)."""
    living = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            living.append(pid)
    return living


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found
