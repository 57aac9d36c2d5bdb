"""``transfer.json``: what one encoder reached on its sets, read as data of an unknown hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, untrusted
from ..errors import FastrexError
from . import catalog, scores

FILE = "transfer.json"
VERSION = 1
MAX_BYTES = 64 * 2**20
COMMON = ("logistic", "sgd", "knn", "ncm")  # by which a mean is taken where sets lack the protocol's probe
LARGE = 100_000  # a set of the user's with more training images is probed as the large official ones are
IN1K = "in1k"
# What encoders were trained on, officially or by a name that users give: in no mean.
TRAINING = (IN1K, "train")
MEANS = {"13": (*catalog.SMALL, *catalog.COG), "15": (*catalog.SMALL, *catalog.COG, *catalog.INAT)}

Result = dict[str, Any]


def find(place: Path) -> Path:
    """The result that ``place`` names: the file itself, the folder that holds it, or the run whose it is."""
    for path in (place / FILE, place / "transfer" / FILE):
        if path.is_file():
            return path
    return place


def read(path: Path) -> Result:
    """A result, its version and types checked.

    Raises:
        FastrexError: there is none, or it is not one that this version reads; the message says where.
    """
    way_out = "give the --out of a fastrex transfer"
    try:
        content = untrusted.read_json(path, MAX_BYTES)
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or version != VERSION:
            raise ValueError(f"its version must be {VERSION}, got {str(version)[:20]}")
        _check(content, _RESULT, "it")
        keys = [key(entry) for entry in content["sets"]]
        if len(set(keys)) < len(keys):
            raise ValueError("a set has two results")
        if any(entry["headline"] not in entry["probes"] for entry in content["sets"]):
            raise ValueError("a set has no result of its headline probe")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FastrexError(f"transfer: {path} must be a result of fastrex transfer ({reason}); {way_out}") from None
    result: Result = content
    return result


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Replace the file whole.

    Raises:
        FastrexError: it cannot be written, or would be larger than :func:`read` takes.
    """
    try:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        untrusted.check_json(text, MAX_BYTES, untrusted.MAX_ITEMS)
        files.write_text(path, text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FastrexError(f"transfer: {path} cannot be written ({reason}); choose another --out") from None


def key(entry: Mapping[str, Any]) -> tuple[str, int | None]:
    """What tells a set's result from the others: its name and the shots."""
    return entry["name"], entry["shots"]


def headline(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the probe that counts."""
    found: dict[str, Any] = entry["probes"][entry["headline"]]
    return found


def published(entry: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """The published numbers of classes, training and test images of an official set of which ``entry`` has others, so
    that its figures cannot be compared with published ones; else None."""
    known = catalog.BY_NAME.get(entry["name"]) if entry["official"] else None
    if known is None:
        return None
    numbers = known.classes, known.trainval, known.test
    return numbers if numbers != (entry["classes"], entry["train"], entry["test"]) else None


def partial(result: Mapping[str, Any]) -> set[str]:
    """The official sets of which ``result`` has not measured just the published images."""
    return {entry["name"] for entry in result["sets"] if published(entry)}


def usual(entry: Mapping[str, Any]) -> str:
    """The probe that the protocol has for this set."""
    known = catalog.BY_NAME.get(entry["name"]) if entry["official"] else None
    if known is not None:
        return "sgd" if known.large else "logistic"
    said = entry.get("usual")
    return said if said in ("logistic", "sgd") else "sgd" if entry["train"] > LARGE else "logistic"


def as_published(entry: Mapping[str, Any]) -> bool:
    """Whether a figure can stand beside published ones: an official set, all of it and nothing else, by the protocol's
    probe."""
    whole = entry["official"] and published(entry) is None and not entry.get("left_out")
    return bool(whole) and entry["headline"] == usual(entry)


def merged(stored: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``stored`` entries with ``own`` in their places, in the order of the catalog: of the same images, both's probes
    are kept."""
    found = {key(entry): dict(entry) for entry in stored}
    for entry in own:
        before = found.get(key(entry), {})
        same = before.get("images") == entry["images"] and before.get("fingerprint") == entry["fingerprint"]
        probes = {**(before["probes"] if same else {}), **entry["probes"]}
        first = usual(entry) if usual(entry) in probes else before.get("headline", "") if same else ""
        whole = {**entry, "probes": probes, "headline": first or entry["headline"]}
        found[key(entry)] = {**whole, "as_published": as_published(whole)}
    order = [*catalog.BY_NAME, *(entry["name"] for entry in (*stored, *own))]
    return sorted(found.values(), key=lambda entry: (order.index(entry["name"]), entry["shots"] or 0))


def means(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the sets with all their training images: the official ones of :data:`MEANS`, by the probe that the
    protocol has for each, and ``all`` that there are but :data:`TRAINING`; and the same of the few shots, as ``13@8``
    for 8 images per class.

    ``all`` is by the protocol's probes as well, unless a set lacks its own: then by one that all of them have, which
    is said (``probe``). A mean without any of its sets is left out; one of sets that are not the published ones is not
    complete.
    """
    found: dict[str, Any] = {}
    for shots in sorted({entry["shots"] for entry in sets}, key=lambda shots: shots or 0):
        entries = {entry["name"]: entry for entry in sets if entry["shots"] == shots}
        ending = "" if shots is None else f"@{shots}"
        rights = {n: e["probes"][usual(e)]["right"] for n, e in entries.items() if usual(e) in e["probes"]}
        odd = {name for name, entry in entries.items() if published(entry)}
        for name, wanted in MEANS.items():
            if (mean := scores.mean(rights, wanted)) is not None:
                found[name + ending] = {**mean, "complete": mean["complete"] and not odd & {*mean["sets"]}}
        others = [name for name in entries if name not in TRAINING]
        common = [p for p in COMMON if others and all(p in entries[name]["probes"] for name in others)]
        by = common[0] if common and not {*others} <= rights.keys() else ""
        if by:
            rights = {name: entries[name]["probes"][by]["right"] for name in others}
        if (mean := scores.mean(rights, others)) is not None:
            complete = mean["complete"] and not odd & {*mean["sets"]}
            found["all" + ending] = {**mean, "complete": complete, **({"probe": by} if by else {})}
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _tally(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_count, value)) and sum(value) > 0


# The value of a name (needed, unless with a question mark), the items of a list, all values of an object, or None as
# well.
_Shape = Callable[[Any], bool] | dict[str, Any] | list[Any] | tuple[str, Any]
_SPREAD = {"mean": _share, "std": _number, "low": _share, "high": _share, "seeds": [_share]}
_ODDS = {"value": _number, "low": _number, "high": _number, "moved?": _flag}
_MEAN = {"log_odds": _ODDS, "top1": _share, "sets": [_text], "complete": _flag, "moved?": [_text], "probe?": _text}
_PROBE = {
    "top1": _SPREAD,
    "mean_per_class": _SPREAD,
    "log_odds": _ODDS,
    "right": _tally,
    "chosen": [("values", _number)],
    "seconds": _number,
}
_SET = {
    "name": _text,
    "title": _text,
    "official": _flag,
    "classes": _count,
    "train": _count,
    "test": _count,
    "shots": ("or null", _count),
    "headline": _text,
    "fingerprint": _text,
    "images?": _text,
    "files?": _text,
    "usual?": _text,
    "left_out?": _count,
    "untested?": [_text],
    "notices?": [_text],
    "probes": ("values", _PROBE),
}
_SKIPPED = {"name": _text, "reason": _text, "get": _text, "shots?": ("or null", _count), "probes?": [_text]}
_RESULT = {
    "source": _text,
    "encoder": {"identity": _text, "arch": _text, "features": _count},
    "transform": {"resize": _count, "size": _count, "channels": _count, "interpolation": _text},
    "protocol": _text,
    "seeds": [_count],
    "sets": [_SET],
    "skipped": [_SKIPPED],
    "means": ("values", _MEAN),
}


def _check(value: Any, shape: _Shape, place: str) -> None:
    """ValueError where ``value`` is not of this shape."""
    if isinstance(shape, tuple):
        kind, inner = shape
        if kind == "or null":
            if value is not None:
                _check(value, inner, place)
            return
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be an object")
        for name, part in value.items():
            _check(part, inner, f"{place}.{name[:40]}")
    elif isinstance(shape, dict):
        needed = {name: inner for name, inner in shape.items() if not name.endswith("?")}
        if not isinstance(value, dict) or not needed.keys() <= value.keys():
            raise ValueError(f"{place} must be an object with {', '.join(needed)}")
        for name, inner in shape.items():
            if name.rstrip("?") in value:
                _check(value[name.rstrip("?")], inner, f"{place}.{name.rstrip('?')}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{place} must be a list")
        for number, part in enumerate(value):
            _check(part, shape[0], f"{place}[{number}]")
    elif not shape(value):
        raise ValueError(f"{place} must be {_WORDS[shape]}")


_WORDS: dict[Callable[[Any], bool], str] = {
    _number: "a number",
    _share: "a share from 0 to 1",
    _count: "a whole number of at least 0",
    _text: "text",
    _flag: "true or false",
    _tally: "the numbers of test images that k of the seeds got right",
}
