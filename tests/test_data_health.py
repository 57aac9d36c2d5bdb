"""A loader that runs for days: flat memory and files, no rebuild between epochs, no process or shared memory left."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SETTINGS, environment

from fastrex.config import AugmentConfig, DataConfig
from fastrex.data import dali
from fastrex.data.index import build
from fastrex.data.loader import Batch, TrainLoader
from fastrex.data.plan import Plan

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

DATA = DataConfig(threads=2, global_size=16, local_crops=1, local_size=8, local_scale=(0.1, 0.3))


def make(folder: Path, batch_size: int = 8, data: DataConfig = DATA, **options: int) -> TrainLoader:
    index = build(folder)
    rows = index.rows("train", 0.0)
    plan = Plan(7, batch_size, rows, index.heights, index.widths, data, AugmentConfig(), labels=index.labels)
    options = {"start": 0, "stop": 8, **options}
    return TrainLoader(index, plan, data, device="cpu", dtype=torch.float32, **options)


def resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_thousand_steps_leave_memory_files_and_threads_as_they_are(stripes: Path) -> None:
    before = threading.active_count()
    sizes, files, threads = [], [], []
    for batch in make(stripes, stop=2020):  # beyond the last look: the end of the plan ends threads early
        if batch.step % 250 == 249:
            sizes.append(resident())
            files.append(len(os.listdir("/proc/self/fd")))
            threads.append(threading.active_count())
    assert len(sizes) == 8
    # The first quarter warms allocators and pools.
    assert max(sizes[2:]) < sizes[1] * 1.05, sizes
    # Files that are being read at the moment.
    assert max(files) - min(files) <= 4, files
    assert max(threads) == min(threads), threads
    assert threading.active_count() == before


def test_an_epoch_ends_without_a_new_pipeline(stripes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    make_pipeline = dali._pipeline
    monkeypatch.setattr(dali, "_pipeline", lambda *args: built.append(args) or make_pipeline(*args))
    epochs = {batch.epoch for batch in make(stripes, stop=20)}
    assert epochs == {0, 1, 2}
    assert len(built) == 1


def test_one_batch_is_the_same_bits_whatever_made_it(stripes: Path) -> None:
    """(seed, step) with 1 or 8 threads, prefetch 1 or 4, alone or in a run, on one rank or as two halves."""

    def batch(step: int, threads: int, prefetch: int, **options: int) -> Batch:
        data = dataclasses.replace(DATA, threads=threads, prefetch=prefetch)
        with make(stripes, data=data, start=step, stop=step + 1, **options) as loader:
            (one,) = loader
        return one

    run = list(make(stripes, stop=12))
    for step in (0, 5, 11):
        for threads in (1, 8):
            for prefetch in (1, 4):
                one = batch(step, threads, prefetch)
                assert np.array_equal(one.samples, run[step].samples)
                assert all(torch.equal(a, b) for a, b in zip(one.crops, run[step].crops, strict=True))
        halves = [batch(step, 3, 2, rank=rank, world=2) for rank in (0, 1)]
        for crops, *parts in zip(run[step].crops, *(half.crops for half in halves), strict=True):
            joined = torch.cat([part.unflatten(0, (-1, 4)) for part in parts], dim=1)
            assert torch.equal(crops.unflatten(0, (-1, 8)), joined)


def train(out: Path, data: Path, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    words = [*before, sys.executable, "-m", "fastrex", "train", "demo", *SETTINGS, "optim.epochs=500"]
    return subprocess.Popen(
        [*words, "--data", str(data), "--out", str(out), "--max-steps", "40" if before else "2000"],
        env=environment(), cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def processes_of(session: int) -> list[int]:
    """Living processes of a session; field 6 of stat, behind the name in brackets."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, owner = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            except (OSError, ValueError):
                continue
            if int(owner) == session and state != "Z":
                found.append(int(entry.name))
    return found


def test_a_killed_trainer_leaves_no_process_and_no_shared_memory(stripes: Path, tmp_path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    process = train(tmp_path / "run", stripes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.pid in processes_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 5
    while (left := processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert set(os.listdir("/dev/shm")) <= shared


def test_two_megabytes_of_shared_memory_are_enough(stripes: Path, tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False, capture_output=True).returncode
    ):
        pytest.skip("a small /dev/shm needs a mount namespace of its own, which this user may not make")
    small = ("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "small")
    process = train(tmp_path / "run", stripes, before=small)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
