"""All that a GPU can show, by one command within a given time: the tests, then kernels, loader, step and run.

Every part is one or more processes with a share of the time; what one leaves goes to those after it, and what one
breaks is its own. This process stays clear of torch and of the GPU: it starts them, ends them and reads their files.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import FOREIGN, ROOT, gpu_jobs, gpu_process, gpu_report
from .files import write_json
from .gpu_facts import Facts
from .gpu_jobs import Job, Part, Settings
from .gpu_process import Ended, Stop
from .gpu_report import Outcome

# Kept back of the whole time: to end the last part and to write the table.
RESERVE_S = 12.0
FACTS_S = 90.0
# Less is no time for a process that has to import torch.
LEAST_S = 3.0
OURS = {"cuda": "triton", "cpu": "cpp"}
Say = Callable[[str], None]


def run(settings: Settings, command: str, say: Say) -> int:
    """Measure, write the files, and give the exit code: 0 if everything that could run ran and no test failed, 2 if
    there is no GPU."""
    start = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    with gpu_process.asked_to_stop() as stop:
        facts = machine_facts(settings, stop)
        if settings.device == "cuda" and not facts.get("gpu"):
            why = facts.get("no_gpu", "torch.cuda.is_available() is False")
            print(f"gpu: this command needs a GPU that torch can use: {why}", file=sys.stderr)
            return 2
        outcomes = measure(settings, facts, start + 60 * settings.minutes - RESERVE_S, stop, command, say)
    say(write(settings, outcomes, facts, command))
    return 0 if all(one.state in ("done", "absent") for one in outcomes) else 1


def environment(settings: Settings, facts: Facts) -> dict[str, str]:
    """Of every child: a checkout works without being installed, and nothing of ours is built."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = [str(ROOT), str(ROOT / "kernels")] if __package__ == "benchmarks" else []
    path += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept |= {"PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in path if p)), "PYTHONUNBUFFERED": "1"}
    kept |= {"TMPDIR": str(settings.work), "MPLBACKEND": "Agg"}
    if not facts.get("cpp"):
        kept["FASTREX_NO_CPP"] = "1"
    if settings.data is None:
        kept["FASTREX_CACHE"] = str(settings.work / "cache")  # the images that are made do not last
    return kept


def machine_facts(settings: Settings, stop: Stop) -> Facts:
    """What the machine says about itself; without an answer, why there is none."""
    answer = settings.work / "facts.json"
    command = [sys.executable, "-m", f"{__package__}.gpu_facts", str(answer), settings.device]
    log = settings.out / "facts.log"
    ended = gpu_process.run(command, log, FACTS_S, environment(settings, {"cpp": True}), settings.work, stop)
    facts: Facts = {"device": settings.device, "packages": {}, "dali": False, "pytest": False, "pillow": False}
    facts |= {"cores": 1, "cases": [], "no_gpu": ended.why, "no_kernels": ended.why}
    found = _read(answer)
    return found if isinstance(found, dict) and not ended.why else facts


def measure(settings: Settings, facts: Facts, deadline: float, stop: Stop, command: str, say: Say) -> list[Outcome]:
    """Every part in turn. The table is written after each: whatever happens then, it holds what is known."""
    parts = gpu_jobs.parts(settings, facts)
    outcomes: list[Outcome] = []
    for place, part in enumerate(parts):
        weights = [other.weight for other in parts[place:] if not other.absent]
        if part.absent:
            outcomes.append(Outcome(part.name, "absent", part.absent))
            record = {"op": part.name, "error": f"absent: {part.absent}"}
            name = "tests" if part.name == "tests" else f"{part.name}-{settings.device}"
            write_json(settings.out / f"{name}.json", [record])
        else:
            share = max(deadline - time.monotonic(), 0.0) * part.weight / sum(weights)
            say(f"{part.name}: {share:.0f} s")
            outcomes.append(run_part(settings, facts, part, share, stop))
        say(f"{part.name}: {outcomes[-1].state} {outcomes[-1].headline or outcomes[-1].reason}")
        write(settings, outcomes, facts, command)
    return outcomes


def run_part(settings: Settings, facts: Facts, part: Part, share: float, stop: Stop) -> Outcome:
    """The jobs of a part within its share."""
    start = time.monotonic()
    outcome = Outcome(part.name, "done", share=share)
    try:
        jobs = part.jobs(share)
    except Exception as error:
        outcome.state, outcome.reason = "failed", f"{type(error).__name__}: {error}"
        return outcome
    for name in {job.target for job in jobs if job.target}:
        (settings.out / name).unlink(missing_ok=True)
    ends: list[tuple[Job, Ended]] = []
    for place, job in enumerate(jobs):
        left = share - (time.monotonic() - start)
        rest = sum(other.weight for other in jobs[place:] if not other.extra)
        limit = left if job.extra else left * job.weight / rest
        log = settings.out / f"{job.name}.log"
        if stop or left < LEAST_S:
            ended = Ended(0, 0.0, True, "")
        else:
            env = environment(settings, facts) | job.env
            ended = gpu_process.run(job.command, log, limit, env, settings.work, stop)
        ends.append((job, ended))
        _collect(settings, job)
    outcome.seconds = time.monotonic() - start
    _judge(settings, facts, outcome, ends, stop)
    return outcome


def _collect(settings: Settings, job: Job) -> None:
    """Add what a job has written to its target."""
    if job.record is None:
        return
    found, target = _read(job.record), settings.out / job.target
    if isinstance(found, list):
        write_json(target, [*(_read(target) or ()), *found])
    elif found is not None:
        write_json(target, found)


def _judge(settings: Settings, facts: Facts, outcome: Outcome, ends: Sequence[tuple[Job, Ended]], stop: Stop) -> None:
    """State, reason and figures of a part whose jobs are over."""
    names = dict.fromkeys(job.target for job, _ in ends if job.target)
    files = {name: _read(settings.out / name) for name in names}
    if outcome.part == "tests":
        (answer,) = files.values()
        outcome.headline, outcome.details, well = gpu_report.tests(answer or {})
    elif outcome.part == "kernels":
        (records,) = files.values()
        log = "\n".join(_text(settings.out / f"{job.name}.log") for job, _ in ends)
        known, ours = len(facts["cases"]), OURS[settings.device]
        outcome.headline, outcome.details, well = gpu_report.kernels(records or [], log, known, ours)
    else:
        stem = f"{outcome.part}-{settings.device}"
        named = {name.removeprefix(stem).removesuffix(".json").strip("-"): files[name] or [] for name in names}
        outcome.headline, outcome.details, well = gpu_report.speeds(named)
    wrong = [f"{job.name} {ended.why}" for job, ended in ends if ended.why and not ended.late]
    late = [f"{job.name} {ended.why}" for job, ended in ends if ended.late and not job.extra]
    if outcome.part == "tests" and outcome.details:
        wrong = []  # its exit code says no more than the failures that are told
    # Without a record of a step there is none to be had in no time; anything else that is missing is a failure.
    if wrong or not (well or (late and outcome.part not in ("tests", "kernels"))):
        outcome.state = "failed"
    elif late:
        outcome.state = "out of time"
    outcome.reason = "; ".join([f"interrupted by signal {stop.signal}"] * bool(stop) + wrong + late)


def write(settings: Settings, outcomes: Sequence[Outcome], facts: Mapping[str, Any], command: str) -> str:
    """Write gpu.json and gpu.md; the latter's text."""
    machine = {name: value for name, value in facts.items() if name != "cases"}
    content = {"command": command, "machine": machine, "parts": [one.to_dict() for one in outcomes]}
    write_json(settings.out / "gpu.json", content)
    text = gpu_report.table(outcomes, facts, command)
    (settings.out / "gpu.md").write_text(text, encoding="utf-8")
    return text


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""
