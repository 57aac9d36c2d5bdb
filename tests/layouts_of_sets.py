"""Miniature copies of the official data sets: the files and folders that their archives unpack to, three classes each.

Every writer returns what a reader must find: the classes in the protocol's order, and for each image path its class and
whether it is a test image. That is written down here by hand, not worked out from what the writer writes.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat


@dataclass(frozen=True)
class Expected:
    """``images``: path below the folder of the images -> (class, test)."""

    classes: tuple[str, ...]
    images: dict[str, tuple[str, bool]]


def jpeg(seed: int) -> bytes:
    """A picture 24 high and 32 wide, another for every seed."""
    buffer = io.BytesIO()
    pixels = np.full((24, 32, 3), np.array([seed * 37 % 256, seed * 91 % 256, seed * 53 % 256], np.uint8))
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def draw(root: Path, paths: Iterable[str]) -> None:
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpeg(seed))


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def expected(classes: Iterable[str], train: dict[str, str], test: dict[str, str]) -> Expected:
    images = {path: (name, False) for path, name in train.items()} | {path: (name, True) for path, name in test.items()}
    return Expected(tuple(classes), images)


def aircraft(root: Path) -> Expected:
    """Variants in an order of their own, one of them with a slash and one with spaces."""
    write(root / "variants.txt", "Tu-154", "F/A-18", "Model B200")
    write(root / "images_variant_trainval.txt", "0034309 F/A-18", "0034310 Model B200", "1025794 Tu-154")
    write(root / "images_variant_test.txt", "0062765 Tu-154", "0062766 F/A-18", "0062767 Model B200")
    found = expected(
        ["Tu-154", "F/A-18", "Model B200"],
        {"images/0034309.jpg": "F/A-18", "images/0034310.jpg": "Model B200", "images/1025794.jpg": "Tu-154"},
        {"images/0062765.jpg": "Tu-154", "images/0062766.jpg": "F/A-18", "images/0062767.jpg": "Model B200"},
    )
    draw(root, found.images)
    return found


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]


def cars_whole(root: Path) -> Expected:
    """The one file of 16,185 annotations: first training and test images, as in the official one, in any order."""
    kinds = [("relative_im_path", "O"), *((f"bbox_{end}", "O") for end in ("x1", "y1", "x2", "y2"))]
    annotations = np.zeros(6, [*kinds, ("class", "O"), ("test", "O")])
    for row, (number, test) in enumerate([(3, 0), (1, 0), (2, 0), (2, 1), (3, 1), (1, 1)]):
        annotations[row] = (f"car_ims/{row + 1:06d}.jpg", 1, 2, 30, 20, number, test)
    root.mkdir(parents=True, exist_ok=True)
    names = np.array([CARS], object)
    savemat(root / "cars_annos.mat", {"annotations": annotations.reshape(1, -1), "class_names": names})
    found = expected(
        CARS,
        {"car_ims/000001.jpg": CARS[2], "car_ims/000002.jpg": CARS[0], "car_ims/000003.jpg": CARS[1]},
        {"car_ims/000004.jpg": CARS[1], "car_ims/000005.jpg": CARS[2], "car_ims/000006.jpg": CARS[0]},
    )
    draw(root, found.images)
    return found


def cars_kit(
    root: Path, labelled: str = "cars_test_annos_withlabels.mat", kit: str = "devkit", doubled: bool = False
) -> Expected:
    """``kit``: the folder of the development kit; ``doubled``: images in folders within folders of the same names."""
    (root / kit).mkdir(parents=True)
    savemat(root / kit / "cars_meta.mat", {"class_names": np.array([CARS], object)})
    kinds = [*((f"bbox_{end}", "O") for end in ("x1", "y1", "x2", "y2")), ("class", "O"), ("fname", "O")]
    for name, numbers in ((f"{kit}/cars_train_annos.mat", (2, 3, 1)), (labelled, (1, 2, 3))):
        annotations = np.zeros(3, kinds)
        for row, number in enumerate(numbers):
            annotations[row] = (1, 2, 30, 20, number, f"{row + 1:05d}.jpg")
        savemat(root / name, {"annotations": annotations.reshape(1, -1)})
    train, test = ("cars_train/cars_train", "cars_test/cars_test") if doubled else ("cars_train", "cars_test")
    found = expected(
        CARS,
        {f"{train}/00001.jpg": CARS[1], f"{train}/00002.jpg": CARS[2], f"{train}/00003.jpg": CARS[0]},
        {f"{test}/00001.jpg": CARS[0], f"{test}/00002.jpg": CARS[1], f"{test}/00003.jpg": CARS[2]},
    )
    draw(root, found.images)
    return found


def dtd(root: Path) -> Expected:
    """Training and validation images are one; split 2, with others, must not be looked at."""
    write(
        root / "labels/train1.txt", "zigzagged/zigzagged_0002.jpg", "banded/banded_0002.jpg", "dotted/dotted_0002.jpg"
    )
    write(root / "labels/val1.txt", "banded/banded_0005.jpg")
    write(root / "labels/test1.txt", "dotted/dotted_0007.jpg", "banded/banded_0007.jpg", "zigzagged/zigzagged_0007.jpg")
    write(root / "labels/train2.txt", "dotted/dotted_0007.jpg")
    found = expected(
        ["banded", "dotted", "zigzagged"],
        {
            "images/banded/banded_0002.jpg": "banded",
            "images/banded/banded_0005.jpg": "banded",
            "images/dotted/dotted_0002.jpg": "dotted",
            "images/zigzagged/zigzagged_0002.jpg": "zigzagged",
        },
        {
            "images/banded/banded_0007.jpg": "banded",
            "images/dotted/dotted_0007.jpg": "dotted",
            "images/zigzagged/zigzagged_0007.jpg": "zigzagged",
        },
    )
    draw(root, found.images)
    return found


def eurosat(root: Path, counts: tuple[int, ...] = (10, 20, 40)) -> list[str]:
    """The class folders; returns the images, whose split the reader draws."""
    paths = [
        f"{name}/{name}_{number}.jpg"
        for name, count in zip(("AnnualCrop", "Forest", "SeaLake"), counts, strict=True)
        for number in range(1, count + 1)
    ]
    draw(root, paths)
    return paths


def flowers102(root: Path) -> Expected:
    root.mkdir(parents=True, exist_ok=True)
    savemat(root / "imagelabels.mat", {"labels": np.array([[3, 1, 2, 2, 3, 1, 1, 2]], np.uint8)})
    sets = {"trnid": [[2, 3, 5]], "valid": [[6]], "tstid": [[1, 4, 7]]}
    savemat(root / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in sets.items()})
    found = expected(
        ["1", "2", "3"],
        {
            "jpg/image_00002.jpg": "1",
            "jpg/image_00003.jpg": "2",
            "jpg/image_00005.jpg": "3",
            "jpg/image_00006.jpg": "1",
        },
        {"jpg/image_00001.jpg": "3", "jpg/image_00004.jpg": "2", "jpg/image_00007.jpg": "1"},
    )
    draw(root, [*found.images, "jpg/image_00008.jpg"])
    return found


def pets(root: Path) -> Expected:
    """Breeds of several words; the numbers, not the names, give the labels."""
    write(root / "annotations/list.txt", "#Image CLASS-ID SPECIES BREED ID", "Abyssinian_1 1 1 1")
    write(
        root / "annotations/trainval.txt",
        "Abyssinian_100 1 1 1",
        "yorkshire_terrier_12 3 2 2",
        "american_bulldog_7 2 2 1",
    )
    write(
        root / "annotations/test.txt", "yorkshire_terrier_1 3 2 2", "american_bulldog_201 2 2 1", "Abyssinian_201 1 1 1"
    )
    found = expected(
        ["Abyssinian", "american bulldog", "yorkshire terrier"],
        {
            "images/Abyssinian_100.jpg": "Abyssinian",
            "images/american_bulldog_7.jpg": "american bulldog",
            "images/yorkshire_terrier_12.jpg": "yorkshire terrier",
        },
        {
            "images/Abyssinian_201.jpg": "Abyssinian",
            "images/american_bulldog_201.jpg": "american bulldog",
            "images/yorkshire_terrier_1.jpg": "yorkshire terrier",
        },
    )
    draw(root, found.images)
    return found


def food101(root: Path) -> Expected:
    write(root / "meta/classes.txt", "apple_pie", "tacos", "waffles")
    write(root / "meta/train.txt", "waffles/10", "apple_pie/1005649", "tacos/3")
    write(root / "meta/test.txt", "apple_pie/1011328", "tacos/4", "waffles/11")
    train = {"apple_pie": ["apple_pie/1005649"], "tacos": ["tacos/3"], "waffles": ["waffles/10"]}
    test = {"apple_pie": ["apple_pie/1011328"], "tacos": ["tacos/4"], "waffles": ["waffles/11"]}
    write(root / "meta/train.json", json.dumps(train))
    write(root / "meta/test.json", json.dumps(test))
    found = expected(
        ["apple_pie", "tacos", "waffles"],
        {
            "images/apple_pie/1005649.jpg": "apple_pie",
            "images/tacos/3.jpg": "tacos",
            "images/waffles/10.jpg": "waffles",
        },
        {
            "images/apple_pie/1011328.jpg": "apple_pie",
            "images/tacos/4.jpg": "tacos",
            "images/waffles/11.jpg": "waffles",
        },
    )
    draw(root, found.images)
    return found


def sun397(root: Path, texts: str = "Partitions", images: str = "") -> Expected:
    """Lines with a leading slash; one class in a folder of three levels, and not in alphabetical order. ``texts`` and
    ``images``: where below ``root`` the two archives were unpacked."""
    folder = root / texts
    write(folder / "ClassName.txt", "/a/abbey", "/b/balcony/interior", "/b/balcony/exterior")
    write(root / images / "ClassName.txt", "/a/abbey", "/b/balcony/interior", "/b/balcony/exterior")
    write(
        folder / "Training_01.txt",
        "/b/balcony/interior/sun_a.jpg",
        "/a/abbey/sun_aaalbzqrimafwbiv.jpg",
        "/b/balcony/exterior/sun_a.jpg",
    )
    write(
        folder / "Testing_01.txt",
        "/a/abbey/sun_b.jpg",
        "/b/balcony/exterior/sun_b.jpg",
        "/b/balcony/interior/sun_b.jpg",
    )
    write(folder / "Training_02.txt", "/a/abbey/sun_b.jpg")
    found = expected(
        ["a/abbey", "b/balcony/exterior", "b/balcony/interior"],
        {
            "a/abbey/sun_aaalbzqrimafwbiv.jpg": "a/abbey",
            "b/balcony/interior/sun_a.jpg": "b/balcony/interior",
            "b/balcony/exterior/sun_a.jpg": "b/balcony/exterior",
        },
        {
            "a/abbey/sun_b.jpg": "a/abbey",
            "b/balcony/exterior/sun_b.jpg": "b/balcony/exterior",
            "b/balcony/interior/sun_b.jpg": "b/balcony/interior",
        },
    )
    draw(root / images, found.images)
    return found


def inat(root: Path, year: int, named: bool = True) -> Expected:
    """Category ids in no order, two species of one name; ``named``: in the annotations, else in categories.json."""
    kingdom = {2018: "Plantae", 2019: "Plants"}[year]
    names = {5: "Iris", 2: "Rosa canina", 9: "Iris"}
    categories = [
        {"id": key, "supercategory": kingdom, "name": name if named else "obfuscated"} for key, name in names.items()
    ]
    for split, start, order in (("train", 100, (9, 2, 5)), ("val", 200, (2, 5, 9))):
        images = [
            {"id": start + i, "file_name": f"train_val{year}/{kingdom}/{key}/{split}.jpg", "width": 32, "height": 24}
            for i, key in enumerate(order)
        ]
        annotations = [{"id": i, "image_id": start + i, "category_id": key} for i, key in enumerate(order)]
        content = {"images": images, "annotations": annotations[::-1], "categories": categories}
        write(root / f"{split}{year}.json", json.dumps(content))
    if not named:
        write(root / "categories.json", json.dumps([{"id": key, "name": name} for key, name in names.items()]))
    classes = ["Rosa canina (2)", "Iris (5)", "Iris (9)"]
    found = expected(
        classes,
        {f"train_val{year}/{kingdom}/{key}/train.jpg": name for key, name in zip((2, 5, 9), classes, strict=True)},
        {f"train_val{year}/{kingdom}/{key}/val.jpg": name for key, name in zip((2, 5, 9), classes, strict=True)},
    )
    draw(root, found.images)
    return found


def imagenet(root: Path, val: str = "val") -> Expected:
    found = expected(
        ["n01440764", "n01443537", "n01484850"],
        {f"train/{name}/{name}_18.JPEG": name for name in ("n01440764", "n01443537", "n01484850")},
        {
            f"{val}/n01440764/ILSVRC2012_val_00000293.JPEG": "n01440764",
            f"{val}/n01443537/ILSVRC2012_val_00000236.JPEG": "n01443537",
            f"{val}/n01484850/ILSVRC2012_val_00002338.JPEG": "n01484850",
        },
    )
    draw(root, found.images)
    return found


def pickled(content: object, protocol: int = 4) -> bytes:
    return pickle.dumps(content, protocol)


def cog(root: Path, protocol: int = 4, kind: Any = np.str_, images: str = "imagenet21k") -> list[Expected]:
    """Five levels of three classes, none sorted; the paths have a leading slash, as numpy arrays of ``kind``."""
    levels = [[f"n{level}000000{number}" for number in (3, 1, 2)] for level in range(1, 6)]
    split = {
        name: {
            "train": np.array([f"/{name}/{name}_7.JPEG", f"/{name}/{name}_11.JPEG"], kind),
            "test": np.array([f"/{name}/{name}_100.JPEG"], kind),
        }
        for level in levels
        for name in level
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "cog_levels_mapping_file.pkl").write_bytes(pickled(levels, protocol))
    (root / "cog_concepts_split_file.pkl").write_bytes(pickled(split, protocol))
    found = []
    for number in range(1, 6):
        names = [f"n{number}0000001", f"n{number}0000002", f"n{number}0000003"]
        found.append(
            expected(
                names,
                {f"{name}/{name}_{image}.JPEG": name for name in names for image in (7, 11)},
                {f"{name}/{name}_100.JPEG": name for name in names},
            )
        )
        draw(root / images, found[-1].images)
    return found
