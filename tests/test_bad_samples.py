"""Files that go bad after they were indexed: deleted, cut, replaced, unreadable, undecodable; stop or replace."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SETTINGS, environment, write_stripes
from PIL import Image

from fastrex import rundir
from fastrex.config import AugmentConfig, DataConfig
from fastrex.data import reader, sharding
from fastrex.data.index import Index, build
from fastrex.data.loader import Batch, EvalLoader, TrainLoader
from fastrex.data.plan import Plan
from fastrex.data.reader import BadSample
from fastrex.errors import FastrexError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

DATA = DataConfig(
    threads=2, global_size=24, local_crops=2, local_size=16, eval_resize=24, eval_size=20, local_scale=(0.1, 0.3),
    on_bad_sample="replace", max_bad_samples=10,
)  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garble(path: Path) -> None:
    """As long as before, so that only the decoder notices."""
    path.write_bytes(path.read_bytes()[:60].ljust(path.stat().st_size, b"\xff"))


def swap(path: Path) -> None:
    """Another image of the same length in bytes."""
    size = path.stat().st_size
    Image.new("RGB", (20, 20)).save(path, quality=50)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def turn_into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink, "cut": cut, "garbled": garble, "replaced": swap,
    "a folder now": turn_into_folder, "a pipe now": turn_into_pipe,
}  # fmt: skip


@pytest.fixture
def folder(stripes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stripes / "train", tmp_path / "images"))


def make_plan(index: Index, batch_size: int = 8, data: DataConfig = DATA) -> Plan:
    rows = index.rows("train", 0.0)
    return Plan(7, batch_size, rows, index.heights, index.widths, data, AugmentConfig(), labels=index.labels)


def load(index: Index, data: DataConfig = DATA, stop: int = 16, start: int = 0, **options: int) -> list[Batch]:
    plan = make_plan(index)
    with TrainLoader(index, plan, data, device="cpu", dtype=torch.float32, start=start, stop=stop, **options) as loader:
        return list(loader)


def same(a: Batch, b: Batch, place: int) -> bool:
    """Whether image ``place`` of both batches gave the same crops."""
    width = len(a.samples)
    return all(torch.equal(x[place::width], y[place::width]) for x, y in zip(a.crops, b.crops, strict=True))


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_the_bad_images_are_replaced_by_others_of_their_class(folder: Path, damage: str) -> None:
    index = build(folder)
    clean = load(index)
    bad = [3, 40]
    for row in bad:
        DAMAGES[damage](index.path(row))
    batches = load(index)
    assert len(batches) == len(clean) == 16
    replaced = 0
    for batch, was in zip(batches, clean, strict=True):
        assert torch.equal(batch.target, was.target)
        assert not np.isin(batch.samples, bad).any()
        for place, row in enumerate(was.samples):
            if row in bad:
                replaced += 1
                assert batch.samples[place] != row
            else:
                assert batch.samples[place] == row
                assert same(batch, was, place)
    assert replaced == 4  # two images, two epochs


def test_the_replacements_depend_on_nothing_but_the_files(folder: Path) -> None:
    """Not on when the loader starts, how far ahead it reads, how many threads, how many ranks; also on DALI's path."""
    index = build(folder)
    garble(index.path(5))
    cut(index.path(6))
    index.path(30).unlink()
    whole = load(index)
    tail = load(index, start=11)
    slow = load(index, dataclasses.replace(DATA, threads=1, prefetch=4))
    ranks = [load(index, rank=rank, world=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert np.array_equal(batch.samples, slow[step].samples)
        assert all(torch.equal(a, b) for a, b in zip(batch.crops, slow[step].crops, strict=True))
        joined = np.concatenate([rank[step].samples for rank in ranks])
        assert np.array_equal(batch.samples, joined)
    for batch, again in zip(whole[11:], tail, strict=True):
        assert np.array_equal(batch.samples, again.samples)
        assert all(torch.equal(a, b) for a, b in zip(batch.crops, again.crops, strict=True))
    by_dali = load(index, dataclasses.replace(DATA, resize="dali"))
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(whole, by_dali, strict=True))


def test_a_replacement_may_be_bad_too(folder: Path) -> None:
    """A whole class but one image is gone: that one stands in for all; then all of it: other classes do."""
    index = build(folder)
    rows = np.flatnonzero(index.labels == 2)
    for row in rows[1:]:
        index.path(int(row)).unlink()
    budget = dataclasses.replace(DATA, max_bad_samples=16)
    for batch in load(index, budget, stop=8):
        of_class = batch.samples[batch.target.numpy() == 2]
        assert (of_class == rows[0]).all()
    index.path(int(rows[0])).unlink()
    for batch in load(index, budget, stop=8):
        assert not np.isin(batch.samples, rows).any()
        assert (index.labels[batch.samples] == batch.target.numpy()).all()


def test_the_budget_ends_the_run_by_name_and_stop_at_the_first(folder: Path) -> None:
    index = build(folder)
    for row in range(4):
        index.path(row).unlink()
    assert load(index, dataclasses.replace(DATA, max_bad_samples=4))
    with pytest.raises(BadSample, match=r"and data\.max_bad_samples=3 others were bad before it") as caught:
        load(index, dataclasses.replace(DATA, max_bad_samples=3))
    assert any(repr(str(index.path(row))) in str(caught.value) for row in range(4))
    with pytest.raises(BadSample, match=r"cannot be read .No such file or directory.; .*on_bad_sample=replace"):
        load(index, dataclasses.replace(DATA, on_bad_sample="stop"))


def test_what_has_gone_bad_leaves_no_file_open(folder: Path) -> None:
    index = build(folder)
    load(index, stop=8)  # the decoder opens some of its own once
    before = len(os.listdir("/proc/self/fd"))
    for row in range(16, 32):
        turn_into_folder(index.path(row))
    budget = dataclasses.replace(DATA, max_bad_samples=16)
    for _ in range(2):
        load(index, budget, stop=8)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_machine_out_of_file_handles_is_no_bad_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(folder)

    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(reader.os, "open", full)
    with pytest.raises(FastrexError, match=r"cannot be read .Too many open files.; raise the limit") as caught:
        reader.read_bytes(index, 0)
    assert not isinstance(caught.value, BadSample)


def test_many_threads_keep_few_shards_open(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "OPEN_SHARDS", 3)
    sharding.shard(folder, tmp_path / "shards", max_bytes=20_000)
    index = build(tmp_path / "shards")
    assert len(index.shards) > 4
    before = len(os.listdir("/proc/self/fd"))

    def read_all() -> list[np.ndarray]:
        handles = reader.Shards()
        with ThreadPoolExecutor(8) as pool:
            contents = list(pool.map(lambda row: reader.read_bytes(index, row, handles), range(len(index))))
        assert len(os.listdir("/proc/self/fd")) - before == 3
        return contents

    contents = read_all()
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(np.array_equal(content, reader.read_bytes(index, row)) for row, content in enumerate(contents))


def test_an_extremely_thin_image_is_evaluated_in_little_memory(tmp_path: Path) -> None:
    """Resizing the whole of it to the evaluation's size would take 13 GB."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.effect_noise((65_500, 1), 90).convert("RGB").save(tmp_path / name / "thin.png")
        Image.effect_noise((90, 70), 90).convert("RGB").save(tmp_path / name / "usual.png")
    index = build(tmp_path)
    usual = dataclasses.replace(DATA, eval_resize=256, eval_size=224)
    loader = EvalLoader(index, np.arange(4), usual, batch_size=4, device="cpu", dtype=torch.float32)
    with limited_memory(4 << 30):
        ((images, _, _),) = loader
    assert images.shape == (4, 3, 224, 224)
    assert images.isfinite().all()


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """At most ``more`` bytes of address space beyond those of now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_every_bad_file_is_news_once(folder: Path) -> None:
    index = build(folder)
    garble(index.path(9))
    index.path(33).unlink()
    plan = make_plan(index)
    with TrainLoader(index, plan, DATA, device="cpu", dtype=torch.float32, start=0, stop=24) as loader:
        assert len(list(loader)) == 24
        lines = sorted(loader.news, key=lambda line: index.name(9) in line)
    assert len(lines) == 2
    assert f"{index.name(33)!r} cannot be read (No such file or directory)" in lines[0]
    assert f"{index.name(9)!r} cannot be decoded" in lines[1]


def test_evaluation_leaves_bad_files_out(folder: Path) -> None:
    index = build(folder)
    rows = index.rows("train", 0.0)
    garble(index.path(0))
    for row in range(16, 24):
        index.path(row).unlink()
    loader = EvalLoader(index, rows, DATA, batch_size=8, device="cpu", dtype=torch.float32)
    seen = [(len(images), part) for images, _, part in loader]
    assert [count for count, _ in seen] == [7, 8, *[8] * 5]  # the third batch had no good file
    assert np.array_equal(np.concatenate([part for _, part in seen]), np.delete(rows, [0, *range(16, 24)]))
    assert len(loader.news) == 9
    with pytest.raises(FastrexError, match="cannot be decoded"):
        list(
            EvalLoader(
                index, rows, dataclasses.replace(DATA, on_bad_sample="stop"), batch_size=8, device="cpu",
                dtype=torch.float32,
            )
        )  # fmt: skip


def start(folder: Path, out: Path, *more: str, ranks: int = 2) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = ["-m", "fastrex", "train", "demo", *SETTINGS, "optim.epochs=40", *more, "--data", folder, "--out", out]
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, words)], env=environment(), text=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = out / "metrics.jsonl"
        if log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines()):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within two minutes")


def test_a_run_of_two_ranks_goes_on_without_a_file_that_is_deleted(tmp_path: Path) -> None:
    write_stripes(tmp_path / "data" / "train", 16, seed=0)
    write_stripes(tmp_path / "data" / "val", 4, seed=1)
    out = tmp_path / "run"
    process = start(tmp_path / "data", out, "data.on_bad_sample=replace", "optim.epochs=12")
    wait_for_step(process, out, 3)
    (tmp_path / "data" / "train" / "class-1" / "03.jpg").unlink()
    cut(tmp_path / "data" / "train" / "class-2" / "07.jpg")
    (tmp_path / "data" / "val" / "class-3" / "01.jpg").unlink()
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    status = rundir.read_status(out)
    assert (status["state"], status["step"]) == ("completed", 48)
    log = (out / "train.log").read_text(encoding="utf-8")
    for name in ("class-1/03.jpg", "class-2/07.jpg", "class-3/01.jpg"):
        assert name in log


def test_a_run_of_two_ranks_stops_and_names_the_file(tmp_path: Path) -> None:
    write_stripes(tmp_path / "data", 16, seed=0)
    out = tmp_path / "run"
    process = start(tmp_path / "data", out, "data.held_out=0")
    wait_for_step(process, out, 3)
    (tmp_path / "data" / "class-1" / "03.jpg").unlink()
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == 1
    assert "class-1/03.jpg' cannot be read (No such file or directory)" in errors
    assert rundir.read_status(out)["state"] == "failed"
