"""``fastrex status``: what a person or a script needs to know of a run after an accident."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from command import fastrex
from conftest import SETTINGS


@pytest.fixture(scope="module")
def made(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a run"
    words = ["train", "demo", *SETTINGS, "--data", stripes, "--out", out, "--device", "cpu", "--max-steps", "4"]
    assert fastrex(*words, "checkpoint.every_steps=2").code == 0
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "a run")
    return tmp_path / "a run"


def rewrite(run: Path, **facts: object) -> None:
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    (run / "status.json").write_text(json.dumps({**status, **facts}), encoding="utf-8")


def dead_pid() -> int:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_finished_run(run: Path) -> None:
    ended = fastrex("status", run)
    assert ended.code == 0
    for line in ("state: completed", "world_size: 1", "logged_step: 4", f"host: {socket.gethostname()}"):
        assert line in ended.out.splitlines()
    assert re.search(r"^checkpoint: 4 \(", ended.out, re.M)
    assert re.search(r"^last sign of life: \d+ (s|min|h) ago$", ended.out, re.M)
    assert "continue:" not in ended.out


def test_a_killed_run_says_how_to_go_on(run: Path) -> None:
    rewrite(run, state="running", pid=dead_pid())
    old = time.time() - 3 * 3600
    for path in run.iterdir():
        os.utime(path, (old, old))
    ended = fastrex("status", run)
    assert "state: killed" in ended.out
    assert "last sign of life: 3 h ago" in ended.out
    assert f"continue: fastrex train --out '{run}' --resume must" in ended.out
    facts = json.loads(fastrex("status", run, "--json").out)
    assert facts["silent_s"] == pytest.approx(3 * 3600, abs=600)
    assert facts["good"] == [2, 4]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"state": "failed", "rank": 3, "error": "RuntimeError: a\nb"}, ["rank: 3", r"error: RuntimeError: a\nb"]),
        ({"state": "preempted", "step": 2}, ["state: preempted", "--resume must"]),
        ({"state": "diverged"}, ["--init-from", "optim.lr"]),
        ({"state": "running", "host": "elsewhere"}, ["state: running", "host: elsewhere", "last sign of life"]),
    ],
)
def test_other_ends(run: Path, facts: dict[str, object], said: list[str]) -> None:
    rewrite(run, **facts)
    ended = fastrex("status", run)
    assert ended.code == 0
    for words in said:
        assert words in ended.out


def test_ranks_are_named_in_the_way_on(run: Path) -> None:
    rewrite(run, state="preempted")
    env = json.loads((run / "env.json").read_text(encoding="utf-8"))
    (run / "env.json").write_text(json.dumps({**env, "world_size": 8}), encoding="utf-8")
    assert "--resume must, on 8 ranks as before" in fastrex("status", run).out


@pytest.mark.parametrize("damage", ["a bit", "cut", "missing", "manifest"])
def test_damaged_checkpoints_are_found(run: Path, damage: str) -> None:
    folder = run / "checkpoints" / "step-00000004"
    victim = folder / ("state.json" if damage == "manifest" else "model.safetensors")
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"a bit": content[:-1] + bytes([content[-1] ^ 1])}.get(damage, content[: len(content) // 2]))
    before = sorted(run.rglob("*"))
    quick, slow = fastrex("status", run), fastrex("status", run, "--verify")
    if damage == "a bit":  # which only reading finds
        assert quick.code == 0
        assert "checkpoint: 4 " in quick.out
    else:
        assert quick.code == 1
    assert slow.code == 1
    assert "checkpoint: 2 (verified)" in slow.out
    assert "damaged checkpoint: 4: " in slow.out
    facts = json.loads(fastrex("status", run, "--verify", "--json").out)
    assert (facts["checkpoint"], facts["good"], list(facts["damaged"])) == (2, [2], ["4"])
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "[]", "null", '"x"', '{"pid": 1}', '{"state": 3}', "{", "\x00", "[" * 100_000])
def test_a_status_that_is_none(run: Path, content: str) -> None:
    (run / "status.json").write_text(content, encoding="utf-8")
    ended = fastrex("status", run)
    assert ended.code == 1
    assert "must be a run directory" in ended.line


@pytest.mark.parametrize("pid", [None, "7", 2**62, -1, 1.5, [1]])
def test_any_pid(run: Path, pid: object) -> None:
    rewrite(run, state="running", pid=pid)
    (run / "env.json").write_text("[]", encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "ti')
    ended = fastrex("status", run)
    assert ended.code == 0, ended.err
    assert "logged_step: 4" in ended.out
