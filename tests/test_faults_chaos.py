"""Jobs that are killed again and again, anywhere and in every way, and started again until they are done: what they end
in is what a quiet run ends in."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import launch
import pytest
from conftest import SETTINGS

from fastrex import rundir

Report = Callable[..., None]

# Fixed, so that a failure can be had again; it is printed with the plan that follows from it.
SEEDS = {"torchrun": 20230501, "outer loop": 20230502}
KILLS = 10
STEPS = 60
CHAOS = [
    *SETTINGS,
    "optim.epochs=15",
    "checkpoint.every_epochs=0",
    "checkpoint.every_steps=2",
    "run.stall_s=10",
]
# Every way to die at least once; what else is drawn comes from the same list.
KINDS = ("kill", "leave", "raise", "stall", "signal", "kill-in-save", "kill-in-save")


def plan(seed: int, folder: Path) -> list[str]:
    """The faults of a seed: kinds, ranks and rising steps, each to happen once."""
    chance = random.Random(seed)
    kinds = [*KINDS, *chance.choices(KINDS, k=KILLS - len(KINDS))]
    chance.shuffle(kinds)
    # Far enough apart that each meets a job which trains again, the last with a checkpoint still to come.
    steps = [4 + 5 * number + chance.randrange(3) for number in range(KILLS)]
    faults = []
    for number, (kind, step) in enumerate(zip(kinds, steps, strict=True)):
        rank = chance.randrange(2)
        words = f"step={step},once={folder / f'{number}-{kind}'}"
        if kind == "kill-in-save":  # rank 0 writes, with about ten flushes for a checkpoint
            words += f",rank=0,at={chance.randrange(10)}"
        else:
            words += f",rank={rank}"
        faults.append(f"{kind}:{words}" + (",signal=SIGTERM" if kind == "signal" else ""))
    print(f"seed {seed}:", *(fault.replace(f"{folder}/", "") for fault in faults), sep="\n  ")
    return faults


def happened(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in folder.iterdir())


@pytest.fixture(scope="module")
def quiet(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that nothing happens to, and its state's hash on each rank."""
    folder = tmp_path_factory.mktemp("quiet")
    words = ["train", "demo", *CHAOS, "--data", stripes, "--out", folder / "run", "--device", "cpu"]
    with launch.ranks(folder / "log", 2, launch.faulty(words, hashes=folder / "hashes")) as job:
        assert job.wait(240) == [0, 0], job.output
    hashes = read_hashes(folder / "hashes")
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    return folder / "run", hashes


def read_hashes(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("rank*.txt"))]


def check_whole(run: Path, straight: Path) -> None:
    """The directory of a run that was killed many times is as tidy as the quiet run's, and its log as complete."""
    assert rundir.read_status(run)["state"] == "completed"
    names = [{p.relative_to(folder).as_posix() for p in folder.rglob("*")} for folder in (run, straight)]
    assert names[0] == names[1]
    lines, expected = records(run), records(straight)
    assert [(r["step"], "eval/knn" in r) for r in lines] == [(r["step"], "eval/knn" in r) for r in expected]
    assert [r.get("train/loss") for r in lines] == [r.get("train/loss") for r in expected]
    for line in (run / "train.log").read_text(encoding="utf-8").splitlines():
        time.strptime(line.split(" ", 1)[0], "%Y-%m-%dT%H:%M:%S")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.faults
def test_torchrun_restarts_until_it_is_done(
    quiet: tuple[Path, list[str]], stripes: Path, tmp_path: Path, report: Report
) -> None:
    marks, run = tmp_path / "marks", tmp_path / "run"
    marks.mkdir()
    faults = plan(SEEDS["torchrun"], marks)
    words = ["train", "demo", *CHAOS, "--data", stripes, "--out", run, "--device", "cpu"]
    command = launch.faulty(words, faults, tmp_path / "hashes")
    options = ("--standalone", f"--max-restarts={KILLS + 2}")
    with launch.torchrun(tmp_path / "log", 2, command, options) as job:
        assert job.wait(900) == [0], job.output
    assert len(happened(marks)) == KILLS, happened(marks)
    check_whole(run, quiet[0])
    assert read_hashes(tmp_path / "hashes") == quiet[1]
    report(
        "T39",
        "10 seeded accidents, torchrun --max-restarts",
        injected=KILLS,
        survived=KILLS,
        bits_equal=True,
        seed=SEEDS["torchrun"],
    )


@pytest.mark.faults
def test_an_outer_loop_restarts_until_it_is_done(
    quiet: tuple[Path, list[str]], stripes: Path, tmp_path: Path, report: Report
) -> None:
    marks, run = tmp_path / "marks", tmp_path / "run"
    marks.mkdir()
    faults = plan(SEEDS["outer loop"], marks)
    words = ["train", "demo", *CHAOS, "--data", stripes, "--out", run, "--device", "cpu", "--resume", "auto"]
    command = launch.faulty(words, faults, tmp_path / "hashes")
    launchers = 0
    for start in range(KILLS + 5):
        log = tmp_path / f"log-{start}"
        before = len(happened(marks))
        if start in (2, 6):
            kill_the_launcher(log, command, run)
            launchers += 1
            continue
        with launch.ranks(log, 2, command) as job:
            codes = job.wait(240)
        if codes == [0, 0]:
            break
        # A rank may leave with 0 on purpose; nobody takes that for the end of the job.
        assert any(codes), job.output
        assert len(happened(marks)) > before, job.output
        assert rundir.read_status(run)["state"] in ("failed", "preempted", "killed"), job.output
    else:
        pytest.fail("the job was never done")
    assert len(happened(marks)) == KILLS, happened(marks)
    check_whole(run, quiet[0])
    assert read_hashes(tmp_path / "hashes") == quiet[1]
    report(
        "T39",
        "10 seeded accidents and 2 killed launchers, an outer loop with --resume auto",
        injected=KILLS + launchers,
        survived=KILLS + launchers,
        bits_equal=True,
        seed=SEEDS["outer loop"],
    )


def kill_the_launcher(log: Path, command: Sequence[str], run: Path) -> None:
    """torchrun is killed once its ranks train; they must go by themselves, so that the next job may write."""
    known = len((run / "train.log").read_bytes())
    with launch.torchrun(log, 2, command) as job:
        job.until(lambda: b" step " in (run / "train.log").read_bytes()[known:], 240)
        below = launch.descendants(job.processes[0].pid)
        os.kill(job.processes[0].pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while left := launch.alive(below):
            assert time.monotonic() < deadline, f"left behind: {left}\n{job.output}"
            time.sleep(0.1)
