"""What the files of a run directory say, as far as they can be read. Nothing is changed, nothing is believed: the
directory may be somebody else's, or be written to at this moment."""

from __future__ import annotations

import math
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import config as config_module
from .. import metrics, rundir, scales, untrusted
from ..config import Config
from ..errors import FastrexError, explain
from ..transfer import results

# What the page shows of metrics.jsonl; other names are not kept.
NAMES = (
    *("train/loss", "train/top1", "train/top5", "train/lr", "train/epoch", "train/grad_norm", "train/class_change"),
    *("train/loss_scale", "eval/top1", "eval/knn", "eval/images", "perf/images_per_s", "perf/data_wait"),
    *("bank/empty_classes", "bank/age", "bank/filled", "train/without_positive"),
)
MAX_METRICS, MAX_LOG, MAX_ANALYSIS = 1 << 30, 1 << 28, 1 << 26  # bytes
FIRST, LAST = 60, 140  # lines of the log that are kept of its beginning and its end
LINE = 1 << 12
PROGRESS = re.compile(r"step \d+(/\d+ epoch \d+| evaluation) \|")
STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d) (.*)")


class Curve(Sequence[tuple[float, float | None]]):
    """Logged values (step, number), None where there was no finite one; 16 bytes each, however long the run."""

    def __init__(self) -> None:
        self.steps, self.values = array("d"), array("d")

    def add(self, step: int, value: object) -> None:
        number = scales.number(value)
        self.steps.append(float(step))
        self.values.append(math.nan if number is None else number)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return list(self)[i]
        value = self.values[i]
        return self.steps[i], None if math.isnan(value) else value

    def __iter__(self) -> Iterator[tuple[float, float | None]]:
        for step, value in zip(self.steps, self.values, strict=True):
            yield step, None if math.isnan(value) else value

    def finite(self) -> list[tuple[float, float]]:
        """The points that have a number."""
        return [(step, value) for step, value in self if value is not None]


@dataclass
class Record:
    """A run directory as it was found.

    Attributes:
        name: of the run on the page. config, status, environment: as in :mod:`fastrex.rundir`; None or empty where
            they cannot be read. curves: by the names of metrics.jsonl. lines: (time, text) of train.log without its
            progress. dropped: lines of train.log that were left out as too many.
        transfer, analysis: results of ``fastrex transfer``, checked, and of ``fastrex analyze``, some JSON object.
        missing: what could not be read -> why.
    """

    path: Path
    name: str
    config: Config | None = None
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    dropped: int = 0
    transfer: dict[str, Any] | None = None
    analysis: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The last one on record."""
        logged = [int(curve.steps[-1]) for curve in self.curves.values() if len(curve)]
        said = whole(self.status, "step")
        return max([*logged, *([] if said is None else [said])], default=None)

    @property
    def steps_per_epoch(self) -> int | None:
        """From what the run has logged of its epochs."""
        found = self.curves.get("train/epoch", Curve()).finite()
        step, epoch = found[-1] if found else (0.0, 0.0)
        return round(step / epoch) if step > 0 and epoch > 0 and step / epoch < 1e12 else None

    def last(self, name: str) -> float | None:
        points = self.curves[name].finite() if name in self.curves else []
        return points[-1][1] if points else None

    def best(self, name: str) -> tuple[float, float] | None:
        """(step, value) of the largest value."""
        points = self.curves[name].finite() if name in self.curves else []
        return max(points, key=lambda point: point[1], default=None)


def read(path: Path, name: str) -> Record:
    """What is in the run directory ``path``.

    Raises:
        FastrexError: it is none.
    """
    if not path.is_dir() or not any((path / name).is_file() for name in (rundir.CONFIG, "metrics.jsonl")):
        raise FastrexError(f"report: RUN must be a run directory, got {path}; give what --out of fastrex train was")
    record = Record(path, name)

    def part(file: str, reader: Callable[[Path], None]) -> None:
        try:
            reader(path / file)
        except FileNotFoundError:
            record.missing[file] = "it is not there"
        except OSError as error:
            record.missing[file] = explain(error)
        except (ValueError, FastrexError) as error:
            record.missing[file] = str(error)

    def config(file: Path) -> None:
        if not file.exists():
            raise FileNotFoundError
        record.config = config_module.read(file)

    def status(file: Path) -> None:
        if not file.exists():
            raise FileNotFoundError
        try:
            record.status = rundir.read_status(path)
        except FastrexError:
            raise ValueError("it does not say a state") from None

    def environment(file: Path) -> None:
        record.environment = _object(file, rundir.MAX_STATUS)

    def transfer(file: Path) -> None:
        if not file.exists():
            raise FileNotFoundError
        record.transfer = results.read(file)

    def analysis(file: Path) -> None:
        record.analysis = _object(file, MAX_ANALYSIS)

    part(rundir.CONFIG, config)
    part(rundir.STATUS, status)
    part(rundir.ENV, environment)
    part("metrics.jsonl", lambda file: _metrics(file, record))
    part("train.log", lambda file: _log(file, record))
    part("transfer/transfer.json", transfer)
    part("analysis/analysis.json", analysis)
    return record


def inside(content: object, *place: str | int) -> Any:
    """What stands at ``place`` inside of JSON; None where there is nothing."""
    for key in place:
        if isinstance(content, dict) and isinstance(key, str):
            content = content.get(key)
        elif isinstance(content, list) and isinstance(key, int) and -len(content) <= key < len(content):
            content = content[key]
        else:
            return None
    return content


def number(content: object, *place: str | int) -> float | None:
    """A finite number of a moderate size inside of JSON, else None."""
    return scales.number(inside(content, *place))


def whole(content: object, *place: str | int) -> int | None:
    """A whole number inside of JSON, else None."""
    found = inside(content, *place)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def word(content: object, *place: str | int) -> str:
    """A string inside of JSON, else an empty one."""
    found = inside(content, *place)
    return found if isinstance(found, str) else ""


def entries(content: object, *place: str | int) -> list[dict[str, Any]]:
    """The objects in a list inside of JSON."""
    found = inside(content, *place)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def names(paths: Sequence[Path]) -> list[str]:
    """What the runs are called on the page: their folders' names, with as much before as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-count:]).lstrip("/") or "/" for part in parts]
        if len(set(found)) == len(found):
            return found
    twice = next(path for i, path in enumerate(paths) if parts[i] in parts[:i])
    raise FastrexError(f"report: RUN must name each run once, got {twice} twice")


def _object(file: Path, limit: int) -> dict[str, Any]:
    content = untrusted.read_json(file, limit)
    if not isinstance(content, dict):
        raise ValueError("it must hold an object")
    return content


def _metrics(file: Path, record: Record) -> None:
    if file.stat().st_size > MAX_METRICS:
        raise ValueError(f"it has more than {MAX_METRICS} bytes")
    for _, line in metrics.records(file):
        if line["step"] >= 0:
            for name in NAMES:
                if name in line:
                    record.curves.setdefault(name, Curve()).add(line["step"], line[name])


def _log(file: Path, record: Record) -> None:
    if file.stat().st_size > MAX_LOG:
        raise ValueError(f"it has more than {MAX_LOG} bytes")
    last: deque[tuple[str, str]] = deque(maxlen=LAST)
    with untrusted.opened(file) as raw:
        while content := raw.readline(LINE):
            line = content.decode("utf-8", "replace").strip()
            stamp = STAMP.fullmatch(line)
            time, text = stamp.groups() if stamp else ("", line)
            if not text or PROGRESS.match(text):
                continue
            if len(record.lines) < FIRST:
                record.lines.append((time, text))
            else:
                record.dropped += len(last) == LAST
                last.append((time, text))
    record.lines += last
