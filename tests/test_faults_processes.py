"""Ranks that die, hang, leave or are told to stop: the job ends within seconds and says who and where, or saves at one
step on all ranks, and the resumed run ends in the bits of one that nothing happened to."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import launch
import pytest
import torch
from conftest import SETTINGS

from fastrex import checkpoint, distributed, rundir
from fastrex.distributed import World

Report = Callable[..., None]
RESUME = ("--resume", "must", "--device", "cpu")


def arguments(data: Path, out: Path, *more: str) -> list[str | Path]:
    return ["train", "demo", *SETTINGS, "--data", data, "--out", out, "--device", "cpu", *more]


def hashes(folder: Path) -> list[str]:
    return [(folder / f"rank{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]


def status(out: Path) -> dict[str, object]:
    return dict(rundir.read_status(out))


def words_of(job: launch.Job, rank: int) -> str:
    """The last line of a rank."""
    return [line for line in job.output.splitlines() if line.startswith(f"fastrex: error [rank {rank}]: ")][-1]


def resumed(out: Path, folder: Path) -> list[str]:
    """The run in ``out`` continued to its end by two ranks; their hashes."""
    with launch.ranks(folder / "resumed.log", 2, launch.faulty(["train", "--out", out, *RESUME], (), folder)) as job:
        assert job.wait(120) == [0, 0], job.output
    assert status(out)["state"] == "completed"
    return hashes(folder)


@pytest.fixture(scope="module")
def quiet(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The state of two ranks that nothing happened to, after 16 steps."""
    folder = tmp_path_factory.mktemp("quiet")
    with launch.ranks(folder / "log", 2, launch.faulty(arguments(stripes, folder / "run"), (), folder)) as job:
        assert job.wait(120) == [0, 0], job.output
    first, second = hashes(folder)
    assert first == second
    return [first, second]


def test_a_rank_that_fails_ends_the_job_by_name(stripes: Path, tmp_path: Path, report: Report) -> None:
    out = tmp_path / "run"
    words = launch.faulty(arguments(stripes, out), ["raise:rank=1,step=5"])
    with launch.ranks(tmp_path / "log", 2, words) as job:
        job.until(lambda: "[rank 1]: faulty: this rank fails" in job.output, 120)
        failed = time.monotonic()
        assert job.wait(30) == [1, 1]
        assert time.monotonic() - failed < 10
    told = r"train: rank 1 failed at step 5 \(training\): faulty: this rank fails on purpose"
    assert re.search(told, words_of(job, 0))
    assert "this rank fails on purpose" in words_of(job, 1)
    now = status(out)
    assert (now["state"], now["rank"], now["step"]) == ("failed", 1, 5)
    assert re.search(told, str(now["error"]))
    report("T14", "a rank raises at step 5", injected=1, survived=1)


@pytest.mark.parametrize(
    ("rank", "how", "codes"),
    [
        (1, "kill", [1, -9]),
        pytest.param(1, "leave", [1, 0], marks=pytest.mark.faults),
        pytest.param(0, "kill", [-9, 1], marks=pytest.mark.faults),
        pytest.param(0, "leave", [0, 1], marks=pytest.mark.faults),
    ],
)
def test_a_rank_that_is_gone_is_named_and_not_taken_for_success(
    rank: int, how: str, codes: list[int], stripes: Path, tmp_path: Path, report: Report
) -> None:
    out, other = tmp_path / "run", 1 - rank
    words = launch.faulty(arguments(stripes, out), [f"{how}:rank={rank},step=5"])
    with launch.ranks(tmp_path / "log", 2, words) as job:
        job.until(lambda: job.processes[rank].poll() is not None, 120)
        gone = time.monotonic()
        assert job.wait(30) == codes
        assert time.monotonic() - gone < 10
    assert f"train: rank {rank} was killed or left without a word at step 5 (training)" in words_of(job, other)
    now = status(out)
    assert (now["state"], now["rank"], now["step"]) == ("failed", rank, 5)
    report("T15", f"rank {rank}: {'SIGKILL' if how == 'kill' else '_exit(0)'} at step 5", injected=1, survived=1)


@pytest.mark.faults
def test_a_rank_that_dies_while_the_images_are_indexed_ends_the_job(
    stripes: Path, tmp_path: Path, report: Report
) -> None:
    """There the others wait in a collective with the patience of hours."""
    with launch.ranks(
        tmp_path / "log",
        2,
        launch.faulty(arguments(stripes, tmp_path / "run"), ["signal-at-start:rank=0,signal=SIGKILL"]),
    ) as job:
        assert job.wait(120) == [-9, 1]
    assert "train: rank 0 was killed or left without a word at step 0 (opening the data)" in words_of(job, 1)
    report("T15", "rank 0: SIGKILL while it indexes the images", injected=1, survived=1)


@pytest.mark.faults
def test_a_rank_that_hangs_is_named_and_all_show_where_they_are(stripes: Path, tmp_path: Path, report: Report) -> None:
    out = tmp_path / "run"
    words = launch.faulty(arguments(stripes, out, "run.stall_s=6"), ["stall:rank=1,step=5"])
    with launch.ranks(tmp_path / "log", 2, words) as job:
        job.until(lambda: "step 5/16" in job.output, 120)
        since = time.monotonic()
        assert job.wait(60) == [1, 1]
        assert 5 < time.monotonic() - since < 30
    told = "train: no rank made progress for 6 s; rank 1 hangs at step 5 (training) and the others wait"
    for rank in range(2):
        assert told in words_of(job, rank)
        assert f"rank {rank}: its threads, the latest call first" in job.output
    assert re.search(r'faulty\.py", line \d+ in stall', job.output)
    now = status(out)
    assert (now["state"], now["rank"], now["step"]) == ("failed", 1, 5)
    report("T16", "a rank hangs at step 5, run.stall_s=6", injected=1, survived=1)


@pytest.mark.faults
def test_two_jobs_at_once_and_a_port_that_is_taken(stripes: Path, tmp_path: Path, report: Report) -> None:
    port = str(launch.free_port())
    first = launch.faulty(arguments(stripes, tmp_path / "a", "--max-steps", "6"), ["stall:step=3,seconds=20"])
    second = launch.faulty(arguments(stripes, tmp_path / "b", "--max-steps", "3"))
    with (
        launch.ranks(tmp_path / "a.log", 2, first, MASTER_PORT=port) as one,
        launch.ranks(tmp_path / "b.log", 2, second) as two,
    ):
        one.until(lambda: "step 3/6" in one.output, 120)
        # A third job is told to meet where the first one does: it is the one that notices.
        third = launch.faulty(arguments(stripes, tmp_path / "c"))
        with launch.ranks(tmp_path / "c.log", 2, third, MASTER_PORT=port, FASTREX_MEETING_S="3") as wrong:
            assert wrong.wait(120) == [1, 1]
        assert f"must be able to listen at 127.0.0.1:{port}, but that port is in use" in words_of(wrong, 0)
        assert "rank 1 must reach rank 0" in words_of(wrong, 1)
        assert two.wait(120) == [0, 0], two.output
        assert one.wait(120) == [0, 0], one.output
    assert not (tmp_path / "c").exists()
    report("T17", "two jobs at once; a third one on the port of the first", injected=1, survived=1)


@pytest.mark.faults
def test_a_meeting_point_that_is_not_there_is_named(stripes: Path, tmp_path: Path, report: Report) -> None:
    with socket.socket() as box:
        box.bind(("127.0.0.1", 0))
        port = box.getsockname()[1]
        words = launch.faulty(arguments(stripes, tmp_path / "run"))
        more = {"MASTER_PORT": str(port), "FASTREX_MEETING_S": "4"}
        with launch.ranks(tmp_path / "log", 2, words, **more) as job:
            assert job.wait(120) == [1, 1]
    assert f"at 127.0.0.1:{port}" in words_of(job, 0)
    assert f"rank 1 must meet the 1 other ranks at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT)" in words_of(job, 1)
    report("T17", "a port that is taken by another program", injected=1, survived=1)


def under_torchrun(
    folder: Path, words: list[str], number: signal.Signals, options: Iterable[str] = ("--standalone",)
) -> tuple[int, list[int]]:
    """Send ``number`` to the launcher while both ranks are in the middle of step 5, which takes two seconds; return its
    exit code and what is still alive of its ranks later (on an idle machine they are gone within 5 seconds)."""
    with launch.torchrun(folder / "log", 2, words, tuple(options)) as job:
        job.until(lambda: "step 5/16" in job.output, 120)
        ranks = launch.descendants(job.processes[0].pid)
        assert len(ranks) >= 2
        job.send(number)
        code = job.wait(60)[0]
        deadline = time.monotonic() + 30
        while (alive := launch.alive(ranks)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return code, alive


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGUSR1, -10, marks=pytest.mark.faults),
        pytest.param(signal.SIGUSR2, -12, marks=pytest.mark.faults),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.faults),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.faults),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_signal_to_the_launcher_saves_at_one_step_and_nobody_stays(
    number: signal.Signals, code: int, stripes: Path, tmp_path: Path, quiet: list[str], report: Report
) -> None:
    """torchrun passes SIGTERM and SIGINT on and ends with 1 whatever its ranks do; the others kill it, and the kernel
    tells the ranks."""
    out = tmp_path / "run"
    words = launch.faulty(arguments(stripes, out), ["stall:step=5,seconds=2"])
    assert under_torchrun(tmp_path, words, number) == (code, [])
    now = status(out)
    assert (now["state"], now["step"], now["checkpoint"]) == ("preempted", 6, 6)
    assert resumed(out, tmp_path) == quiet
    names = {signal.SIGTERM: "T18", signal.SIGKILL: "T20"}
    fault = f"{number.name} to torchrun in the middle of a step"
    report(names.get(number, "T19"), fault, injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_stops_at_the_worst_moments(stripes: Path, tmp_path: Path, quiet: list[str], report: Report) -> None:
    """One run, stopped before there is one, twice in a step, in a save and in an evaluation."""
    out = tmp_path / "run"
    accidents = [
        (["signal-at-start:rank=1,signal=SIGTERM"], "while the images are indexed", "SIGTERM", None),
        (["signal:step=2,signal=SIGTERM"] * 2, "twice in step 2", "SIGTERM", 3),
        (["signal-in-save:rank=0,signal=SIGUSR1,seconds=1"], "in a save", "SIGUSR1", None),
        (["signal-in-evaluation:rank=1,signal=SIGUSR2,seconds=0.4"], "in an evaluation", "SIGUSR2", 8),
    ]
    # The command as a scheduler repeats it.
    words = arguments(stripes, out, "eval.every_epochs=2", "eval.batch_size=2", "--resume", "auto")
    for number, (faults, when, name, step) in enumerate(accidents):
        with launch.ranks(tmp_path / f"{number}.log", 2, launch.faulty(words, faults)) as job:
            assert job.wait(120) == [75, 75], job.output
        if number == 0:
            assert "stopped by SIGTERM before there was anything to save; start it again" in job.output
            assert not out.exists()
            report("T19", f"{name} {when}", injected=1, survived=1)
            continue
        now = status(out)
        assert now["state"] == "preempted", when
        assert step is None or now["step"] == step, when
        assert now["checkpoint"] == (now["step"] or None), when
        assert f"preempted at step {now['step']}" in job.output
        checkpoints = [checkpoint.folder(out, kept) for kept in checkpoint.steps(out)]
        for folder in checkpoints:
            checkpoint.verify(folder)
        assert not [p for p in (out / "checkpoints").glob("*") if p not in checkpoints]
        report("T19", f"{name} {when}", injected=1, survived=1, bits_equal=True)
    # 16 batches of each rank would have shown the bank.
    assert job.output.count("evaluation batch") < 16
    assert evaluated(out) == []
    assert resumed(out, tmp_path) == quiet
    assert evaluated(out) == [8, 16]


def evaluated(out: Path) -> list[int]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["step"] for record in map(json.loads, lines) if "eval/knn" in record]


@pytest.mark.faults
def test_a_restarted_job_ends_in_the_same_bits(stripes: Path, tmp_path: Path, quiet: list[str], report: Report) -> None:
    out, once = tmp_path / "run", tmp_path / "once"
    words = launch.faulty(
        arguments(stripes, out, "checkpoint.every_steps=3"), [f"kill:rank=1,step=7,once={once}"], tmp_path
    )
    with launch.torchrun(tmp_path / "log", 2, words, ("--standalone", "--max-restarts=1")) as job:
        assert job.wait(180) == [0], job.output
    assert once.exists()
    assert "train: rank 1 was killed or left without a word at step 7" in job.output
    # The newest one may still have been on its way to the disk.
    assert re.search("resumed from step-0000000[346]", job.output)
    assert hashes(tmp_path) == quiet
    report("T15", "SIGKILL under torchrun --max-restarts 1", injected=1, survived=1, bits_equal=True)


@pytest.mark.faults
def test_a_second_writer_is_refused_by_name_while_the_first_one_lives(
    stripes: Path, tmp_path: Path, report: Report
) -> None:
    out = tmp_path / "run"
    with launch.one(tmp_path / "log", launch.faulty(arguments(stripes, out), ["stall:step=5"])) as first:
        first.until(lambda: "step 5/16" in first.output, 120)
        again = launch.faulty(["train", "--out", out, *RESUME])
        with launch.one(tmp_path / "second.log", again) as second:
            assert second.wait(60) == [1]
        pid = first.processes[0].pid
        assert f"is being written by another process (process {pid} on {socket.gethostname()})" in second.output
        assert status(out)["state"] == "running"
    assert status(out)["state"] == "killed"
    # The lock ended with its owner, though its file is still there.
    assert (out / rundir.LOCK).exists()
    with launch.one(tmp_path / "third.log", again) as third:
        assert third.wait(120) == [0], third.output
    report("T20", "a second run on the directory of one that lives", injected=1, survived=1)


@pytest.mark.faults
def test_a_second_interrupt_does_not_wait(stripes: Path, tmp_path: Path, report: Report) -> None:
    out = tmp_path / "run"
    with launch.one(tmp_path / "log", launch.faulty(arguments(stripes, out), ["stall:step=5"])) as job:
        job.until(lambda: "step 5/16" in job.output, 120)
        job.send(signal.SIGINT)
        job.until(lambda: "press Ctrl-C again" in job.output)
        time.sleep(1.5)
        assert job.processes[0].poll() is None
        job.send(signal.SIGINT)
        assert job.wait(30) == [130]
    assert status(out)["state"] == "failed"
    report("T19", "SIGINT twice", injected=1, survived=1)


def test_each_host_prepares_for_itself_and_nobody_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts need not share what rank 0 writes: one rank of each does the work, and all leave it together."""
    together = threading.Barrier(6)
    monkeypatch.setattr(distributed.dist, "new_group", lambda **options: "patient")
    monkeypatch.setattr(distributed.dist, "barrier", lambda group: together.wait(60))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda group: None)
    happened: list[str] = []

    def run(rank: int) -> None:
        with distributed.main_first(World(rank, 6, rank % 2, 2, torch.device("cpu"))):
            happened.append({0: "main", 2: "host", 4: "host"}.get(rank, "rest"))
        happened.append("out")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(6)))
    assert happened == ["main", *["host"] * 2, *["rest"] * 3, *["out"] * 6]
