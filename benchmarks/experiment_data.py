"""The images of the experiments, as folders: CIFAR-10 in two parts by class, Omniglot, and handwritten digits.

The encoders train on the first six classes of CIFAR-10 by name. They transfer to the other four, to characters that
they have never seen anything like, and to digits.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastrex.data.demo import write_digits
from fastrex.errors import FastrexError

ARCHIVES = CIFAR, OMNIGLOT = "cifar10-jpeg.tar.xz", "omniglot-small1.zip"
# A set of this name is what `fastrex report` takes for the training task.
TASK, NOVEL = "train", "cifar4"
TASK_CLASSES = 6
DRAWINGS = 15  # of the 20 of each character: the probe's; the others test it
SETS = (TASK, NOVEL, "omniglot", "digits")


def prepare(data: Path, work: Path, per_class: int, probe_per_class: int) -> dict[str, Path]:
    """Write the folders that are not there yet below ``work``; each with ``train/`` and ``test/`` (digits: ``val/``).

    Args:
        data: the folder with the two archives. per_class: images of each class that an encoder trains on.
        probe_per_class: images of each class of CIFAR-10 that a probe is fitted to.

    Returns:
        ``images``: what encoders train on, and the transfer sets by name. A probe of the task has images of the very
        classes that the encoder was trained on; its test images were seen by neither.
    """
    for name in ARCHIVES:
        if not (data / name).is_file():
            raise FastrexError(f"benchmarks: --data must hold {CIFAR} and {OMNIGLOT}, got {data} without {name}")
    source = _once(work / "cifar10", lambda place: _unpack(data / CIFAR, place))
    classes = sorted(folder.name for folder in (source / "train").iterdir())
    task, novel = classes[:TASK_CLASSES], classes[TASK_CLASSES:]
    folders = {"images": work / f"cifar6-{per_class}", TASK: work / f"cifar6-probe-{probe_per_class}"}
    folders |= {NOVEL: work / f"cifar4-probe-{probe_per_class}", "omniglot": work / "omniglot"}
    _once(folders["images"], lambda place: _select(source, place, task, per_class))
    _once(folders[TASK], lambda place: _select(source, place, task, probe_per_class))
    _once(folders[NOVEL], lambda place: _select(source, place, novel, probe_per_class))
    _once(folders["omniglot"], lambda place: _characters(data / OMNIGLOT, place))
    return {**folders, "digits": write_digits(work / "digits")}


def _once(place: Path, write: Callable[[Path], None]) -> Path:
    """``place``, written by ``write`` unless it is there; it appears complete, by one rename."""
    if not place.is_dir():
        part = place.with_name(f".{place.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        part.rename(place)
    return place


def _unpack(archive: Path, place: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.isfile() and len(parts) == 3 and ".." not in parts and (data := tar.extractfile(member)):
                folder = place / parts[0] / parts[1]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / parts[2]).write_bytes(data.read())


def _select(source: Path, place: Path, classes: list[str], per_class: int) -> None:
    """Links to the first ``per_class`` training images of each class, and to all of its test images."""
    for split, count in (("train", per_class), ("test", None)):
        for name in classes:
            (place / split / name).mkdir(parents=True)
            images = sorted((source / split / name).iterdir())
            if count is not None and count > len(images):
                raise FastrexError(f"benchmarks: a class has {len(images)} training images, got {count} asked for")
            for image in images[:count]:
                (place / split / name / image.name).hardlink_to(image)


def _characters(archive: Path, place: Path) -> None:
    """A class for each character of each alphabet; which drawings test it is drawn once, by a fixed seed."""
    order = np.random.default_rng(0)
    with zipfile.ZipFile(archive) as held:
        for name, drawings in _by_character(held):
            for number, chosen in enumerate(order.permutation(len(drawings)).tolist()):
                folder = place / ("train" if number < DRAWINGS else "test") / name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / Path(drawings[chosen]).name).write_bytes(held.read(drawings[chosen]))


def _by_character(held: zipfile.ZipFile) -> Iterator[tuple[str, list[str]]]:
    drawings: dict[str, list[str]] = {}
    for name in sorted(held.namelist()):
        parts = name.split("/")
        if len(parts) == 4 and name.endswith(".png"):
            drawings.setdefault(f"{parts[1]}-{parts[2]}", []).append(name)
    yield from drawings.items()
