"""What the trade-off experiment found: a table, a scatter, and sentences that the numbers themselves decide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import machine
from .files import write_json
from .tradeoff_data import NOVEL, SETS, TASK

TRANSFER = tuple(name for name in SETS if name != TASK)
TITLES = {TASK: "6 classes (task)", NOVEL: "4 new classes", "omniglot": "Omniglot", "digits": "digits"}
# Two-sided 95 % of Student's t, by degrees of freedom: with three seeds a difference has to be large to be one.
STUDENT = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Pairs (with, without) in the order of the method; the same seeds on both sides.
STEPS = (
    ("a quarter of the learning rate", "base-slow", "base"),
    ("four times the learning rate", "base-fast", "base"),
    ("multi-crop", "mc", "base"),
    ("cosine softmax", "cos", "mc"),
    *((f"projector of {depth} hidden layers", f"pr{depth}", "cos") for depth in range(4)),
    ("3 instead of 0 hidden layers", "pr3", "pr0"),
    ("OCM behind 1 hidden layer", "ocm1", "pr1"),
    ("OCM behind 3 hidden layers", "ocm3", "pr3"),
    ("all of it with 1 hidden layer", "ocm1", "base"),
    ("all of it with 3 hidden layers", "ocm3", "base"),
)
NOTES = (
    "All arms see the same images for the same number of steps, with the same learning rate and schedule; a step with "
    "multi-crop computes about twice as much as one without, and OCM adds a momentum encoder.",
    "±: 95 % interval of Student's t over the seeds' differences, each on its own: of twenty such intervals one is "
    "expected to leave out 0 by chance.",
    "The task is a probe fitted to images of the classes that the encoder was trained on, tested on others; transfer "
    f"is the mean log-odds of {len(TRANSFER)} sets.",
)


def content(
    runs: Sequence[Mapping[str, Any]], titles: Mapping[str, str], settings: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Everything that the files show: runs, means and deviations per arm, differences with their intervals."""
    arms = {
        name: {"title": title, **_summary([run for run in runs if run["arm"] == name])}
        for name, title in titles.items()
    }
    steps = [
        {"step": words, "with": new, "without": old, **_difference(runs, new, old)}
        for words, new, old in STEPS
        if new in titles and old in titles
    ]
    versions = machine.facts("cpu", "pooled")
    return {"command": command, "settings": dict(settings), "versions": versions, "arms": arms, "steps": steps} | {
        "conclusion": [sentence(step) for step in steps],
        "notes": list(NOTES),
        "runs": list(runs),
    }


def _axes(run: Mapping[str, Any]) -> dict[str, float]:
    """Where a run stands: accuracy of the linear probe on the task, mean log-odds over the transfer sets."""
    sets = run["sets"]
    odds = [sets[name]["logistic"]["log_odds"] for name in TRANSFER]
    return {"task": sets[TASK]["logistic"]["mean"], "transfer": statistics.fmean(odds)}


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns: dict[str, list[float]] = {}
    for run in runs:
        for name, value in _axes(run).items():
            columns.setdefault(name, []).append(value)
        for name in SETS:
            for probe in ("logistic", "knn"):
                columns.setdefault(f"{name}/{probe}", []).append(run["sets"][name][probe]["mean"])
    return {name: {"mean": statistics.fmean(values), "std": _std(values)} for name, values in columns.items()}


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _difference(runs: Sequence[Mapping[str, Any]], new: str, old: str) -> dict[str, Any]:
    """New less old, seed by seed: mean, half of the 95 % interval of Student's t, and in how many seeds it is up."""
    of = {(run["arm"], run["seed"]): _axes(run) for run in runs}
    seeds = sorted(seed for arm, seed in of if arm == new and (old, seed) in of)
    found: dict[str, Any] = {"seeds": len(seeds)}
    for axis in ("task", "transfer"):
        values = [of[new, seed][axis] - of[old, seed][axis] for seed in seeds]
        freedom = min(len(values), len(STUDENT)) - 1
        half = STUDENT[freedom] * _std(values) / math.sqrt(len(values)) if freedom else None
        found[axis] = {"mean": statistics.fmean(values), "half": half, "up": sum(value > 0 for value in values)}
    return found


def sentence(step: Mapping[str, Any]) -> str:
    """What a step did, in words that claim no more than its interval does."""

    def moved(axis: str, words: str, scale: float, unit: str) -> str:
        part = step[axis]
        if part["half"] is None:
            return f"{words} {scale * part['mean']:+.2f} {unit} with one seed, which says nothing sure"
        sure = abs(part["mean"]) > part["half"]
        way = ("raises" if part["mean"] > 0 else "lowers") if sure else "does not clearly move"
        return (
            f"{way} {words} ({scale * part['mean']:+.2f} ± {scale * part['half']:.2f} {unit}, up in {part['up']} of "
            f"{step['seeds']} seeds)"
        )

    task = moved("task", "accuracy on the task", 100, "points")
    transfer = moved("transfer", "transfer", 1, "log-odds")
    return f"{step['step']} ({step['with']} against {step['without']}): {task}; {transfer}."


def table(content: Mapping[str, Any]) -> str:
    """Markdown: an arm a line, linear probes in %, mean and deviation over the seeds."""

    def share(cell: Mapping[str, float]) -> str:
        return f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}"

    heads = ["", *(TITLES[name] for name in SETS), "mean transfer log-odds"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for arm in content["arms"].values():
        odds = arm["transfer"]
        cells = [share(arm[f"{name}/logistic"]) for name in SETS] + [f"{odds['mean']:.3f} ± {odds['std']:.3f}"]
        lines.append(f"| {arm['title']} | {' | '.join(cells)} |")
    found = [f"- {line}" for line in content["conclusion"]]
    return "\n".join([*lines, "", *found, "", *(f"* {line}" for line in content["notes"])])


def write(content: Mapping[str, Any], path: Path) -> None:
    """``path`` (JSON), and beside it the table (.md) and the scatter (.png)."""
    write_json(path, content)
    title = f"# Training task against transfer\n\n```bash\n{content['command']}\n```\n\n"
    path.with_suffix(".md").write_text(f"{title}{table(content)}\n", encoding="utf-8")
    _scatter(content, path.with_suffix(".png"))


def _scatter(content: Mapping[str, Any], target: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("tradeoff: the picture needs matplotlib; pip install 'fastrex[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    colours = {"base": "#6e7781", "mc": "#efb118", "cos": "#a463f2", "pr": "#4269d0", "ocm": "#3ca951"}
    for name, arm in content["arms"].items():
        colour = colours[name.partition("-")[0].rstrip("0123456789")]
        x, y = arm["task"], arm["transfer"]
        axis.errorbar(
            100 * x["mean"], y["mean"], xerr=100 * x["std"], yerr=y["std"], fmt="o", color=colour, capsize=3, alpha=0.9
        )
        axis.annotate(name, (100 * x["mean"], y["mean"]), xytext=(6, 5), textcoords="offset points", color=colour)
    projectors = [content["arms"][name] for name in content["arms"] if name.startswith("pr")]
    axis.plot(
        [100 * arm["task"]["mean"] for arm in projectors],
        [arm["transfer"]["mean"] for arm in projectors],
        color=colours["pr"], alpha=0.35,
    )  # fmt: skip
    axis.set(xlabel="accuracy on the training task (linear probe, %)", ylabel="mean transfer log-odds")
    axis.set_title(f"mean and deviation of {content['settings']['seeds']} seeds", fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110)
    plt.close(figure)
