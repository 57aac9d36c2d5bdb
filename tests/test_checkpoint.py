"""Checkpoints appear whole, are verified when read, and a damaged one is set aside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrex import checkpoint

ROOT = Path(__file__).parents[1]


def parts(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    image = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return {"model": {"conv": image, "count": torch.tensor(7)}, "bank": {"labels": torch.arange(5)}}


def write(run: Path, step: int, keep: int = 10) -> Path:
    return checkpoint.save(run, step, parts(float(step)), {"epoch": step / 2}, keep)


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    assert path.name == "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == ["bank.safetensors", "model.safetensors", "state.json"]
    loaded, state = checkpoint.load(path)
    assert (state["step"], state["epoch"]) == (12, 6.0)
    assert checkpoint.state_hash(loaded) == checkpoint.state_hash(parts(12.0))
    assert checkpoint.state_hash(loaded) != checkpoint.state_hash(parts(13.0))


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in path.iterdir()} == {"0o644"}


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 10]


def test_saving_a_step_again_is_harmless(tmp_path: Path) -> None:
    assert write(tmp_path, 3) == write(tmp_path, 3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage(path: Path, how: str) -> None:
    if how == "flipped bit":
        flip(path / "model.safetensors")
    elif how == "cut":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-8])
    elif how == "missing file":
        (path / "bank.safetensors").unlink()
    elif how == "empty manifest":
        (path / "state.json").write_text("", encoding="utf-8")
    elif how == "manifest of another shape":
        (path / "state.json").write_text('{"format": 1, "files": [], "step": 2}', encoding="utf-8")
    elif how == "newer format":
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        (path / "state.json").write_text(json.dumps({**state, "format": 99}), encoding="utf-8")
    elif how == "path that leaves the folder":
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state["files"]["../../x.safetensors"] = {"bytes": 1, "sha256": ""}
        (path / "state.json").write_text(json.dumps(state), encoding="utf-8")


@pytest.mark.parametrize(
    "how",
    [
        "flipped bit",
        "cut",
        "missing file",
        "empty manifest",
        "manifest of another shape",
        "newer format",
        "path that leaves the folder",
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path, how: str) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2), how)
    with pytest.raises(checkpoint.BadCheckpoint):
        checkpoint.load(checkpoint.folder(tmp_path, 2))
    said: list[str] = []
    assert checkpoint.newest_good(tmp_path, said.append) == (checkpoint.folder(tmp_path, 1), 1)
    assert "set aside as bad.step-00000002" in said[0]
    # The same step can be saved again.
    write(tmp_path, 2)
    assert checkpoint.newest_good(tmp_path, said.append) == (checkpoint.folder(tmp_path, 2), 2)


def test_looking_without_a_writer_touches_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2), "cut")
    assert checkpoint.newest_good(tmp_path) == (checkpoint.folder(tmp_path, 1), 1)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_all_damaged_is_not_a_fresh_start(tmp_path: Path) -> None:
    damage(write(tmp_path, 2), "cut")
    assert checkpoint.newest_good(tmp_path, lambda _: None) is None
    assert checkpoint.had_any(tmp_path)
    assert not checkpoint.had_any(tmp_path / "elsewhere")


FULL = """
import resource, sys, torch
from pathlib import Path
from fastrex import checkpoint
from fastrex.errors import FastrexError
# A limit on the size of files stands for a full disk: the kernel refuses the write in the same way.
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    checkpoint.save(Path(sys.argv[1]), 2, {"model": {"w": torch.zeros(100_000)}}, {}, 2)
except FastrexError as error:
    print(error)
"""


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, 1)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    assert "could not be written" in result.stdout
    assert "older checkpoints are untouched" in result.stdout
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001"]


LOOP = """
import sys, torch
from pathlib import Path
from fastrex import checkpoint
run, step = Path(sys.argv[1]), 0
while True:
    step += 1
    checkpoint.save(run, step, {"model": {"w": torch.full((200_000,), float(step))}}, {}, 2)
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    for attempt in range(4):
        run = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(run)], env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        # Different phases of the write: the loop needs a few milliseconds per save.
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        newest = checkpoint.steps(run)[-1]
        found = checkpoint.newest_good(run)
        assert found == (checkpoint.folder(run, newest), newest)
        assert checkpoint.load(found[0])[0]["model"]["w"][0].item() == newest
        write(run, newest + 1)
        assert not list((run / "checkpoints").glob(".tmp-*"))
