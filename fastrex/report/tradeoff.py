"""Accuracy on the training task against mean log-odds on the transfer sets, a point per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import charts, drawing, scales
from ..charts import Dot
from ..markup import Raw, table
from ..transfer import results, scores
from ..transfer.results import TRAINING
from .groups import FEW, Group, groups, many, spread
from .page import Section, grid, titled
from .record import Record

TITLE = "Training against transfer"
ACCURACIES = {"eval/top1": "held-out top-1, own classifier", "eval/knn": "held-out k-NN"}
MAX_NAMED = 9  # points that have their names beside them; more have numbers
MEAN_SIZE, RUN_SIZE = 1.35, 0.6  # of points that are the mean of several runs, and of these
PROBES = {"logistic": "logistic regression", "sgd": "SGD", "knn": "k-NN", "ncm": "NCM"}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Place:
    """Where a run is; intervals over resamples of the test images."""

    record: Record
    x: float
    y: float
    x_interval: Interval | None
    y_interval: Interval


def tradeoff(records: Sequence[Record]) -> Section:
    """The chart, over the sets that all runs with transfer results share. Of many runs, those that differ only in the
    seed have one name, at their mean."""
    if len(records) < 2:
        return Section("tradeoff", TITLE)
    done = [record for record in records if record.transfer]
    entries = {record.name: _whole(record) for record in done}
    shared, unlike = _shared(list(entries.values()))
    measure = _measure(done, entries)
    omitted = tuple(f"{TITLE}: {name} is left out, the runs were measured on different images." for name in unlike)
    if len(done) < 2 or not shared or measure is None:
        why = (
            "at least two runs need results of fastrex transfer" if len(done) < 2
            else "the runs have no transfer set in common" if not shared
            else "no accuracy on the training task is known for all runs with transfer results"
        )  # fmt: skip
        return Section("tradeoff", TITLE, omitted=(*omitted, f"{TITLE}: {why}."))
    found = {}
    for record in done:
        own = entries[record.name]
        try:
            mean = scores.mean({name: own[name]["probes"][by]["right"] for name, by in shared.items()}, list(shared))
        except (ValueError, ArithmeticError) as error:
            return Section("tradeoff", TITLE, omitted=(f"{TITLE}: {record.name} has numbers that are none ({error}).",))
        x, interval = _training(record, own, measure)
        if mean is not None and x is not None:
            odds = mean["log_odds"]
            found[record.name] = Place(record, x, odds["value"], interval, (odds["low"], odds["high"]))
    name, by = measure
    task = ACCURACIES.get(name, f"{name}, top-1 of the probe" + (f" ({PROBES.get(by, by)})" if by != "usual" else ""))
    body = _drawn(groups(records), found, f"training task: {task}")
    sets = ", ".join(name if by == _usual(entries, name) else f"{name} by {PROBES.get(by, by)}"
                     for name, by in shared.items())  # fmt: skip
    note = (
        f"Up is better transfer, right is better on the training task. Mean over {len(shared)} "
        f"set{'s' * (len(shared) != 1)}: {sets}. Bars: 95 % bootstrap intervals over test images"
    )
    if many(records):
        note += "; of a mean of runs that differ only in the seed (large, the runs small), their standard deviation"
    return Section("tradeoff", TITLE, body, f"{note}.", omitted)


def _drawn(known: Sequence[Group], found: Mapping[str, Place], x: str) -> str:
    """The chart, and below it what its points are where they are many."""
    there = [(group, [found[r.name] for r in group.records if r.name in found]) for group in known]
    there = [(group, places) for group, places in there if places]
    room = all(scales.width(group.name, drawing.SIZE) <= drawing.ROOM for group, _ in there)
    crowded = len(found) > FEW
    numbered = crowded and (len(there) > MAX_NAMED or not room)
    dots, rows = [], list[tuple[object, ...]]()
    for number, (group, places) in enumerate(there, 1):
        tag = str(number) if numbered else ""
        (across, wide), (up, high) = spread([p.x for p in places]), spread([p.y for p in places])
        if len(places) > 1:
            dots += [Dot(p.record.name, p.x, p.y, colour=group.place, size=RUN_SIZE) for p in places]
            ends = (across - wide, across + wide), (up - high, up + high)
            note = f"mean and standard deviation of {len(places)} runs"
            dots.append(Dot(group.name, across, up, *ends, group.place, note, tag, MEAN_SIZE))
        else:
            dots.append(Dot(group.name, across, up, places[0].x_interval, places[0].y_interval, group.place, "", tag))
        several = len(places) > 1
        rows.append((
            *([number] if numbered else []), titled(group.name, group.place), len(places),
            f"{100 * across:.2f}" + (f" ± {100 * wide:.2f}" if several else ""),
            (f"{up:.3f}" + (f" ± {high:.3f}" if several else "")).replace("-", "−"),
        ))  # fmt: skip
    height = 360 if crowded else 260
    chart = grid([charts.scatter(dots, title=TITLE, x=x, y="mean log-odds", unit_x="%", height=height)])
    if not crowded:
        return chart
    headers = (*(["no."] if numbered else []), "run", "runs", "training task, %", "mean log-odds")
    key = table(headers, rows, align="rlrrr" if numbered else "lrrr", classes=("key",))
    return Raw(f'<div class="beside">{chart}{key}</div>')


def _whole(record: Record) -> dict[str, dict[str, Any]]:
    """The sets with all their training images, by name."""
    return {entry["name"]: entry for entry in (record.transfer or {})["sets"] if entry["shots"] is None}


def _shared(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> tuple[dict[str, str], list[str]]:
    """The transfer sets that all runs have -> the probe; and those of which they have not the same images."""
    found, unlike = dict[str, str](), list[str]()
    for name in runs[0] if runs else ():
        probe = None if name in TRAINING else _probe([run.get(name) for run in runs])
        if probe is None:
            continue
        if len({run[name]["images"] for run in runs if "images" in run[name]}) > 1:
            unlike.append(name)
        else:
            found[name] = probe
    return found, unlike


def _probe(entries: Sequence[Mapping[str, Any] | None]) -> str | None:
    """The probe by which all runs can be compared on a set: the protocol's, else the first that all have."""
    there = [entry for entry in entries if entry is not None]
    if len(there) < len(entries) or not there:
        return None
    order = (results.usual(there[0]), *results.COMMON)
    return next((probe for probe in order if all(probe in entry["probes"] for entry in there)), None)


def _usual(entries: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str) -> str:
    return results.usual(next(iter(entries.values()))[name])


def _measure(
    records: Sequence[Record], entries: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> tuple[str, str] | None:
    """The accuracy on the training task that all of them have: of a probe, else the last one of the training; and the
    probe, "usual" where it is the protocol's."""
    for name in TRAINING:
        own = [entries[record.name].get(name) for record in records]
        probe = _probe(own)
        if probe is not None and own[0] is not None:
            return name, "usual" if probe == results.usual(own[0]) else probe
    for name in ACCURACIES:
        if records and all(record.last(name) is not None for record in records):
            return name, "usual"
    return None


def _training(
    record: Record, own: Mapping[str, Mapping[str, Any]], measure: tuple[str, str]
) -> tuple[float | None, Interval | None]:
    name, by = measure
    if name in ACCURACIES:
        return record.last(name), None
    top1 = own[name]["probes"][results.usual(own[name]) if by == "usual" else by]["top1"]
    return float(top1["mean"]), (float(top1["low"]), float(top1["high"]))
