"""What the fault tests injected and what survived: their raw lines become one JSON file and the table of
RELIABILITY.md."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrex import rundir
from fastrex.errors import FastrexError

from . import files, machine

Line = dict[str, Any]
Record = dict[str, Any]

BEGIN, END = "<!-- table of faults: written by `make test-faults` -->", "<!-- end of the table of faults -->"
KEYS = {"id", "fault", "injected", "survived", "bits_equal", "test"}

# Every test of the plan. Those that inject no fault into a running job stand in other files of `make test`.
TESTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "T01": ("twice the same bits; another seed, another order", ()),
    "T02": ("stopped, saved, continued by a new process", ()),
    "T03": ("cut at any place of an epoch", ()),
    "T04": ("a resumed run cut again", ()),
    "T05": ("a piece of the state is missing", ()),
    "T06": ("other threads and prefetch on resume; batches from any step on", ()),
    "T07": ("resumed with other ranks, data, settings or version", ()),
    "T08": ("killed at random moments of saving", ()),
    "T09": ("killed at each point of a save", ()),
    "T10": ("the newest checkpoint is damaged", ()),
    "T11": ("all checkpoints are damaged", ()),
    "T12": ("the disk is full", ()),
    "T13": (
        "saving while training goes on",
        (
            "test_saving.py::test_stored_is_the_state_at_the_call",
            "test_saving.py::test_a_failure_in_the_background_is_said_and_the_next_attempt_succeeds",
            "test_saving.py::test_an_interpreter_that_ends_waits_for_the_write",
        ),
    ),
    "T14": ("a rank fails", ()),
    "T15": ("a rank is killed, or leaves without a word", ()),
    "T16": ("a rank hangs", ()),
    "T17": ("two jobs at once; a port that is taken", ()),
    "T18": ("SIGTERM", ()),
    "T19": ("other signals, twice, and at bad moments", ()),
    "T20": ("the launcher is killed; a second writer", ()),
    "T21": ("gradients that are not finite, fp16", ()),
    "T22": ("numbers gone bad for good", ()),
    "T23": ("bad rows of features", ()),
    "T24": (
        "a corpus of odd image files",
        ("test_odd_files.py::test_index", "test_odd_files.py::test_a_bomb_is_refused_without_being_decoded"),
    ),
    "T25": (
        "a file goes bad: the job stops by name",
        ("test_bad_samples.py::test_a_run_of_two_ranks_stops_and_names_the_file",),
    ),
    "T26": ("a file goes bad: another takes its place", ()),
    "T27": (
        "files deleted, cut and replaced during training",
        (
            "test_bad_samples.py::test_a_run_of_two_ranks_goes_on_without_a_file_that_is_deleted",
            "test_bad_samples.py::test_only_the_bad_images_are_replaced_by_others_of_their_class",
        ),
    ),
    "T28": (
        "cut JPEGs",
        (
            "test_index.py::test_every_odd_file_gets_its_status_and_its_decoded_shape",
            "test_check.py::test_a_thousand_ruined_jpegs",
        ),
    ),
    "T29": (
        "odd folders: hidden, nested, loops, names",
        (
            "test_index.py::test_single_folder_with_hidden_nested_and_foreign_files",
            "test_index.py::test_symlink_loops_end_and_bring_no_other_class_in",
            "test_index.py::test_names_that_are_not_utf8_survive_storage",
        ),
    ),
    "T30": (
        "images that ranks and batches do not divide",
        (
            "test_plan.py::test_drop_uses_each_sample_at_most_once_and_pad_counts_its_repeats",
            "test_plan.py::test_shares_of_ranks_and_micro_batches_join_to_the_global_batch",
            "test_distributed.py::test_a_batch_that_the_ranks_cannot_share_is_refused",
        ),
    ),
    "T31": (
        "no sample is missing; order by seed and epoch",
        ("test_plan.py::test_permutations_depend_on_seed_and_epoch_and_are_not_biased",),
    ),
    "T32": ("kernels against float64", ("test_contract.py::test_contract",)),
    "T33": ("canary of Triton's interpreter", ("test_interpreter.py::test_products",)),
    "T34": (
        "bank: repeated labels, any order, any threads",
        (
            "test_class_means.py::test_against_a_plain_loop_over_many_updates",
            "test_class_means.py::test_threads_never_show_in_the_bits",
        ),
    ),
    "T35": (
        "kernels compiled ahead of time, within budgets",
        ("test_aot.py::test_kernels_compile_within_their_budgets",),
    ),
    "T36": ("hostile checkpoints and weights", ()),
    "T37": ("hostile manifests and lists", ()),
    "T38": ("folders: read-only, umask, odd names", ()),
    "T39": ("ten accidents, restarted until done", ()),
    "T40": ("every error path of the command line", ()),
    "T41": ("a checkpoint of an older release", ()),
    "T42": ("long runs: memory, files, threads, disk", ()),
    "cluster": ("several hosts: cut off, switched off, replaced", ()),
    "sharded": ("class weights split over the ranks", ()),
    "buffers": ("BatchNorm's statistics equal on every rank", ()),
}


def record(lines: Sequence[Line], command: str) -> Record:
    """The content of reliability.json.

    Args:
        lines: raw, as the fault tests' ``--report`` writes them. command: that repeats the measurement.

    Raises:
        FastrexError: a line lacks a key or has an unknown id.
    """
    for line in lines:
        if lacking := sorted(KEYS - line.keys()):
            raise FastrexError(f"reliability: every line must have {', '.join(sorted(KEYS))}, one lacks {lacking[0]}")
        if line["id"] not in TESTS and not line["id"].startswith("T?"):
            known = ", ".join(TESTS)
            raise FastrexError(f"reliability: an id must be one of {known}, got {line['id']!r} of {line['test']}")
    compared = [line for line in lines if line["bits_equal"] is not None]
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": rundir.commit(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"fastrex": rundir.version(), **machine.facts("cpu", "pooled")},
        "totals": {
            "tests": len({line["test"] for line in lines}),
            "injected": sum(line["injected"] for line in lines),
            "survived": sum(line["survived"] for line in lines),
            "compared": len(compared),
            "bits_equal": sum(bool(line["bits_equal"]) for line in compared),
        },
        "missing": [name for name, (_, where) in TESTS.items() if not where and not _of(name, lines)],
        "tests": [
            {"id": name, "what": what, "also": [f"tests/{place}" for place in where], "faults": _of(name, lines)}
            for name, (what, where) in {**TESTS, **_unknown(lines)}.items()
        ],
    }


def _of(name: str, lines: Sequence[Line]) -> list[Line]:
    return [{key: value for key, value in line.items() if key != "id"} for line in lines if line["id"] == name]


def _unknown(lines: Sequence[Line]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Tests that failed before they said which of the plan they are."""
    return {line["id"]: ("a test that failed early", ()) for line in lines if line["id"] not in TESTS}


def table(content: Record) -> str:
    """The record as Markdown: a sentence, and a row for each fault or, where there is none, for the test."""
    totals, versions = content["totals"], content["versions"]
    rows = [
        f"{totals['injected']} faults injected, {totals['survived']} survived; {totals['bits_equal']} of "
        f"{totals['compared']} comparisons equal to the last bit. {content['date']}, commit {content['commit'][:10]}, "
        f"{content['cores']} cores ({versions['cpu']}), Python {versions['python']}, torch {versions['torch']}.",
        "",
        "| test | what happens | injected | survived | bits equal |",
        "|---|---|---|---|---|",
    ]
    for test in content["tests"]:
        for line in _joined(test["faults"]):
            why = next((f" ({word}: {line[word]})" for word in ("failed", "skipped") if line.get(word)), "")
            equal = {None: "", True: "yes", False: "NO"}[line["bits_equal"]]
            fault = f"{line['fault']}{why}".replace("|", "\\|")
            rows.append(f"| {test['id']} | {fault} | {line['injected']} | {line['survived']} | {equal} |")
        if not test["faults"] and test["also"]:
            places = ", ".join(f"`{place}`" for place in dict.fromkeys(p.split("::")[0] for p in test["also"]))
            rows.append(f"| {test['id']} | {test['what']}: {places}, part of `make test` | | | |")
        elif not test["faults"]:
            rows.append(f"| {test['id']} | {test['what']}: NOT RUN | | | |")
    return "\n".join(rows)


def _joined(lines: Sequence[Line]) -> list[Line]:
    """Lines that say the same (of the parameters of one test) as one, their numbers added."""
    joined: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        key = (line["fault"], line["bits_equal"], line.get("failed"), line.get("skipped"))
        before = joined.get(key)
        counts = {name: line[name] + (before[name] if before else 0) for name in ("injected", "survived")}
        joined[key] = {**line, **counts}
    return list(joined.values())


def placed(document: str, rows: str) -> str:
    """``document`` with ``rows`` between its two markers.

    Raises:
        FastrexError: it has no markers.
    """
    if not (found := re.search(f"{re.escape(BEGIN)}\n.*{re.escape(END)}", document, re.S)):
        raise FastrexError(f"reliability: the document must hold the lines {BEGIN} and {END}")
    return f"{document[: found.start()]}{BEGIN}\n\n{rows}\n\n{END}{document[found.end() :]}"


def write(raw: Path, out: Path, document: Path, command: str) -> Record:
    """Write ``out/reliability.json`` and the table of ``document`` from the raw lines in ``raw``; the record.

    Raises:
        FastrexError: a file cannot be read or is not what it should be.
    """
    try:
        lines: list[Line] = json.loads(raw.read_text(encoding="utf-8"))
        text = document.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FastrexError(f"reliability: {raw} and {document} must be readable ({error})") from None
    content = record(lines, command)
    text = placed(text, table(content))
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "reliability.json", content)
    document.write_text(text, encoding="utf-8")
    return content


def verdict(content: Mapping[str, Any]) -> str | None:
    """What is not as it should be, in one line; None if all survived."""
    totals = content["totals"]
    odd = []
    if content["missing"]:
        odd.append(f"no test reported {', '.join(content['missing'])}")
    if lost := totals["injected"] - totals["survived"]:
        odd.append(f"{lost} of {totals['injected']} faults were not survived")
    if wrong := totals["compared"] - totals["bits_equal"]:
        odd.append(f"{wrong} of {totals['compared']} comparisons are not equal")
    return "; ".join(odd) or None
