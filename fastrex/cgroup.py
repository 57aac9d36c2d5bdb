"""Limits that a container, a scheduler or a shell sets on this process. Standard library only."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")


def memory() -> int | None:
    """Bytes of memory that this process and those beside it in its groups may use together, or None for no limit."""
    limits = [_number(folder / name) for folder in _folders("memory") for name in ("memory.max", _OLD_MEMORY)]
    # Version 1 writes "no limit" as a huge number.
    return min((n for n in limits if n is not None and n < 2**60), default=None)


def processes() -> int | None:
    """How many more processes and threads the groups of this process admit, or None for no limit."""
    room = []
    for folder in _folders("pids"):
        most, now = _number(folder / "pids.max"), _number(folder / "pids.current")
        if most is not None and now is not None:
            room.append(max(0, most - now))
    return min(room, default=None)


def admit_files(need: int) -> tuple[int, int]:
    """Let this process have ``need`` files open, as far as it may; the limit before and after (RLIM_INFINITY: none)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return soft, soft
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (need if hard == resource.RLIM_INFINITY else min(need, hard), hard))
    return soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0]


_OLD_MEMORY = "memory.limit_in_bytes"


def _folders(controller: str) -> Iterator[Path]:
    """The folders of this process's groups up to the root, of version 2 and of version 1 where there is one."""
    try:
        lines = GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = ROOT / controller if controllers else ROOT
        here = base / place.lstrip("/")
        # In a container the path may be the host's, of which only the root is there.
        while here != base and base in here.parents:
            yield here
            here = here.parent
        yield base


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max", or no such file
        return None
