"""EuroSAT (RGB), which comes without a split: class folders, and the split that is drawn here.

The protocol shuffles each class and takes 810 images for the test, 540 for validation and the rest for training. The
published code draws anew in each run, so that no two results are about the same images; here the split is drawn once,
by a fixed seed, and stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from .. import files, untrusted
from ..data.index import cache_dir
from ..data.scan import Listing, find_layout, list_images, quoted, subfolders
from ..errors import FastrexError
from .annotations import (
    JSON_ITEMS,
    TEST,
    TEXT_LIMIT,
    TRAINVAL,
    UNPACK,
    contents,
    guarded,
    inside,
    json_mapping,
    listing,
)

SEED = 22  # of the published protocol
OWN = "split.json"
TEST_IMAGES = 810
SMALLEST = 2000  # images of the smallest class
TOPS = ("eurosat/2750", "EuroSAT/2750", "2750", "EuroSAT_RGB", "EuroSAT")
CLASSES = frozenset(
    [
        *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
        *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
    ]
)


def eurosat(place: Path) -> Listing:
    """The ten class folders below 2750/ or EuroSAT_RGB/; labels by sorted folder name; val counts as trainval.

    ``split.json`` in the folder (``{"test": ["AnnualCrop/AnnualCrop_1.jpg", ...]}``) is used where it is there. Else
    the split is drawn, and stored in the cache folder. Folders with other names are left out.
    """
    folders = [folder for folder in (*(place / top for top in TOPS), place) if folder.is_dir()]
    root = next((folder for folder in folders if CLASSES & set(subfolders(folder))), None)
    if root is None:
        fact = contents(folders[0])
        raise FastrexError(
            f"transfer: {str(folders[0])!r} must hold AnnualCrop and the other class folders, or 2750, got {fact}; "
            f"{UNPACK}"
        )
    layout = find_layout(root)
    others = [folder.name for folder in layout.folders if folder.name not in CLASSES]
    layout = dataclasses.replace(layout, folders=tuple(f for f in layout.folders if f.name in CLASSES))
    images = list_images(layout)
    paths = [os.fsdecode(path) for path in images.paths]
    if (place / OWN).is_file():
        test, notice = _own(place / OWN, paths), f"EuroSAT: the split is that of {OWN}"
    else:
        test, notice = _stored(paths)
    rows = [
        (path, label, TEST if path in test else TRAINVAL)
        for path, label in zip(paths, images.labels.tolist(), strict=True)
    ]
    found = listing(root, root, images.classes, rows)
    left_out = (f"EuroSAT: folders that are no class of it are left out: {quoted(others)}",) if others else ()
    return dataclasses.replace(found, ignored=images.ignored, notices=(notice, *left_out))


def draw(paths: list[str]) -> set[str]:
    """The test images among ``paths``, CLASS/NAME: 810 of each class of the official set, and as large a share of one
    that has fewer images than any class of it.

    Each image has a rank of its own, the hash of seed and path: a copy with one image more or less has the same split
    but for one image.
    """
    classes: dict[str, list[tuple[bytes, str]]] = {}
    for path in paths:
        key = b"%d\0" % SEED + os.fsencode(path)
        ranked = hashlib.blake2b(key, digest_size=8).digest(), path
        classes.setdefault(path.partition("/")[0], []).append(ranked)
    test: set[str] = set()
    for names in classes.values():
        count = min(TEST_IMAGES, max(1, round(TEST_IMAGES / SMALLEST * len(names))), len(names) - 1)
        test |= {path for _, path in sorted(names)[:count]}
    return test


def _own(path: Path, paths: list[str]) -> set[str]:
    """The split that the user gives."""
    content = json_mapping(path)

    def read() -> set[str]:
        test = {inside(name, path) for name in content["test"]}
        if unknown := sorted(test - set(paths)):
            raise ValueError(f"it names {unknown[0]!r:.100}, which is not there")
        return test

    return guarded(path, read)


def _stored(paths: list[str]) -> tuple[set[str], str]:
    """The split drawn before for these images, else a new one, which is stored."""
    digest = hashlib.sha256("\n".join(sorted(paths)).encode("utf-8", "surrogateescape")).hexdigest()
    path = cache_dir() / "transfer" / f"eurosat-split-{digest[:16]}.json"
    notice = f"EuroSAT: the split is drawn by seed {SEED} and stored in {path.name}"
    try:
        content = untrusted.read_json(path, TEXT_LIMIT, items=JSON_ITEMS)
        if content["images"] == digest and set(content["test"]) <= set(paths):
            return set(content["test"]), notice
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none yet, or damaged: the same one is drawn again
    test = draw(paths)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {"seed": SEED, "images": digest, "test": sorted(test)})
    except OSError as error:
        way_out = "free some space, or set FASTREX_CACHE to a folder that can be written"
        raise FastrexError(f"transfer: cannot write {str(path)!r} ({error.strerror or error}); {way_out}") from error
    return test, notice
