"""The 16 data sets of the t-ReX transfer protocol, and what a user names to evaluate on: them, or folders of their own.

Numbers of images and classes as published; where to get a set is said by name only, nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.index import Index, Progress
from ..data.scan import Listing
from ..errors import FastrexError, UsageError, explain
from . import cog, eurosat, inat, official, opening
from .annotations import UNPACK

NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}")


class MissingSet(FastrexError):
    """A data set is not there; ``get``: what to get, and where (empty for a folder of the user's own)."""

    def __init__(self, message: str, get: str) -> None:
        super().__init__(message)
        self.get = get


@dataclass(frozen=True)
class OfficialSet:
    """A data set of the protocol: published numbers of classes and of images, ``large`` where the probe is trained by
    SGD on normalised features, and ``read``, which turns its folder into a listing (split 0 trainval, 1 test)."""

    name: str
    title: str
    classes: int
    trainval: int
    test: int
    large: bool
    get: str
    read: Callable[[Path], Listing]

    @property
    def folder(self) -> str:
        """Its folder below the root; the five levels of CoG share one."""
        return "cog" if self.name in COG else self.name


COG_GET = (
    "ImageNet-21K (Winter 2021 release) from image-net.org into cog/imagenet21k, and cog_levels_mapping_file.pkl and "
    "cog_concepts_split_file.pkl from the ImageNet-CoG page of NAVER LABS Europe"
)
COG_IMAGES = (1_118_804, 1_115_788, 1_095_203, 1_107_128, 1_091_654)
INAT_GET = (
    "iNaturalist {year} of github.com/visipedia/inat_comp: train_val{year}.tar.gz, train{year} and val{year} json"
)

SETS: tuple[OfficialSet, ...] = (
    OfficialSet(
        *("aircraft", "Aircraft", 100, 6_667, 3_333, False),
        "fgvc-aircraft-2013b from the FGVC-Aircraft page of the Visual Geometry Group, Oxford",
        official.aircraft,
    ),
    OfficialSet(
        *("cars196", "Cars196", 196, 8_144, 8_041, False),
        "car_ims and cars_annos.mat (or the development kit) from the Stanford Cars page",
        official.cars196,
    ),
    OfficialSet(
        *("dtd", "DTD", 47, 3_760, 1_880, False),
        "dtd-r1.0.1 from the Describable Textures page of the Visual Geometry Group, Oxford",
        official.dtd,
    ),
    OfficialSet(
        *("eurosat", "EuroSAT", 10, 18_900, 8_100, False),
        "EuroSAT (RGB) from github.com/phelber/EuroSAT",
        eurosat.eurosat,
    ),
    OfficialSet(
        *("flowers102", "Flowers102", 102, 2_040, 6_149, False),
        "102flowers, imagelabels.mat and setid.mat from the 102 Flowers page of the Visual Geometry Group, Oxford",
        official.flowers102,
    ),
    OfficialSet(
        *("pets", "Pets", 37, 3_680, 3_669, False),
        "images and annotations from the Oxford-IIIT Pet page of the Visual Geometry Group, Oxford",
        official.pets,
    ),
    OfficialSet(
        *("food101", "Food101", 101, 75_750, 25_250, False),
        "food-101 from the Food-101 page of the Computer Vision Lab, ETH Zurich",
        official.food101,
    ),
    OfficialSet(
        *("sun397", "SUN397", 397, 19_850, 19_850, False),
        "SUN397 and its Partitions from the SUN database page, Princeton",
        official.sun397,
    ),
    *(
        OfficialSet(
            *(f"cog-l{number}", f"CoG L{number}", 1000, images, 50_000, True),
            COG_GET,
            cog.level(number),
        )
        for number, images in enumerate(COG_IMAGES, 1)
    ),
    OfficialSet(
        *("inat2018", "iNat 2018", 8_142, 437_513, 24_426, True),
        INAT_GET.format(year=2018),
        inat.inat2018,
    ),
    OfficialSet(
        *("inat2019", "iNat 2019", 1_010, 265_213, 3_030, True),
        INAT_GET.format(year=2019),
        inat.inat2019,
    ),
    OfficialSet(
        *("in1k", "IN1K", 1000, 1_281_167, 50_000, True),
        "ILSVRC-2012 from image-net.org, train and val as class folders",
        inat.imagenet,
    ),
)
SMALL = tuple(known.name for known in SETS if not known.large)
COG = tuple(known.name for known in SETS if known.name.startswith("cog-"))
INAT = tuple(known.name for known in SETS if known.name.startswith("inat"))
GROUPS = {"small": SMALL, "cog": COG, "inat": INAT, "all": tuple(known.name for known in SETS)}
BY_NAME = {known.name: known for known in SETS}
# Where torchvision leaves what its archives unpack to: in the root itself.
TOPS = {
    "aircraft": ("fgvc-aircraft-2013b",),
    "cars196": ("stanford_cars",),
    "eurosat": ("EuroSAT", "EuroSAT_RGB"),
    "flowers102": ("flowers-102",),
    "pets": ("oxford-iiit-pet",),
    "food101": ("food-101",),
    "sun397": ("SUN397",),
}


@dataclass(frozen=True)
class Task:
    """A data set to evaluate on; ``official``: which of the protocol's it is, if any."""

    name: str
    path: Path | None
    official: OfficialSet | None


def tasks(words: Sequence[str], root: Path | None) -> list[Task]:
    """What ``words`` name, each once, in their order: official sets (in their folders below ``root``), the groups
    small, cog, inat and all, and NAME=PATH. An official name before "=" (also cog, for all five levels) says where that
    set is.

    Raises:
        UsageError: a name is unknown, has two places or none, or nothing is named.
    """
    found: dict[str, Task] = {}
    placed: set[str] = set()  # their own places go before what a group means
    for word in words:
        names, path = _named(word)
        for name in names:
            known = BY_NAME.get(name)
            if path is None:
                if name not in found:
                    found[name] = Task(name, _below(root, word, known), known)
                continue
            if name in placed and found[name].path != path:
                raise UsageError(f"--sets: {name} must have one place, got {str(found[name].path)!r} and {str(path)!r}")
            placed.add(name)
            found[name] = Task(name, path, known)
    if not found:
        raise UsageError(f"--sets must name a data set, got none; known are {', '.join((*GROUPS, *BY_NAME))}")
    return list(found.values())


def _named(word: str) -> tuple[Sequence[str], Path | None]:
    """The names that ``word`` stands for, and the place that it gives."""
    name, equals, place = word.partition("=")
    if not equals:
        _refuse_unknown(name)
        return GROUPS.get(name, (name,)), None
    if not NAME.fullmatch(name) or name in GROUPS.keys() - {"cog"}:
        raise UsageError(
            f"--sets: {word!r} must begin with the name of one data set (letters, digits, . _ + -), got {name!r}"
        )
    small = name.lower()  # a folder of that name would be taken for one's own, with another split and other labels
    if small != name and (small in BY_NAME or small == "cog"):
        raise UsageError(
            f"--sets: {name!r} must be written as the data set is, got other letters; did you mean {small}=?"
        )
    if not place:
        raise UsageError(f"--sets: {name} must have a place, got nothing behind the =; give {name}=PATH")
    return COG if name == "cog" else (name,), Path(os.path.expanduser(place))


def _refuse_unknown(name: str) -> None:
    if name not in GROUPS and name not in BY_NAME:
        near = difflib.get_close_matches(name.lower(), [*GROUPS, *BY_NAME], 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join((*GROUPS, *BY_NAME))}"
        raise UsageError(f"--sets: {name!r} must be a known data set or NAME=PATH, got neither; {hint}")


def _below(root: Path | None, word: str, known: OfficialSet | None) -> Path:
    if root is None or known is None:
        raise UsageError(f"--sets: {word} must have a place, got no --root; give --root DATASETS, or NAME=PATH")
    folders = [root / name for name in (known.folder, *TOPS.get(known.name, ()))]
    return next((folder for folder in folders if os.path.isdir(folder)), folders[0])


def open_task(task: Task, *, threads: int = 0, progress: Progress | None = None, stamp: str = "") -> Index:
    """The index of a task: two splits, 0 trainval and 1 test; classes in the order of the protocol's labels.

    What is odd (other numbers than published, classes left out, a test set that was held out here) is in its
    ``notices``. The index is stored in the cache folder, see :func:`.opening.of_listing`.

    threads, progress: as for :func:`fastrex.data.index.build`; stamp: that of the index which another rank has opened,
    which is taken as it is where this machine has it stored.

    Raises:
        MissingSet: there is no such folder, or it is empty.
        FastrexError: the folder holds something else; says what was expected and what was found.
    """
    place = None if task.path is None else Path(os.path.abspath(task.path))
    try:
        fact = "no place" if place is None else _absence(place)
        if place is not None and not fact:
            index = opening.known(task.name, place, stamp) if stamp else None
            return index or _opened(task, place, threads, progress)
    except OSError as error:  # wherever a reader looks: no permission, too long a name
        raise FastrexError(f"transfer: {task.name}: {explain(error)}") from error
    get = task.official.get if task.official else ""
    way_out = f"get {get}" if get else "check the path"
    raise MissingSet(f"transfer: {task.name} must be there, got {fact}; {way_out}", get)


def _absence(place: Path) -> str:
    """Why there is no data set at ``place``, if so."""
    if not place.exists():
        return f"no {str(place)!r}"
    return f"an empty {str(place)!r}" if place.is_dir() and not any(place.iterdir()) else ""


def _opened(task: Task, place: Path, threads: int, progress: Progress | None) -> Index:
    if task.official is None:
        return opening.own(task.name, place, threads=threads, progress=progress)
    if not place.is_dir():
        raise FastrexError(
            f"transfer: {str(place)!r} must be the folder of {task.official.title}, got a file; {UNPACK}"
        )
    listed = task.official.read(place)
    listed = dataclasses.replace(listed, notices=(*listed.notices, *_counts(task.official, listed)))
    return opening.of_listing(task.name, place, listed, threads=threads, progress=progress)


def _counts(known: OfficialSet, listed: Listing) -> tuple[str, ...]:
    """A notice where there is more or less than published."""
    test = int(listed.splits.sum())
    found = len(listed.classes), len(listed.paths) - test, test
    published = known.classes, known.trainval, known.test
    if found == published:
        return ()
    return (
        f"{known.title}: {found[0]} classes, {found[1]} training and {found[2]} test images; published are "
        f"{published[0]}, {published[1]} and {published[2]}, so that the results cannot be compared",
    )
