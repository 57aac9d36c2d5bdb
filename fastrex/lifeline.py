"""One end of a connection between two ranks: short lines of JSON that never block whoever sends them. The kernel says
when the other end is gone. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import select
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

MAX_LINE = 8192
MAX_WAITING = 65536
WELCOME_S = 10.0
HELLO_S, STRANGERS = 5.0, 64
_SIOCGIFADDR = 0x8915


class Store(Protocol):
    """Of torch's stores what the watch needs."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes: ...


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


class Door:
    """Where the other ranks come in: rank 0's listening socket, on a port that the kernel picks. Who does not show the
    token within ``HELLO_S`` is shown out without a word, and no more than ``STRANGERS`` may wait at a time.

    Args:
        everywhere: listen on all addresses of this host, or for this host alone.
        welcome: is given each newcomer: rank, lifeline, what it has said already. Its lifeline is registered with
            ``selector`` for it already, with nothing to call.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        size: int,
        everywhere: bool,
        lost_s: float,
        welcome: Callable[[int, Lifeline, list[dict[str, Any]]], None],
    ) -> None:
        self._selector, self._size, self._lost_s, self._welcome = selector, size, lost_s, welcome
        self._socket = _listen(everywhere)
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])
        self.token, self.proof = secrets.token_hex(16), secrets.token_hex(16)
        self.missing = set(range(1, size))
        self._strangers: dict[Lifeline, float] = {}
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            if len(self._strangers) >= STRANGERS + self._size:
                connection.close()
                return
            line = Lifeline(connection, self._lost_s)
            self._strangers[line] = time.monotonic() + HELLO_S
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._greet(line))

    def _greet(self, line: Lifeline) -> None:
        try:
            if not (said := line.receive()):
                return
            token, rank = said[0].get("token"), said[0].get("rank")
            if not isinstance(token, str) or not secrets.compare_digest(
                token.encode("utf-8", "replace"), self.token.encode()
            ):
                raise ValueError("a stranger")
            if type(rank) is not int or rank not in self.missing:
                raise ValueError("no rank that is missing")
        except (ValueError, Gone, Lost):
            self._show_out(line)
            return
        del self._strangers[line]
        self.missing.discard(rank)
        line.send(kind="welcome", proof=self.proof)
        self._welcome(rank, line, said[1:])

    def _show_out(self, line: Lifeline) -> None:
        del self._strangers[line]
        self._selector.unregister(line.socket)
        line.close()

    def look(self) -> None:
        """Show out who has waited for too long."""
        now = time.monotonic()
        for line in [line for line, until in self._strangers.items() if now > until]:
            self._show_out(line)

    def close(self) -> None:
        for line in self._strangers:
            line.close()
        self._socket.close()


def _listen(everywhere: bool) -> socket.socket:
    if everywhere:
        # Where IPv6 is compiled in but switched off, binding to it fails.
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", 0), backlog=1024)
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def addresses(master: str) -> list[str]:
    """Addresses of this host that other ranks may reach, the likeliest first: the one that it shows to ``master``
    (nothing is sent to find out), then those of its interfaces."""
    found = []
    with contextlib.suppress(OSError):
        for family, kind, _, _, where in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(where)
                found.append(str(probe.getsockname()[0]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            # An interface may have no IPv4 address.
            with contextlib.suppress(OSError):
                packed = struct.pack("256s", name.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, packed)[20:24]))
    return list(dict.fromkeys(found))[:16]


def dial(
    where: Iterable[str], port: int, hello: dict[str, Any], proof: str, lost_s: float
) -> tuple[Lifeline, list[dict[str, Any]]] | None:
    """A lifeline to the first of the addresses where the one that knows ``proof`` answers ``hello``, and what else it
    has said already."""
    for address in where:
        try:
            line = Lifeline(socket.create_connection((address, port), timeout=3), lost_s)
        except OSError:
            continue
        line.send(**hello)
        with contextlib.suppress(ValueError, Gone, Lost):
            select.select([line.socket], [], [], WELCOME_S)
            first, *more = line.receive() or [{}]
            if first.get("kind") == "welcome" and first.get("proof") == proof:
                return line, more
        line.close()
    return None
