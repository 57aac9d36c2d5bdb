"""The report of the fault tests: no fault goes missing on the way from a test to RELIABILITY.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT, environment

from benchmarks import reliability
from benchmarks.__main__ import main
from fastrex.errors import FastrexError

RESULT = ROOT / "benchmarks" / "results" / "reliability.json"

FAULTY_TESTS = '''
import pytest

def test_good(report):
    report("T14", "a rank fails", injected=2, survived=2, bits_equal=True)

def test_fails_before_it_reports(report):
    assert 1 == 2, "it broke"
    report("T15", "a rank is killed", injected=1, survived=1)

def test_fails_after_it_reported(report):
    report("T16", "a rank hangs", injected=1, survived=1, bits_equal=True)
    raise RuntimeError("too late")

@pytest.mark.skip(reason="needs root")
def test_skipped(report):
    report("T17", "two jobs", injected=1, survived=1)

@pytest.fixture
def broken():
    raise OSError("no disk")

def test_without_its_fixture(broken, report):
    report("T18", "a signal", injected=1, survived=1)

def test_without_an_id():
    """Says nothing of what it is."""
    raise ValueError("early")
'''


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What tests of all fates leave in the raw report."""
    folder = tmp_path_factory.mktemp("faults")
    test, raw = folder / "test_faults_made_up.py", folder / "raw.json"
    test.write_text(FAULTY_TESTS, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    words = ["-q", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", folder, test, "--report", raw]
    path = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, words)],
        env={**environment(), "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    found: list[dict[str, Any]] = json.loads(raw.read_text(encoding="utf-8"))
    return found


def test_a_test_that_fails_is_a_fault_that_was_not_survived(lines: list[dict[str, Any]]) -> None:
    told = {line["id"]: line for line in lines}
    assert set(told) == {"T14", "T15", "T16", "T17", "T18", "T??"}
    assert told["T14"]["survived"] == 2
    for name in ("T15", "T16", "T18", "T??"):
        assert (told[name]["injected"], told[name]["survived"], told[name]["bits_equal"]) == (1, 0, None)
    assert told["T15"]["failed"].startswith("it broke")
    assert told["T??"]["fault"] == "Says nothing of what it is."
    assert told["T17"]["injected"] == 0
    assert "needs root" in told["T17"]["skipped"]


def test_the_table_shows_failures_and_what_did_not_run(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    raw, document = tmp_path / "raw.json", tmp_path / "doc.md"
    raw.write_text(json.dumps(lines), encoding="utf-8")
    document.write_text(f"before\n{reliability.BEGIN}\nstale words\n{reliability.END}\nafter\n", encoding="utf-8")
    words = ["reliability", str(raw), "--out", str(tmp_path), "--document", str(document)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "4 of 6 faults were not survived" in result.output
    assert "no test reported T01" in result.output
    content = json.loads((tmp_path / "reliability.json").read_text(encoding="utf-8"))
    assert content["totals"] == {"tests": 6, "injected": 6, "survived": 2, "compared": 1, "bits_equal": 1}
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale words" not in text
    assert "| T15 | a rank is killed (failed: it broke) | 1 | 0 |" in text
    assert "| T17 | two jobs (skipped: needs root) | 0 | 0 |" in text
    assert "| T01 | twice the same bits; another seed, another order: NOT RUN |" in text
    # Once more changes nothing.
    CliRunner().invoke(main, words)
    assert document.read_text(encoding="utf-8") == text


def test_lines_that_are_none_are_refused(lines: list[dict[str, Any]]) -> None:
    with pytest.raises(FastrexError, match="one lacks fault"):
        reliability.record([{k: v for k, v in lines[0].items() if k != "fault"}], "")
    with pytest.raises(FastrexError, match="got 'T43'"):
        reliability.record([{**lines[0], "id": "T43"}], "")


def test_every_test_of_the_plan_has_its_place() -> None:
    assert list(reliability.TESTS)[:42] == [f"T{number:02d}" for number in range(1, 43)]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    reported = set(re.findall(r"""\breport\(\s*["']([\w?-]+)["']""", sources)) - {"T43"}
    assert reported <= set(reliability.TESTS)
    for name, (_, where) in reliability.TESTS.items():
        assert where or name in reported, name
        for place in where:
            file, _, function = place.partition("::")
            assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M), place


def test_the_table_of_the_document_is_that_of_the_results() -> None:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    text = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")
    assert reliability.placed(text, reliability.table(content)) == text
    assert [test["id"] for test in content["tests"]] == list(reliability.TESTS)
    assert reliability.verdict(content) is None
