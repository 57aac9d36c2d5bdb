"""A pytest plugin: every result goes to a file as soon as it is known, so that what a dying process had found stays.

``python -m pytest -p benchmarks.gpu_hooks``; the environment variable FASTREX_GPU_TESTS holds a
:class:`~benchmarks.gpu_tests.Share` as JSON.
Tests that the file has already are not run again.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from .gpu_tests import LOST, VARIABLE, Share, read


def shares(names: Sequence[str], count: int) -> list[int]:
    """The share of each test. Those that compile the same kernels stay together: same function, same first and last
    parameter (operator and dtype)."""

    def group(name: str) -> tuple[str, ...]:
        function, _, parameters = name.rstrip("]").partition("[")
        words = parameters.split("-")
        return function, words[0], words[-1]

    sizes = Counter(group(name) for name in names)
    loads, chosen = [0] * count, {}
    for key, size in sizes.most_common():
        chosen[key] = loads.index(min(loads))
        loads[chosen[key]] += size
    return [chosen[group(name)] for name in names]


class Recorder:
    """The hooks."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.done = {record["id"] for record in read(Path(share.file)) if "outcome" in record}
        self.failed = False
        # Of its own: pytest puts a file in the place of the one that tests write to.
        self.stderr = os.dup(2)

    def write(self, **record: Any) -> None:
        with open(self.share.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    @pytest.hookimpl(trylast=True)  # after what the command line leaves out
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        numbers = shares([item.nodeid for item in items], self.share.count)
        mine = [item for item, number in zip(items, numbers, strict=True) if number == self.share.number]
        self.write(collected=len(mine))
        items[:] = [item for item in mine if item.nodeid not in self.done]

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self.write(id=report.nodeid, outcome="failed", seconds=None, text=reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.failed = False
        self.write(start=nodeid)
        faulthandler.dump_traceback_later(self.share.limit_s, exit=True, file=self.stderr)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.failed |= report.outcome == "failed"
            outcome = report.outcome if report.when == "call" or report.outcome == "skipped" else "failed"
            self.write(id=report.nodeid, outcome=outcome, seconds=round(report.duration, 3), text=reason(report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.write(end=nodeid)
        if self.failed and not healthy():
            os.write(self.stderr, f"\nafter {nodeid} the GPU can no longer be used by this process\n".encode())
            os._exit(LOST)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        # 0, 1, 5: all passed, some failed, none left to run. Anything else is an error of the session.
        if int(exitstatus) in (0, 1, 5):
            self.write(finished=True)


def reason(report: Any) -> str:
    """The first line of what a report has to say, with its place."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):  # of a skipped test: file, line, reason
        return str(longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(longrepr, "reprcrash", None)
    text, place = (str(longrepr or ""), "") if crash is None else (crash.message, f" ({crash.path}:{crash.lineno})")
    lines: Iterable[str] = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line), "")[:300] + place.replace(f"{os.getcwd()}/", "")


def healthy() -> bool:
    """Whether this process can still use its GPU, if it does."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def pytest_configure(config: Any) -> None:
    if VARIABLE in os.environ:
        config.pluginmanager.register(Recorder(Share(**json.loads(os.environ[VARIABLE]))), "fastrex-gpu-recorder")
