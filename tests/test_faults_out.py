"""Where a run may be written: odd names, links, other disks, narrow masks; what cannot be is said before step 1."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import fastrex
from conftest import SETTINGS

from fastrex import preflight

Report = Callable[..., None]
FILES = {"config.toml", "env.json", "status.json", "metrics.jsonl", "train.log", "index.npz"}


def train(stripes: Path, out: Path | str, steps: int, *more: str) -> list[str]:
    new = ["train", "demo", *SETTINGS, "checkpoint.every_steps=1", "--data", str(stripes)]
    return [*new, "--out", str(out), "--device", "cpu", "--max-steps", str(steps), *more]


def whole(out: Path) -> None:
    """A run of two steps, with all its files."""
    assert {p.name for p in out.iterdir()} >= FILES
    assert json.loads((out / "status.json").read_text(encoding="utf-8"))["state"] == "completed"
    assert (out / "checkpoints" / "step-00000002" / "state.json").is_file()
    assert (out / "export" / "model.safetensors").is_file()
    assert not [p for p in out.rglob("*") if p.name.startswith(".") and p.name != ".lock"], "nothing is left behind"


@contextlib.contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o077, *(pytest.param(m, marks=pytest.mark.faults) for m in (0o022, 0o002))])
def test_modes_follow_the_mask(
    mask: int, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    made = tmp_path / "made"
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    shutil.rmtree(data / ".fastrex", ignore_errors=True)
    monkeypatch.setenv("FASTREX_CACHE", str(made / "cache"))
    with masked(mask):
        made.mkdir()
        for words in (
            train(data, made / "run", 2),
            ["data", "index", data],
            ["data", "check", data, "--json", made / "check.json"],
            ["data", "shard", data, made / "shards"],
            ["data", "demo", made / "demo"],
            ["data", "show", *SETTINGS, "--data", data, "--out", made / "batch.html"],
            ["data", "show", *SETTINGS, "--data", data, "--out", made / "batch.png"],
            ["eval", made / "run", "--json", made / "eval.json", "--device", "cpu"],
            ["export", made / "run", made / "encoder", "--to", "hf"],
        ):
            ended = fastrex(*words)
            assert ended.code == 0, ended.err
    whole(made / "run")
    written = [made, *made.rglob("*"), data / ".fastrex", *(data / ".fastrex").iterdir()]
    modes = {str(p.relative_to(tmp_path)): stat.S_IMODE(p.stat().st_mode) for p in written}
    wrong = {n: oct(m) for n, m in modes.items() if m != (0o777 if (tmp_path / n).is_dir() else 0o666) & ~mask}
    assert not wrong
    assert len(modes) > 60
    report("T38", f"every file of every command under umask {mask:03o}", injected=len(modes), survived=len(modes))


def elsewhere(path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["spaces and 日本", "leading -", "a link", "relative", "another disk", "longest"])
def test_places_that_work(
    kind: str, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    monkeypatch.chdir(tmp_path)
    out: Path = tmp_path / "out"
    given: Path | str = out
    with contextlib.ExitStack() as closing:
        if kind == "spaces and 日本":
            given = out = tmp_path / "a b" / "日本 'quoted\" $HOME"
        elif kind == "leading -":
            given = "./-out"
            out = tmp_path / "-out"
        elif kind == "a link":
            out = tmp_path / "there"
            out.mkdir()
            given = tmp_path / "link"
            given.symlink_to("there")
        elif kind == "relative":
            given, out = "runs/../runs/mine", tmp_path / "runs" / "mine"
            (tmp_path / "runs").mkdir()
        elif kind == "another disk":
            out = closing.enter_context(contextlib.contextmanager(elsewhere)(tmp_path)) / "out"
            given = out
        else:
            room = preflight.PATH_MAX - preflight.TAIL - len(os.fsencode(tmp_path))
            parts = [*["n" * 200] * ((room - 3) // 201), "n" * ((room - 3) % 201)]
            given = out = tmp_path.joinpath(*filter(None, parts))
            assert room - 10 < len(str(out)) - len(str(tmp_path)) <= room
        assert fastrex(*train(stripes, given, 1)).code == 0
        monkeypatch.chdir(stripes)  # a run continues from anywhere
        ended = fastrex("train", "--out", out, "--resume", "must", "--device", "cpu", "--max-steps", "2")
        assert ended.code == 0, ended.err
        whole(out)
        assert "resumed from step-00000001" in ended.out
        if kind == "a link":
            assert (tmp_path / "link").is_symlink()
    report("T38", f"--out: {kind}", injected=1, survived=1)


def test_a_longer_path_is_refused_at_once(stripes: Path, tmp_path: Path, report: Report) -> None:
    deep = tmp_path.joinpath(*["n" * 200] * ((preflight.PATH_MAX - len(str(tmp_path))) // 201))
    ended = fastrex(*train(stripes, deep, 1))
    assert ended.code == 1
    assert "--out must be shorter" in ended.line
    assert not any(tmp_path.iterdir())
    report("T38", "--out: too long for the files of a run", injected=1, survived=1)


def test_a_read_only_folder_is_refused_before_the_images_are_looked_for(tmp_path: Path, report: Report) -> None:
    if os.geteuid():
        pytest.skip("only root can become another user")
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        os.seteuid(65534)
        try:
            ended = fastrex(*train(tmp_path / "no images", root / "run", 1))
        finally:
            os.seteuid(0)
        assert ended.code == 1
        assert "cannot be written (Permission denied); choose another --out" in ended.line
    finally:
        shutil.rmtree(root)
    report("T38", "--out in a folder of somebody else", injected=1, survived=1)


def test_an_output_may_have_the_longest_name(stripes: Path, tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250 + ".json")
    assert fastrex("data", "check", stripes, "--json", target).code == 0
    assert json.loads(target.read_text(encoding="utf-8"))["bad"] == {}
