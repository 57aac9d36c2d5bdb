"""How a run begins and ends when something gets in between: another job, another rank, a logger."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from conftest import SETTINGS

from fastrex import checkpoint, digests, distributed, metrics, rundir, trainer
from fastrex import config as c
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.verdict import RankLost, Verdict
from fastrex.watch import Watch


def alone(watch: Watch | None = None) -> World:
    return World(0, 1, 0, 1, torch.device("cpu"), watch or Watch())


def configuration(*more: str) -> c.Config:
    return c.load("demo", [*SETTINGS, "data.path=synthetic", *more])


def state_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text(encoding="utf-8"))
    return content


def test_two_jobs_that_both_decided_to_begin_are_one_run(tmp_path: Path) -> None:
    run, world, config = tmp_path / "run", alone(), configuration()
    assert not any(rundir.decide(run, config, "auto", world)[1] for _ in range(2))
    first, second = rundir.RunDir(run, world), rundir.RunDir(run, world)
    first.open(config, False, facts={"job": 1})
    first.status("completed")
    first.close()
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(
        FastrexError, match=r"another job has begun a run in .*; resume it with --resume must, or choose"
    ):
        second.open(config, False, facts={"job": 2})
    second.failed(FastrexError("as the trainer would"))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    # The lock is free again for a job that knows of the run.
    third = rundir.RunDir(run, world)
    third.open(config, True, facts={"job": 3})
    third.close()


def test_what_a_killed_job_left_of_its_small_files_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".status.json.77-01234567").write_text("{", encoding="utf-8")
    (tmp_path / ".index.npz.77-01234567.npz").touch()
    run = rundir.RunDir(tmp_path, alone())
    run.open(configuration(), True, facts={})
    run.close()
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "config.toml", "env.json", "status.json"}


def test_a_saved_stop_is_preempted_though_a_rank_was_killed_meanwhile(tmp_path: Path) -> None:
    run = rundir.RunDir(tmp_path, alone())
    run.open(configuration(), False, facts={})
    run.ended(Verdict("train: rank 1 was killed", 1, 4, gone=True))
    assert state_of(tmp_path)["state"] == "failed"
    run.status("preempted", step=4)
    # What the main thread meets in the collective that follows is no news.
    run.failed(RankLost(Verdict("train: rank 1 was killed", 1, 4, gone=True)))
    run.close()
    assert (state_of(tmp_path)["state"], state_of(tmp_path)["step"]) == ("preempted", 4)


def test_the_state_is_written_before_any_rank_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    digested: list[int] = []
    state_digest = digests.state_digest

    def barrier(world: World) -> None:
        seen.append(state_of(tmp_path / world.watch.command)["state"])

    def counted(*arguments: Any) -> digests.StateDigest:
        digested.append(1)
        return state_digest(*arguments)

    monkeypatch.setattr(distributed, "barrier", barrier)
    monkeypatch.setattr(digests, "state_digest", counted)
    out = tmp_path / "train"
    assert trainer.train(configuration(), out=out, max_steps=2, device="cpu").state == "completed"
    assert seen == ["running", "completed"]
    assert len(digested) == 1, "the last checkpoint was made more than once"
    seen.clear()
    digested.clear()

    # Asked to stop from the first step on.
    asked = iter([False])
    monkeypatch.setattr(Watch, "boundary", lambda self: next(asked, True))
    assert trainer.train(None, out=out, resume="must", device="cpu").state == "preempted"
    assert seen == ["running", "preempted"]
    assert checkpoint.steps(out) == [2, 3]
    assert len(digested) == 2  # of what was loaded, and of what was saved


@pytest.mark.parametrize("where", ["_train", "open"])
def test_the_run_says_who_was_the_end_of_it_not_the_echo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    watch = Watch(0, 2)

    @contextlib.contextmanager
    def world(device: str) -> Iterator[World]:
        yield alone(watch)

    def lost(*arguments: Any, **named: Any) -> None:
        watch._decide(Verdict("train: rank 1 was killed", 1, 3, gone=True))
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "world", world)
    monkeypatch.setattr(*((trainer, "_train") if where == "_train" else (distributed, "barrier")), lost)
    with pytest.raises(RankLost, match="rank 1 was killed"):
        trainer.train(configuration(), out=tmp_path / "run", device="cpu")
    status = state_of(tmp_path / "run")
    assert (status["state"], status["rank"], status["error"]) == ("failed", 1, "train: rank 1 was killed")


class Board:
    """TensorBoard on a full disk: its thread has failed, every call says so."""

    closed = 0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def add_scalar(self, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        Board.closed += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Service:
    """W&B out of reach."""

    def init(self, **named: Any) -> Service:
        return self

    def log(self, *arguments: Any, **named: Any) -> None:
        raise ConnectionError("no route\nto host")

    finish = log


def test_a_logger_that_fails_costs_its_own_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_tensorboard", lambda: Board)
    monkeypatch.setattr(metrics, "_wandb", Service)
    config = configuration("run.tensorboard=true", "run.wandb=project")
    log = metrics.Log(tmp_path, config, alone(), None)
    for step in (1, 2):
        log.record(step, {"train/loss": 1.0})
    log.close()
    quiet = metrics.Log(tmp_path, config, alone(), None)
    quiet.close()
    assert Board.closed == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" cannot go on (")[0] for line in said] == ["TensorBoard", "W&B", "TensorBoard", "W&B"]
    assert "No space left on device" in said[0]
    assert [r["step"] for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines())] == [1, 2]


ELSEWHERE = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    os.chdir(sys.argv.pop(1))
else:
    del sys.argv[1]
sys.argv[0] = "fastrex"
runpy.run_module("fastrex", run_name="__main__")
"""


@pytest.mark.faults
def test_a_dry_run_hears_from_rank_0_what_stands_in_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 sees no run there, as on a host that does not share the disk."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    trainer.train(configuration(), out="run", max_steps=1, device="cpu")
    words = ["train", "--out", "run", "--resume", "must", "--device", "cpu", "--dry-run", "--allow-world-size-change"]
    with launch.ranks(tmp_path / "log", 2, ["-c", ELSEWHERE, str(tmp_path / "other"), *words]) as job:
        assert job.wait(120) == [0, 0], job.output
    assert "run would be resumed" in job.output
    with launch.ranks(
        tmp_path / "log2", 2, ["-c", ELSEWHERE, str(tmp_path / "other"), "train", "demo", *words[1:3], *words[5:8]]
    ) as job:
        assert job.wait(120) == [1, 1], job.output
    assert "--out must be a new or empty directory" in job.output
