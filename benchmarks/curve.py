"""The training curve of one run: from its metrics.jsonl to a JSON that can be compared and a PNG that can be looked
at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def write(run: Path, name: str, command: str, out: Path) -> list[Path]:
    """Write ``out/name.json`` and ``out/name.png``."""
    curve = read(run)
    content: dict[str, Any] = {
        "command": command,
        "environment": json.loads((run / "env.json").read_text(encoding="utf-8")),
        "config": _without_paths((run / "config.toml").read_text(encoding="utf-8")),
        **curve,
    }
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [target, _plot(curve, name, out / f"{name}.png")]


def _without_paths(text: str) -> str:
    """The configuration without the folder of the machine it ran on."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("path = ")) + "\n"


def _plot(curve: dict[str, list[dict[str, float]]], name: str, target: Path) -> Path:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("curve: the picture needs matplotlib; pip install 'fastrex[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [r["step"] for r in curve["train"]]
    left.plot(steps, [r["train/loss"] for r in curve["train"]], color="#4269d0")
    left.set(title="training loss", xlabel="step")
    left.set_ylim(bottom=0)
    right.plot(
        steps, [r["train/top1"] for r in curve["train"]], color="#9498a0", label="top-1 over all crops, training"
    )
    for key, label, color in (
        ("eval/knn", "k-NN, held out", "#ff725c"),
        ("eval/top1", "prototypes, held out", "#3ca951"),
    ):
        points = [(r["step"], r[key]) for r in curve["eval"] if key in r]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=label, color=color)
    right.set(title="accuracy", xlabel="step", ylim=(0, 1))
    right.legend(loc="lower right", frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(name)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
