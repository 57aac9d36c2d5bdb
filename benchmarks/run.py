"""A training run from end to end beside its step alone: how much of the step's speed the loader leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastrex import config as config_module
from fastrex import rundir
from fastrex.errors import FastrexError

from . import loader, measure
from .processes import Answer, Team
from .run_worker import Spec
from .step import Record

KEYS = (
    "op", "impl", "allocator", "device", "threads", "batch", "crops", "model", "objective", "bn", "precision",
    "images_per_s_p20", "images_per_s_p50", "images_per_s_p80", "step_images_per_s_p50", "ratio", "data_wait",
    "parts_ms", "rounds", "step_rounds", "notices", "data", "versions", "commit", "command",
)  # fmt: skip
ROUND_S = 10.0
SPLIT_STEPS = 5
# End to end over step, on a GPU.
BAR = 0.95


@dataclass(frozen=True)
class Settings(loader.Settings):
    """What is measured; ``seconds`` are those of all phases together."""

    batch: int = 8
    seconds: float = 60.0


def run(settings: Settings, say: Callable[[str], None] = lambda _: None) -> list[Record]:
    """Measure in phases that alternate; one record.

    Raises:
        FastrexError: unusable data or settings, or a run that ended.
    """
    config = config_module.load(settings.recipe, settings.configuration)
    allocator = "pooled" if settings.device == "cpu" else "cuda"
    spec = Spec(settings.recipe, settings.configuration, settings.device, settings.threads, allocator)
    ends: list[Answer] = []
    kept: list[Answer] = []
    count = max(1, round(settings.seconds / ROUND_S / 4)) * 2
    with tempfile.TemporaryDirectory() as folder:
        team = Team("the run", "run_worker", [spec.to_json()], folder, [{"OMP_NUM_THREADS": str(settings.threads)}])
        try:
            say("starting the run")
            start = ask(team, "start")
            for number in range(count):
                for phase in measure.order(["end_to_end", "kept"], number):
                    say(f"phase {number + 1} of {count}: {phase}")
                    answers = ends if phase == "end_to_end" else kept
                    answers.append(ask(team, phase, seconds=settings.seconds / count / 2))
            say("parts of a step")
            split = ask(team, "parts", steps=SPLIT_STEPS)
        finally:
            team.close()
    whole, alone = speeds(ends), speeds(kept)
    median, step = measure.quantile(whole, 0.5), measure.quantile(alone, 0.5)
    record: Record = dict.fromkeys(KEYS) | {
        "op": "run", "impl": "fastrex", "allocator": allocator, "device": settings.device, "threads": settings.threads,
        "batch": settings.batch, "crops": config.data.crops_text, "model": config.model.arch,
        "objective": config.objective.name, "bn": start["bn"], "precision": start["precision"],
        "notices": start["notices"],
        **{f"images_per_s_p{p}": round(measure.quantile(whole, p / 100), 3) for p in (20, 50, 80)},
        "step_images_per_s_p50": round(step, 3), "ratio": round(median / step, 4),
        "data_wait": round(sum(a["wait_s"] for a in ends) / sum(a["seconds"] for a in ends), 4),
        "parts_ms": split["parts"], "rounds": [round(s, 3) for s in whole], "step_rounds": [round(s, 3) for s in alone],
        "data": {key: start[key] for key in ("images", "classes")}, "commit": rundir.commit(),
        "versions": {"fastrex": rundir.version(), **start["facts"]}, "command": settings.command,
    }  # fmt: skip
    return [record]


def ask(team: Team, do: str, **more: Any) -> Answer:
    """The answer of the one process. FastrexError where there is none."""
    (answer,) = team.ask(do, **more)
    if "absent" in answer:
        raise FastrexError(f"bench run: {answer['absent']}")
    return answer


def speeds(phases: Sequence[Answer]) -> list[float]:
    """Images per second of each."""
    return [phase["images"] / phase["seconds"] for phase in phases]


def table(records: Sequence[Record]) -> str:
    """Both rates, where the time of a step goes, and the bar."""
    (record,) = records
    place = f"cpu, {record['threads']} threads" if record["device"] == "cpu" else "cuda"
    data, spread = record["data"], f"{record['images_per_s_p20']:.2f} to {record['images_per_s_p80']:.2f}"
    lines = [
        f"\nrun ({place}): {record['model']}, {record['crops']} crops, batches of {record['batch']}, "
        f"{record['objective']}, bn {record['bn']}, {record['precision']}",
        f"{data['images']} images of {data['classes']} classes",
        f"{'end to end':<22}{record['images_per_s_p50']:>11.2f} images/s  ({spread}), "
        f"{record['data_wait']:.1%} of the time waiting for data",
        f"{'step, batch kept':<22}{record['step_images_per_s_p50']:>11.2f} images/s",
        f"{'end to end / step':<22}{record['ratio']:>11.1%}",
        "",
        *(f"{part:<22}{taken:>11.2f} ms of a step" for part, taken in record["parts_ms"].items()),
    ]
    return "\n".join([*lines, *verdicts(records)])


def verdicts(records: Sequence[Record]) -> list[str]:
    """Whether the bar of a GPU is met."""
    return [
        f"bar {BAR:.0%} of the step's rate: {'met' if r['ratio'] >= BAR else 'missed'}, reached {r['ratio']:.1%}"
        for r in records
        if r["device"] == "cuda"
    ]
