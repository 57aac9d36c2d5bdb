"""How the other ranks find rank 0 and come in. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import secrets
import select
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .cgroup import admit_files
from .errors import FastrexError
from .lifeline import Gone, Lifeline, Lost

KEY = "fastrex/watch"
WELCOME_S = 10.0
HELLO_S, STRANGERS = 5.0, 64
AGAIN_S = 0.2
# Files that rank 0 has open beside its connections.
OTHER_FILES = 512
_SIOCGIFADDR = 0x8915


class Store(Protocol):
    """Of torch's stores what the watch needs."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes: ...


class Door:
    """Where the other ranks come in: rank 0's listening socket, on a port that the kernel picks. Who does not show the
    token within ``HELLO_S`` is shown out without a word, and no more than ``STRANGERS`` may wait at a time.

    Args:
        everywhere: listen on all addresses of this host, or for this host alone.
        welcome: is given each newcomer: rank, lifeline, what it has said already. Its lifeline is registered with
            ``selector`` for it already, with nothing to call.

    ``problem``: why nobody can come in any more, if so.
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
        admit_files(size + OTHER_FILES)
        self._socket, self.problem = _listen(everywhere), ""
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])
        self.token, self.proof = secrets.token_hex(16), secrets.token_hex(16)
        self.missing = set(range(1, size))
        self._strangers: dict[Lifeline, float] = {}
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # It would be called again at once, for ever.
                self._selector.unregister(self._socket)
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                self.problem = (
                    f"rank 0 must hold a connection to each of the {self._size} ranks, but the limit on open files is "
                    f"{limit}; raise it (ulimit -n)"
                )
            return
        with contextlib.suppress(OSError):
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


def announce(door: Door, store: Store, master: str, everywhere: bool) -> str:
    """Tell the other ranks where the door is; returns a name for this start of this job."""
    mine = [a for a in [os.environ.get("FASTREX_WATCH_ADDRESS")] if a]
    mine += addresses(master) if everywhere else ["127.0.0.1"]
    job = secrets.token_hex(8)
    facts = {"port": door.port, "addresses": mine, "token": door.token, "proof": door.proof, "job": job}
    store.set(KEY, json.dumps(facts))
    return job


def enter(
    rank: int, store: Store, master: str, patience_s: float, lost_s: float, command: str
) -> tuple[Lifeline, list[dict[str, Any]], str]:
    """A lifeline to rank 0, what it has said already, and the name that :func:`announce` gave.

    Raises:
        FastrexError: it could not be reached.
    """
    deadline = time.monotonic() + patience_s
    # torchrun keeps the store over a restart: what it says may be of ranks that are gone, until rank 0 replaces it.
    while True:
        facts = json.loads(store.get(KEY))
        where = list(dict.fromkeys([*facts["addresses"], master]))
        hello = {"kind": "hello", "rank": rank, "token": facts["token"]}
        if (found := dial(where, facts["port"], hello, facts["proof"], lost_s)) is not None:
            return *found, str(facts["job"])
        if time.monotonic() > deadline:
            raise FastrexError(
                f"{command}: rank {rank} must reach rank 0 on port {facts['port']} of one of {', '.join(where)}; let "
                "the hosts talk on all ports, as gloo and NCCL need, or name the right address of rank 0's host in "
                "FASTREX_WATCH_ADDRESS"
            )
        time.sleep(AGAIN_S)
