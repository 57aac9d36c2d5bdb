"""One command with an end: its output in a log, and nothing of it left when its time is over.

It gets a session of its own, so that what it has started can be found, in whatever process groups, and ended with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

TICK_S = 0.05
# From the request to end until processes are killed, and from then until those that a driver holds are left behind.
GRACE_S = 5.0
KILL_S = 10.0


@dataclass
class Stop:
    """Whether somebody has asked this command itself to end, and by which signal."""

    signal: int = 0

    def __bool__(self) -> bool:
        return self.signal != 0


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Note SIGTERM, SIGINT and SIGHUP instead of dying of them: the table is still to be written."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = stop.signal or number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Ended:
    """How a process ended. ``code``: as of subprocess, negative for a signal; ``late``: it was ended, its time was
    over (or everybody's was)."""

    code: int
    seconds: float
    late: bool
    last: str

    @property
    def why(self) -> str:
        """What went wrong, or nothing."""
        if self.late:
            return f"ended after {self.seconds:.0f} s" if self.seconds else "not started"
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-self.code).name}"
        return f"exit code {self.code}: {self.last}" if self.code else ""


def run(
    command: Sequence[str], log: Path, limit_s: float, env: Mapping[str, str], cwd: Path, stop: Stop | None = None
) -> Ended:
    """Run ``command`` with its output in ``log``, for ``limit_s`` seconds at most."""
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
    late = False
    while not _has_ended(process.pid):
        if stop or time.monotonic() - start > limit_s:
            late = True
            break
        time.sleep(TICK_S)
    end_session(process.pid)
    code = process.poll()
    return Ended(-signal.SIGKILL if code is None else code, time.monotonic() - start, late, last_line(log))


def _has_ended(pid: int) -> bool:
    """Leaves the process to be waited for: until then nobody else can get its number, which is its session's too."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_session(leader: int) -> None:
    """End every process of the session; the leader is still to be waited for."""
    _send(leader, signal.SIGTERM)
    _send(leader, signal.SIGCONT)  # one that is stopped hears nothing else
    deadline = time.monotonic() + GRACE_S
    while members(leader) and time.monotonic() < deadline:
        time.sleep(TICK_S)
    deadline = time.monotonic() + KILL_S
    while members(leader) and time.monotonic() < deadline:  # one that is starting another may need it twice
        _send(leader, signal.SIGKILL)
        time.sleep(TICK_S)


def _send(leader: int, number: int) -> None:
    for pid in members(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def members(leader: int) -> list[int]:
    """Processes of the session that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # The name may hold anything, brackets too.
                state, _, _, session = (folder / "stat").read_text("utf-8", "replace").rpartition(") ")[2].split()[:4]
                if int(session) == leader and state not in "ZX":
                    found.append(int(folder.name))
    return found


def last_line(log: Path) -> str:
    """The last words of a log, without what only marks their place."""
    lines = log.read_text("utf-8", "replace").splitlines() if log.is_file() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no message")
