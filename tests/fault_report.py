"""Collects what the fault tests report, for ``--report FILE``: also of tests that fail, so that no fault goes missing.

A line travels as a property of its test's report, which pytest-xdist hands over too.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

FAULT, ENDED = "fault", "ended"
ANNOUNCED = re.compile(r"""report\(\s*["']([\w?-]+)["'],\s*f?["']([^"']+)["']""")


def announced(item: pytest.Item) -> list[tuple[str, str]]:
    """(id, fault) of the calls of ``report`` that stand in a test's source: what it would have reported."""
    function = inspect.unwrap(item.function)  # type: ignore[attr-defined]
    calls = ANNOUNCED.findall(inspect.getsource(function))
    return calls or [("T??", (inspect.getdoc(function) or item.name).splitlines()[0])]


class FaultReport:
    """The plugin that writes ``path`` at the end: a list of lines, sorted by id and fault. None: only hands them on."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        result = yield
        concerned = "report" in getattr(item, "fixturenames", ()) or item.path.name.startswith("test_faults_")
        if concerned and not result.passed and not hasattr(result, "wasxfail"):
            if result.skipped:
                reason = str(result.longrepr[2] if isinstance(result.longrepr, tuple) else "").removeprefix("Skipped: ")
            else:
                reason = str(call.excinfo.value if call.excinfo else "").strip()
            words = {result.outcome: (reason.splitlines() or [""])[0][:200]}
            told = {line["id"] for name, line in item.user_properties if name == FAULT}  # type: ignore[index]
            for number, fault in announced(item):
                if number not in told:
                    line = {"id": number, "fault": fault, "injected": 1, "survived": 0, "bits_equal": None}
                    item.user_properties.append((FAULT, {**line, "test": item.nodeid}))
            item.user_properties.append((ENDED, words))
            result.user_properties = list(item.user_properties)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        lines: list[Any] = [dict(line) for name, line in report.user_properties if name == FAULT]
        for name, words in report.user_properties:
            if name == ENDED:
                for line in lines:
                    # What was said before the failure did not hold to the end of its test; a skipped one injected
                    # nothing.
                    line.update(survived=0, bits_equal=None, **words)
                    if "skipped" in words:
                        line["injected"] = 0
        self.lines += lines

    def pytest_sessionfinish(self) -> None:
        if self.path is None:
            return
        self.lines.sort(key=lambda line: (line["id"], line["fault"], line["test"]))
        self.path.write_text(json.dumps(self.lines, indent=1) + "\n", encoding="utf-8")
