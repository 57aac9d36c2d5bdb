"""Checkpoints appear whole, are verified when read, and a damaged one is set aside."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastrex import checkpoint, files


def parts(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    image = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return {"model": {"conv": image, "count": torch.tensor(7)}, "bank": {"labels": torch.arange(5)}}


def write(run: Path, step: int, keep: int = 10, every: int = 0) -> Path:
    return checkpoint.save(
        run, step, parts(float(step)), {"epoch": step / 2, "digest": ""}, keep_last=keep, keep_every=every
    )


def good(run: Path, say: Callable[[str], object] | None = None) -> int | None:
    found = checkpoint.newest_good(run, say)
    return None if found is None else found.step


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


def test_multiples_stay_for_good(tmp_path: Path) -> None:
    for step in range(1, 12):
        write(tmp_path, step, keep=2, every=4)
    assert checkpoint.steps(tmp_path) == [4, 8, 10, 11]


def test_what_is_damaged_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (checkpoint.folder(tmp_path, 2) / "bank.safetensors").unlink()
    (checkpoint.folder(tmp_path, 3) / "state.json").write_bytes(b"")
    write(tmp_path, 4, keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]
    write(tmp_path, 5, keep=2)
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_nothing_is_removed_before_its_successor_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, keep=1)
    seen = []
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        seen.append((Path(target).name, good(tmp_path)))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    write(tmp_path, 2, keep=1)
    assert [(name[:10], step) for name, step in seen] == [("step-00000", 1), (".tmp-old-s", 2)]
    assert checkpoint.steps(tmp_path) == [2]


def test_saving_a_step_again_is_harmless(tmp_path: Path) -> None:
    first = write(tmp_path, 3)
    stamp = (first / "state.json").stat().st_mtime_ns
    assert write(tmp_path, 3) == first
    assert (first / "state.json").stat().st_mtime_ns == stamp
    # Unless it is damaged: then it is written anew.
    flip(first / "model.safetensors")
    assert write(tmp_path, 3) == first
    assert good(tmp_path) == 3
    assert (tmp_path / "checkpoints" / "bad.step-00000003").is_dir()


def test_a_checkpoint_of_another_state_does_not_pass_for_this_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, parts(1.0), {"digest": "1"}, keep_last=2)
    path = checkpoint.save(tmp_path, 3, parts(2.0), {"digest": "2"}, keep_last=2)
    assert checkpoint.state_hash(checkpoint.load(path)[0]) == checkpoint.state_hash(parts(2.0))
    aside, state = checkpoint.load(tmp_path / "checkpoints" / "bad.step-00000003")
    assert (checkpoint.state_hash(aside), state["digest"]) == (checkpoint.state_hash(parts(1.0)), "1")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EACCES])
def test_a_file_system_that_flushes_no_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    original = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path, 1)
    files.write_text(tmp_path / "file", "whole")
    assert good(tmp_path) == 1
    # A file that cannot be flushed is an error as ever.
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(code, "")))
    with pytest.raises(OSError):  # noqa: PT011
        files.sync(tmp_path / "file")


def test_what_killed_writers_of_a_file_left_is_swept(tmp_path: Path) -> None:
    name = "index.npz"
    left = [f".{name}.77-01234567", f".{name}.78-89abcdef.npz"]
    others = [f".{name}.swp", f".my{name}.77-01234567", ".status.json.77-01234567", f".{name}.77-0123456"]
    for other in (*left, *others):
        (tmp_path / other).touch()
    os.utime(tmp_path / left[0], (0, 0))
    files.sweep(tmp_path / name, 600)
    assert {p.name for p in tmp_path.iterdir()} == {left[1], *others}
    files.sweep(tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == set(others)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reseal(path: Path, **changes: object) -> None:
    """Change the manifest as a program would that knows its checksum; None takes a key away."""
    state = {**json.loads((path / "state.json").read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in state.items() if value is not None}
    (path / "state.json").write_text(json.dumps(checkpoint.sealed(kept)), encoding="utf-8")


def damage(path: Path, how: str) -> None:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if how == "flipped bit":
        flip(path / "model.safetensors")
    elif how == "cut file":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-8])
    elif how == "missing file":
        (path / "bank.safetensors").unlink()
    elif how == "extra file":
        (path / "notes.txt").touch()
    elif how == "extra tensors":
        shutil.copy(path / "bank.safetensors", path / "other.safetensors")
    elif how == "empty manifest":
        (path / "state.json").write_text("", encoding="utf-8")
    elif how == "missing manifest":
        (path / "state.json").unlink()
    elif how == "manifest of another shape":
        reseal(path, files=[])
    elif how == "wrong sha256":
        state["files"]["model.safetensors"]["sha256"] = "0" * 64
        reseal(path, files=state["files"])
    elif how == "edited manifest":
        (path / "state.json").write_text(json.dumps({**state, "epoch": 9.0}), encoding="utf-8")
    elif how == "of another step":
        reseal(path, step=7)
    elif how == "path that leaves the folder":
        reseal(path, files={**state["files"], "../../x.safetensors": {"bytes": 1, "sha256": ""}})
    elif how == "tensors that are none":
        text = b"not tensors"
        (path / "bank.safetensors").write_bytes(text)
        fact = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        reseal(path, files={**state["files"], "bank.safetensors": fact})
    else:
        raise AssertionError(how)


WAYS = (
    "flipped bit", "cut file", "missing file", "extra file", "extra tensors", "empty manifest", "missing manifest",
    "manifest of another shape", "wrong sha256", "edited manifest", "of another step", "path that leaves the folder",
    "tensors that are none",
)  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path, how: str) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2), how)
    with pytest.raises(checkpoint.BadCheckpoint):
        checkpoint.load(checkpoint.folder(tmp_path, 2))
    said: list[str] = []
    assert good(tmp_path, said.append) == 1
    assert "set aside as bad.step-00000002, step 1 is used" in said[0]
    # The same step can be saved again.
    write(tmp_path, 2)
    assert good(tmp_path, said.append) == 2


def test_no_bit_of_a_checkpoint_can_flip_unnoticed(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for name in ("state.json", "model.safetensors", "bank.safetensors"):
        whole = (path / name).read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            (path / name).write_bytes(changed)
            with pytest.raises(checkpoint.BadCheckpoint):
                checkpoint.load(path)
        (path / name).write_bytes(whole)
    assert good(tmp_path) == 1


def test_looking_without_a_writer_touches_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2), "cut file")
    assert good(tmp_path) == 1
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_corpses_are_few(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for step in range(2, 8):
        damage(write(tmp_path, step), "cut file")
        assert good(tmp_path, lambda _: None) == 1
    bad = sorted(p.name for p in (tmp_path / "checkpoints").glob("bad.*"))
    assert bad == ["bad.step-00000006", "bad.step-00000007"]


def test_all_damaged_is_not_a_fresh_start_and_nothing_is_thrown_away(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        damage(write(tmp_path, step), "cut file")
    assert good(tmp_path, lambda _: None) is None
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]
    assert checkpoint.had_any(tmp_path)
    assert not checkpoint.had_any(tmp_path / "elsewhere")


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-00000002-77-dead").mkdir()
    (folder / ".tmp-step-00000002-77-dead" / "model.safetensors").touch()
    living = folder / ".tmp-step-00000003-78-living"
    living.mkdir()
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, living], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        write(tmp_path, 2)
        assert [p.name for p in folder.glob(".tmp-*")] == [living.name]
        process.kill()
    checkpoint.sweep(tmp_path)
    assert not list(folder.glob(".tmp-*"))


def test_a_broken_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        checkpoint.WriteFailed, match=r"step-00000002 could not be written \(Input/output error; it needs"
    ):
        write(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001"]


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(checkpoint, "_temporary", lambda final: pytest.fail("it was begun"))
    words = r"\(No space left on device; it needs 432 bytes, 1000 are free\); older checkpoints are untouched"
    with pytest.raises(checkpoint.WriteFailed, match=words):
        write(tmp_path, 2)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    """The kernel refuses the write: a limit on the size of files stands for the disk."""
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(checkpoint.WriteFailed) as caught:
            checkpoint.save(tmp_path, 2, {"model": {"w": torch.zeros(100_000)}}, {}, keep_last=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    words = (
        r"step-00000002 could not be written \(.*too large.*; it needs 400000 bytes, \d+ are free\); older checkpoints"
    )
    assert re.search(words, str(caught.value), re.IGNORECASE)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001"]
    assert good(tmp_path) == 1
