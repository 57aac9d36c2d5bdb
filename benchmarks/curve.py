"""Training curves: from the metrics.jsonl of one or more runs to a JSON that can be compared and a PNG that can be
looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#6cc5b0")
RESULTS = Path(__file__).parent / "results"


def read(run: Path) -> dict[str, list[dict[str, float]]]:
    """Records of training and of evaluation, in the order of their steps; ``hours`` counts from the first record."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    if not records:
        raise SystemExit(f"curve: {run / 'metrics.jsonl'} holds no record yet")
    start = records[0]["time"]
    for record in records:
        record["hours"] = round((record.pop("time") - start) / 3600, 5)
    return {
        "train": [r for r in records if "train/loss" in r],
        "eval": [r for r in records if "eval/knn" in r],
    }


def write(runs: Sequence[Path], name: str, command: str, out: Path) -> list[Path]:
    """Write ``out/name.json`` and ``out/name.png``: the curve of one run, or of several side by side."""
    curves = {run.name: read(run) for run in runs}
    contents = [{"environment": _environment(run), "config": _without_paths(run), **curves[run.name]} for run in runs]
    if len(runs) == 1:
        content: dict[str, Any] = {"command": command, **contents[0]}
    else:
        content = {"command": command, "runs": dict(zip(curves, contents, strict=True))}
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [target, _plot(curves, name, out / f"{name}.png")]


def _environment(run: Path) -> Any:
    return json.loads((run / "env.json").read_text(encoding="utf-8"))


def _without_paths(run: Path) -> str:
    """The configuration without the folder of the machine it ran on."""
    lines = (run / "config.toml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("path = ")) + "\n"


def _plot(curves: Mapping[str, dict[str, list[dict[str, float]]]], name: str, target: Path) -> Path:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("curve: the picture needs matplotlib; pip install 'fastrex[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    lone = len(curves) == 1
    # One run: a colour per quantity. Several: a colour per run, runs that differ in their "-seed" alone share one.
    groups = {run: run.partition("-seed")[0] for run in curves}
    colours = dict(zip(dict.fromkeys(groups.values()), cycle(COLOURS), strict=False))
    named: set[str] = set()
    for run, curve in curves.items():
        group, colour = groups[run], colours[groups[run]]
        first = group not in named
        named.add(group)
        steps = [r["step"] for r in curve["train"]]
        left.plot(steps, [r["train/loss"] for r in curve["train"]], color=colour)
        if lone:
            top1 = [r["train/top1"] for r in curve["train"]]
            right.plot(steps, top1, color="#9498a0", label="top-1 over all crops, training")
        for key, words, own, dashes in (
            ("eval/knn", "k-NN, held out", "#ff725c", "-"),
            ("eval/top1", "prototypes, held out", "#3ca951", "--"),
        ):
            points = [(r["step"], r[key]) for r in curve["eval"] if key in r]
            if points:
                look = {"color": own} if lone else {"color": colour, "linestyle": dashes}
                label = words if lone else f"{group}: {words}" if first else None
                right.plot(*zip(*points, strict=True), marker="o", label=label, **look)
    left.set(title="training loss", xlabel="step")
    left.set_ylim(bottom=0)
    right.set(title="accuracy", xlabel="step", ylim=(0, 1))
    right.legend(loc="lower right" if lone else "upper left", frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
