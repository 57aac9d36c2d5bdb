"""The loader's benchmark: what a record holds, who takes turns, what is refused. No timed assertion."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, environment
from PIL import Image
from torchvision_shim import import_torchvision

from benchmarks import loader, loader_report, loader_worker
from benchmarks.__main__ import main
from benchmarks.rivals import Absent, pillow_loader
from fastrex import config as config_module
from fastrex.data import index as index_module
from fastrex.data.plan import Plan
from fastrex.errors import FastrexError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

KEYS = [
    "op", "impl", "stage", "device", "threads", "batch", "crops", "images_per_s_p20", "images_per_s_p50",
    "images_per_s_p80", "ratio", "share", "rounds", "data", "error", "versions", "commit", "command",
]  # fmt: skip
SMALL = ("data.global_size=24", "data.local_crops=2", "data.local_size=16", "data.local_scale=[0.1,0.5]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six smooth JPEGs."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for i in range(6):
            coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            side = tuple(int(n) for n in generator.integers(40, 90, 2))
            coarse.resize(side, Image.Resampling.BICUBIC).save(root / name / f"{i}.jpg", quality=95)
    return root


def configured(folder: Path, *words: str) -> config_module.Config:
    here = [f'data.path="{folder}"', "data.held_out=0", "data.threads=1", "optim.batch_size=4"]
    return config_module.load("trex", [*SMALL, *here, *words])


def opened(config: config_module.Config) -> tuple[index_module.Index, Plan]:
    index = index_module.open_or_build(config.data.path)
    rows = index.rows("train", config.data.held_out)
    batch = config.optim.batch_size
    return index, Plan(0, batch, rows, index.heights, index.widths, config.data, config.augment)


@pytest.fixture(scope="module")
def records(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of the whole command in real processes."""
    out = tmp_path_factory.mktemp("out") / "new"
    words = ["--data", str(folder), "--device", "cpu", "--threads", "1", "--batch", "4", "--seconds", "0.2"]
    env = {**environment(), "PYTHONPATH": ""}
    start = [sys.executable, "-m", "benchmarks", "loader", *SMALL, *words, "--out", str(out)]
    done = subprocess.run(start, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pillow decode" in done.stdout
    assert (out / "loader-cpu.png").read_bytes().startswith(b"\x89PNG")
    found: list[dict[str, Any]] = json.loads((out / "loader-cpu.json").read_text(encoding="utf-8"))
    return found


def test_records(records: list[dict[str, Any]], folder: Path) -> None:
    wholes = {r["impl"]: r for r in records if r["stage"] is None}
    assert list(wholes) == ["fastrex", "pillow", "torchvision"]
    for record in records:
        assert list(record) == KEYS
        assert (record["op"], record["crops"], record["batch"]) == ("loader", "1x24 + 2x16", 4)
        assert record["data"]["files"] == 10  # 12 less those held out
        assert record["data"]["mean_bytes"] > 0
        assert record["data"]["mean_pixels"] > 1600
        assert record["command"].startswith("fastrex bench loader data.global_size=24 ")
        assert record["command"].count("--data PATH") == 1
        assert str(folder) not in json.dumps(record)
        if record["error"] is None:
            assert 0 < record["images_per_s_p20"] <= record["images_per_s_p50"] <= record["images_per_s_p80"]
            assert {"fastrex", "torch", "python", "cpu", "allocator", "pillow"} <= set(record["versions"])
    ours, pillow = wholes["fastrex"], wholes["pillow"]
    assert (ours["error"], pillow["error"]) == (None, None)
    assert (ours["versions"]["allocator"], pillow["versions"]["allocator"]) == ("pooled", "default")
    best = max(r["images_per_s_p50"] for r in wholes.values() if r["impl"] != "fastrex" and r["error"] is None)
    for record in wholes.values():
        if record["error"] is None:
            assert record["ratio"] == pytest.approx(record["images_per_s_p50"] / best, rel=1e-3)
            assert len(record["rounds"]) == 2
            assert min(record["rounds"]) <= record["images_per_s_p50"] <= max(record["rounds"])
        else:
            assert record["error"].startswith("absent: torchvision cannot be imported")


def test_stages(records: list[dict[str, Any]]) -> None:
    stages = {
        impl: {r["stage"]: r for r in records if r["stage"] and r["impl"] == impl} for impl in ("fastrex", "pillow")
    }
    assert list(stages["fastrex"]) == ["read", "decode", "crop", "augment"]
    assert list(stages["pillow"]) == list(pillow_loader.STAGES)
    for found in stages.values():
        assert sum(r["share"] for r in found.values()) == pytest.approx(1, abs=1e-3)
        assert all(r["ratio"] is None for r in found.values())


def test_table(records: list[dict[str, Any]]) -> None:
    text = loader_report.table(records)
    assert "loader (cpu, 1 threads), batches of 4, 1x24 + 2x16 crops" in text
    assert "bar" not in text  # which is for two threads and the paper's crops
    judged = [
        {**r, "threads": 2, "crops": "1x224 + 8x96", "ratio": 4.25 if r["impl"] == "fastrex" else r["ratio"]}
        for r in records
    ]
    assert loader_report.table(judged).endswith("bar 4.00x: met, 4.250x over the fastest rival")


def test_chart_needs_matplotlib(records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'fastrex[plots]'" in str(loader_report.chart(records, tmp_path / "chart.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--data", "synthetic"], "synthetic"),
        (["--threads", "100000"], "--threads must be at most the number of cores"),
        (["--batch", "1"], "--batch"),
        (["--batch", "1000"], "optim.batch_size"),
        (["--recipe", "none"], "none"),
        (["data.local_sizes=9"], "local_size"),
        (["--device", "gpu"], "--device"),
    ],
)
def test_bad_input_is_one_line(folder: Path, words: list[str], message: str) -> None:
    usual = ["loader", "--data", str(folder), "--device", "cpu", "--threads", "1", "--batch", "4"]
    done = CliRunner().invoke(main, [*usual, *words])
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)  # not an error that shows a traceback
    assert message in done.output.splitlines()[-1]


def settings(folder: Path, *impls: str) -> loader.Settings:
    return loader.Settings(data=str(folder), words=SMALL, batch=4, seconds=0.1, impls=impls)


def test_a_loader_works_only_while_it_is_asked(folder: Path, tmp_path: Path) -> None:
    worker = loader.start("pillow", settings(folder), str(tmp_path))
    try:
        assert worker.ask("round", seconds=0.01)[0]["images"] % 4 == 0
        pids = group_of(worker.members[0].pid)
        assert len(pids) == 2  # itself and one worker of the DataLoader
        deadline = time.monotonic() + 10
        while {state(pid) for pid in pids} != {"T"} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {state(pid) for pid in pids} == {"T"}
        assert worker.ask("round", seconds=0.01)[0]["images"] > 0
    finally:
        worker.close()
    assert not group_of(worker.members[0].pid)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def group_of(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                pass
    return found


def test_a_loader_that_ends_says_why(folder: Path, tmp_path: Path) -> None:
    worker = loader.start("fastrex", settings(tmp_path / "nothing"), str(tmp_path))
    try:
        with pytest.raises(FastrexError, match=r"fastrex ended: .*nothing"):
            worker.ask("sample")
    finally:
        worker.close()


def test_batches_must_agree(tmp_path: Path) -> None:
    def answer(shift: float = 0.0, **change: Any) -> dict[str, Any]:
        path = tmp_path / f"{shift}.npz"
        np.savez(path, np.full((2, 3, 3, 8, 8), shift, np.float32))
        group = {"shape": [8, 3, 8, 8], "dtype": "float32", "mean": 0.1, "std": 1.0, **change}
        return {"groups": [group], "pictures": str(path)}

    loader.compare("pillow", answer(), answer(0.05, mean=0.2), 4)
    for wrong, message in (
        (answer(shape=[8, 3, 9, 9]), r"shape \[8, 3, 9, 9\], not \[8, 3, 8, 8\]"),
        (answer(dtype="float64"), "dtype float64, not float32"),
        (answer(mean=9.0), "mean 9.000, not 0.100"),
        (answer(std=float("nan")), "std nan, not 1.000"),
        (answer(0.07), "0.070 on average between crops with the same draws, more than 0.06"),
    ):
        with pytest.raises(FastrexError, match=message):
            loader.compare("pillow", answer(), wrong, 4)


def test_absent_rivals_and_the_ratio() -> None:
    base = dict.fromkeys(KEYS)
    speeds = {"fastrex": [400.0, 420.0, 380.0], "pillow": [100.0, 90.0, 110.0]}
    facts = {impl: {"facts": {"torch": "2"}} for impl in speeds}
    found = loader._records(base, ["fastrex", "pillow", "torchvision"], facts, speeds, {"torchvision": "no"})
    assert [(r["impl"], r["images_per_s_p50"], r["ratio"], r["error"]) for r in found] == [
        ("fastrex", 400.0, 4.0, None),
        ("pillow", 100.0, 1.0, None),
        ("torchvision", None, None, "absent: no"),
    ]
    assert (found[0]["images_per_s_p20"], found[0]["images_per_s_p80"]) == (388.0, 412.0)
    (alone,) = loader._records(base, ["fastrex"], facts, {"fastrex": [400.0]}, {})
    assert alone["ratio"] is None


def test_the_rival_makes_the_recipe(folder: Path) -> None:
    config = configured(folder)
    index, plan = opened(config)
    stream = iter(pillow_loader.open_loader("pillow", config, index, plan, "cpu"))
    seen = []
    for _ in range(6):  # across epochs of three batches
        crops, labels = next(stream)
        assert [tuple(c.shape) for c in crops] == [(4, 3, 24, 24), (4, 3, 16, 16), (4, 3, 16, 16)]
        assert {c.dtype for c in crops} == {torch.float32}
        seen += labels.tolist()
    epochs = [plan.permutation(epoch) for epoch in range(2)]
    assert seen == [int(index.labels[row]) for epoch in epochs for row in epoch]


@pytest.mark.parametrize("word", ["data.sampling=balanced", "data.repeats=2", "data.channels=1"])
def test_a_rival_says_what_it_cannot_do(folder: Path, word: str) -> None:
    with pytest.raises(Absent, match=r"data\.channels=3 only"):
        pillow_loader.open_views("pillow", configured(folder, word))


def test_torchvision_is_absent_with_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(Absent, match="torchvision cannot be imported"):
        pillow_loader.open_views("torchvision", configured(folder))


OFF = ("augment.flip=0", "augment.jitter=0", "augment.grayscale=0", "augment.global_blur=0", "augment.local_blur=0",
       "augment.global_solarize=0", "data.global_scale=[1,1]", "data.local_crops=0", "data.ratio=[0.5,2]")  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("augment.flip=1",),
        ("augment.jitter=1",),
        ("augment.grayscale=1",),
        ("augment.global_solarize=1",),
        ("augment.global_blur=1", "augment.blur_radius=[1.5,1.5]"),
    ],
    ids=lambda words: words[0] if words else "resize",
)
def test_the_rival_is_torchvision(folder: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls give the same pixels; the jitters with the draws that torchvision made."""
    functional = pytest.importorskip(import_torchvision().__name__ + ".transforms.functional")
    config = configured(folder, *OFF, *words)
    index, _ = opened(config)
    image = pillow_loader.load(index, 0)
    # The whole image: no box is drawn that either could choose.
    monkeypatch.setattr(pillow_loader, "random_box", lambda width, height, *_: (0, 0, width, height))
    theirs: Any = pillow_loader.torchvision_views(config)
    made: list[tuple[int, float]] = []
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for op, name in enumerate(names):
        real = getattr(functional, name)

        def spy(picture: Any, factor: float, op: int = op, real: Any = real) -> Any:
            made.append((op, factor))
            return real(picture, factor)

        monkeypatch.setattr(functional, name, spy)
    random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setattr("torchvision.transforms.transforms.RandomResizedCrop.get_params", staticmethod(whole))
    (wanted,) = theirs(image)
    views = pillow_loader.PillowViews(config)
    random.seed(0)
    draw = views.draw(image.size, views.groups[0])
    if made:
        draw = pillow_loader.Draw(**{**draw.__dict__, "jitter": tuple(made)})
    got = views.view(image, draw)
    assert torch.allclose(got, wanted, atol=1e-6)


def whole(picture: Any, *_: object) -> tuple[int, int, int, int]:
    return 0, 0, picture.height, picture.width


def test_planned_draws_are_the_plans(folder: Path) -> None:
    """Each draw of the plan changes what it says."""
    plain = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 256.0]
    draw = pillow_loader.planned(24, (3, 5, 20, 30), plain)
    assert draw == pillow_loader.Draw(24, (5, 3, 35, 23), False, (), False, 0.0, 256)
    full = [1.0, 23.0, 1.2, 0.8, 1.1, 0.05, 1.0, 1.5, 128.0]
    draw = pillow_loader.planned(24, (3, 5, 20, 30), full)
    assert draw.jitter == ((3, 0.05), (2, 1.1), (1, 0.8), (0, 1.2))
    assert (draw.flip, draw.gray, draw.blur, draw.solarize) == (True, True, 1.5, 128)


def test_boxes_are_torchvisions() -> None:
    random.seed(0)
    for width, height in ((50, 40), (400, 3), (3, 400), (1, 1)):
        for _ in range(50):
            left, top, right, bottom = pillow_loader.random_box(width, height, (0.05, 1.0), (3 / 4, 4 / 3))
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
    # No box of that shape fits: the largest centred one.
    assert pillow_loader.random_box(400, 3, (0.5, 1.0), (3 / 4, 4 / 3)) == (198, 0, 202, 3)


def test_too_little_shared_memory_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 1, 4096

    config = configured(folder)
    index, plan = opened(config)
    monkeypatch.setattr(pillow_loader.os, "statvfs", lambda path: Full)
    with pytest.raises(Absent, match="MB in /dev/shm; lower --batch"):
        pillow_loader.open_loader("pillow", config, index, plan, "cpu")


def test_settings_are_those_of_training(folder: Path) -> None:
    wanted = loader.Settings(data=str(folder), words=SMALL, threads=2, batch=6)
    config = config_module.load(wanted.recipe, wanted.configuration)
    assert (config.optim.batch_size, config.data.threads, config.data.local_crops) == (6, 2, 2)
    assert config.data.path == str(folder)
    assert loader_worker.IMPLS == ("fastrex", "pillow", "torchvision")
