"""The GPU tests, in as many processes as are useful; a test that ends its process costs one test.

``python -m benchmarks.gpu_tests SPEC`` reads a :class:`Spec` as JSON and writes, again and again while it runs, what is
known so far: ``counts``, ``tests`` and ``finished``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import ROOT

TICK_S = 0.5
# Foreign warnings are no failures of ours on a version that we have never seen.
OPTIONS = (
    "-v", "--tb=short", "--color=no", "--continue-on-collection-errors", "-W", "default", "-p", "no:cacheprovider",
    "-p", f"{__package__}.gpu_hooks",
)  # fmt: skip
ENDED = "its process ended"
VARIABLE = "FASTREX_GPU_TESTS"
# Exit code: the process cannot go on, its GPU's context is lost and every test after it would fail.
LOST = 70


@dataclass(frozen=True)
class Share:
    """Share ``number`` of ``count`` of the tests; results go to ``file``; a test that takes longer than ``limit_s``
    ends its process."""

    file: str
    number: int
    count: int
    limit_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read(file: Path) -> list[dict[str, Any]]:
    """The records; a line that its writer did not finish is left out."""
    found = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


@dataclass(frozen=True)
class Spec:
    """``words`` for pytest, ``processes`` that share the tests, ``limit_s`` for each test; ``out`` takes the answer,
    ``logs`` is the stem of the processes' logs."""

    words: tuple[str, ...]
    processes: int
    limit_s: float
    out: str
    logs: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Runner:
    """One share of the tests and the process that runs it now."""

    def __init__(self, spec: Spec, number: int, folder: Path) -> None:
        self.spec = spec
        self.share = Share(str(folder / f"{number}.jsonl"), number, spec.processes, spec.limit_s)
        self.log = Path(f"{spec.logs}-{number + 1}.log")
        self.log.unlink(missing_ok=True)
        self.error = ""
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pytest", *OPTIONS, *self.spec.words]
        env = {**os.environ, VARIABLE: self.share.to_json(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    @property
    def records(self) -> list[dict[str, Any]]:
        return read(Path(self.share.file))

    def running(self) -> bool:
        """Whether there is more to come; a process that died is followed by another one for the tests that are left."""
        code = self.process.poll()
        if code is None:
            return True
        records = self.records
        if any("finished" in record for record in records):
            return False
        begun = [record for record in records if "start" in record]
        over = {record["end"] for record in records if "end" in record}
        if begun and begun[-1]["start"] not in over:
            name = begun[-1]["start"]
            died = {"id": name, "end": name, "outcome": "failed", "seconds": None, "text": self._death(code)}
            with open(self.share.file, "a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(died)}\n")  # the process may have died within a line
        elif code != LOST:
            self.error = f"pytest ended with exit code {code}, see {self.log.name}"
            return False
        self.process = self._start()
        return True

    def _death(self, code: int) -> str:
        if code < 0:
            return f"{ENDED}: {signal.Signals(-code).name}"
        # The fault handler's exit code, when it has printed where everybody was.
        return f"{ENDED}: not done within {self.spec.limit_s:.0f} s" if code == 1 else f"{ENDED}: exit code {code}"


def summary(runners: list[Runner], running: bool) -> dict[str, Any]:
    """What is known of all tests."""
    tests: dict[str, dict[str, Any]] = {}
    collected, errors = 0, [runner.error for runner in runners if runner.error]
    for runner in runners:
        records = runner.records
        collected += max((record["collected"] for record in records if "collected" in record), default=0)
        for record in records:
            # A test that passed and then failed when it was torn down has failed.
            if "outcome" in record and tests.get(record["id"], {}).get("outcome") != "failed":
                tests[record["id"]] = {key: record[key] for key in ("id", "outcome", "seconds", "text")}
    counts = Counter(test["outcome"] for test in tests.values())
    known = {name: counts[name] for name in ("passed", "failed", "skipped")}
    known["not run"] = max(collected - len(tests), 0)
    finished = not running and not errors
    return {"counts": known, "finished": finished, "errors": errors, "tests": sorted(tests.values(), key=_place)}


def _place(test: dict[str, Any]) -> tuple[bool, str]:
    return test["outcome"] != "failed", test["id"]


def main() -> None:
    """Entry point."""
    spec = Spec(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        runners = [Runner(spec, number, Path(folder)) for number in range(spec.processes)]
        running = True
        while running:
            time.sleep(TICK_S)
            busy = [runner.running() for runner in runners]
            running = any(busy)
            answer = summary(runners, running)
            temporary = Path(f"{spec.out}.tmp")
            temporary.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
            temporary.replace(spec.out)
    print(", ".join(f"{count} {name}" for name, count in answer["counts"].items()), *answer["errors"], sep="\n")
    sys.exit(1 if answer["errors"] or answer["counts"]["failed"] else 0)


if __name__ == "__main__":
    main()
