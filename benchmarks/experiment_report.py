"""What an experiment found: a table, a scatter, and sentences that the numbers themselves decide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import machine
from .experiment import Experiment
from .experiment_data import NOVEL, SETS, TASK
from .files import write_json

TRANSFER = tuple(name for name in SETS if name != TASK)
TITLES = {TASK: "6 classes (task)", NOVEL: "4 new classes", "omniglot": "Omniglot", "digits": "digits"}
# Two-sided 95 % of Student's t, by degrees of freedom: with three seeds a difference has to be large to be one.
STUDENT = (0.0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# What every experiment's reader must know.
AXES = (
    "The task is a probe fitted to images of the classes that the encoder was trained on, tested on others; transfer "
    f"is the mean log-odds of {len(TRANSFER)} sets."
)


def content(
    experiment: Experiment, runs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Everything that the files show: runs, means and deviations per arm, differences with their intervals.

    ``settings`` has at least the ``epochs`` of an arm of one stage.
    """
    there = {run["arm"] for run in runs}
    arms = {
        arm.name: {"title": arm.title, **_summary([run for run in runs if run["arm"] == arm.name])}
        for arm in experiment.arms
        if arm.name in there
    }
    steps = [
        {"step": words, "with": new, "without": old, **_difference(runs, new, old)}
        for words, new, old in experiment.steps
        if {new, old} <= there
    ]
    stages = {
        arm.name: list(experiment.epochs(arm, settings["epochs"]))
        for arm in experiment.arms
        if arm.name in there and arm.start
    }
    commits = sorted({commit for run in runs for commit in run["commits"]})
    versions = machine.facts("cpu", "pooled")
    return {"command": command, "settings": dict(settings), "versions": versions, "commits": commits} | {
        "arms": arms,
        "steps": steps,
        "stages": stages,
        "conclusion": [sentence(step) for step in steps],
        "notes": [*experiment.notes, *_notes(experiment, steps, stages, commits), AXES],
        "runs": list(runs),
    }


def _notes(
    experiment: Experiment, steps: Sequence[Mapping[str, Any]], stages: Mapping[str, Sequence[int]], commits: list[str]
) -> list[str]:
    """What a reader must know that hangs on what was run."""
    notes = [
        f"{name}: {before} of the {before + after} epochs are those of {experiment.arm(name).start}, {after} its own."
        for name, (before, after) in stages.items()
    ]
    if intervals := sum(step[axis]["half"] is not None for step in steps for axis in ("task", "transfer")):
        notes.append(
            "±: 95 % interval of Student's t over the seeds' differences, each on its own: if nothing made a "
            f"difference, {0.05 * intervals:.2g} of the {intervals} intervals would still be expected to leave out 0."
        )
    if len(commits) > 1:
        notes.append(f"The trainings are of {len(commits)} commits: {', '.join(commits)}.")
    return notes


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


def write(experiment: Experiment, content: Mapping[str, Any], path: Path) -> None:
    """``path`` (JSON), and beside it the table (.md) and the scatter (.png)."""
    write_json(path, content)
    title = f"# {experiment.title}\n\n```bash\n{content['command']}\n```\n\n"
    path.with_suffix(".md").write_text(f"{title}{table(content)}\n", encoding="utf-8")
    _scatter(experiment, content, path.with_suffix(".png"))


def _scatter(experiment: Experiment, content: Mapping[str, Any], target: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(f"{experiment.name}: the picture needs matplotlib; pip install 'fastrex[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for name, arm in content["arms"].items():
        colour = experiment.arm(name).colour
        x, y = arm["task"], arm["transfer"]
        axis.errorbar(
            100 * x["mean"], y["mean"], xerr=100 * x["std"], yerr=y["std"], fmt="o", color=colour, capsize=3, alpha=0.9
        )
        axis.annotate(name, (100 * x["mean"], y["mean"]), xytext=(6, 5), textcoords="offset points", color=colour)
    if line := [content["arms"][name] for name in experiment.joined if name in content["arms"]]:
        axis.plot(
            [100 * arm["task"]["mean"] for arm in line],
            [arm["transfer"]["mean"] for arm in line],
            color=experiment.arm(experiment.joined[0]).colour,
            alpha=0.35,
        )
    axis.set(xlabel="accuracy on the training task (linear probe, %)", ylabel="mean transfer log-odds")
    axis.set_title(f"mean and deviation of {content['settings']['seeds']} seeds", fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110)
    plt.close(figure)
