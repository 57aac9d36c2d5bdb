"""Seven of the small data sets, read as their official archives unpack (also where torchvision keeps them).

Each reader takes the folder of the set, or one that holds the archive's own top folder, and gives trainval as split 0
and test as split 1. Labels are in the order that the t-ReX protocol prescribes. Errors are those of
:mod:`.annotations`: what the folder must hold, and what it does hold.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..data.scan import Listing
from ..errors import FastrexError
from .annotations import (
    TEST,
    TRAINVAL,
    UNPACK,
    Row,
    contents,
    guarded,
    label_of,
    lines,
    listing,
    position,
    unpacked,
    words,
)
from .matlab import variables


def aircraft(place: Path) -> Listing:
    """FGVC-Aircraft 2013b, the 100 variants; labels in the order of variants.txt."""
    needed = ("images", "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt")
    root, _ = unpacked(place, ("data", "fgvc-aircraft-2013b/data"), needed)
    classes = lines(root / "variants.txt")
    labels = position(root / "variants.txt", classes)
    rows: list[Row] = []
    for split, name in ((TRAINVAL, "trainval"), (TEST, "test")):
        path = root / f"images_variant_{name}.txt"
        rows += [(f"images/{image}.jpg", label_of(path, labels, variant), split) for image, variant in words(path, 2)]
    return listing(root, root / "images_variant_trainval.txt", classes, rows)


WHOLE = ("cars_annos.mat", "car_ims")
LABELLED = "cars_test_annos_withlabels.mat"  # of the test images: came later, stands beside the kit or was put into it
KITS = tuple(
    (f"{kit}/cars_meta.mat", f"{kit}/cars_train_annos.mat", "cars_train", "cars_test", f"{beside}{LABELLED}")
    for kit in ("devkit", "car_devkit/devkit")
    for beside in ("", f"{kit}/")
)


def cars196(place: Path) -> Listing:
    """Stanford Cars: cars_annos.mat with car_ims/, or the newer development kit; labels as the annotations number them.
    The boxes are not used. Some copies have cars_train/ and cars_test/ inside folders of the same names."""
    root, number = unpacked(place, ("stanford_cars", "cars196", "car_devkit"), WHOLE, *KITS)
    if number == 0:
        path = root / "cars_annos.mat"
        found = variables(path, "annotations", "class_names")
        rows = guarded(
            path, lambda: [_car(row, row["relative_im_path"], _one(row["test"])) for row in found["annotations"]]
        )
        return listing(root, path, guarded(path, lambda: _texts(found["class_names"])), rows)
    meta, train, *folders, test = KITS[number - 1]
    names = variables(root / meta, "class_names")["class_names"]
    classes = guarded(root / meta, lambda: _texts(names))
    rows = []
    for split, folder, name in ((TRAINVAL, folders[0], train), (TEST, folders[1], test)):
        annotations = variables(root / name, "annotations")["annotations"]
        inner = f"{folder}/{folder}"
        images = inner if (root / inner).is_dir() else folder
        rows += guarded(root / name, partial(_kit, annotations, images, split))
    return listing(root, root / train, classes, rows)


def _kit(annotations: Any, folder: str, split: int) -> list[Row]:
    return [_car(row, f"{folder}/{row['fname']}", split) for row in annotations]


def _car(row: Any, path: Any, split: int) -> Row:
    if split not in (TRAINVAL, TEST):
        raise ValueError(f"an image is neither for training nor for the test but {split}")
    return _texts([path])[0], _one(row["class"]) - 1, split


def _texts(words: Any) -> list[str]:
    if not all(isinstance(word, str) for word in words):
        raise ValueError("there is something else where words must be")
    return list(words)


def _one(numbers: Any) -> int:
    if len(numbers) != 1 or numbers[0] != int(numbers[0]):
        raise ValueError("there is something else where a whole number must be")
    return int(numbers[0])


def dtd(place: Path) -> Listing:
    """Describable Textures, split 1 of 10: train1 and val1, test1; labels by sorted folder name."""
    names = {"labels/train1.txt": TRAINVAL, "labels/val1.txt": TRAINVAL, "labels/test1.txt": TEST}
    root, _ = unpacked(place, ("dtd", "dtd/dtd"), ("images", *names))
    named = [(image, split) for name, split in names.items() for image in lines(root / name)]
    return _by_folder(root, root / "labels/train1.txt", "images/", named)


def flowers102(place: Path) -> Listing:
    """Oxford Flowers: trnid and valid are trainval, tstid the test set; the classes have numbers only, from 1 on."""
    root, _ = unpacked(place, ("flowers-102", "flowers102"), ("jpg", "setid.mat", "imagelabels.mat"))
    sets = variables(root / "setid.mat", "trnid", "valid", "tstid")
    labels = variables(root / "imagelabels.mat", "labels")["labels"]

    def rows() -> list[Row]:
        found = []
        for name, split in (("trnid", TRAINVAL), ("valid", TRAINVAL), ("tstid", TEST)):
            for image in map(int, sets[name]):
                if not 1 <= image <= len(labels):
                    raise ValueError(f"image {image} of {len(labels)}")
                found.append((f"jpg/image_{image:05d}.jpg", int(labels[image - 1]) - 1, split))
        return found

    def classes() -> list[str]:
        last = int(labels.max())
        if last > len(labels):
            raise ValueError(f"class {last} of {len(labels)} images")
        return [str(number) for number in range(1, last + 1)]

    names = guarded(root / "imagelabels.mat", classes)
    return listing(root, root / "setid.mat", names, guarded(root / "setid.mat", rows))


def pets(place: Path) -> Listing:
    """Oxford-IIIT Pets, the 37 breeds; labels as the annotations number them, names from the images."""
    files = {"annotations/trainval.txt": TRAINVAL, "annotations/test.txt": TEST}
    root, _ = unpacked(place, ("oxford-iiit-pet",), ("images", *files))
    rows: list[Row] = []
    breeds: dict[int, str] = {}
    for name, split in files.items():
        path = root / name
        for image, number in words(path, 2):
            label = guarded(path, partial(int, number.split()[0]))
            breed = image.rpartition("_")[0].replace("_", " ")
            if breeds.setdefault(label, breed) != breed:
                raise FastrexError(
                    f"transfer: {str(path)!r} must give a breed one number, got {label} for {breeds[label][:80]!r} and "
                    f"{breed[:80]!r}; get it again"
                )
            rows.append((f"images/{image}.jpg", label, split))
    labels = {number: label for label, number in enumerate(sorted(breeds))}
    rows = [(path, labels[number], split) for path, number, split in rows]
    return listing(root, root / "annotations/trainval.txt", [breeds[number] for number in labels], rows)


def food101(place: Path) -> Listing:
    """Food-101: meta/train.txt and test.txt; labels by sorted folder name."""
    root, _ = unpacked(place, ("food-101",), ("images", "meta/train.txt", "meta/test.txt"))
    named = [
        (f"{image}.jpg", split)
        for split, name in ((TRAINVAL, "train"), (TEST, "test"))
        for image in lines(root / f"meta/{name}.txt")
    ]
    return _by_folder(root, root / "meta/train.txt", "images/", named)


def sun397(place: Path) -> Listing:
    """SUN397, partition 01 of 10; labels by sorted class name, as in the published code.

    The images and the partitions come as two archives: SUN397/, and texts that are wherever the second was unpacked
    (here or in Partitions/, beside SUN397/ or in it).
    """
    root = place / "SUN397" if (place / "SUN397").is_dir() else place
    bases = [place, root, *([place.parent] if root.name == "SUN397" else [])]
    folders = [base / name for base in dict.fromkeys(bases) for name in ("", "Partitions")]
    texts = []
    for name in ("ClassName.txt", "Training_01.txt", "Testing_01.txt"):
        # Each for itself: ClassName.txt is in both archives.
        there = [folder / name for folder in folders if (folder / name).is_file()]
        if not there:
            raise FastrexError(
                f"transfer: {str(place)!r} must hold SUN397 (a/ to z/) and, there or in Partitions, ClassName.txt, "
                f"Training_01.txt, Testing_01.txt, got {contents(place)}; {UNPACK}"
            )
        texts.append(there[0])
    classes = sorted(name.strip("/") for name in lines(texts[0]))
    labels = position(texts[0], classes)
    rows: list[Row] = []
    for split, path in ((TRAINVAL, texts[1]), (TEST, texts[2])):
        for line in lines(path):
            image = line.removeprefix("/")
            rows.append((image, label_of(path, labels, image.rpartition("/")[0]), split))
    return listing(root, texts[1], classes, rows)


def _by_folder(root: Path, place: Path, prefix: str, named: list[tuple[str, int]]) -> Listing:
    """Images CLASS/NAME below ``prefix``, whose labels are the sorted names of their folders."""
    classes = sorted({image.partition("/")[0] for image, _ in named})
    labels = {name: label for label, name in enumerate(classes)}
    rows = [(prefix + image, labels[image.partition("/")[0]], split) for image, split in named]
    return listing(root, place, classes, rows)
