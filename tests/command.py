"""The command ``fastrex`` in this process, for tests that call it hundreds of times."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest import mock

from fastrex import cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error."""
        lines = self.err.strip("\n").split("\n")
        assert len(lines) == 1, self.err
        assert lines[0].startswith("fastrex: "), self.err
        assert "Traceback" not in self.err
        return lines[0]


class Hang(BaseException):
    """No exception that a program would catch."""


def fastrex(*words: str | Path, seconds: int = 300) -> Outcome:
    """Run ``fastrex WORDS``; fails when it takes ``seconds``, which then is a hang."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with (
        mock.patch.object(sys, "argv", ["fastrex", *map(str, words)]),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        hang_guard(seconds),
    ):
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code
    assert isinstance(code, int)
    out, err = (stream.buffer.getvalue().decode("utf-8") for stream in streams)  # type: ignore[attr-defined]
    return Outcome(code, out, err)


@contextlib.contextmanager
def hang_guard(seconds: int) -> Iterator[None]:
    def hung(number: int, frame: FrameType | None) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
