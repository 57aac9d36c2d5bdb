"""Images, folders and lists that are damaged, odd or hostile: found by the index, survived or named by a run."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import launch
import numpy as np
import pytest
from conftest import SETTINGS, write_stripes
from PIL import Image
from test_bad_samples import DATA, cut, load, swap, turn_into_pipe
from test_faults_hostile import bounded
from test_odd_files import ENTRIES, IGNORED, JPEG, LINKS, ODD, statuses

from fastrex import rundir
from fastrex.data import headers, index
from fastrex.data.index import Status
from fastrex.data.reader import BadSample
from fastrex.errors import FastrexError

Report = Callable[..., None]
BAD = [odd for odd in ODD if odd.checked != Status.OK]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))


def corpus(root: Path) -> Path:
    for name in ("odd", "other"):
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").write_bytes(JPEG)
    for name, data in {**{odd.name: odd.data for odd in ODD}, **IGNORED}.items():
        (root / "odd" / name).write_bytes(data)
    for name, target in LINKS.items():
        (root / "odd" / name).symlink_to(target)
    os.mkfifo(root / "odd" / "pipe.jpg")
    return root


@pytest.mark.faults
def test_the_corpus_of_odd_files(tmp_path: Path, report: Report) -> None:
    root = corpus(tmp_path / "data")
    found = statuses(index.build(root))
    assert found == {odd.name: odd.index for odd in ODD} | ENTRIES
    assert statuses(index.build(root, threads=3)) == found
    bad = sum(status != Status.OK for status in found.values())
    report(
        "T24",
        "odd files in a folder: index against the golden table",
        injected=len(found),
        survived=len(found),
        bad=bad,
    )


@pytest.mark.parametrize("format", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_headers_that_claim_too_many_pixels_cost_nothing(format: str, tmp_path: Path) -> None:
    """A picture whose header is given the size of 40000 x 40000."""
    buffer = io.BytesIO()
    Image.new("RGB", (50, 30)).save(buffer, format, **({"lossless": True} if format == "WEBP" else {}))
    data = buffer.getvalue()
    small = {
        "BMP": (b"\x32\0\0\0\x1e\0\0\0", b"\x40\x9c\0\0\x40\x9c\0\0"),
        "GIF": (b"\x32\0\x1e\0", b"\x40\x9c\x40\x9c"),
        "JPEG": (b"\x08\0\x1e\0\x32", b"\x08\x9c\x40\x9c\x40"),
        "JPEG2000": (b"ihdr\0\0\0\x1e\0\0\0\x32", b"ihdr\0\0\x9c\x40\0\0\x9c\x40"),
        "PNG": (b"IHDR\0\0\0\x32\0\0\0\x1e", b"IHDR\0\0\x9c\x40\0\0\x9c\x40"),
        "PPM": (b"50 30", b"40000 40000"),
        "TIFF": (b"\x32\0\0\0\x01\x01", b"\x40\x9c\0\0\x01\x01"),
        "WEBP": (b"/\x31\x40\x07\0", b"/\xff\xff\xff\x0f"),  # its largest: 16384 x 16384
    }[format]
    assert small[0] in data
    data = data.replace(*small)
    if format == "TIFF":  # its height is a field of its own
        place = data.index(b"\x01\x01\x03\0") if b"\x01\x01\x03\0" in data else data.index(b"\x01\x01\x04\0")
        data = data[: place + 2] + b"\x04\0\x01\0\0\0\xff\xff\xff\0" + data[place + 12 :]
    (tmp_path / "x").write_bytes(data)
    handle = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        headers._readers()
        with bounded(50 << 20, seconds=1):
            status = headers.examine(handle, 0, len(data))[2]
    finally:
        os.close(handle)
    assert status in (Status.TOO_LARGE, Status.HEADER)


@pytest.mark.faults
def test_bad_files_in_the_loader_are_named(stripes: Path, tmp_path: Path, report: Report) -> None:
    """Every bad kind in the place of a good file, without a budget: the loader stops and names it."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")
    root = Path(shutil.copytree(stripes / "train", tmp_path / "images"))
    built = index.build(root)
    good = built.path(5).read_bytes()
    stop = dataclasses.replace(DATA, on_bad_sample="stop")
    for odd in BAD:
        built.path(5).write_bytes(odd.data)
        with pytest.raises(BadSample) as caught:
            load(built, stop, stop=8)
        assert repr(str(built.path(5))) in str(caught.value), odd.name
    built.path(5).write_bytes(good)
    assert len(load(built, stop, stop=8)) == 8
    report("T25", "bad files that the index did not see: stop by name", injected=len(BAD), survived=len(BAD))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, str]]:
    """Images with a stored index that knows nothing of five bad ones, their names, and where the index lies."""
    root = tmp_path_factory.mktemp("damaged")
    write_stripes(root / "train", 16, seed=0)
    write_stripes(root / "val", 4, seed=1)
    built = index.build(root)
    (root / ".fastrex").mkdir()
    index.save(built, root / ".fastrex" / "index.npz")
    rows = [3, 17, 18, 35, 60]
    kinds = {odd.name: odd for odd in ODD}
    for row, name in zip(
        rows, ("cut_half.jpg", "claims_nothing.jpg", "cut.png", "bomb.png", "cut_20.jpg"), strict=True
    ):
        built.path(row).write_bytes(kinds[name].data)
    return root, [built.name(row) for row in rows], {"FASTREX_CACHE": str(tmp_path_factory.mktemp("cache"))}


def train(data: Path, out: Path, *more: str) -> list[str | Path]:
    return ["train", "demo", *SETTINGS, *more, "--data", data, "--out", out, "--device", "cpu"]


@pytest.mark.faults
def test_a_budget_for_bad_files_on_two_ranks(
    damaged: tuple[Path, list[str], dict[str, str]], tmp_path: Path, report: Report
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")
    root, names, environment = damaged
    hashes = []
    for number, more in enumerate(("data.prefetch=1", "data.prefetch=3")):
        out, folder = tmp_path / f"run{number}", tmp_path / f"hashes{number}"
        words = train(root, out, "data.on_bad_sample=replace", "data.max_bad_samples=10", more)
        with launch.ranks(tmp_path / f"log{number}", 2, launch.faulty(words, hashes=folder), **environment) as job:
            assert job.wait(240) == [0, 0], job.output
        status = rundir.read_status(out)
        assert (status["state"], status["step"]) == ("completed", 16)
        log = (out / "train.log").read_text(encoding="utf-8")
        assert [name for name in names if repr(name) not in log] == []
        hashes += [path.read_text() for path in sorted(folder.iterdir())]
    assert len(hashes) == 4
    assert len(set(hashes)) == 1
    out = tmp_path / "over"
    words = train(root, out, "data.on_bad_sample=replace", "data.max_bad_samples=2")
    with launch.ranks(tmp_path / "log-over", 2, launch.faulty(words), **environment) as job:
        assert all(code != 0 for code in job.wait(240)), job.output
        output = job.output
    assert "data.max_bad_samples=2 others were bad before it" in output
    assert any(name in output for name in names)
    assert rundir.read_status(out)["state"] == "failed"
    report(
        "T26", "five bad files within the budget, and beyond it, on two ranks", injected=5, survived=5, bits_equal=True
    )


@pytest.mark.faults
def test_files_that_change_during_a_run_of_two_ranks(tmp_path: Path, report: Report) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")
    root, out = tmp_path / "data", tmp_path / "run"
    write_stripes(root / "train", 16, seed=0)
    write_stripes(root / "val", 4, seed=1)
    victims = {
        "class-0/03.jpg": Path.unlink,
        "class-1/04.jpg": cut,
        "class-1/05.jpg": lambda path: os.truncate(path, 0),
        "class-2/06.jpg": swap_longer,
        "class-3/07.jpg": turn_into_pipe,
    }
    if os.geteuid():  # root may read anything
        victims["class-3/08.jpg"] = lambda path: path.chmod(0)
    words = train(root, out, "data.on_bad_sample=replace", "data.max_bad_samples=10", "optim.epochs=12")
    with launch.ranks(tmp_path / "log", 2, launch.faulty(words)) as job:
        job.until(lambda: logged(out) >= 3, 240)
        for name, damage in victims.items():
            damage(root / "train" / name)
        assert job.wait(300) == [0, 0], job.output
    status = rundir.read_status(out)
    assert (status["state"], status["step"]) == ("completed", 48)
    log = (out / "train.log").read_text(encoding="utf-8")
    assert [name for name in victims if name not in log] == []
    report(
        "T27", "files deleted, cut, emptied, replaced, piped in mid-run", injected=len(victims), survived=len(victims)
    )


def swap_longer(path: Path) -> None:
    swap(path)
    path.write_bytes(path.read_bytes() + b"\0")


def logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in path.read_text().splitlines()), default=0) if path.exists() else 0


def cut_jpegs(seeds: range, folder: Path) -> Iterator[tuple[int, Status]]:
    path = folder / "x.jpg"
    for seed in seeds:
        rng = np.random.default_rng(seed)
        buffer = io.BytesIO()
        size = tuple(rng.integers(20, 200, 2).tolist())
        options = {"progressive": bool(rng.integers(2)), "quality": int(rng.integers(30, 96))}
        noise = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        noise.save(buffer, "JPEG", **options)
        data = buffer.getvalue()
        # As often near the end, where a crop decodes without a fault.
        length = len(data) - int(rng.integers(2, 40)) if seed % 2 else int(rng.integers(1, len(data) - 1))
        path.write_bytes(data[:length])
        handle = os.open(path, os.O_RDONLY)
        try:
            yield length, Status(headers.examine(handle, 0, length)[2])
        finally:
            os.close(handle)


def test_cut_jpegs_are_found_every_time(tmp_path: Path) -> None:
    assert {status for _, status in cut_jpegs(range(40), tmp_path)} == {Status.TRUNCATED, Status.HEADER}


@pytest.mark.faults
def test_two_hundred_cut_jpegs(tmp_path: Path, report: Report) -> None:
    found = [status for _, status in cut_jpegs(range(200), tmp_path)]
    assert set(found) == {Status.TRUNCATED, Status.HEADER}
    report("T28", "JPEGs cut at random", injected=len(found), survived=len(found))


def write_tree(root: Path, order: random.Random) -> Path:
    """Everything that a tree may hold, made in any order."""
    names = [f"{c}/{n}.jpg" for c in ("a", "A", "b", "caf\udce9", "日本", "train") for n in ("1", "2", "deep/er/3")]
    names.remove("train/deep/er/3.jpg")  # or it would be a split
    names += [".hidden/x.jpg", "a/.x.jpg", "a/._y.jpg", "b/notes.txt", "b/.deep/z.jpg"]
    order.shuffle(names)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    for link, target in (("a/loop", ".."), ("b/self", "self"), ("b/up", "../a"), ("b/round", "."), ("link", "a")):
        (root / link).symlink_to(target)
    return root


def test_odd_trees_give_the_same_classes_every_time(tmp_path: Path, report: Report) -> None:
    trees = [index.build(write_tree(tmp_path / f"{seed}" / "data", random.Random(seed))) for seed in range(6)]
    first = trees[0]
    # As sorted(os.listdir()), which is torchvision's ImageFolder, without what is hidden.
    assert first.classes == tuple(sorted(("a", "A", "b", "caf\udce9", "日本", "train", "link")))
    assert any("'A', 'a'" in notice or "'a', 'A'" in notice for notice in first.notices)
    for tree in trees:
        assert tree.fingerprint == first.fingerprint
        labels = {tree.name(row): tree.classes[tree.labels[row]] for row in range(len(tree))}
        assert all(name.partition("/")[0] == label for name, label in labels.items())
        # What a link leads to belongs to the class with the link; nothing is taken twice within a class.
        assert sorted(name for name, label in labels.items() if label == "b") == [
            "b/1.jpg", "b/2.jpg", "b/deep/er/3.jpg", "b/up/1.jpg", "b/up/2.jpg", "b/up/deep/er/3.jpg"
        ]  # fmt: skip
        assert not any("/." in f"/{name}" for name in labels)
        index.save(tree, tmp_path / "index.npz")
        assert index.load(tmp_path / "index.npz").classes == first.classes
    (tmp_path / "0" / "data" / "empty").mkdir()
    with pytest.raises(FastrexError, match=r"no readable training image in class 'empty'"):
        index.build(tmp_path / "0" / "data")
    report("T29", "trees with hidden, nested, linked, looping, non-UTF-8 and twin folders", injected=7, survived=7)


ROWS = (
    "../x.jpg,a", "a/../../x.jpg,a", "/etc/hostname,a", "x\0.jpg,a", "out/x.jpg,a", "link.jpg,a", "1.jpg,2147483648",
    "1.jpg,-1", f"1.jpg,{2**63}", "y" * 70_000 + ",a", "y" * 5000 + ".jpg,a", ",a", "1.jpg,", '"1.jpg,a',
)  # fmt: skip


def test_lists_that_lead_elsewhere(tmp_path: Path, report: Report) -> None:
    root = tmp_path / "data"
    for name in ("data/1.jpg", "data/2.jpg", "elsewhere/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    (root / "out").symlink_to("../elsewhere")
    (root / "link.jpg").symlink_to("../elsewhere/x.jpg")
    head = "path,label\n1.jpg,0\n2.jpg,1\n"
    (root / "x.csv").write_text(head)
    assert len(index.build(root / "x.csv")) == 2
    lists = {f"{number}.csv": head + row + "\n" for number, row in enumerate(ROWS)}
    for number, row in enumerate(ROWS):
        path, _, label = row.removeprefix('"').rpartition(",")
        path = path if path != "1.jpg" or label != "a" else ""
        lists[f"{number}.jsonl"] = "".join(
            json.dumps({"path": p, "label": n}) + "\n" for p, n in (("1.jpg", "0"), ("2.jpg", "1"), (path, label))
        )
    for name, text in lists.items():
        (root / name).write_text(text)
        with bounded(), pytest.raises(FastrexError, match="line"):
            index.build(root / name)
    (root / "long.csv").write_text(head)
    with open(root / "long.csv", "r+b") as file:
        file.seek(200_000_000)
        file.write(b"x")
    with bounded(100 << 20), pytest.raises(FastrexError, match="longer than"):
        index.build(root / "long.csv")
    count = len(lists) + 1
    report(
        "T37",
        "lists with .., absolute paths, links out, NUL, labels out of range, 200 MB lines",
        injected=count,
        survived=count,
    )
    assert len(list(itertools.chain(root.glob("*.csv"), root.glob("*.jsonl")))) == count + 1
