"""What the parts of the command for a GPU have found, as one table: read back from the files that they left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Record = dict[str, Any]
MAX_LINES = 40
OURS = "fastrex"


@dataclass
class Outcome:
    """One part. ``state``: done, failed, absent or out of time, and ``reason`` why; ``seconds`` of ``share``;
    ``headline``: its figures in a few words; ``details``: lines below the table."""

    part: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    share: float = 0.0
    headline: str = ""
    details: list[str] = field(default_factory=list)

    def to_dict(self) -> Record:
        return asdict(self)


def tests(answer: Mapping[str, Any]) -> tuple[str, list[str], bool]:
    """(headline, details, whether all is well) of the tests."""
    counts: dict[str, int] = answer.get("counts", {})
    headline = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name in ("passed", "failed"))
    failures = [f"{test['id']}: {test['text']}" for test in answer.get("tests", ()) if test["outcome"] == "failed"]
    return headline, [*failures, *answer.get("errors", ())], not failures


def kernels(records: Sequence[Record], log: str, known: int, ours: str) -> tuple[str, list[str], bool]:
    """(headline, details, whether ours has a figure in every case) of the kernels; ``known``: cases there are."""
    verdicts = list(_verdicts(log))
    cases = {(r["op"], r["case"], r["dtype"]) for r in records}
    without = {
        f"{ours} has no time: {r['op']} {r['case']} {r['dtype']}: {_why(r)}"
        for r in records
        if r["impl"] == ours and r["ms_p50"] is None
    }
    missed = [f"{case}: {verdict}" for case, verdict in verdicts if ": met, " not in verdict]
    bars = f"bars: {len(verdicts) - len(missed)} of {len(verdicts)} met; " if verdicts else ""
    wrong = f"; {len(without)} without a time" if without else ""
    absent = sorted({f"{r['impl']} is {r['error']}" for r in records if _is_absent(r) and r["impl"] != ours})
    return f"{bars}{len(cases)} of {known} cases measured{wrong}", [*sorted(without), *missed, *absent], not without


def _verdicts(log: str) -> Iterator[tuple[str, str]]:
    """(case, sentence on a bar) from what ``kernels`` prints, as far as it came."""
    case = ""
    for line in log.splitlines():
        if heading := re.fullmatch(r"(\S+ .+ \S+ \S+) \((?:cuda|cpu, .+)\)", line):
            case = heading[1]
        elif re.match(r"bars? .*: (met|missed), ", line):
            yield case, line


def _is_absent(record: Record) -> bool:
    return str(record.get("error")).startswith("absent: ")


def _why(record: Record) -> str:
    if _is_absent(record):
        return str(record["error"]).removeprefix("absent: ")
    return f"its error {record['error']:.1e} is beyond its budget {record['error_budget']:.1e}"


def speeds(named: Mapping[str, Sequence[Record]]) -> tuple[str, list[str], bool]:
    """(headline, details, whether ours has a figure everywhere) of records with images per second, by what was set."""
    words, details, well = [], [], True
    for name, records in named.items():
        wholes = [r for r in records if r.get("stage") is None and "impl" in r]
        found = {r["impl"]: r["images_per_s_p50"] for r in wholes if r.get("images_per_s_p50") is not None}
        ours = found.get(OURS)
        well &= ours is not None
        told = [_speed(impl, speed, None if impl == OURS else ours) for impl, speed in found.items()]
        # Of a whole run: what is left of the speed that its step has alone.
        told += [f"{r['ratio']:.1%} of its step" for r in wholes if r.get("step_images_per_s_p50")]
        if told:
            words.append(f"{name + ': ' if name else ''}images/s: {', '.join(told)}")
        details += [f"{name + ': ' if name else ''}{r['impl']} is {r['error']}" for r in wholes if r.get("error")]
    return "; ".join(words), list(dict.fromkeys(details)), well


def _speed(impl: str, speed: float, ours: float | None) -> str:
    return f"{impl} {speed:,.0f}" + (f" (we are {ours / speed:.2f}x)" if ours else "")


def table(outcomes: Iterable[Outcome], machine: Mapping[str, Any], command: str) -> str:
    """The page in Markdown."""
    outcomes = list(outcomes)
    lines = [f"# {machine.get('gpu') or machine.get('device')}", "", _about(machine), "", f"`{command}`", ""]
    lines += ["| part | state | time | result |", "|---|---|---|---|"]
    for one in outcomes:
        spent = f"{one.seconds:.0f} of {one.share:.0f} s" if one.share else ""
        said = "; ".join(text for text in (one.headline, one.reason) if text)
        lines.append(f"| {one.part} | {one.state} | {spent} | {said.replace('|', '/')} |")
    for one in outcomes:
        if one.details:
            lines += ["", f"{one.part}:", *(f"- {line}" for line in one.details[:MAX_LINES])]
            if len(one.details) > MAX_LINES:
                lines.append(f"- and {len(one.details) - MAX_LINES} more")
    return "\n".join(lines) + "\n"


def _about(machine: Mapping[str, Any]) -> str:
    packages = {name: text for name, text in machine.get("packages", {}).items() if text}
    facts = [f"{name} {text}" for name, text in packages.items()]
    for name in ("driver", "cuda", "cudnn", "clocks", "python", "commit"):
        if machine.get(name):
            facts.append(f"{name} {machine[name]}")
    return ", ".join(facts)
