"""The official data sets: each is read from a miniature copy of its official layout, and whatever is wrong is named."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_stripes
from torchvision_shim import import_torchvision

pytest.importorskip("scipy", reason="the tests write MATLAB files with scipy")

import layouts_of_sets as sets
from layouts_of_sets import Expected
from scipy.io import loadmat, savemat

from fastrex.data.index import Index, cache_dir
from fastrex.data.loader import EvalLoader
from fastrex.errors import FastrexError, UsageError
from fastrex.sections import DataConfig
from fastrex.transfer import catalog, eurosat, matlab
from fastrex.transfer.catalog import MissingSet, Task, open_task, tasks

Writer = Callable[[Path], Expected]
# By set: where below its folder the archives unpack to, and what writes that.
LAYOUTS: list[tuple[str, str, Writer]] = [
    ("aircraft", "", sets.aircraft),
    ("aircraft", "data", sets.aircraft),
    ("aircraft", "fgvc-aircraft-2013b/data", sets.aircraft),
    ("cars196", "", sets.cars_whole),
    ("cars196", "", sets.cars_kit),
    ("cars196", "stanford_cars", sets.cars_kit),
    ("cars196", "", lambda root: sets.cars_kit(root, "devkit/cars_test_annos_withlabels.mat")),
    ("cars196", "", lambda root: sets.cars_kit(root, kit="car_devkit/devkit", doubled=True)),
    (
        "cars196",
        "",
        lambda root: sets.cars_kit(root, "car_devkit/devkit/cars_test_annos_withlabels.mat", "car_devkit/devkit"),
    ),
    ("dtd", "", sets.dtd),
    ("dtd", "dtd", sets.dtd),
    ("dtd", "dtd/dtd", sets.dtd),
    ("flowers102", "", sets.flowers102),
    ("flowers102", "flowers-102", sets.flowers102),
    ("pets", "", sets.pets),
    ("pets", "oxford-iiit-pet", sets.pets),
    ("food101", "", sets.food101),
    ("food101", "food-101", sets.food101),
    ("sun397", "", sets.sun397),
    ("sun397", "SUN397", sets.sun397),
    ("sun397", "", lambda root: sets.sun397(root, "")),
    # Each archive where it unpacks to.
    ("sun397", "", lambda root: sets.sun397(root, "", "SUN397")),
    ("sun397", "", lambda root: sets.sun397(root, "Partitions", "SUN397")),
    ("sun397", "", lambda root: sets.sun397(root, "SUN397", "SUN397")),
    ("inat2018", "", lambda root: sets.inat(root, 2018)),
    ("inat2018", "", lambda root: sets.inat(root, 2018, named=False)),
    ("inat2019", "", lambda root: sets.inat(root, 2019)),
    ("in1k", "", sets.imagenet),
    ("in1k", "ILSVRC/Data/CLS-LOC", sets.imagenet),
    ("in1k", "", lambda root: sets.imagenet(root, "validation")),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(name: str, root: Path) -> Index:
    (task,) = tasks([name], root)
    return open_task(task)


def found(index: Index) -> Expected:
    rows = range(len(index))
    images = {index.name(row): (index.classes[index.labels[row]], bool(index.split[row])) for row in rows}
    assert len(images) == len(index)
    return Expected(index.classes, images)


def refusal(name: str, root: Path) -> str:
    """The one line of the error."""
    with pytest.raises(FastrexError) as caught:
        opened(name, root)
    assert not isinstance(caught.value, MissingSet)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "top", "writer"), LAYOUTS)
def test_official_layouts(tmp_path: Path, name: str, top: str, writer: Writer) -> None:
    wanted = writer(tmp_path / name / top)
    index = opened(name, tmp_path)
    assert found(index) == wanted
    assert (set(index.heights), set(index.widths)) == ({24}, {32})
    assert index.path(0).is_file()
    # Split 0 is trainval and 1 is test, whatever share is asked to be held out.
    assert [bool(index.split[row]) for row in index.rows("train", 0.0)] == [False] * (len(index.rows("train", 0.1)))
    assert index.split[index.rows("val", 0.1)].all()
    assert len(index.rows("train", 0.0)) + len(index.rows("val", 0.0)) == len(index)
    # A few images instead of thousands are said to be so.
    (notice,) = index.notices
    known = catalog.BY_NAME[name]
    assert f"3 classes, {len(index.rows('train', 0.0))} training and 3 test images; published are" in notice
    assert f"{known.classes}, {known.trainval} and {known.test}" in notice


def test_sets_of_torchvision_agree(tmp_path: Path) -> None:
    """Images, labels and splits are those of independent readers of the same folders."""
    import_torchvision()
    datasets = importlib.import_module("torchvision.datasets")
    sets.aircraft(tmp_path / "aircraft/fgvc-aircraft-2013b/data")
    sets.cars_kit(tmp_path / "cars196/stanford_cars")
    sets.dtd(tmp_path / "dtd/dtd/dtd")
    sets.food101(tmp_path / "food101/food-101")
    sets.pets(tmp_path / "pets/oxford-iiit-pet")
    theirs = {
        "aircraft": (datasets.FGVCAircraft, ("trainval", "test"), "_image_files"),
        "cars196": (datasets.StanfordCars, ("train", "test"), "_samples"),
        "dtd": (datasets.DTD, ("train", "val", "test"), "_image_files"),
        "food101": (datasets.Food101, ("train", "test"), "_image_files"),
        "pets": (datasets.OxfordIIITPet, ("trainval", "test"), "_images"),
    }
    for name, (reader, splits, files) in theirs.items():
        place = tmp_path / name / ("dtd" if name == "dtd" else "")
        index = open_task(Task(name, place, catalog.BY_NAME[name]))
        ours = {index.path(row): (index.classes[index.labels[row]], index.split[row]) for row in range(len(index))}
        for split in splits:
            part = reader(tmp_path / name, split)
            named = getattr(part, files)
            pairs = named if files == "_samples" else zip(named, part._labels, strict=True)
            for path, label in pairs:
                # It calls the breeds by their names in title case.
                found_name, found_split = ours.pop(Path(path))
                assert (found_name.casefold(), found_split) == (part.classes[label].casefold(), split == "test"), path
        assert not ours, name


@pytest.mark.parametrize(
    ("protocol", "kind", "images"),
    [(2, np.str_, "imagenet21k"), (4, np.bytes_, "imagenet21k"), (5, np.str_, "winter21_whole"), (4, object, "")],
)
def test_cog_levels(tmp_path: Path, protocol: int, kind: type, images: str) -> None:
    wanted = sets.cog(tmp_path / "cog", protocol, kind, images)
    for task, level in zip(tasks(["cog"], tmp_path), wanted, strict=True):
        index = open_task(task)
        assert found(index) == level
        assert index.root == tmp_path / "cog" / images
        assert f"published are 1000, {task.official.trainval if task.official else 0} and 50000" in index.notices[0]


def test_cog_refusals(tmp_path: Path) -> None:
    sets.cog(tmp_path / "cog")
    split = tmp_path / "cog" / "cog_concepts_split_file.pkl"
    mapping = tmp_path / "cog" / "cog_levels_mapping_file.pkl"
    good = split.read_bytes(), mapping.read_bytes()

    def wrong(path: Path, content: object) -> str:
        path.write_bytes(content if isinstance(content, bytes) else sets.pickled(content))
        message = refusal("cog-l1", tmp_path)
        split.write_bytes(good[0])
        mapping.write_bytes(good[1])
        return message

    assert "is damaged" in wrong(split, good[0][:-20])
    assert "it has 2 levels" in wrong(mapping, [["n1"], ["n2"]])
    assert "it has a dict where a list must be" in wrong(mapping, {"n1": 1})
    assert "it has a str where a list must be" in wrong(mapping, ["n1", "n2", "n3", "n4", "n5"])
    assert "names a class twice" in wrong(mapping, [["n1", "n1"]] * 5)
    assert "where a word must be" in wrong(mapping, [[1]] * 5)
    assert "class 'n10000001' is missing" in wrong(split, {})
    content = {f"n1000000{number}": {"train": ["../../x.JPEG"], "test": ["x.JPEG"]} for number in (1, 2, 3)}
    assert "must name images below its folder, got '../../x.JPEG'" in wrong(split, content)
    # However many slashes it begins with, a path stays below the folder.
    content["n10000001"]["train"] = ["//etc/x.JPEG"]
    assert "must have a folder imagenet21k with 'etc/x.JPEG'" in wrong(split, content)
    content["n10000001"]["train"] = ["n1//x.JPEG"]
    assert "must name images below its folder, got 'n1//x.JPEG'" in wrong(split, content)
    content["n10000001"]["train"] = "x.JPEG"  # type: ignore[assignment]
    assert "it has a str where a list must be" in wrong(split, content)
    content["n10000001"]["train"] = np.array([["x.JPEG"]])  # type: ignore[assignment]
    assert "it has a ndarray of 2 dimensions where a list must be" in wrong(split, content)
    content["n10000001"]["train"] = []
    assert "no training image" in wrong(split, content)
    del content["n10000001"]["test"]
    assert "must be the official file" in wrong(split, content)
    assert "which lists of words do not need" in wrong(split, sets_bomb(tmp_path))
    assert not (tmp_path / "bomb").exists()
    shutil.rmtree(tmp_path / "cog" / "imagenet21k")
    assert "must have a folder imagenet21k with 'n10000001/n10000001_7.JPEG', got 'cog_concepts" in refusal(
        "cog-l1", tmp_path
    )
    split.unlink()
    message = refusal("cog-l3", tmp_path)
    assert (
        "must hold cog_levels_mapping_file.pkl, cog_concepts_split_file.pkl, got 'cog_levels_mapping_file.pkl'"
        in message
    )


def sets_bomb(tmp_path: Path) -> bytes:
    return b"cos\nmkdir\n(V%s\ntR." % os.fsencode(tmp_path / "bomb")


def test_eurosat_split(tmp_path: Path) -> None:
    paths = sets.eurosat(tmp_path / "eurosat/2750")
    index = opened("eurosat", tmp_path)
    assert index.classes == ("AnnualCrop", "Forest", "SeaLake")
    assert sorted(found(index).images) == sorted(paths)
    # 810 of 2000, as large a share of 10, 20 and 40 images, are the test set.
    assert np.bincount(index.labels[index.split == 1]).tolist() == [4, 8, 16]
    assert np.bincount(index.labels[index.split == 0]).tolist() == [6, 12, 24]
    assert any("drawn by seed 22" in notice for notice in index.notices)
    (stored,) = (cache_dir() / "transfer").glob("eurosat-split-*.json")
    test = json.loads(stored.read_text())["test"]
    assert sorted(test) == sorted(path for path, (_, test) in found(index).images.items() if test)
    # What was stored is what counts, from then on; without it, or where it is damaged, the same split is drawn again.
    changed = [*test[1:], next(path for path in paths if path not in test)]
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"test": changed}))
    assert sorted(path for path, (_, test) in found(opened("eurosat", tmp_path)).images.items() if test) == sorted(
        changed
    )
    for damaged in ("", "[]", '{"images": 1}', None):
        if damaged is None:
            shutil.rmtree(cache_dir())
        else:
            stored.write_text(damaged)
        assert found(opened("eurosat", tmp_path)) == found(index)
    # Another copy, elsewhere and read in another order, has the same split.
    shutil.copytree(tmp_path / "eurosat", tmp_path / "more/eurosat")
    shutil.move(tmp_path / "more/eurosat/2750", tmp_path / "more/eurosat/EuroSAT_RGB")
    assert found(opened("eurosat", tmp_path / "more")) == found(index)


def test_eurosat_draws_810_of_each_class() -> None:
    counts = (2000, 2500, 3000)
    names = [f"c{label}/{number}.jpg" for label, count in enumerate(counts) for number in range(count)]
    test = eurosat.draw(names)
    assert [sum(name.startswith(f"c{label}/") for name in test) for label in range(3)] == [810, 810, 810]
    assert eurosat.draw([names[row] for row in np.random.default_rng(0).permutation(len(names))]) == test
    # Known values: they must not change with a version of anything.
    assert sorted(name for name in test if name[:2] == "c0")[:4] == [f"c0/{n}.jpg" for n in (100, 1000, 1002, 1004)]
    # About as many of each tenth of the names: a shuffle, not the first ones.
    tenths = np.bincount([int(name[3:-4]) // 300 for name in test if name.startswith("c2/")], minlength=10)
    assert tenths.min() > 50


@pytest.mark.parametrize("count", [3, 10, 37, 1999, 2000, 2500])
def test_one_image_more_or_less_moves_at_most_one_of_eurosat(count: int) -> None:
    names = [f"River/River_{number}.jpg" for number in range(count)]
    test = eurosat.draw(names)
    for place in {0, 1, count // 2, count - 1}:
        less = eurosat.draw(names[:place] + names[place + 1 :])
        assert len((test ^ less) - {names[place]}) <= 1
    # Other classes have no say in it.
    assert {name for name in eurosat.draw([*names, "Forest/1.jpg", "Forest/2.jpg"]) if name[0] == "R"} == test


def test_eurosat_leaves_other_folders_out(tmp_path: Path) -> None:
    sets.eurosat(tmp_path / "eurosat/EuroSAT/2750")
    whole = opened("eurosat", tmp_path)
    sets.draw(tmp_path / "eurosat/EuroSAT/2750", ["__MACOSX/._x.jpg", "__MACOSX/x.jpg", "Tundra/x.jpg"])
    index = opened("eurosat", tmp_path)
    assert found(index) == found(whole)
    assert "EuroSAT: folders that are no class of it are left out: classes 'Tundra', '__MACOSX'" in index.notices
    assert not any("left out" in notice for notice in whole.notices)


def test_eurosat_with_a_split_of_ones_own(tmp_path: Path) -> None:
    paths = sets.eurosat(tmp_path / "eurosat/2750")
    own = tmp_path / "eurosat/split.json"
    own.write_text(json.dumps({"test": [paths[0], paths[12], paths[69]]}))
    index = opened("eurosat", tmp_path)
    assert {path for path, (_, test) in found(index).images.items() if test} == {paths[0], paths[12], paths[69]}
    assert any("that of split.json" in notice for notice in index.notices)
    for content, fault in (
        ({"test": ["Forest/Forest_999.jpg"]}, r"it names 'Forest/Forest_999\.jpg', which is not there"),
        ({"test": ["../x.jpg"]}, "must name images below its folder"),
        ({"train": []}, "no 'test'"),
        ({"test": [3]}, "must be the official file"),
        ([], "must hold an object, got a list"),
        ({"test": []}, "must have test images, got none"),
    ):
        own.write_text(json.dumps(content))
        with pytest.raises(FastrexError, match=fault):
            opened("eurosat", tmp_path)


def test_wrong_layouts_say_what_is_expected_and_found(tmp_path: Path) -> None:
    """Of every set: a folder with something else in it."""
    for known in catalog.SETS:
        (tmp_path / known.folder / "Readme").mkdir(parents=True, exist_ok=True)
        (tmp_path / known.folder / "notes.txt").touch()
    wanted = {
        "aircraft": "images, variants.txt, images_variant_trainval.txt, images_variant_test.txt",
        "cars196": "cars_annos.mat, car_ims, or devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_train",
        "dtd": "images, labels/train1.txt, labels/val1.txt, labels/test1.txt",
        "eurosat": "AnnualCrop and the other class folders, or 2750",
        "flowers102": "jpg, setid.mat, imagelabels.mat",
        "pets": "images, annotations/trainval.txt, annotations/test.txt",
        "food101": "images, meta/train.txt, meta/test.txt",
        "sun397": "SUN397 (a/ to z/) and, there or in Partitions, ClassName.txt, Training_01.txt, Testing_01.txt",
        "inat2018": "train2018.json, val2018.json, train_val2018",
        "inat2019": "train2019.json, val2019.json, train_val2019",
        "in1k": "train, val",
    } | dict.fromkeys(catalog.COG, "cog_levels_mapping_file.pkl, cog_concepts_split_file.pkl")
    assert wanted.keys() == catalog.BY_NAME.keys()
    for name, names in wanted.items():
        message = refusal(name, tmp_path)
        folder = tmp_path / catalog.BY_NAME[name].folder
        assert message.startswith(f"transfer: {str(folder)!r} must hold {names}"), message
        assert message.endswith("got 'Readme/', 'notes.txt'; unpack the official archives there"), message


def test_half_unpacked_archive_is_looked_at_inside(tmp_path: Path) -> None:
    sets.dtd(tmp_path / "dtd/dtd")
    shutil.rmtree(tmp_path / "dtd/dtd/labels")
    assert f"{str(tmp_path / 'dtd/dtd')!r} must hold images, labels/train1.txt" in refusal("dtd", tmp_path)
    assert "got 'images/'; unpack" in refusal("dtd", tmp_path)


# No annotation names the images of ImageNet.
@pytest.mark.parametrize(("name", "top", "writer"), [layout for layout in LAYOUTS if layout[0] != "in1k"])
def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path, name: str, top: str, writer: Writer) -> None:
    images = sorted(writer(tmp_path / name / top).images)
    for path in images[:2]:
        next((tmp_path / name / top).rglob(path)).unlink()
    message = refusal(name, tmp_path)
    assert "got 2 missing, the first" in message
    assert any(repr(path) in message for path in images[:2])


def test_missing_sets(tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    for known in catalog.SETS:
        (task,) = tasks([known.name], tmp_path)
        with pytest.raises(MissingSet, match=f"^transfer: {known.name} must be there, got (no|an empty) '") as caught:
            open_task(task)
        assert caught.value.get == known.get
        assert str(caught.value).endswith(f"; get {known.get}")
    with pytest.raises(MissingSet, match=r"mine must be there, got no '.*nowhere'; check the path"):
        open_task(Task("mine", tmp_path / "nowhere", None))
    with pytest.raises(MissingSet, match="pets must be there, got no place"):
        open_task(Task("pets", None, catalog.BY_NAME["pets"]))


def test_annotations_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(sets.jpeg(0))
    sets.dtd(tmp_path / "dtd")
    for line in ("../../../secret.jpg", "/secret.jpg", "banded/../../../../secret.jpg"):
        sets.write(tmp_path / "dtd/labels/val1.txt", line)
        assert f"must name images below its folder, got 'images/{line}'" in refusal("dtd", tmp_path)
    sets.sun397(tmp_path / "sun397")
    sets.write(tmp_path / "sun397/ClassName.txt", "/a/abbey", "../b")
    sets.write(tmp_path / "sun397/Partitions/Training_01.txt", "../b/secret.jpg")
    sets.write(tmp_path / "sun397/Partitions/Testing_01.txt", "/a/abbey/sun_b.jpg")
    assert "must name images below its folder, got '../b/secret.jpg'" in refusal("sun397", tmp_path)
    sets.inat(tmp_path / "inat2019", 2019)
    path = tmp_path / "inat2019/train2019.json"
    path.write_text(path.read_text().replace("train_val2019/Plants/5/train.jpg", str(tmp_path / "secret.jpg")))
    assert "must name images below its folder" in refusal("inat2019", tmp_path)
    sets.cars_kit(tmp_path / "cars196")
    kinds = [("class", "O"), ("fname", "O")]
    rows = np.array([[(1, "../../../secret.jpg")]], kinds)
    savemat(tmp_path / "cars196/devkit/cars_train_annos.mat", {"annotations": rows})
    assert "must name images below its folder" in refusal("cars196", tmp_path)


def test_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cog").touch()
    assert refusal("cog-l2", tmp_path).endswith(
        "must be the folder of CoG L2, got a file; unpack the official archives there"
    )


def test_odd_annotations(tmp_path: Path) -> None:
    sets.aircraft(tmp_path / "aircraft")
    path = tmp_path / "aircraft/images_variant_test.txt"
    for text, fault in (
        ("0062765 747-400\n", "must name known classes, got '747-400'"),
        ("0062765\n", "must have 2 words in each line, got 1 in line 1"),
        ("", "must have test images, got none"),
        ("0034309 F/A-18\n", "must give each image one class and split, got two for 'images/0034309.jpg'"),
        ("\0 F/A-18\n", "must name image files"),
        (f"{'x' * 5000} F/A-18\n", "must name image files"),
    ):
        path.write_text(text)
        assert fault in refusal("aircraft", tmp_path)
    path.write_bytes(b"\xff\xfe")
    assert "must be the official file" in refusal("aircraft", tmp_path)
    path.write_text("0062765 Tu-154\n" * 3)
    assert opened("aircraft", tmp_path).notices[0] == "images_variant_trainval.txt names 2 images twice"
    path.unlink()
    path.mkdir()
    assert "give a file" in refusal("aircraft", tmp_path)
    sets.write(tmp_path / "aircraft/variants.txt", "Tu-154", "Tu-154")
    assert "must name each class once" in refusal("aircraft", tmp_path)
    sets.pets(tmp_path / "pets")
    sets.write(tmp_path / "pets/annotations/test.txt", "Birman_1 1 1 1")
    assert "must give a breed one number, got 1 for 'Abyssinian' and 'Birman'" in refusal("pets", tmp_path)
    sets.write(tmp_path / "pets/annotations/test.txt", "Birman_1 x 1 1")
    assert "must be the official file" in refusal("pets", tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"images": [{"id": 1}]}, "no 'file_name'"),
        ({"images": 3}, "must be the official file"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "two images have the same id"),
        ({"annotations": []}, "3 images have no category"),
        ({"annotations": [{"image_id": 100, "category_id": 3}]}, "image 100 of category 3, which is not there"),
        ({"annotations": [{"image_id": 7, "category_id": 5}]}, "image 7 of category 5, which is not there"),
        ({"categories": [{"id": "5"}]}, "a category must have an id of its own"),
        ({"categories": [5]}, "must be the official file"),
        ({"categories": None}, "must be the official file"),
    ],
)
def test_odd_json(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    sets.inat(tmp_path / "inat2018", 2018)
    path = tmp_path / "inat2018/train2018.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert fault in refusal("inat2018", tmp_path)


def test_damaged_and_hostile_matlab_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets.flowers102(tmp_path / "flowers102")
    path = tmp_path / "flowers102/setid.mat"
    good = path.read_bytes()

    def wrong(content: bytes) -> str:
        path.write_bytes(content)
        message = refusal("flowers102", tmp_path)
        assert message.startswith(f"transfer: {str(path)!r} must be the official")
        assert message.endswith("get it again")
        return message

    assert "it is no MATLAB 5 file" in wrong(b"")
    assert "it is no MATLAB 5 file" in wrong(b"<html>" * 100)
    assert "it has no variable trnid" in wrong(good[:128])
    rng = np.random.default_rng(0)
    for end in rng.integers(129, len(good) - 1, 20):
        wrong(good[:end])
    ids = {"trnid": [[1]], "valid": [[2]], "tstid": [[9]]}
    savemat(path, {name: np.array(value) for name, value in ids.items()})
    assert "image 9 of 8" in wrong(path.read_bytes())
    savemat(path, {"trnid": np.array([["x"]]), "valid": np.array([[1]]), "tstid": np.array([[1]])})
    assert "must be the official" in wrong(path.read_bytes())
    labels = tmp_path / "flowers102/imagelabels.mat"
    for value in (1e300, np.inf, np.nan, 9, [[1, 9]]):
        savemat(labels, {"labels": np.array(value)})
        assert f"transfer: {str(labels)!r} must be the official file" in refusal("flowers102", tmp_path)
    savemat(path, {"trnid": np.zeros((1, 1 << 20))}, do_compression=True)
    assert path.stat().st_size < 1 << 16
    monkeypatch.setattr(matlab, "UNFOLDED_LIMIT", 1 << 20)
    assert "unfolds to more than 1048576 bytes" in wrong(path.read_bytes())
    nested: object = 1
    for _ in range(40):
        nested = np.array([[nested]], object)
        box = np.empty((1, 1), object)
        box[0, 0] = nested
        nested = box
    for packed in (False, True):
        savemat(path, {"trnid": nested}, do_compression=packed)
        assert "nested more than 16 deep" in wrong(path.read_bytes())


def matlab_element(kind: int, body: bytes) -> bytes:
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def matlab_file(path: Path, kind: int, shape: bytes, rest: bytes, of_shape: int = 5) -> Path:
    """One packed variable x, of class ``kind``."""
    parts = [(6, bytes([kind, *[0] * 7])), (of_shape, shape), (1, b"x")]
    whole = zlib.compress(matlab_element(14, b"".join(matlab_element(*part) for part in parts) + rest))
    path.write_bytes(b" " * 124 + b"\0\1IM" + struct.pack("<II", 15, len(whole)) + whole)
    return path


def test_small_matlab_files_that_would_be_large(tmp_path: Path) -> None:
    def refused(kind: int, shape: bytes, rest: bytes, of_shape: int = 5) -> str:
        with pytest.raises(FastrexError, match="must be the official MATLAB file") as caught:
            matlab.variables(matlab_file(tmp_path / "x.mat", kind, shape, rest, of_shape), "x")
        assert (tmp_path / "x.mat").stat().st_size < 1 << 15
        return str(caught.value)

    cell, count = matlab_element(14, b""), 1_000_001
    good = matlab.variables(matlab_file(tmp_path / "x.mat", 1, struct.pack("<2i", 1, 3), cell * 3), "x")["x"]
    assert [len(value) for value in good] == [0, 0, 0]
    assert "more than 1000000 cells" in refused(1, struct.pack("<2i", 1, count), cell * count)
    # In parts as well.
    half = [(6, bytes([1, *[0] * 7])), (5, struct.pack("<2i", 1, count // 2)), (1, b"")]
    part = matlab_element(14, b"".join(matlab_element(*element) for element in half) + cell * (count // 2))
    assert "more than 1000000 cells" in refused(1, struct.pack("<2i", 1, 3), part * 3)
    names = matlab_element(5, struct.pack("<i", 1)) + matlab_element(1, b"a" * 257)
    assert "more than 256 fields" in refused(2, struct.pack("<2i", 1, 1), names)
    for numbers in ((1.0, 2.0), (1e-40, 2.0)):
        assert "impossible shape" in refused(1, struct.pack("<2f", *numbers), cell * 2, of_shape=7)


def test_matlab_files_are_read_as_scipy_reads_them(tmp_path: Path) -> None:
    """Kinds of numbers, words and cells, packed and not; the numbers column by column."""
    record = np.zeros(2, [("name", "O"), ("size", "O")])
    record[0], record[1] = ("ä☃", [1.5, -2.0]), ("", 7)
    content = {
        "bytes": np.array([[1, 255]], np.uint8),
        "short": np.array([[-3, 300]], np.int16),
        "long": np.array([[2**40]], np.int64),
        "grid": np.arange(6.0).reshape(2, 3),
        "none": np.zeros((0, 0)),
        "flag": np.array([[True, False]]),
        "word": "a word",
        "cells": np.array([["a", np.array([[1, 2]])]], object),
        "record": record.reshape(1, 2),
    }
    for packed in (False, True):
        savemat(tmp_path / "x.mat", content, do_compression=packed)
        found = matlab.variables(tmp_path / "x.mat", *content)
        theirs = loadmat(tmp_path / "x.mat")
        for name in ("bytes", "short", "long", "grid", "none", "flag"):
            assert found[name].tolist() == theirs[name].ravel(order="F").tolist(), name
        assert (found["word"], found["cells"][0], found["cells"][1].tolist()) == ("a word", "a", [1, 2])
        assert [row["name"] for row in found["record"]] == ["ä☃", ""]
        assert [row["size"].tolist() for row in found["record"]] == [[1.5, -2.0], [7]]


def test_no_change_of_a_matlab_file_does_harm(tmp_path: Path) -> None:
    """A few thousand of these changes made scipy's reader end the process."""
    sets.cars_whole(tmp_path)
    good = (tmp_path / "cars_annos.mat").read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(1500):
        changed = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(120, len(good))] = rng.choice((0, 1, 2, 14, 15, 127, 255, rng.randrange(256)))
        (tmp_path / "x.mat").write_bytes(changed)
        try:
            matlab.variables(tmp_path / "x.mat", "annotations", "class_names")
        except FastrexError as error:
            messages.append(str(error))
    assert 500 < len(messages) < 1500
    assert all("\n" not in message and message.endswith("get it again") for message in messages)


def test_the_index_is_stored_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets.dtd(tmp_path / "dtd")
    looked: list[int] = []
    first = open_task(tasks(["dtd"], tmp_path)[0], progress=lambda done, of: looked.append(done))
    assert looked == [7]
    (stored,) = (cache_dir() / "transfer").glob("dtd-*.npz")
    again = open_task(tasks(["dtd"], tmp_path)[0], progress=lambda done, of: looked.append(done))
    assert (looked, again.fingerprint, again.notices) == ([7], first.fingerprint, first.notices)
    # An image moves from trainval to test: another list, so another index.
    sets.write(tmp_path / "dtd/labels/val1.txt", "dotted/dotted_0003.jpg")
    sets.draw(tmp_path / "dtd/images", ["dotted/dotted_0003.jpg"])
    assert open_task(tasks(["dtd"], tmp_path)[0]).fingerprint != first.fingerprint
    stored.write_bytes(b"damaged")
    assert len(open_task(tasks(["dtd"], tmp_path)[0])) == 7
    # Two copies do not share an index.
    sets.dtd(tmp_path / "more/dtd")
    assert open_task(tasks(["dtd"], tmp_path / "more")[0]).root == tmp_path / "more/dtd"
    assert len(list((cache_dir() / "transfer").glob("dtd-*.npz"))) == 2


def test_broken_images_and_classes_without_any(tmp_path: Path) -> None:
    sets.dtd(tmp_path / "dtd")
    (tmp_path / "dtd/images/dotted/dotted_0002.jpg").write_bytes(b"no image")
    index = opened("dtd", tmp_path)
    assert index.classes == ("banded", "zigzagged")
    assert any("without a readable training image, so left out: class 'dotted'" in notice for notice in index.notices)
    assert opened("dtd", tmp_path).notices == index.notices
    for path in ("banded/banded_0007.jpg", "zigzagged/zigzagged_0007.jpg"):
        (tmp_path / "dtd/images" / path).write_bytes(b"")
    shutil.rmtree(cache_dir())
    assert "must have readable test images, got none" in refusal("dtd", tmp_path)


def test_tasks(tmp_path: Path) -> None:
    assert [task.name for task in tasks(["pets", "small"], tmp_path)] == [
        "pets",
        *(n for n in catalog.SMALL if n != "pets"),
    ]
    everything = tasks(["all", "cog"], tmp_path)
    assert [task.name for task in everything] == [known.name for known in catalog.SETS]
    assert everything[8].path == everything[12].path == tmp_path / "cog"
    assert everything[15].path == tmp_path / "in1k"
    assert tasks(["mine=/data/a=b"], None) == [Task("mine", Path("/data/a=b"), None)]
    assert tasks(["pets=/data/p"], tmp_path) == [Task("pets", Path("/data/p"), catalog.BY_NAME["pets"])]
    assert [task.path for task in tasks(["cog=/c"], None)] == [Path("/c")] * 5
    # A place of its own goes before the group's, in whichever order they are named.
    for words in (["inat", "inat2018=/i"], ["inat2018=/i", "inat"]):
        assert {task.name: task.path for task in tasks(words, tmp_path)} == {
            "inat2018": Path("/i"),
            "inat2019": tmp_path / "inat2019",
        }


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["aircrafts"], "'aircrafts' must be a known data set or NAME=PATH, got neither; did you mean aircraft"),
        (["CoG-L1"], "did you mean cog-l1"),
        (["/data/mine"], "known are small, cog, inat, all, aircraft"),
        ([], "must name a data set, got none"),
        (["mine="], "mine must have a place, got nothing behind the ="),
        (["=/data"], "must begin with the name of one data set"),
        (["small=/data"], "must begin with the name of one data set"),
        (["../x=/data"], "must begin with the name of one data set"),
        (["a=/x", "a=/y"], "a must have one place, got '/x' and '/y'"),
        (["Pets=/data/pets"], "'Pets' must be written as the data set is, got other letters; did you mean pets=?"),
        (["SUN397=/data"], "did you mean sun397=?"),
        (["CoG=/data"], "did you mean cog=?"),
    ],
)
def test_wrong_words(tmp_path: Path, words: list[str], fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        tasks(words, tmp_path)
    assert str(caught.value).startswith("--sets")
    assert fault in str(caught.value)


def test_official_names_need_a_root() -> None:
    with pytest.raises(UsageError, match="small must have a place, got no --root"):
        tasks(["small"], None)


def test_catalog_adds_up() -> None:
    assert (len(catalog.SMALL), len(catalog.COG), len(catalog.INAT), len(catalog.SETS)) == (8, 5, 2, 16)
    assert {known.name for known in catalog.SETS if known.large} == {*catalog.COG, *catalog.INAT, "in1k"}
    assert len({known.title for known in catalog.SETS}) == 16


def test_folders_of_ones_own(tmp_path: Path) -> None:
    write_stripes(tmp_path / "both/train", 4, seed=0)
    write_stripes(tmp_path / "both/val", 2, seed=1)
    index = open_task(tasks([f"mine={tmp_path / 'both'}"], None)[0])
    assert (len(index.rows("train", 0.0)), len(index.rows("val", 0.0)), index.notices) == (16, 8, ())
    assert not index.split[index.rows("train", 0.0)].any()
    shutil.move(tmp_path / "both/val", tmp_path / "both/test")
    index = open_task(tasks([f"mine={tmp_path / 'both'}"], None)[0])
    assert (len(index.rows("train", 0.0)), len(index.rows("val", 0.0))) == (16, 8)
    assert (tmp_path / "both/train").is_dir()
    assert not (tmp_path / "both/.fastrex").exists()


def test_list_of_ones_own(tmp_path: Path) -> None:
    """And one without splits, of which a part is held out."""
    sets.draw(tmp_path, [f"{name}/{number}.jpg" for name in "ab" for number in range(10)])
    rows = [(f"{name}/{number}.jpg", name, "test" if number > 6 else "train") for name in "ab" for number in range(10)]
    sets.write(tmp_path / "mine.csv", "path,label,split", *map(",".join, rows))
    index = open_task(Task("mine", tmp_path / "mine.csv", None))
    assert found(index).images == {path: (label, split == "test") for path, label, split in rows}
    sets.write(tmp_path / "alone.csv", "path,label", *(",".join(row[:2]) for row in rows))
    index = open_task(Task("alone", tmp_path / "alone.csv", None))
    assert np.bincount(index.labels[index.split == 1]).tolist() == [1, 1]


def test_folder_without_a_test_set_holds_a_tenth_out(tmp_path: Path) -> None:
    write_stripes(tmp_path / "alone", 20, seed=0)
    from fastrex.data.index import open_or_build

    usual = open_or_build(tmp_path / "alone")
    index = open_task(Task("alone", tmp_path / "alone", None))
    assert np.bincount(index.labels[index.split == 1]).tolist() == [2] * 4
    for share in (0.0, 0.1, 0.5):
        assert index.split[index.rows("val", share)].tolist() == [1] * 8
        assert index.split[index.rows("train", share)].tolist() == [0] * 72
    held = {usual.name(int(row)) for row in usual.rows("val", 0.1)}
    assert {index.name(int(row)) for row in index.rows("val", 0.0)} == held
    assert any("10% of each class" in notice for notice in index.notices)
    assert index.fingerprint != usual.fingerprint
    for row in (0, 40, 79):
        assert index.name(row).split("/")[0] == index.classes[index.labels[row]]


def test_wrong_folders_of_ones_own(tmp_path: Path) -> None:
    for class_name in "ab":
        sets.draw(tmp_path / "few", [f"{class_name}/1.jpg"])
    with pytest.raises(FastrexError, match="must have a class of two images to hold one out"):
        open_task(Task("few", tmp_path / "few", None))
    sets.draw(tmp_path / "flat", ["1.jpg"])
    with pytest.raises(FastrexError, match="no class folders, 1 images directly in it"):
        open_task(Task("flat", tmp_path / "flat", None))
    sets.draw(tmp_path / "bad", ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"])
    (tmp_path / "bad/val/a/1.jpg").write_bytes(b"")
    with pytest.raises(FastrexError, match="must have readable test images"):
        open_task(Task("bad", tmp_path / "bad", None))


def test_images_of_a_set_are_decoded_in_order(tmp_path: Path) -> None:
    """The whole way: official layout, index, loader; each image has the colour that was written."""
    sets.sun397(tmp_path / "sun397")
    index = opened("sun397", tmp_path)
    rows = index.rows("val", 0.0)
    data = replace(DataConfig(), eval_resize=16, eval_size=16)
    loader = EvalLoader(index, rows, data, batch_size=2, device=torch.device("cpu"), dtype=torch.float32)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    seen = []
    for images, target, numbers in loader:
        for image, label, row in zip(images, target.tolist(), numbers.tolist(), strict=True):
            name = index.name(row)
            seed = list(sets_order(tmp_path)).index(name)
            colour = (image.mean((1, 2)) * std + mean) * 255
            wanted = torch.tensor([seed * 37 % 256, seed * 91 % 256, seed * 53 % 256], dtype=torch.float32)
            assert torch.allclose(colour, wanted, atol=4), name
            assert name.startswith(index.classes[label] + "/")
            seen.append(row)
    assert seen == rows.tolist()


def sets_order(tmp_path: Path) -> dict[str, tuple[str, bool]]:
    return sets.sun397(tmp_path / "again").images
