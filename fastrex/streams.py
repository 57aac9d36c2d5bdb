"""Lines for people, whatever stands behind stdout and stderr: any encoding, a pipe that nobody reads any more, nothing
at all. Standard library only."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import IO


def tolerate() -> None:
    """Let stdout and stderr escape what their encoding cannot hold (names of files are any bytes)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop(stream: IO[str] | None) -> None:
    """Send whatever a broken stream still holds, and all that comes, nowhere: flushing it at exit would fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def say(text: str) -> None:
    """A line on stdout that also stands elsewhere: a reader that has gone, or a full disk, does not end the program."""
    try:
        print(text, flush=True)
    except OSError:
        drop(sys.stdout)
