"""``fastrex analyze``: what the features of encoders look like on the held-out images of some sets."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import distributed, export
from ..data.index import Index
from ..distributed import World
from ..errors import FastrexError, UsageError, explain, one_line
from ..rundir import CONFIG, version
from ..transfer import catalog, features, folder, keys
from . import filters, measures, outcome, projected

Rows = NDArray[np.int64]
Say = Callable[[str], None]
POOLED = "pooled"
APART = "in1k"  # what encoders are trained on: neither pooled nor averaged with the sets that they transfer to


@dataclass(frozen=True, eq=False)
class _Set:
    """A set and the held-out images of it that are looked at."""

    name: str
    index: Index
    rows: Rows


def run(
    sources: Sequence[str],
    sets: Sequence[str],
    *,
    root: Path | None = None,
    out: Path | None = None,
    images: int | None = None,
    size: int | None = None,
    cache: Path | None = None,
    threads: int = 0,
    device: str = "auto",
    say: Say = print,
) -> Path:
    """Measure every source on every set that is there; write analysis.json, analysis.md and analysis.html.

    Args:
        sources: runs, checkpoints, exports, files (see :func:`fastrex.export.load_source`).
        sets, root: as for :func:`fastrex.transfer.catalog.tasks`.
        out: folder; by default SOURCE/analysis for a lone run, else ./analysis.
        images: at most so many of each set (see :func:`chosen`). size: side of the image in pixels.
        cache: where features are kept. threads: of the decoder, 0 = all cores. device: auto, cpu or cuda.

    Returns:
        The folder.

    Raises:
        FastrexError: no set is there, a source that cannot be read, features without a direction, an unwritable folder.
    """
    tasks = catalog.tasks(sets, root)
    if any(task.name == POOLED for task in tasks):
        raise UsageError(f"--sets: {POOLED!r} is what all sets together are called, got a set of that name; rename it")
    out = _out(sources, out)
    with distributed.world(device) as world:
        if world.size > 1:
            raise UsageError(f"analyze must be one process, got {world.size} ranks; start it without torchrun")
        opened, skipped = _open(tasks, images, threads, say)
        names = _names(sources)
        subjects = []
        for source, name in zip(sources, names, strict=True):
            subjects.append(_subject(source, name, opened, size, cache, threads, world, say))
    subjects.sort(key=lambda subject: -1 if subject["projector_layers"] is None else subject["projector_layers"])
    if outcome.shorten(subjects):
        say("so many sources and sets have more singular values than are kept; analyze fewer at a time for all spectra")
    result = {
        "version": outcome.VERSION,
        "fastrex": version(),
        "torch": str(torch.__version__),
        "images": images,
        "subjects": subjects,
        "skipped": skipped,
    }
    outcome.write(out, result)
    for line in outcome.summary(result):
        say(line)
    say(f"analysis: {out}")
    return out


def chosen(index: Index, most: int | None) -> Rows:
    """Sorted rows of the held-out images: all of them, or ``most``, spread evenly over the classes.

    They are taken in pairs of a class, so that few images of many classes still have distances within classes, in an
    order that only the images' paths decide.
    """
    rows = index.rows("val", 0.0)
    if most is None or len(rows) <= most:
        return rows
    labels, key = index.labels[rows], index.split_key[rows]
    order = np.lexsort((key, labels))
    rows, labels, key = rows[order], labels[order], key[order]
    first = np.searchsorted(labels, labels, side="left")
    place = np.arange(len(rows)) - first
    # Round by round of two images per class; classes in the order of their first image's key.
    rounds = np.lexsort((place, labels, key[first], place // 2))
    return np.sort(rows[rounds[:most]])


def _out(sources: Sequence[str], out: Path | None) -> Path:
    """The folder to write to, made before the work for it is done."""
    lone = Path(sources[0]) if len(sources) == 1 and (Path(sources[0]) / CONFIG).is_file() else None
    out = out or (lone / "analysis" if lone is not None else Path("analysis"))
    folder.claim("analyze", out, outcome.FILES)
    if (out / outcome.FILES[0]).exists() and not outcome.known(out):
        raise FastrexError(
            f"analyze: --out {out} must be new or hold an analysis, got another {outcome.FILES[0]} in it; name another"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastrexError(f"analyze: --out {out}: {explain(error)}") from None
    return out


def _open(
    tasks: Sequence[catalog.Task], images: int | None, threads: int, say: Say
) -> tuple[list[_Set], list[dict[str, str]]]:
    found, skipped = list[_Set](), list[dict[str, str]]()
    for task in tasks:
        try:
            index = catalog.open_task(task, threads=threads)
        except catalog.MissingSet as missing:
            reason = str(missing).removeprefix("transfer: ")
            skipped.append({"name": task.name, "reason": reason, "get": missing.get})
            say(f"{task.name}: left out: {reason}")
            continue
        for notice in index.notices:
            say(f"{task.name}: {notice}")
        found.append(_Set(task.name, index, chosen(index, images)))
    if not found:
        raise FastrexError(f"analyze: one of --sets must be there, got none; {skipped[0]['reason']}")
    return found, skipped


def _names(sources: Sequence[str]) -> list[str]:
    """Short names: the last part of each path, as much of it as tells them apart."""
    paths = [Path(os.path.abspath(source)) for source in sources]
    if len(set(paths)) < len(paths):
        raise UsageError("analyze: every SOURCE must be named once, got one of them twice")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _subject(
    source: str,
    name: str,
    sets: Sequence[_Set],
    size: int | None,
    cache: Path | None,
    threads: int,
    world: World,
    say: Say,
) -> dict[str, Any]:
    """All that is to be said of one source."""
    place, projector = projected.find(source)
    read = export.load_source(place)
    encoder = export.load_encoder(place).to(world.device)
    known, how = keys.identity(read), features.Transform.of(read, size)
    results, pool, classes = list[dict[str, Any]](), list[tuple[Tensor, Tensor]](), 0
    if projector is not None:
        projector = projector.to(world.device)

    def measured(title: str, x: Tensor, labels: Tensor) -> dict[str, Any]:
        say(f"{one_line(name)}: {title}, {len(x)} images")
        rows = []
        with features.exact():
            for layer, values in projected.layers(x.to(world.device), projector):
                try:
                    found = _plain(measures.describe(values, labels))
                except FastrexError as error:
                    raise FastrexError(f"analyze: {name} on {title}, {layer}: {error}") from None
                rows.append({"layer": layer, "width": values.shape[1], **found})
        return {"name": title, "images": len(x), "layers": rows}

    for one in sets:
        extracted = features.extract(
            encoder,
            known,
            one.index,
            one.rows,
            how,
            world,
            cache=features.default_cache() if cache is None else cache,
            threads=threads,
            note=say,
            name=one.name,
        )
        results.append(measured(one.name, extracted.features, extracted.labels))
        if one.name != APART:
            # The same number is another class in another set.
            pool.append((extracted.features, extracted.labels + classes))
            classes += len(one.index.classes)
    entry: dict[str, Any] = {
        "name": name,
        "source": source,
        "projector_layers": None if projector is None else projected.depth(projector),
        "encoder": {"identity": known, **read.arch, "features": int(encoder.num_features)},  # type: ignore[arg-type]
        "transform": how.facts(),
    }
    if len(pool) > 1:
        mean = _mean([result for result in results if result["name"] != APART])
        labels = torch.cat([labels for _, labels in pool])
        results.append(measured(POOLED, torch.cat([x for x, _ in pool]), labels))
        entry["mean"] = mean
    return {**entry, "sets": results, "filters": filters.diversity(encoder)}


def _plain(values: Mapping[str, float | list[float] | None]) -> dict[str, Any]:
    """As JSON holds it: no NaN, and no more digits of a spectrum than mean something."""
    numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
    lists = {name: [float(f"{v:.7g}") for v in value] for name, value in values.items() if isinstance(value, list)}
    return {name: None if v is None or not math.isfinite(v) else v for name, v in numbers.items()} | lists


def _mean(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measures averaged over sets, layer by layer; None where a set has none."""
    rows = []
    for same in zip(*(result["layers"] for result in results), strict=True):
        row: dict[str, Any] = {"layer": same[0]["layer"], "width": same[0]["width"]}
        for key in outcome.MEASURES:
            values = [layer[key] for layer in same]
            row[key] = None if None in values else statistics.fmean(values)
        rows.append(row)
    return {"sets": [result["name"] for result in results], "layers": rows}
