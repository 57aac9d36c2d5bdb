"""The folder that a command writes its result into: nobody else's, and by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from .. import files, untrusted
from ..errors import FastrexError, explain, one_line

LOCK = ".lock"
WAIT_S = 60.0  # a result is written in much less


def claim(command: str, out: Path, names: Sequence[str]) -> None:
    """Refuse a folder that cannot be written or holds something else than a result of ``command``.

    Args:
        names: of its files; the first is that which tells what it is, the others are never there without it.

    Raises:
        FastrexError: says what stands there.
    """
    try:
        there = files.nearest(out)
        if not there.is_dir():
            raise FastrexError(f"{command}: --out must be a folder, got the file {there}; choose another")
        if not os.access(there, os.W_OK | os.X_OK):
            raise FastrexError(f"{command}: --out {out} cannot be written (no permission in {there}); choose another")
        held = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    except OSError as error:
        raise FastrexError(f"{command}: --out {out}: {explain(error)}") from None
    left = tuple(f".{name}." for name in names)
    other = sorted(name for name in held - {*names, LOCK} if not name.startswith(left))
    if names[0] not in held:
        other = other or sorted(held & {*names})
    if other:
        raise FastrexError(
            f"{command}: --out {out} must be new or hold the result of it, got {other[0]!r} in it; choose another"
        )


@contextlib.contextmanager
def locked(command: str, out: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Be the only one who writes into ``out``, which is there; others are waited for.

    Raises:
        FastrexError: another process has kept it for ``wait_s`` seconds, or the folder cannot be written.
    """
    path, end = out / LOCK, time.monotonic() + wait_s
    while True:
        try:
            file = untrusted.to_append(path, "a+")
        except OSError as error:
            raise FastrexError(f"{command}: --out {out} cannot be written: {explain(error)}") from None
        with file:
            if not _taken(file):
                if time.monotonic() > end:
                    raise FastrexError(
                        f"{command}: --out {out} must be free to write, another process{_owner(file)} keeps it; end "
                        "that one, or choose another --out"
                    )
                time.sleep(0.05)
                continue
            if not _there(file, path):
                continue
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _there(file: IO[str], path: Path) -> bool:
    """Whether it is the file that others see: whoever has had the lock before has removed theirs."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _taken(file: IO[str]) -> bool:
    """Whether this process has the lock, which the kernel takes back when it ends; a file system without locks gives
    it to everybody."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _owner(file: IO[str]) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        file.seek(0)
        facts = untrusted.parse_json(file.read(1000))
        return f" (process {int(facts['pid'])} on {one_line(str(facts['host'])[:80])})"
    return ""
