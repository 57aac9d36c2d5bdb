"""Curves of training and of the bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import charts
from ..charts import Bar, Series
from .groups import Group, groups, many, spread
from .page import Section, grid
from .record import Curve, Record

SMOOTH = 0.02  # share of a curve that a running mean goes over
# What is logged, its title, unit, and how it is drawn.
TRAINING: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("train/loss", "Loss", "", {"smooth": SMOOTH}),
    ("train/lr", "Learning rate", "", {"zero": True}),
    ("train/grad_norm", "Gradient norm", "", {"log_y": True, "smooth": SMOOTH}),
    ("perf/images_per_s", "Speed", "images/s", {"zero": True, "smooth": SMOOTH}),
    ("perf/data_wait", "Waiting for data", "%", {"zero": True, "smooth": SMOOTH}),
    ("train/loss_scale", "Loss scale (fp16)", "", {"log_y": True}),
)
ACCURACY: tuple[tuple[str, str], ...] = (
    ("eval/top1", "held out, own classifier"),
    ("eval/knn", "held out, k-NN"),
    ("train/top1", "training crops"),
)
BANK: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("bank/empty_classes", "Empty classes", "", {"zero": True}),
    ("bank/age", "Mean age of an entry", "steps", {"zero": True}),
    ("bank/filled", "Filled slots of the queue", "%", {"zero": True}),
    ("train/without_positive", "Crops without a positive", "%", {"zero": True, "smooth": SMOOTH}),
    ("train/class_change", "", "l2", {"log_y": True, "smooth": SMOOTH}),
)
# What the change of the class vectors is called, by whether they are prototypes of a bank; None: of runs of both kinds.
DRIFT = {
    True: "Drift: change of prototypes per step",
    False: "Change of class weights per step",
    None: "Drift: change of class vectors per step",
}


def training(records: Sequence[Record]) -> Section:
    """Loss, accuracies, learning rate, gradient, speed."""
    drawn = _charts(records, TRAINING[:1])
    if len(records) == 1:
        named = [(label, records[0].curves[key]) for key, label in ACCURACY if key in records[0].curves]
        if named:
            # The fine curve of the training crops comes last, so that the palette's first colours are the results.
            series = [Series(label, curve) for label, curve in named]
            drawn.append(charts.lines(series, title="Top-1 accuracy", unit="%", smooth=SMOOTH))
    else:
        named_charts = tuple((key, f"Top-1, {label}", "%", {"smooth": SMOOTH}) for key, label in ACCURACY)
        drawn += _charts(records, named_charts)
    drawn += _charts(records, TRAINING[1:])
    if not drawn:
        return Section("curves", "Training", omitted=_why(records, "curves"))
    faint = (
        "the runs, smoothed. Strong: the mean of those that differ only in the seed"
        if many(records)
        else ("as logged. Strong: running mean over 2 % of the points")
    )
    note = f"Faint: {faint}. A red cross: the value was not finite."
    if many(records):
        note += " Bars: of runs measured once, their mean and standard deviation."
    return Section("curves", "Training", grid(drawn), note, _why(records, "curves"))


def bank(records: Sequence[Record]) -> Section:
    """The health of class prototypes or weights, where the objective logs it."""
    drawn = _charts(records, BANK)
    if not drawn:
        return Section("bank", "Bank and class vectors", omitted=("Bank: none of the runs has logged any of it.",))
    note = (
        "An empty class has no entry in the bank and is a neutral competitor; a crop without a positive has no loss. "
        "The change is the mean l2 distance of "
        "the normalised class vectors before and after a step: how far the prototypes of a bank drift, and the same "
        "of learnt class weights."
    )
    return Section("bank", "Bank and class vectors", grid(drawn), note)


def _charts(records: Sequence[Record], kinds: Sequence[tuple[str, str, str, dict[str, Any]]]) -> list[str]:
    drawn = []
    for key, title, unit, how in kinds:
        found = [(group, [r for r in group.records if key in r.curves]) for group in groups(records)]
        there = [(group, members) for group, members in found if members]
        if not there:
            continue
        banked = {_banked(r) for _, members in there for r in members}
        series = []
        for group, members in there:
            name = group.name
            if not title and len(banked) > 1:
                name += f" ({'prototypes' if _banked(members[0]) else 'weights'})"
            # A run, or what runs have in common, keeps its colour in all charts.
            curves = [r.curves[key] for r in members]
            mean = curves[0] if len(curves) == 1 else _mean(curves)
            series.append(Series(name, mean, group.place, curves if len(curves) > 1 else ()))
        shown = title or DRIFT[banked.pop() if len(banked) == 1 else None]
        if len(records) > 1 and (
            bars := _bars([(group, [r.curves[key] for r in members]) for group, members in there])
        ):
            drawn.append(charts.bars(bars, title=shown, unit=unit))
            continue
        drawn.append(charts.lines(series, title=shown, unit=unit, legend=len(records) > 1, **how))
    return drawn


def _bars(there: Sequence[tuple[Group, Sequence[Curve]]]) -> list[Bar]:
    """Runs of which each has been measured once, as at their ends: curves of one point say less. Else none."""
    if any(len(curve) != 1 or not curve.finite() for _, curves in there for curve in curves):
        return []
    bars = []
    for group, curves in there:
        mean, deviation = spread([value for curve in curves for _, value in curve.finite()])
        interval = (mean - deviation, mean + deviation) if len(curves) > 1 else None
        bars.append(Bar(group.name, mean, interval, group.place))
    return bars


def _banked(record: Record) -> bool:
    """Whether the class vectors are prototypes of a bank: then its health is logged."""
    return "bank/age" in record.curves or "bank/empty_classes" in record.curves


def _mean(curves: Sequence[Curve]) -> list[tuple[float, float | None]]:
    """The mean of curves where all of them go on, each with its last value at or before a step; no number where one
    has none."""
    known = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    first, last = max(map(min, known)), min(map(max, known))
    steps = np.array(sorted({step for values in known for step in values if first <= step <= last}))
    total = np.zeros(len(steps))
    for values in known:
        own = np.array(sorted(values))
        total += np.array([values[step] for step in own])[np.searchsorted(own, steps, side="right") - 1]
    return list(zip(steps.tolist(), (total / len(known)).tolist(), strict=True))


def _why(records: Sequence[Record], what: str) -> tuple[str, ...]:
    lines = []
    for record in records:
        if not record.curves:
            why = record.missing.get("metrics.jsonl", "metrics.jsonl has no whole line yet")
            lines.append(f"{what.capitalize()} of {record.name}: {why}.")
    return tuple(lines)
