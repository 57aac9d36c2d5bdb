"""What the runs are: state and results at a glance, differences between settings, what they ran on, what happened."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .. import config as config_module
from .. import objectives
from ..config import Config
from ..errors import FastrexError
from ..markup import Raw, table, text
from ..settings import toml_value
from .groups import groups, places
from .page import Section, count, percent, titled
from .record import Record, inside, whole, word

STATES = {"completed": "good", "failed": "bad", "diverged": "bad", "killed": "bad"}
ABSENT = "–"
MAX_VALUES = 6  # of runs in one column
# Names, and what each of the runs below has.
Columns = list[tuple[object, list[dict[str, str]]]]
# What a reader of the log looks for.
NOTABLE = re.compile(r"left out|replaced|cannot|damaged|fail|diverged|overflow|preempted|resumed|has changed|bad", re.I)


def overview(records: Sequence[Record]) -> str:
    """State, progress and best results: figures for a lone run, a table for several."""
    if len(records) > 1:
        headers = ("run", "state", "step", "recipe", "objective", "top-1", "k-NN", "images/s", "encoder")
        rows = [
            (titled(r.name, i), _state(r), _steps(r), _recipe(r), _method(r),
             percent(_value(r.best("eval/top1"))), percent(_value(r.best("eval/knn"))), _speed(r), _encoder(r))
            for i, r in zip(places(records), records, strict=True)
        ]  # fmt: skip
        failures = "".join(_failure(r, f"{r.name}: ") for r in records)
        return table(headers, rows, align="llrllrrrl", classes=("overview",)) + failures
    (record,) = records
    facts = [
        ("state", _state(record), _when(record)),
        ("step", _steps(record), _epochs(record)),
        ("recipe", _recipe(record), _method(record)),
        ("best held-out top-1", *_best(record, "eval/top1")),
        ("best held-out k-NN", *_best(record, "eval/knn")),
        ("speed", f"{_speed(record)} images/s", _hardware(record)),
        ("encoder", _encoder(record), _exported(record)),
    ]
    items = "".join(
        f"<div><dt>{name}</dt><dd>{_cell(value)}<small>{_cell(more)}</small></dd></div>" for name, value, more in facts
    )
    return f'<dl class="facts">{items}</dl>{_failure(record)}'


def settings(records: Sequence[Record]) -> Section:
    """Settings that differ between the runs, or between a lone run and its recipe; all of them behind a click."""
    title, omitted = "Configuration", []
    known = [r for r in records if r.config is not None]
    for record in records:
        if record.config is None:
            omitted.append(f"Configuration of {record.name}: {record.missing.get('config.toml', 'it is not there')}.")
    if not known:
        return Section("config", title, omitted=tuple(omitted))
    columns: Columns
    if len(records) > 1:
        columns = _columns(records, {r.name: _items(r.config) for r in known})
        note = "Settings that differ between the runs."
    else:
        published = _published(known[0].config)
        if published is None:
            omitted.append("Differences from the recipe: it is none of those that come with fastrex.")
        columns = [("this run", [_items(known[0].config)])]
        if published is not None:
            columns.append((f"recipe {published.recipe}", [_items(published)]))
        note = "Settings that differ from the recipe's published values."
    keys = _keys(columns)
    differ = [key for key in keys if _differs(columns, key)]
    compared = sum(len(runs) for _, runs in columns) > 1
    body = ""
    if compared and differ:
        body = _settings_table(columns, differ)
    elif compared:
        note = "All settings are the same." if len(records) > 1 else "All settings are those of the recipe."
    else:
        note = ""
    whole_table = _settings_table(columns if len(records) > 1 else columns[:1], keys)
    return Section(
        "config", title, f"{body}<details><summary>all settings</summary>{whole_table}</details>", note, tuple(omitted)
    )


def environment(records: Sequence[Record]) -> Section:
    """Versions and hardware: what differs between the runs, and what they have in common."""
    omitted = tuple(
        f"Environment of {r.name}: {r.missing.get('env.json', 'env.json is empty')}."
        for r in records
        if not r.environment
    )
    columns = _columns(records, {r.name: _flat(r.environment) for r in records if r.environment})
    if not columns:
        return Section("environment", "Environment", omitted=omitted)
    keys = _keys(columns)
    same = [key for key in keys if not _differs(columns, key)]
    rows = [(key, *(_common(runs, key) for _, runs in columns)) for key in keys if key not in same]
    body = table(("", *(name for name, _ in columns)), rows, classes=("settings",)) if rows else ""
    pairs = "".join(f"<div><dt>{text(key)}</dt><dd>{text(columns[0][1][0][key])}</dd></div>" for key in same)
    note = "What differs between the runs, then what is the same." if rows else ""
    return Section("environment", "Environment", f'{body}<dl class="pairs">{pairs}</dl>', note, omitted)


def events(records: Sequence[Record]) -> Section:
    """What train.log says beside the progress: starts, resumes, files left out, warnings."""
    parts, omitted = [], []
    for i, record in zip(places(records), records, strict=True):
        if not record.lines:
            why = record.missing.get("train.log", "train.log has no such line yet")
            omitted.append(f"Events of {record.name}: {why}.")
            continue
        rows = [
            (time.replace("T", " "), Raw(f"<b>{text(line)}</b>") if NOTABLE.search(line) else line)
            for time, line in record.lines
        ]
        body = table((), rows, classes=("log",))
        if record.dropped:
            body = Raw(f'<p class="dim">{record.dropped} lines between the first and the last are left out.</p>{body}')
        if len(records) > 1:
            name = titled(record.name, i)
            body = Raw(f"<details><summary>{name}: {len(record.lines)} lines</summary>{body}</details>")
        parts.append(body)
    note = "train.log without its progress lines; bold: what may need a look."
    return Section("events", "Events", "".join(parts), note if parts else "", tuple(omitted))


def _state(record: Record) -> Raw:
    state = word(record.status, "state") or "unknown"
    return Raw(f'<span class="{STATES.get(state, "")}">{text(state)}</span>')


def _when(record: Record) -> str:
    return word(record.status, "time").replace("T", " ").replace("Z", " UTC") or record.missing.get("status.json", "")


def _failure(record: Record, before: str = "") -> str:
    error = word(record.status, "error")
    return f'<p class="failure">{text(before + error)}</p>' if error else ""


def _total(record: Record) -> int | None:
    per_epoch = record.steps_per_epoch
    return None if per_epoch is None or record.config is None else per_epoch * record.config.optim.epochs


def _steps(record: Record) -> str:
    total = _total(record)
    return count(record.step) + (f" of {count(total)}" if total is not None and record.step is not None else "")


def _epochs(record: Record) -> str:
    epoch = record.last("train/epoch")
    total = f" of {record.config.optim.epochs}" if record.config else ""
    return "" if epoch is None else f"epoch {epoch:.4g}{total}"


def _recipe(record: Record) -> str:
    return record.config.recipe if record.config else "unknown"


def _method(record: Record) -> str:
    if record.config is None:
        return ""
    return f"{record.config.objective.name}, {record.config.model.arch}, {record.config.projector.text}"


def _value(point: tuple[float, float] | None) -> float | None:
    return point[1] if point else None


def _best(record: Record, name: str) -> tuple[str, str]:
    best, images = record.best(name), record.last("eval/images")
    if best is None:
        return ABSENT, "not evaluated"
    return percent(best[1]), f"at step {count(best[0])}" + (f", {count(images)} images" if images else "")


def _speed(record: Record) -> str:
    """The median: starts and evaluations are no part of it."""
    curve = record.curves.get("perf/images_per_s")
    rates = [value for _, value in curve.finite()] if curve else []
    return count(statistics.median(rates)) if rates else ABSENT


def _hardware(record: Record) -> str:
    gpus, ranks = inside(record.environment, "gpus"), whole(record.environment, "world_size") or 1
    device = str(gpus[0]) if isinstance(gpus, list) and gpus else word(record.environment, "device")
    return f"{ranks} × {device}" if device else ""


def _encoder(record: Record) -> str:
    return "export/" if (record.path / "export" / "model.safetensors").is_file() else ABSENT


def _exported(record: Record) -> str:
    return "model.safetensors" if _encoder(record) != ABSENT else "not exported yet"


def _items(config: Config | None) -> dict[str, str]:
    return {f"{s}.{k}": toml_value(v) for s, k, v, _ in config_module.items(config)} if config else {}


def _published(config: Config | None) -> Config | None:
    """The recipe as it comes with fastrex. Only a name of these is looked for: a run may be somebody else's."""
    if config is None or config.recipe not in config_module.recipes():
        return None
    try:
        return objectives.resolve(config_module.load(config.recipe))
    except FastrexError:
        return None


def _columns(records: Sequence[Record], known: Mapping[str, dict[str, str]]) -> Columns:
    """A column for each group of runs of which any is ``known``."""
    found = [(g, [known[r.name] for r in g.records if r.name in known]) for g in groups(records)]
    return [(titled(g.name, g.place), runs) for g, runs in found if runs]


def _keys(columns: Columns) -> list[str]:
    return list(dict.fromkeys(key for _, runs in columns for values in runs for key in values))


def _differs(columns: Columns, key: str) -> bool:
    return len({values.get(key) for _, runs in columns for values in runs}) > 1


def _common(runs: Sequence[Mapping[str, str]], key: str) -> str:
    """The value of all the runs of a column, or theirs one after the other as long as they are few."""
    values = list(dict.fromkeys(values.get(key, ABSENT) for values in runs))
    return ", ".join(values) if len(values) <= MAX_VALUES else f"{len(values)} values"


def _settings_table(columns: Columns, keys: Sequence[str]) -> Raw:
    rows = [
        (
            Raw(f"<code>{text(key)}</code>"),
            *(Raw(f"<code>{text(_common(runs, key))}</code>") for _, runs in columns),
        )
        for key in keys
    ]
    return table(("setting", *(name for name, _ in columns)), rows, classes=("settings",))


def _flat(content: Any, before: str = "") -> dict[str, str]:
    """Nested objects as ``outer inner``; lists in one cell."""
    found: dict[str, str] = {}
    for key, value in content.items():
        name = f"{before}{key}".replace("packages ", "")
        if isinstance(value, dict):
            found |= _flat(value, f"{name} ")
        elif isinstance(value, list):
            found[name] = ", ".join(map(str, value)) or "none"
        else:
            found[name] = str(value)
    return found


def _cell(value: object) -> str:
    return value if isinstance(value, Raw) else text(value)
