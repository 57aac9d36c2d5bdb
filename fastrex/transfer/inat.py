"""The sets with an image folder per class or with JSON annotations: ImageNet-1K, iNaturalist 2018 and 2019."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import untrusted
from ..data.scan import Listing, find_layout, list_images
from .annotations import (
    JSON_ITEMS,
    JSON_LIMIT,
    TEST,
    TRAINVAL,
    Row,
    guarded,
    json_mapping,
    listing,
    refuse_none,
    unpacked,
)


def imagenet(place: Path) -> Listing:
    """ImageNet-1K: train/WNID/*.JPEG and val/WNID/*.JPEG (or validation/); labels by sorted WordNet id; val is the test
    set."""
    root, _ = unpacked(place, ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"), ("train", "val"), ("train", "validation"))
    listed = list_images(find_layout(root))
    refuse_none(root, listed.splits.tolist())
    return listed


def inat2018(place: Path) -> Listing:
    """iNaturalist 2018, see :func:`_inat`."""
    return _inat(place, 2018)


def inat2019(place: Path) -> Listing:
    """iNaturalist 2019, see :func:`_inat`."""
    return _inat(place, 2019)


def _inat(place: Path, year: int) -> Listing:
    """train_val{year}/, train{year}.json and val{year}.json (test set: val), as the competition's archives unpack.

    Labels are in the order of the category ids. The names are those of categories.json where that is there, since the
    annotations of 2018 came without them at first.
    """
    train, val, images = f"train{year}.json", f"val{year}.json", f"train_val{year}"
    root, _ = unpacked(place, (f"inat{year}", f"inaturalist-{year}"), (train, val, images))
    content = json_mapping(root / train)
    names = guarded(root / train, lambda: _names(content["categories"]))
    if (root / "categories.json").is_file():
        path = root / "categories.json"
        read = guarded(path, lambda: _names(untrusted.read_json(path, JSON_LIMIT, items=JSON_ITEMS)))
        names |= {key: name for key, name in read.items() if key in names}
    labels = {key: label for label, key in enumerate(sorted(names))}
    # Two species of one name are told apart by their ids.
    once = len(set(names.values())) == len(names)
    classes = [names[key] if once else f"{names[key]} ({key})" for key in labels]
    rows = guarded(root / train, lambda: list(_rows(content, labels, TRAINVAL)))
    content = json_mapping(root / val)
    rows += guarded(root / val, lambda: list(_rows(content, labels, TEST)))
    return listing(root, root / train, classes, rows)


def _names(categories: Any) -> dict[int, str]:
    """The name of each category by its id."""
    found = {}
    for category in categories:
        key, name = category["id"], category.get("name", category["id"])
        if type(key) is not int or not isinstance(name, str | int) or key in found:
            raise ValueError("a category must have an id of its own and a name")
        found[key] = str(name)[:256]
    return found


def _rows(content: dict[str, Any], labels: dict[int, int], split: int) -> Iterator[Row]:
    files = {image["id"]: image["file_name"] for image in content["images"]}
    if len(files) < len(content["images"]):
        raise ValueError("two images have the same id")
    seen = set()
    for annotation in content["annotations"]:
        key, category = annotation["image_id"], annotation["category_id"]
        if key not in files or category not in labels:
            raise ValueError(f"an annotation names image {key!r:.40} of category {category!r:.40}, which is not there")
        if not isinstance(files[key], str):
            raise ValueError(f"the file name of image {key!r:.40} is no text")
        seen.add(key)
        yield files[key], labels[category], split
    if len(seen) < len(files):
        raise ValueError(f"{len(files) - len(seen)} images have no category")
