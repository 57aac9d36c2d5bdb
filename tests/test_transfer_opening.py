"""Between a word of ``--sets`` and an index: places, stored indexes that grow old, folders of one's own, odd copies."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_stripes

pytest.importorskip("scipy", reason="the tests write MATLAB files with scipy")

import layouts_of_sets as sets
from layouts_of_sets import Expected
from PIL import Image

from fastrex.data.index import Index, cache_dir
from fastrex.errors import FastrexError
from fastrex.transfer import catalog, cog, opening
from fastrex.transfer.catalog import MissingSet, Task, open_task, tasks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(name: str, root: Path) -> Index:
    (task,) = tasks([name], root)
    return open_task(task)


def row_of(index: Index, name: str) -> int:
    return next(row for row in range(len(index)) if index.name(row) == name)


TORCHVISION: list[tuple[str, str, Callable[[Path], Expected]]] = [
    ("aircraft", "fgvc-aircraft-2013b/data", sets.aircraft),
    ("cars196", "stanford_cars", sets.cars_kit),
    ("dtd", "dtd/dtd", sets.dtd),
    ("flowers102", "flowers-102", sets.flowers102),
    ("pets", "oxford-iiit-pet", sets.pets),
    ("food101", "food-101", sets.food101),
    ("sun397", "SUN397", sets.sun397),
    ("sun397", "", lambda root: sets.sun397(root, "", "SUN397")),
    ("sun397", "", lambda root: sets.sun397(root, "Partitions", "SUN397")),
]


@pytest.mark.parametrize(("name", "top", "writer"), TORCHVISION)
def test_folders_below_one_root_as_torchvision_leaves_them(
    tmp_path: Path, name: str, top: str, writer: Callable[[Path], Expected]
) -> None:
    wanted = writer(tmp_path / top)
    for index in (opened(name, tmp_path), open_task(Task(name, tmp_path, catalog.BY_NAME[name]))):
        assert {index.name(row) for row in range(len(index))} == wanted.images.keys()
    # A folder of the set's own name goes before.
    (tmp_path / name).mkdir(exist_ok=True)
    if name != "dtd":
        with pytest.raises(MissingSet):
            opened(name, tmp_path)


def test_eurosat_of_torchvision(tmp_path: Path) -> None:
    for top in ("eurosat/2750", "EuroSAT/2750", "EuroSAT_RGB"):
        root = tmp_path / top.replace("/", "-")
        paths = sets.eurosat(root / top)
        assert len(opened("eurosat", root)) == len(paths)
        assert len(open_task(Task("eurosat", root, catalog.BY_NAME["eurosat"]))) == len(paths)


def test_an_image_that_is_repaired_or_replaced_is_looked_at_again(tmp_path: Path) -> None:
    sets.dtd(tmp_path / "dtd")
    name = "images/dotted/dotted_0007.jpg"
    path = tmp_path / "dtd" / name
    good = path.read_bytes()
    first = opened("dtd", tmp_path)

    def looked_at() -> tuple[str, int, int]:
        index = opened("dtd", tmp_path)
        row = row_of(index, name)
        return index.fingerprint, int(index.status[row]), int(index.widths[row])

    path.unlink()
    path.write_bytes(b"")
    assert looked_at()[1:] == (1, 0)
    # In its place: the folder has not changed.
    modified = path.parent.stat().st_mtime_ns
    path.write_bytes(good)
    assert path.parent.stat().st_mtime_ns == modified
    assert looked_at() == (first.fingerprint, 0, 32)
    path.unlink()
    Image.new("RGB", (99, 77)).save(path)
    assert looked_at()[1:] == (0, 99)
    assert opened("dtd", tmp_path).fingerprint != first.fingerprint
    # The only training image of a class, with which the class went and comes again.
    only = tmp_path / "dtd/images/dotted/dotted_0002.jpg"
    content = only.read_bytes()
    only.unlink()
    only.write_bytes(b"")
    assert opened("dtd", tmp_path).classes == opened("dtd", tmp_path).classes == ("banded", "zigzagged")
    only.write_bytes(content)
    assert opened("dtd", tmp_path).classes == first.classes


def test_what_is_still_bad_is_no_reason_to_look_at_the_rest(tmp_path: Path) -> None:
    sets.dtd(tmp_path / "dtd")
    (tmp_path / "dtd/images/dotted/dotted_0007.jpg").write_bytes(b"")
    looked: list[int] = []
    for _ in range(3):
        index = open_task(tasks(["dtd"], tmp_path)[0], progress=lambda done, of: looked.append(done))
        assert len(index.bad()) == 1
    assert looked == [7]


def test_another_rank_takes_the_stored_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none but the one that it is told of."""
    sets.cog(tmp_path / "cog")
    (task,) = tasks(["cog-l3"], tmp_path)
    first = open_task(task)

    def read(path: Path) -> object:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(cog.foreign, "read_words", read)
    again = open_task(task, stamp=first.stamp)
    assert (again.fingerprint, again.root, again.notices) == (first.fingerprint, first.root, first.notices)
    for stamp in ("", "other"):
        with pytest.raises(AssertionError, match="read again"):
            open_task(task, stamp=stamp)
    (stored,) = (cache_dir() / "transfer").glob("cog-l3-*.npz")
    stored.write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="read again"):
        open_task(task, stamp=first.stamp)


def test_train_val_and_test_of_ones_own(tmp_path: Path) -> None:
    """The protocol's split: val/ is there to choose by, test/ to test on."""
    for split, images, seed in (("train", 4, 0), ("val", 2, 1), ("test", 3, 2)):
        write_stripes(tmp_path / "mine" / split, images, seed=seed)
    (task,) = tasks([f"mine={tmp_path / 'mine'}"], None)
    index = open_task(task)
    assert index.notices == ("train/ and val/ together are the training images, test/ is the test set",)
    names = [index.name(row) for row in range(len(index))]
    folders = [name.split("/")[0] for name in names]
    assert {folder for folder, split in zip(folders, index.split, strict=True) if split} == {"test"}
    assert {folder for folder, split in zip(folders, index.split, strict=True) if not split} == {"train", "val"}
    assert [folders.count(split) for split in ("train", "val", "test")] == [16, 8, 12]
    assert [name.split("/")[1] for name in names] == [index.classes[label] for label in index.labels]
    assert np.bincount(index.labels[index.rows("train", 0.0)]).tolist() == [6] * 4
    assert np.bincount(index.labels[index.rows("val", 0.0)]).tolist() == [3] * 4
    assert open_task(task).fingerprint == index.fingerprint
    # An image more is noticed.
    shutil.copy(tmp_path / "mine" / names[0], tmp_path / "mine" / Path(names[0]).parent / "more.jpg")
    assert len(open_task(task)) == len(index) + 1
    (tmp_path / "mine/val").rename(tmp_path / "mine/validation")
    assert "train/ and validation/ together" in open_task(task).notices[0]
    (tmp_path / "mine/test/class-9").mkdir()
    with pytest.raises(FastrexError, match=r"test' must have the classes of train/, got class 'class-9'; remove"):
        open_task(task)
    # Test images without classes are those of a competition: val/ is what one can test on.
    shutil.rmtree(tmp_path / "mine/test")
    sets.draw(tmp_path / "mine/test", ["1.jpg"])
    index = open_task(task)
    assert {index.name(int(row)).split("/")[0] for row in index.rows("val", 0.0)} == {"validation"}


def test_names_that_are_too_long(tmp_path: Path) -> None:
    for known in (None, catalog.BY_NAME["dtd"]):
        with pytest.raises(FastrexError, match=r"^transfer: .*File name too long; choose a shorter name$"):
            open_task(Task("dtd", tmp_path / ("x" * 300), known))
    with pytest.raises(FastrexError, match="File name too long"):
        opened("dtd", tmp_path / ("x" * 300))
    sets.cog(tmp_path / "cog")
    split = tmp_path / "cog" / cog.SPLITS
    long = {"train": ["n10000001/" + "x" * 300], "test": ["n1/y"]}
    split.write_bytes(sets.pickled({f"n1000000{number}": long for number in (1, 2, 3)}))
    with pytest.raises(FastrexError, match=r"^transfer: cog-l1: .*File name too long"):
        opened("cog-l1", tmp_path)


@pytest.mark.parametrize(
    ("name", "place"), [("dtd", "labels"), ("cog-l1", "imagenet21k"), ("sun397", ""), ("eurosat", "2750"), ("mine", "")]
)
def test_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str) -> None:
    """Whoever runs the tests may read everything: the refusal of the system is what is put in its place."""
    {"dtd": sets.dtd, "cog-l1": sets.cog, "sun397": sets.sun397}.get(name, sets.eurosat)(tmp_path / "set/x")
    (tmp_path / "set/x").rename(tmp_path / "set" / name.removesuffix("-l1"))
    hidden = str(tmp_path / "set" / name.removesuffix("-l1") / place)
    real = os.stat

    def stat(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if isinstance(path, str | Path) and str(path).startswith(hidden) and str(path) != hidden:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)  # type: ignore[call-overload,no-any-return]

    def scandir(path: object = ".") -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "scandir", scandir)
    known = catalog.BY_NAME.get(name)
    with pytest.raises(FastrexError, match="Permission denied") as caught:
        open_task(Task(name, tmp_path / "set" / name.removesuffix("-l1"), known))
    assert "\n" not in str(caught.value)


def empty_rows(rows: int) -> bytes:
    """An array of ``rows`` times no word at all, as opcodes."""
    kind = b"cnumpy\ndtype\nX\x02\x00\x00\x00U1\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNNK\x04K\x04K\x08tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return empty + b"(K\x01(\x8a\x06" + rows.to_bytes(6, "little") + b"K\x00t" + kind + b"\x89C\x00tb"


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def test_short_pickles_that_would_be_long(tmp_path: Path) -> None:
    sets.cog(tmp_path / "cog")
    split, mapping = tmp_path / "cog" / cog.SPLITS, tmp_path / "cog" / cog.MAPPING
    levels = mapping.read_bytes()

    def refused() -> str:
        with pytest.raises(FastrexError) as caught:
            opened("cog-l1", tmp_path)
        return str(caught.value)

    rows = empty_rows(2**38)
    split.write_bytes(
        b"\x80\x04}" + word("n10000001") + b"}" + word("train") + rows + b"s" + word("test") + rows + b"ss."
    )
    assert split.stat().st_size < 300
    assert "an array without words that is no empty row" in refused()
    mapping.write_bytes(b"\x80\x04" + rows + b".")
    assert "an array without words that is no empty row" in refused()
    # One array for all classes: the second class to name it is refused, the third not looked at.
    mapping.write_bytes(levels)
    shared = {"train": np.array(["n10000001/n10000001_7.JPEG"]), "test": np.array(["x.JPEG"])}
    split.write_bytes(sets.pickled({f"n1000000{number}": shared for number in (1, 2)}))
    assert "one class and split, got two for 'n10000001/n10000001_7.JPEG'" in refused()
    letters = np.frombuffer(b"x" * 2_100_000, "S1")
    split.write_bytes(sets.pickled({f"n1000000{n}": {"train": letters, "test": letters} for n in (1, 2, 3)}))
    (tmp_path / "cog/imagenet21k/x").write_bytes(b"")
    assert "a level names more than 4000000 images" in refused()


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        raise MemoryError

    sets.cog(tmp_path / "cog")
    sets.dtd(tmp_path / "dtd")
    with monkeypatch.context() as patch:
        patch.setattr("fastrex.foreign.opcodes.check", full)
        with pytest.raises(FastrexError, match="needs more memory than there is; get it again, or free some memory"):
            opened("cog-l1", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("fastrex.transfer.annotations.untrusted.read_text", full)
        with pytest.raises(FastrexError, match=r"train1\.txt' must fit the memory"):
            opened("dtd", tmp_path)


def test_texts_that_begin_with_a_mark_and_end_lines_as_windows_does(tmp_path: Path) -> None:
    wanted = sets.pets(tmp_path / "pets")
    for path in (tmp_path / "pets/annotations").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    index = opened("pets", tmp_path)
    assert {index.name(row) for row in range(len(index))} == wanted.images.keys()


def test_paths_of_cog_with_slashes_around_them(tmp_path: Path) -> None:
    wanted = sets.cog(tmp_path / "cog")[0]
    split: dict[str, dict[str, list[str]]] = {name: {"train": [], "test": []} for name in wanted.classes}
    for path, (name, test) in wanted.images.items():
        split[name]["test" if test else "train"].append(f"//{path}/")
    (tmp_path / "cog" / cog.SPLITS).write_bytes(sets.pickled(split))
    index = opened("cog-l1", tmp_path)
    assert {index.name(row) for row in range(len(index))} == wanted.images.keys()


def test_stored_indexes_bear_the_name_of_their_set(tmp_path: Path) -> None:
    sets.dtd(tmp_path / "dtd")
    index = opened("dtd", tmp_path)
    assert opening.known("dtd", tmp_path / "dtd", index.stamp) is not None
    assert opening.known("pets", tmp_path / "dtd", index.stamp) is None
