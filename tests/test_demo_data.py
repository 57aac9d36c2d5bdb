"""The digits as an image folder: complete, deterministic, written once, safe with several writers."""

from __future__ import annotations

import importlib
import threading

import numpy as np
import pytest
from PIL import Image

from fastrex.data import demo, index
from fastrex.errors import FastrexError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return demo.write_digits(tmp_path_factory.mktemp("demo") / "digits")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_every_digit_is_there_and_a_fifth_of_each_is_held_out(digits):
    built = index.build(digits)
    assert (built.layout, built.classes) == ("train+val", tuple("0123456789"))
    assert (len(built), built.bad(), built.ignored) == (1797, [], 0)
    train, val = built.rows("train", 0.0), built.rows("val", 0.0)
    per_class = [np.bincount(built.labels[rows], minlength=10) for rows in (train, val)]
    assert (per_class[1] == sum(per_class) // 5).all()
    assert set(built.heights) == set(built.widths) == {32}


def test_images_are_grey_and_look_like_the_source(digits):
    source = importlib.import_module("sklearn.datasets").load_digits()
    for path in sorted(digits.rglob("*.jpg"))[::97]:
        number, digit = int(path.stem), int(path.parent.name)
        assert source.target[number] == digit
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), float)
        # The enlargement is smooth, so its 4x4 means differ from the source; a wrong image differs by 100 and more.
        assert np.abs(small - source.images[number] * 255 / 16).mean() < 20


def test_writing_again_changes_nothing_and_elsewhere_gives_the_same_bytes(digits, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert demo.write_digits(digits) == digits
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path))
    assert demo.write_digits() == tmp_path / "digits-v1"
    assert contents(tmp_path / "digits-v1") == contents(digits)
    assert [path.name for path in tmp_path.iterdir()] == ["digits-v1"]


def test_writers_at_the_same_time_all_get_the_complete_folder(tmp_path):
    failures = []

    def write():
        try:
            folder = demo.write_digits(tmp_path / "digits")
            assert len(contents(folder)) == 1797
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_foreign_or_damaged_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(FastrexError, match="something else than the demo data; remove it or give another"):
        demo.write_digits(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose me"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(FastrexError, match="No space left on device"):
        demo.write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_missing_scikit_learn_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(FastrexError, match=r"pip install 'fastrex\[train\]'"):
        demo.write_digits(tmp_path / "digits")
