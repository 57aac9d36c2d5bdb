"""The trade-off experiment: its folders, one real run of it, and the words that its numbers allow."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

from benchmarks import experiment_data, experiment_report, experiment_run, tradeoff
from benchmarks.experiment import SIZES
from fastrex.errors import FastrexError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def picture(seed: int, size: int, kind: str) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archives(tmp_path_factory.mktemp("archives"))


def write_archives(folder: Path) -> Path:
    """The two archives, small: ten classes of 32 and 4 images, three characters of two alphabets."""
    with tarfile.open(folder / experiment_data.CIFAR, "w:xz") as tar:
        for number, (split, count) in enumerate((("train", 32), ("test", 4))):
            for label, name in enumerate(CLASSES):
                for i in range(count):
                    data = picture(100 * label + i + 10_000 * number, 32, "JPEG")
                    entry = tarfile.TarInfo(f"{split}/{name}/{i:04d}.jpg")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    with zipfile.ZipFile(folder / experiment_data.OMNIGLOT, "w") as held:
        for character in ("Greek/character01", "Greek/character02", "Korean/character01"):
            for i in range(20):
                name = f"images_background_small1/{character}/0001_{i + 1:02d}.png"
                held.writestr(name, picture(i, 35, "PNG"))
    return folder


def test_the_folders(archives: Path, tmp_path: Path) -> None:
    folders = experiment_data.prepare(archives, tmp_path, 8, 5)
    assert sorted(folders) == sorted(["images", *experiment_data.SETS])
    for name, classes, count in (("images", CLASSES[:6], 8), ("train", CLASSES[:6], 5), ("cifar4", CLASSES[6:], 5)):
        assert sorted(p.name for p in (folders[name] / "train").iterdir()) == list(classes)
        for kind in classes:
            assert len(list((folders[name] / "train" / kind).iterdir())) == count
            assert len(list((folders[name] / "test" / kind).iterdir())) == 4
    characters = ["Greek-character01", "Greek-character02", "Korean-character01"]
    for split, count in (("train", 15), ("test", 5)):
        assert sorted(p.name for p in (folders["omniglot"] / split).iterdir()) == characters
        assert all(len(list(p.iterdir())) == count for p in (folders["omniglot"] / split).iterdir())
    drawings = [{p.name for p in (folders["omniglot"] / s / characters[0]).iterdir()} for s in ("train", "test")]
    assert not drawings[0] & drawings[1]
    assert experiment_data.prepare(archives, tmp_path, 8, 5) == folders
    with pytest.raises(FastrexError, match="32 training images, got 33 asked for"):
        experiment_data.prepare(archives, tmp_path, 33, 5)
    with pytest.raises(FastrexError, match="without cifar10-jpeg"):
        experiment_data.prepare(tmp_path / "none", tmp_path, 8, 5)


def run(arm: str, seed: int, task: float, odds: tuple[float, float, float]) -> dict[str, Any]:
    def cell(mean: float, value: float) -> dict[str, Any]:
        return {probe: {"mean": mean, "low": mean, "high": mean, "log_odds": value} for probe in ("logistic", "knn")}

    sets = {"train": cell(task, 9.0)} | {
        name: cell(0.5, value) for name, value in zip(experiment_report.TRANSFER, odds, strict=True)
    }
    return {"arm": arm, "seed": seed, "steps": 1, "commits": ["abc"], "train_loss": 1.0, "sets": sets}


def test_the_words_claim_what_the_intervals_do() -> None:
    runs = [run("base", s, 0.50 + s / 100, (0.0, 0.1, 0.2)) for s in range(3)]
    # Up by 9.9, 10 and 10.1 points; transfer up by 1.2, down by 0.9, equal.
    runs += [
        run("mc", s, 0.60 + s / 100 + (s - 1) / 1000, (o, 0.1 + o, 0.2 + o)) for s, o in enumerate((1.2, -0.9, 0.0))
    ]
    found = experiment_report.content(tradeoff.TRADEOFF, runs, {"seeds": 3, "epochs": 5}, "command")
    (step,) = found["steps"]
    assert (step["task"]["up"], step["transfer"]["up"]) == (3, 1)
    assert step["task"]["mean"] == pytest.approx(0.10)
    assert step["task"]["half"] == pytest.approx(4.303 * 0.001 / 3**0.5)
    assert found["arms"]["base"]["transfer"] == {"mean": pytest.approx(0.1), "std": pytest.approx(0.0)}
    (line,) = found["conclusion"]
    assert "raises accuracy on the task (+10.00 ± 0.25 points, up in 3 of 3 seeds)" in line
    assert "does not clearly move transfer (+0.10 ± 2.62 log-odds, up in 1 of 3 seeds)" in line
    assert (
        "| Base: cross-entropy, one crop | 51.0 ± 1.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 0.100 ± 0.000 |"
        in experiment_report.table(found)
    )


def test_one_seed_is_no_evidence() -> None:
    runs = [run("base", 0, 0.5, (0.0, 0.1, 0.2)), run("mc", 0, 0.6, (1.0, 1.1, 1.2))]
    found = experiment_report.content(tradeoff.TRADEOFF, runs, {"seeds": 1, "epochs": 5}, "command")
    assert found["steps"][0]["task"]["half"] is None
    assert "accuracy on the task +10.00 points with one seed, which says nothing sure" in found["conclusion"][0]
    assert not any("interval" in note for note in found["notes"])


def test_a_failure_begins_nothing_more() -> None:
    begun = []

    def work(number: int, cores: set[int]) -> None:
        assert cores
        begun.append(number)
        if number == 1:
            raise FastrexError("the second")

    with pytest.raises(FastrexError, match="the second"):
        experiment_run.side_by_side([partial(work, number) for number in range(50)], 1)
    assert begun[:2] == [0, 1]
    assert len(begun) < 50


def test_another_size_is_another_run(tmp_path: Path) -> None:
    laptop, gpu = SIZES["laptop"], SIZES["gpu"]
    work = experiment_run.Work(tradeoff.TRADEOFF, {}, tmp_path, laptop, tradeoff.ARMS[0], 0, "cpu")
    places = {replace(work, size=size).run for size in (laptop, gpu, replace(laptop, epochs=9))}
    assert len(places) == 3


def test_every_step_compares_arms_that_there_are() -> None:
    names = {arm.name for arm in tradeoff.ARMS}
    assert {name for _, new, old in tradeoff.STEPS for name in (new, old)} == names


def test_a_real_run(archives: Path, tmp_path: Path) -> None:
    """Two arms, one seed; the second call trains and probes nothing."""
    words = ["--data", str(archives), "--out", str(tmp_path / "work"), "--size", "quick", "--seeds", "1"]
    words += ["--arm", "base", "--arm", "ocm1", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    command = [sys.executable, "-m", "benchmarks", "tradeoff", *words]

    def go() -> str:
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
        assert not done.returncode, done.stderr
        return done.stdout

    assert go().count(": trained in") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["arm"] for run in found["runs"]] == ["base", "ocm1"]
    assert all(set(run["sets"]) == set(experiment_data.SETS) for run in found["runs"])
    assert 0.9 > found["arms"]["base"]["digits/logistic"]["mean"] > 0.15
    assert (tmp_path / "found.md").read_text().count("\n| ") == 3  # the heads, and a line for each arm
    assert (tmp_path / "found.png").stat().st_size > 5000
    again = go()
    assert ": trained in" not in again
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == found["runs"]
