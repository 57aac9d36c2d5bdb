"""Who is still there, and how far: a rank that dies, hangs or leaves ends the job within seconds, by name.

Every rank holds one TCP connection to rank 0 and a thread that listens on it. When a process ends, in whatever way,
its kernel closes the connection, and a rank that has not said goodbye is dead. No timeout is involved: nobody is taken
for dead who is only busy. Only a host that does not answer at all for ``LOST_S`` is lost. A hang has no such sign:
ranks count their progress, and when nobody's count moves for ``run.stall_s``, the one that is furthest behind is what
the others wait for; a rank whose very thread says nothing is frozen (:mod:`fastrex.stall`). What rank 0 concludes (a
:class:`Verdict`) goes to all. A main thread that sits in a collective cannot act on it, so the thread ends the process
a moment later, or when the checkpoint that is being written is complete. A single process needs none of this.

The connections also carry the agreement on where to stop (:mod:`fastrex.agreement`). No message means more than its
text and numbers, and none is taken from a stranger: a random token, told through the job's store, opens the door. It
keeps jobs apart and guards against accidents; like gloo and NCCL it wants a network that is trusted.

Standard library only, and no call to the device: this must work when nothing else does.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from . import ending
from .agreement import Agreement
from .door import Door, Store, announce, enter
from .errors import DivergedError, FastrexError
from .lifeline import Gone, Lifeline, Lost
from .messages import outcome, read_place, read_verdict, whole, words
from .stall import Clock
from .verdict import Interrupted, Place, RankLost, Verdict, failure, first_line

POLL_S, BEAT_S = 0.2, 1.0
# A host that does not answer for so long is lost.
LOST_S = float(os.environ.get("FASTREX_LOST_S", "30"))
# What the main thread gets to leave by itself after a verdict, and then to close what it has open.
GRACE_S, LEAVE_S = 3.0, 60.0
# How long an error of a collective waits for the verdict that explains it; shorter than the grace of the others.
EXPLAIN_S = 3.0
# How long the end of a process waits for a checkpoint that is being written, and a verdict for being written down.
BUSY_S, NOTE_S = 600.0, 2.0
# What rank 0 can listen to.
WORDS_PER_S = 250


class Watch:
    """One rank's end. Made for a single process it only counts.

    What the training sets: ``wanted`` (is this rank asked to stop), ``on_verdict`` (called by the watch's thread),
    ``collectives`` (how many this rank has issued; called by the thread), ``busy`` (is a checkpoint being written that
    the end of this process should wait for; called by the thread), ``command`` and ``way_out`` for the messages.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.wanted: Callable[[], bool] = lambda: False
        self.on_verdict: Callable[[Verdict], object] = lambda verdict: None
        self.collectives: Callable[[], int] = lambda: -1
        self.busy: Callable[[], bool] = lambda: False
        self.command, self.way_out = "ranks", ""
        self.job = ""  # a name for this start of this job, the same on all ranks
        self.verdict: Verdict | None = None
        self.place = Place()
        self._agreement = Agreement()
        self._peers: dict[int, Lifeline] = {}
        self._places: dict[int, Place] = {}
        self._done: set[int] = set()
        self._door: Door | None = None
        self._answers: dict[int, int] | None = None
        self._asked = False
        self._decided, self._complete = threading.Event(), threading.Event()
        self._deciding = threading.Lock()
        self._hard_end = self._latest_end = float("inf")
        self._own_error = ""
        self._unsaid: Verdict | None = None
        self._told = self._beat = time.monotonic()
        # Few ranks tell at once and every second; of many, rank 0 hears no more than it can listen to.
        self._beat_s = max(BEAT_S, size / WORDS_PER_S)
        self.clock = Clock(LOST_S)
        self._closing = False
        self._own: tuple[selectors.BaseSelector | socket.socket, ...] = ()
        self._thread: threading.Thread | None = None

    # Start and end.

    def start(self, store: Store, master: str, everywhere: bool, patience_s: float) -> None:
        """Connect to the other ranks; returns when this rank's lifeline is up, on rank 0 when all are.

        Args:
            store: where rank 0 tells the others how to reach it. master: any host that all ranks can reach.
            everywhere: listen for other hosts too. patience_s: how long ranks may come after one another.

        Raises:
            FastrexError: rank 0 cannot be reached, or ranks are missing.
        """
        self._selector = selectors.DefaultSelector()
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)
        self._own = (self._selector, self._alarm, self._bell)
        self._selector.register(self._alarm, selectors.EVENT_READ, self._rung)
        if self.rank == 0:
            self._door = Door(self._selector, self.size, everywhere, LOST_S, self._welcome)
            self.job = announce(self._door, store, master, everywhere)
        else:
            line, said, self.job = enter(self.rank, store, master, patience_s, LOST_S, self.command)
            self._selector.register(line.socket, selectors.EVENT_READ)
            self._welcome(0, line, said)
        self._thread = threading.Thread(target=self._run, name="fastrex-watch", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + patience_s
        while self.rank == 0 and not self._complete.wait(POLL_S):
            self.check()
            if self._door is not None and self._door.problem:
                raise FastrexError(f"{self.command}: {self._door.problem}")
            if time.monotonic() > deadline:
                missing = sorted(self._door.missing) if self._door is not None else []
                raise FastrexError(
                    f"{self.command}: all {self.size} ranks must come within {patience_s:.0f} s, got no word from rank "
                    f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}; look at their output"
                )

    def bye(self) -> None:
        """This rank's end is not an accident any more."""
        for line in self._peers.values():
            line.send(kind="bye")

    def close(self) -> None:
        """Stop watching."""
        self._closing = True
        if self._thread is not None:
            self._ring()
            self._thread.join(5)
        for closing in (*self._peers.values(), self._door, *self._own):
            if closing is not None:
                closing.close()
        self._own = ()

    # What the main thread says and asks.

    def mark(self, step: int, doing: str) -> None:
        """Progress: ``step`` steps are done and this comes next. All ranks mark the same things in the same order."""
        self.place = Place(self.place.ticks + 1, step, doing)
        self.clock.doing(doing)
        if self._peers and time.monotonic() - self._told >= max(0, self.size - 8) / WORDS_PER_S:
            self._tell()

    def again(self) -> None:
        """Progress with what was marked last."""
        self.mark(self.place.step, self.place.doing)

    def guard(self, stall_s: float, first_step: int = 0) -> None:
        """From now on, no progress of any rank for ``stall_s`` seconds ends the job; until ``first_step`` is done, and
        for whatever else is done for the first time, there is more time. 0: only a rank that is frozen does; infinity:
        not even that."""
        self.clock.guard(stall_s, first_step)

    def boundary(self) -> bool:
        """Pass a place where the ranks can stop; True on all of them at the same one.

        Raises:
            RankLost: the job has ended meanwhile.
        """
        if self.size == 1:
            return self.wanted()
        if not self._asked and self.wanted():
            self._ring()
        stop = self._agreement.boundary()
        self.check()
        return stop

    @property
    def leaving(self) -> bool:
        """Whether what leads up to the next boundary can be left out, since all stop there."""
        return self.wanted() if self.size == 1 else self._agreement.near

    def check(self) -> None:
        """Raise :class:`RankLost` when the job has ended."""
        if self.verdict is not None:
            raise RankLost(self.verdict)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Errors inside are told to the other ranks, or replaced by what has happened to those."""
        try:
            yield
        except (RankLost, GeneratorExit):
            self._leave("")
            raise
        except BaseException as error:
            if self.size == 1 or self._own_error:
                raise
            # A collective fails when another rank is gone: the watch knows more about that. What fastrex itself raises,
            # and a device that is out of memory, explain themselves.
            own = isinstance(error, FastrexError) or type(error).__name__ == "OutOfMemoryError"
            if isinstance(error, RuntimeError) and not own and self._decided.wait(EXPLAIN_S) and self.verdict:
                self._leave("")
                raise RankLost(self.verdict) from error
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Tell the others and go; waits until rank 0 has heard it."""
        states = {DivergedError: "diverged", Interrupted: "preempted"}
        text, state = first_line(error), states.get(type(error), "failed")
        self._leave(text)
        if self.rank == 0:
            self._decide(failure(self.command, 0, self.place, text, state))
        elif 0 in self._peers:
            self._tell()
            self._peers[0].send(kind="failed", text=text, state=state)
            self._decided.wait(1.0)

    def _leave(self, text: str) -> None:
        """The main thread is on its way out."""
        self._own_error = text or self._own_error or "left"
        self._end_in(LEAVE_S)

    def _end_in(self, seconds: float) -> None:
        self._hard_end = time.monotonic() + seconds
        self._latest_end = self._hard_end + BUSY_S

    # The thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select(POLL_S):
                    key.data()
                self._look(time.monotonic())
        except BaseException as error:
            # A rank that nobody watches could hang for ever.
            if not self._closing:
                self._own_error = f"{self.command}: the watch failed: {first_line(error)}"
                self._end()
        finally:
            self._agreement.give_up()

    def _ring(self) -> None:
        """Wake the thread."""
        with contextlib.suppress(OSError):
            self._bell.send(b"!")

    def _rung(self) -> None:
        with contextlib.suppress(OSError):
            self._alarm.recv(4096)

    def _look(self, now: float) -> None:
        self.clock.looked(now)
        if now < self._latest_end < float("inf") and self.busy():
            # And time to say so, once it is complete.
            self._hard_end = max(self._hard_end, now + GRACE_S)
        if now > self._hard_end:
            self._end()
        if now - self._beat > self._beat_s:
            self._beat = now
            self._tell()
            self._notice_stall(now)
        for line in self._peers.values():
            line.flush()
        if self._door is not None:
            self._door.look()
        if not self._asked and self.wanted():
            self._asked = True
            if self.rank:
                self._peers[0].send(kind="stop")
            else:
                self._propose()

    def _tell(self) -> None:
        """Where this rank is; to rank 0, or from it to all."""
        self._told = time.monotonic()
        place = self._here()
        for line in self._peers.values():
            line.send(kind="beat", place=place)

    def _here(self) -> Place:
        issued = -1
        with contextlib.suppress(RuntimeError):  # of a group that is being taken down
            issued = self.collectives()
        return self.place._replace(collectives=issued)

    def _welcome(self, rank: int, line: Lifeline, said: Sequence[dict[str, Any]]) -> None:
        self._peers = {**self._peers, rank: line}
        self.clock.heard(rank)
        self._selector.modify(line.socket, selectors.EVENT_READ, lambda: self._read(rank))
        if len(self._peers) == self.size - 1:
            self._complete.set()
        self._read(rank, said)

    def _read(self, rank: int, said: Sequence[dict[str, Any]] = ()) -> None:
        """Take what a rank has ``said`` already and what there is to read."""
        try:
            for message in (*said, *self._peers[rank].receive()):
                self.clock.heard(rank)
                self._heard(rank, message)
            return
        except Gone:
            how = "was killed or left without a word"
        except Lost:
            how = f"has not answered for {LOST_S:.0f} s, its host or the network is gone,"
        except ValueError as error:
            how = f"has sent what no rank sends ({error})"
        self._selector.unregister(self._peers[rank].socket)
        if rank in self._done:
            return
        # Over many ranks rank 0 seldom speaks of itself; it is about where this one is.
        place = self._places.get(rank, Place())
        if rank == 0 and self.place.step > place.step:
            place = self.place
        text = f"{self.command}: rank {rank} {how} {place}{self._stop_words}"
        self._decide(Verdict(text, rank, place.step, gone=True))

    @property
    def _stop_words(self) -> str:
        return "; all ranks stop" + (f", {self.way_out}" if self.way_out else "")

    def _heard(self, rank: int, message: dict[str, Any]) -> None:
        """Raises ValueError for what is no message of ours."""
        kind = message.get("kind")
        if kind == "beat":
            self._places[rank] = read_place(message.get("place"))
        elif kind == "bye":
            self._done.add(rank)
            self._settle()
        elif kind == "stop" and self.rank == 0:
            self._propose()
        elif kind == "hold" and self.rank:
            self._peers[0].send(kind="passed", count=self._agreement.hold())
        elif kind == "passed" and self._answers is not None:
            self._answers[rank] = whole(message.get("count"))
            self._settle()
        elif kind == "last" and self.rank:
            self._agreement.settle(whole(message.get("count")))
        elif kind == "failed" and self.rank == 0:
            place = self._places.get(rank, Place())
            self._decide(failure(self.command, rank, place, words(message.get("text")), outcome(message)))
        elif kind == "verdict" and self.rank:
            self._decide(read_verdict(message.get("verdict")))

    def _propose(self) -> None:
        if self._answers is None:
            self._answers = {0: self._agreement.hold()}
            for line in self._peers.values():
                line.send(kind="hold")
            self._settle()

    def _settle(self) -> None:
        """All have answered who have not ended already."""
        if self._answers is not None and self._answers.keys() | self._done >= set(range(self.size)):
            last = max(self._answers.values()) + 1
            for line in self._peers.values():
                line.send(kind="last", count=last)
            self._agreement.settle(last)

    def _notice_stall(self, now: float) -> None:
        places = {**self._places, self.rank: self._here()}
        if self.rank == 0:
            places = {rank: places.get(rank, Place()) for rank in range(self.size) if rank not in self._done}
        if found := self.clock.judge(now, self.rank, places, self._done, self.command, self._stop_words):
            self._decide(found)

    def _decide(self, verdict: Verdict) -> None:
        """The first verdict holds."""
        with self._deciding:
            if self.verdict is not None:
                return
            self.verdict = verdict
            self._end_in(LEAVE_S if self._own_error else GRACE_S)
        if self.rank == 0:
            for line in self._peers.values():
                line.send(kind="verdict", verdict=asdict(verdict))
        self._agreement.give_up()
        self._decided.set()
        if verdict.stalled:
            ending.stacks(f"rank {self.rank}: its threads, the latest call first:\n")
        if self.busy():
            # The checkpoint under way may yet complete what the run was asked for.
            self._unsaid = verdict
        else:
            self._note(verdict)

    def _note(self, verdict: Verdict) -> None:
        """The file system that it goes to may hang: the end of the process must not."""
        ending.aside(lambda: self.on_verdict(verdict), NOTE_S)

    def _end(self) -> NoReturn:
        """The main thread cannot act: it sits in a collective, or waits for a thread that does."""
        if self._unsaid is not None:
            self._note(self._unsaid)
        text = self.verdict.text if self.verdict is not None else self._own_error
        preempted = self.verdict is not None and self.verdict.state == "preempted"
        kind = "" if preempted else " error"
        ending.end(f"fastrex:{kind} [rank {self.rank}]: {text}\n", ending.PREEMPTED if preempted else 1)
