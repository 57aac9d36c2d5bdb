"""The watch between ranks, its agreement and its door, in one process: real sockets, no torch."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import environment

from fastrex import door, lifeline, signals, watch
from fastrex.agreement import Agreement
from fastrex.errors import FastrexError
from fastrex.stall import Clock, stall
from fastrex.verdict import Interrupted, Place, RankLost, Verdict
from fastrex.watch import Watch


class Board:
    """A store as torch's: reading waits for writing."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.content[key] = value.encode()

    def get(self, key: str) -> bytes:
        eventually(lambda: key in self.content)
        return self.content[key]


def eventually(happened: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


Crew = Callable[[int], list[Watch]]


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """``crew(n)``: the connected watches of n ranks. They would end the process; here they only say so."""
    monkeypatch.setattr(Watch, "_end", lambda self: self.close_later())
    monkeypatch.setattr(Watch, "close_later", lambda self: setattr(self, "_hard_end", float("inf")), raising=False)
    made: list[Watch] = []

    def make(size: int) -> list[Watch]:
        board, ranks = Board(), [Watch(rank, size) for rank in range(size)]
        made.extend(ranks)
        with ThreadPoolExecutor(size) as pool:
            list(pool.map(lambda one: one.start(board, "127.0.0.1", False, 20), ranks))
        return ranks

    yield make
    for one in made:
        one.bye()
    for one in made:
        one.close()


def vanish(one: Watch) -> None:
    """As when its process ends."""
    one._closing = True
    one._ring()
    assert one._thread is not None
    one._thread.join()
    one._peers[0].socket.shutdown(socket.SHUT_RDWR)


def test_a_rank_that_is_gone_is_named_everywhere_with_its_place(crew: Crew) -> None:
    ranks = crew(4)
    ranks[2].mark(7, "training")
    vanish(ranks[2])
    for rank in (0, 1, 3):
        eventually(lambda rank=rank: ranks[rank].verdict)
        with pytest.raises(RankLost, match=r"rank 2 was killed or left without a word at step 7 \(training\)"):
            ranks[rank].check()
    assert (ranks[0].verdict.rank, ranks[0].verdict.step, ranks[0].verdict.gone) == (2, 7, True)


def test_without_rank_0_the_others_know_by_themselves(crew: Crew) -> None:
    ranks = crew(3)
    for one in ranks[1:]:
        one.mark(3, "training")
    ranks[0]._closing = True
    for line in ranks[0]._peers.values():
        line.socket.shutdown(socket.SHUT_RDWR)
    for one in ranks[1:]:
        eventually(lambda one=one: one.verdict)
        assert one.verdict.text.startswith("ranks: rank 0 was killed or left without a word at step 3 (training)")


def test_a_goodbye_is_no_accident(crew: Crew) -> None:
    ranks = crew(3)
    ranks[1].bye()
    ranks[1].close()
    ranks[2].mark(1, "training")
    eventually(lambda: ranks[0]._places.get(2, Place()).step == 1 and 1 in ranks[0]._done)
    time.sleep(0.3)
    assert not any(one.verdict for one in ranks)


def test_an_error_is_told_with_its_words_and_nothing_that_moves_a_cursor(crew: Crew) -> None:
    ranks = crew(3)
    ranks[1].mark(5, "training")
    with pytest.raises(FastrexError, match="disk"), ranks[1].explaining():
        raise FastrexError("the disk of \x1b[2Jclass \udce9 is broken")
    for one in (ranks[0], ranks[2]):
        eventually(lambda one=one: one.verdict)
        assert one.verdict.text.startswith("ranks: rank 1 failed at step 5 (training): the disk of")
        assert one.verdict.text.isprintable()


def test_an_echo_is_replaced_by_its_cause(crew: Crew) -> None:
    ranks = crew(3)
    with pytest.raises(FastrexError, match="my own"), ranks[1].explaining():
        raise FastrexError("my own error")
    with pytest.raises(RankLost, match=r"rank 1 failed .*my own error"), ranks[2].explaining():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")


def test_a_stall_names_who_is_behind(crew: Crew, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = crew(3)
    for one in ranks:
        one.mark(1, "waiting for data")
        one.mark(2, "training")
    for one in ranks[:2]:
        one.mark(3, "waiting for data")
    ranks[0].guard(1.0, 0)
    for one in ranks:
        eventually(lambda one=one: one.verdict)
        assert "no rank made progress for 1 s; rank 2 hangs at step 2 (training) and the others" in one.verdict.text
    eventually(lambda: capfd.readouterr().err.count("most recent call first") >= 1)


def test_progress_of_anyone_is_no_stall(crew: Crew) -> None:
    ranks = crew(2)
    for one in ranks:
        one.mark(1, "training")
    ranks[0].guard(1.5, 0)
    deadline = time.monotonic() + 4
    while time.monotonic() < deadline:
        ranks[1].again()
        time.sleep(0.1)
    assert ranks[0].verdict is None


def test_who_is_behind() -> None:
    def named(**places: tuple[int, int]) -> tuple[int, str]:
        table = {int(rank[1:]): Place(ticks, 4, "training", issued) for rank, (ticks, issued) in places.items()}
        verdict = stall(table, "", "")
        return verdict.rank, verdict.text

    assert named(r0=(5, 9), r1=(4, 9)) == (1, "rank 1 hangs at step 4 (training) and the others wait")
    # The same progress: who has not come to the collective that the others are in.
    assert named(r0=(5, 9), r1=(5, 8), r2=(5, 9))[0] == 1
    assert named(r0=(5, 8), r1=(5, 8), r2=(5, 9)) == (
        -1,
        "rank 0, rank 1 hang at step 4 (training) and the others wait",
    )
    assert named(r0=(5, 8), r1=(5, 8)) == (-1, "all ranks wait for one another at step 4 (training)")


@pytest.mark.parametrize("seed", range(6))
def test_all_ranks_stop_at_the_same_boundary(crew: Crew, seed: int) -> None:
    ranks, chance = crew(4), random.Random(seed)
    coupled = threading.Barrier(4)
    asked = [threading.Event() for _ in ranks]
    for one, event in zip(ranks, asked, strict=True):
        one.wanted = event.is_set
    who, when = chance.sample(range(4), 1 + seed % 3), chance.randrange(0, 30)
    pauses = [[chance.choice((0, 0, 0.001, 0.004)) for _ in range(200)] for _ in ranks]

    def run(rank: int) -> int:
        for step in range(200):
            if step == when and rank in who:
                asked[rank].set()
            time.sleep(pauses[rank][step])
            if step % 3 == 0:  # a collective: nobody is further ahead than that
                coupled.wait(20)
            if ranks[rank].boundary():
                return step
        return -1

    with ThreadPoolExecutor(4) as pool:
        stopped = list(pool.map(run, range(4)))
    assert len(set(stopped)) == 1
    assert when <= stopped[0] < 199


def test_a_rank_in_front_of_a_boundary_is_let_go_when_the_job_ends(crew: Crew) -> None:
    ranks = crew(3)
    # Rank 2 never answers: its thread is gone, its kernel is not.
    ranks[2]._closing = True
    ranks[2]._thread.join()
    ranks[1].wanted = lambda: True
    with ThreadPoolExecutor(1) as pool:
        eventually(lambda: ranks[1]._agreement._held)
        waiting = pool.submit(ranks[1].boundary)
        time.sleep(0.3)
        assert not waiting.done()
        ranks[2]._peers[0].socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(RankLost, match="rank 2"):
            waiting.result(20)


def test_what_leads_up_to_the_last_boundary_may_be_left() -> None:
    mine = Agreement()
    assert not mine.boundary()
    assert mine.hold() == 1
    mine.settle(3)
    assert not mine.near
    assert not mine.boundary()
    assert mine.near
    assert mine.boundary()


# Strangers at the door.


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4000) + b"\n",
        b"[" * 8000 + b"\n",
        b"x" * 200_000,
        b"null\n",
        b'{"kind": "hello"}\n',
        b'{"kind": "hello", "rank": 1, "token": "wrong"}\n',
        b'{"kind": "hello", "rank": 1, "token": "\\ud800"}\n',
        b'{"kind": "verdict", "verdict": {"text": "end", "rank": 0, "step": 0}}\n',
    ],
    ids=["http", "noise", "brackets", "long", "null", "no-token", "wrong-token", "surrogate", "verdict"],
)
def test_a_stranger_is_shown_out(crew: Crew, words: bytes) -> None:
    ranks = crew(3)
    with socket.create_connection(("127.0.0.1", ranks[0]._door.port)) as stranger:
        stranger.settimeout(20)
        try:
            stranger.sendall(words)
            assert stranger.recv(100) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass
    healthy(ranks)


def test_a_slow_stranger_is_shown_out_and_does_not_hold_up_the_others(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HELLO_S", 0.5)
    ranks = crew(3)
    with socket.create_connection(("127.0.0.1", ranks[0]._door.port)) as stranger:
        stranger.settimeout(20)
        stranger.sendall(b'{"kind": ')
        healthy(ranks)
        assert stranger.recv(100) == b""


def test_no_more_strangers_than_a_few_may_wait(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "STRANGERS", 2)
    ranks = crew(2)
    crowd = [socket.create_connection(("127.0.0.1", ranks[0]._door.port)) for _ in range(12)]
    eventually(lambda: len(ranks[0]._door._strangers) == 4)
    healthy(ranks)
    for one in crowd:
        one.close()


@pytest.mark.parametrize("rank", [1, 0, 7, True, "1", None])
def test_who_knows_the_token_still_has_to_be_a_rank_that_is_missing(crew: Crew, rank: object) -> None:
    ranks = crew(3)
    with socket.create_connection(("127.0.0.1", ranks[0]._door.port)) as stranger:
        stranger.settimeout(20)
        hello = {"kind": "hello", "rank": rank, "token": ranks[0]._door.token}
        stranger.sendall(json.dumps(hello).encode() + b"\n")
        assert stranger.recv(100) == b""
    healthy(ranks)


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "beat", "place": [1, "2", "x", 3]},
        {"kind": "beat"},
        {"kind": "failed", "text": 5},
        {"kind": "failed", "text": "x" * lifeline.MAX_LINE},
    ],
)
def test_a_rank_that_talks_nonsense_ends_the_job_not_the_watch(crew: Crew, message: dict[str, object]) -> None:
    ranks = crew(3)
    ranks[1]._peers[0].socket.sendall(json.dumps(message).encode() + b"\n")
    eventually(lambda: ranks[2].verdict)
    assert "rank 1 has sent what no rank sends" in ranks[2].verdict.text


def test_a_rank_that_does_not_come_is_missed() -> None:
    alone = Watch(0, 3)
    with pytest.raises(FastrexError, match=r"all 3 ranks must come within 1 s, got no word from rank 1, 2"):
        alone.start(Board(), "127.0.0.1", False, 1.0)
    alone.close()


def test_what_an_earlier_start_left_in_the_store_is_passed_over() -> None:
    board, ranks = Board(), [Watch(rank, 2) for rank in range(2)]
    gone = {"port": 1, "addresses": ["127.0.0.1"], "token": "t", "proof": "p", "job": "earlier"}
    board.set(door.KEY, json.dumps(gone))
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(ranks[1].start, board, "127.0.0.1", False, 20)
        time.sleep(0.5)
        ranks[0].start(board, "127.0.0.1", False, 20)
        late.result(20)
    assert ranks[0].job == ranks[1].job != "earlier"
    for one in ranks:
        one.bye()
    for one in ranks:
        one.close()


def test_a_rank_that_cannot_reach_rank_0_says_where_it_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    board = Board()
    facts = {"port": port, "addresses": ["127.0.0.1"], "token": "t", "proof": "p", "job": "j"}
    board.set(door.KEY, json.dumps(facts))
    lost = Watch(1, 2)
    with pytest.raises(FastrexError, match=rf"rank 1 must reach rank 0 on port {port} of one of 127\.0\.0\.1"):
        lost.start(board, "127.0.0.1", False, 1.0)
    lost.close()


def test_a_single_process_has_no_thread_and_no_socket() -> None:
    before = threading.active_count()
    alone = Watch()
    alone.guard(1.0)
    alone.mark(1, "training")
    assert not alone.boundary()
    assert not alone.leaving
    alone.wanted = lambda: True
    assert alone.boundary()
    assert alone.leaving
    assert threading.active_count() == before
    alone.close()


def test_this_hosts_addresses_begin_with_the_one_that_the_master_sees() -> None:
    assert door.addresses("127.0.0.1")[0] == "127.0.0.1"
    assert door.addresses("no such host")


def test_a_rank_whose_launcher_dies_is_asked_to_stop_and_then_ended(tmp_path: Path) -> None:
    rank = (
        "import os, time; from pathlib import Path; from fastrex import signals; signals.ORPHAN_S = 1.0\n"
        "with signals.noted() as asked:\n"
        f"    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        f"    while not asked: time.sleep(0.01)\n"
        f"    Path({str(tmp_path / 'asked')!r}).write_text(str(int(asked[0])))\n"
        "    time.sleep(60)\n"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    words = [sys.executable, "-c", launcher]
    process = subprocess.Popen(words, env={**environment(), "TORCHELASTIC_RUN_ID": "x"}, stderr=subprocess.DEVNULL)
    eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    eventually(lambda: (tmp_path / "asked").exists() and (tmp_path / "asked").read_text() == str(int(signal.SIGTERM)))
    eventually(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())


def healthy(ranks: list[Watch]) -> None:
    """Everybody still hears everybody."""
    count = ranks[0].place.ticks + 1
    for one in ranks:
        one.mark(count, "training")
    eventually(lambda: all(ranks[0]._places.get(r, Place()).step == count for r in range(1, len(ranks))))
    assert not any(one.verdict for one in ranks)


# What may hang or break while the job ends.


def test_a_watch_that_breaks_ends_the_process(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, ended = crew(2), threading.Event()
    monkeypatch.setattr(Watch, "_end", lambda self: ended.set())

    def broken() -> bool:
        raise OSError("a broken thing")

    ranks[1].wanted = broken
    assert ended.wait(20)
    assert "a broken thing" in ranks[1]._own_error


def test_where_nobody_reads_stderr_the_process_ends_all_the_same() -> None:
    """A closed pipe refuses what is written, a full one keeps whoever writes."""
    code = "from fastrex import ending; ending.stacks('where:'); ending.end('x' * 70000)"
    for close in (True, False):
        reading, writing = os.pipe()
        if close:
            os.close(reading)
        process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=writing)
        os.close(writing)
        assert process.wait(20) == 1
        if not close:
            os.close(reading)


def test_a_verdict_whose_note_hangs_or_fails_is_kept(crew: Crew, capfd: pytest.CaptureFixture[str]) -> None:
    ranks, hung = crew(3), threading.Event()
    ended = [threading.Event() for _ in ranks]
    for one, event in zip(ranks, ended, strict=True):
        one._end = event.set

    def fail(verdict: object) -> None:
        raise ValueError("no such status")

    ranks[0].on_verdict = lambda verdict: hung.wait(60)
    ranks[1].on_verdict = fail
    since = time.monotonic()
    vanish(ranks[2])
    assert ended[0].wait(20)
    assert ended[1].wait(20)
    assert time.monotonic() - since > 2
    hung.set()
    assert "ValueError: no such status" in capfd.readouterr().err


def test_a_checkpoint_under_way_is_waited_for_and_then_the_verdict_noted(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, busy, ended, noted = crew(2), threading.Event(), threading.Event(), list[str]()

    def end(text: str, code: int) -> None:
        ended.set()
        ranks[0]._closing = True

    monkeypatch.undo()
    monkeypatch.setattr(watch, "GRACE_S", 0.5)
    monkeypatch.setattr(watch.ending, "end", end)
    busy.set()
    ranks[0].busy, ranks[0].on_verdict = busy.is_set, lambda verdict: noted.append(verdict.text)
    vanish(ranks[1])
    eventually(lambda: ranks[0].verdict)
    assert not ended.wait(2)
    assert not noted
    busy.clear()
    assert ended.wait(20)
    assert len(noted) == 1


def test_a_checkpoint_that_never_ends_is_not_waited_for(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 0.5)
    monkeypatch.setattr(watch, "BUSY_S", 1.0)
    ranks, ended = crew(2), threading.Event()
    ranks[0]._end = ended.set
    ranks[0].busy = lambda: True
    vanish(ranks[1])
    assert ended.wait(20)


# Who hangs, as a matter of time.


def clock(size: int, own: int, lost_s: float = 30) -> tuple[Clock, Callable[..., Verdict | None]]:
    made = Clock(lost_s)
    start = time.monotonic()
    for rank in range(size):
        if rank != own:
            made.heard(rank)
    places = {rank: Place(5, 5, "training", 1) for rank in range(size)}

    def at(seconds: float, *, looked: bool = True, done: tuple[int, ...] = ()) -> Verdict | None:
        if looked:
            made._looked = start + seconds
        made.looked(start + seconds)
        return made.judge(start + seconds, own, places, set(done), "train", "")

    return made, at


def test_a_rank_0_that_is_frozen_is_named_by_the_others() -> None:
    made, at = clock(2, own=1)
    # Also while nothing is guarded: images may be indexed for hours, but in a process that lives.
    assert at(605) is None
    found = at(615)
    assert (found.rank, found.gone, found.stalled) == (0, True, True)
    assert found.text == "train: rank 0 has given no sign of life for 610 s at step 5 (training)"
    assert at(615, done=(0,)) is None
    made.guard(40.0, 2)
    for what in ("training", "waiting for data", "training"):
        made.doing(what)
    assert at(45) is None
    assert at(55).rank == 0
    made.guard(float("inf"), 0)
    assert at(1e6) is None
    made.guard(0, 0)
    assert at(1e6) is None


def test_a_rank_is_not_frozen_before_the_network_counts_as_lost() -> None:
    _, at = clock(2, own=1, lost_s=1000)
    assert at(1005) is None
    assert at(1015).rank == 0


def test_a_job_that_was_stopped_as_a_whole_goes_on() -> None:
    made, at = clock(2, own=0)
    made.guard(10.0, 2)
    for what in ("training", "waiting for data", "training"):
        made.doing(what)
    assert at(0.1) is None
    made._looked = made._moved
    assert at(3600, looked=False) is None
    assert at(3609) is None
    assert at(3611).stalled


def test_what_is_done_for_the_first_time_has_longer() -> None:
    made, at = clock(2, own=0)
    made.guard(10.0, 2)
    assert at(0.1) is None
    for what in ("training", "waiting for data", "training"):
        made.doing(what)
    assert at(11).stalled
    made.doing("evaluating")
    assert at(11) is None
    assert at(601).stalled
    made.doing("training")
    made.doing("evaluating")
    assert at(11).stalled
    made.first_steps = 4
    assert at(11) is None


def test_many_ranks_speak_less_often() -> None:
    assert Watch(1, 8)._beat_s == 1.0
    assert 1000 / Watch(1, 1000)._beat_s <= 250


# Limits and signals.


def test_a_door_without_files_says_so() -> None:
    code = (
        "import json, resource, socket, os; from fastrex.watch import Watch\n"
        "class Board:\n"
        "    def set(self, key, value):\n"
        "        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]; print(soft)\n"
        "        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft)); port = json.loads(value)['port']\n"
        "        self.line = socket.socket(); files = []\n"
        "        try:\n"
        "            while True: files.append(os.dup(0))\n"
        "        except OSError: pass\n"
        "        self.files = files; self.line.connect(('127.0.0.1', port))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 700))\n"
        "Watch(0, 300).start(Board(), '127.0.0.1', False, 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "700\n"
    assert "connection to each of the 300 ranks, but the limit on open files is 700; raise it" in done.stderr


@pytest.mark.parametrize("stuck", [False, True])
def test_before_there_is_anything_to_save_a_signal_ends_the_process(tmp_path: Path, stuck: bool) -> None:
    """Also one whose main thread sits in a library that does not come back."""
    code = (
        "import sys, time, ctypes; from pathlib import Path; from fastrex import signals, verdict\n"
        "signals.STUCK_S = 0.5\n"
        "def hang(seconds):\n"
        "    mutex, lock = (ctypes.c_byte * 64)(), ctypes.CDLL(None).pthread_mutex_lock\n"
        "    lock(mutex); lock(mutex)\n"
        "wait = hang if sys.argv[1] == 'True' else time.sleep\n"
        "try:\n"
        "    with signals.noted(at_once=True) as asked:\n"
        "        print('ready', flush=True); wait(60)\n"
        "except verdict.Interrupted as early:\n"
        "    print(early); sys.exit(75)\n"
    )
    words = [sys.executable, "-c", code, str(stuck)]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGHUP)
        said = process.stdout.read().decode()
        assert process.wait(20) == 75
    assert "stopped by SIGHUP before there was anything to save" in said
    assert len(said.splitlines()) == 1


def test_once_there_is_something_to_save_signals_are_only_noted() -> None:
    with signals.noted(at_once=True) as asked:
        asked.at_once = False
        for number in signals.STOP[2:]:
            os.kill(os.getpid(), number)
    assert asked == list(signals.STOP[2:])


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert asked == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_before_the_run_is_no_failure(crew: Crew) -> None:
    ranks = crew(3)
    with pytest.raises(Interrupted), ranks[1].explaining():
        raise Interrupted("stopped by SIGTERM")
    for one in (ranks[0], ranks[2]):
        eventually(lambda one=one: one.verdict)
        assert one.verdict.state == "preempted"
        assert one.verdict.text == "ranks: rank 1 stopped at step 0 (starting): stopped by SIGTERM"
