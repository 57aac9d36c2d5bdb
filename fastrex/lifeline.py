"""One end of a connection between two ranks: short lines of JSON that never block whoever sends them. The kernel says
when the other end is gone. Standard library only."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

MAX_LINE = 8192
MAX_WAITING = 65536


class Gone(Exception):
    """The other process has ended, or has closed its end: its kernel says so."""


class Lost(Exception):
    """The other end does not answer any more: its host, or the network between."""


class Lifeline:
    """A connected socket that carries one JSON object per line, both ways.

    What arrives is bounded (``MAX_LINE`` bytes a line) and parsed, nothing more: who reads it decides what it means.

    Args:
        lost_s: seconds without any answer from the other end's kernel after which it counts as lost. A process that is
            busy or frozen keeps answering.
    """

    def __init__(self, connection: socket.socket, lost_s: float) -> None:
        connection.setblocking(False)
        # Addresses of a Unix socket pair know none of these options.
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            every = max(1, int(lost_s / 4))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(lost_s * 1000))
        self.socket = connection
        self._received, self._waiting = bytearray(), bytearray()
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Any thread; never blocks and never fails: that the other end is gone, :meth:`receive` finds out. A reader
        that takes nothing for long misses what does not fit."""
        line = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._sending:
            if len(line) <= MAX_LINE and len(self._waiting) + len(line) <= MAX_WAITING:
                self._waiting += line
            self._push()

    def flush(self) -> None:
        """Send what did not fit before."""
        with self._sending:
            self._push()

    def _push(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self.socket.send(self._waiting)]
        except BlockingIOError:
            pass
        except OSError:
            self._waiting.clear()

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived since the last call; one of the threads.

        Raises:
            Gone, Lost: nothing more will come.
            ValueError: that is no line of ours.
        """
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except (ConnectionResetError, BrokenPipeError):
            raise Gone from None
        except OSError as error:
            raise Lost(str(error)) from None
        if not data:
            raise Gone
        self._received += data
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        if any(len(line) > MAX_LINE for line in [*lines, rest]):
            raise ValueError("a line is too long")
        return [_parsed(bytes(line)) for line in lines]

    def close(self) -> None:
        self.socket.close()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("brackets without end") from None
    if not isinstance(message, dict):
        raise ValueError("no JSON object")
    return message
