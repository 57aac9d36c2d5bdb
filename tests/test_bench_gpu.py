"""The command for a GPU, driven on a CPU: shares of the time, parts that crash or hang, what is absent, the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, environment

from benchmarks import gpu, gpu_facts, gpu_images, gpu_jobs, gpu_process, gpu_report
from benchmarks.__main__ import main
from benchmarks.gpu_hooks import shares
from benchmarks.gpu_jobs import Job, Part, Settings
from benchmarks.gpu_process import Stop
from benchmarks.gpu_tests import Spec

CASES = [
    ("cosine", "c1000", "fp32", 8, False), ("cosine", "c1000", "bf16", 8, True), ("cosine", "c1m", "bf16", 8, True),
    ("means", "trex", "fp32", 3, True), ("means", "22k", "fp32", 3, False), ("means", "22k", "bf16", 3, False),
    ("norm", "block", "fp32", 3, True), ("norm", "block", "bf16", 3, True),
]  # fmt: skip
FACTS: dict[str, Any] = {
    "device": "cpu", "gpu": None, "cores": 12, "dali": True, "pytest": True, "pillow": True, "cpp": True,
    "memory_gib": 139.8, "packages": {"torch": "2.11.0", "triton": "3.6.0", "liger-kernel": None}, "cases": CASES,
}  # fmt: skip
# Whatever a test can do to its process.
BAD_TESTS = """
    import os, signal, time, warnings
    import pytest

    @pytest.fixture
    def broken():
        yield
        raise ValueError("on the way out")

    def test_good(): pass
    def test_killed(): os.kill(os.getpid(), signal.SIGSEGV)
    def test_after_it(): warnings.warn("something foreign", RuntimeWarning)
    def test_wrong(): assert 1 == 2, "numbers"
    def test_taken_down(broken): pass
    def test_endless(): time.sleep(60)
    def test_skipped(): pytest.skip("for a reason")
    def test_left(): os._exit(3)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return Settings(out=tmp_path / "out", work=tmp_path / "work", device="cpu")


def process(code: str, tmp_path: Path, limit_s: float = 10.0, stop: Stop | None = None) -> gpu_process.Ended:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return gpu_process.run(command, tmp_path / "log", limit_s, os.environ, tmp_path, stop)


def alive(mark: str) -> list[str]:
    """Command lines of processes that hold ``mark``."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in text and place.parent.name != str(os.getpid()):
            found.append(text)
    return found


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('fine')", ""),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("raise ValueError('bad')", "exit code 1: ValueError: bad"),
    ],
)
def test_how_a_process_ended_is_said(code: str, why: str, tmp_path: Path) -> None:
    ended = process(code, tmp_path)
    assert (ended.why, ended.late) == (why, False)


def test_nothing_of_a_process_is_left_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "GRACE_S", 0.5)
    mark = f"time.sleep(61.{os.getpid()})"
    stubborn = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {mark}"
    ended = process(
        f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", {stubborn!r}], process_group=0)
        stopped = subprocess.Popen([sys.executable, "-c", "import time; {mark}"], process_group=0)
        time.sleep(0.2)
        os.kill(stopped.pid, signal.SIGSTOP)
        print("at work", flush=True)
        {mark}
        """,
        tmp_path,
        limit_s=1.5,
    )
    assert ended.late
    assert ended.last == "at work"
    assert ended.code == -signal.SIGKILL
    assert ended.seconds < 10
    assert not alive(mark)


def test_what_a_process_leaves_running_is_ended_too(tmp_path: Path) -> None:
    mark = f"time.sleep(62.{os.getpid()})"
    ended = process(
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; {mark}'])", tmp_path
    )
    assert ended.why == ""
    assert not alive(mark)


def test_a_test_that_ends_its_process_costs_one_test(tmp_path: Path) -> None:
    (tmp_path / "test_bad.py").write_text(textwrap.dedent(BAD_TESTS), encoding="utf-8")
    out = tmp_path / "tests.json"
    spec = Spec((str(tmp_path / "test_bad.py"),), 2, 2.0, str(out), str(tmp_path / "tests"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_tests", spec.to_json()],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "2 passed, 5 failed, 1 skipped, 0 not run\n"
    assert (done.returncode, done.stderr) == (1, "")
    answer = json.loads(out.read_text(encoding="utf-8"))
    assert answer["finished"]
    texts = {test["id"].rpartition("::")[2]: (test["outcome"], test["text"]) for test in answer["tests"]}
    assert texts["test_good"] == texts["test_after_it"] == ("passed", "")
    assert texts["test_skipped"] == ("skipped", "for a reason")
    assert texts["test_killed"] == ("failed", "its process ended: SIGSEGV")
    assert texts["test_left"] == ("failed", "its process ended: exit code 3")
    assert texts["test_endless"] == ("failed", "its process ended: not done within 2 s")
    assert texts["test_wrong"][1].startswith("AssertionError: numbers (")
    assert texts["test_taken_down"][1].startswith("ValueError: on the way out (")
    headline, details, well = gpu_report.tests(answer)
    assert (headline, len(details), well) == ("2 passed, 5 failed, 1 skipped", 5, False)
    assert "test_endless" in "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("tests-*.log"))


def test_tests_of_the_same_kernels_share_a_process() -> None:
    names = [
        f"f.py::test_contract[{op}-{case}-triton-{dtype}]" for op in "ab" for case in "xyz" for dtype in ("s", "h")
    ]
    names += ["f.py::test_other", "f.py::test_more[1-2]"]
    places = dict(zip(names, shares(names, 3), strict=True))
    assert set(places.values()) == {0, 1, 2}
    for op in "ab":
        for dtype in ("s", "h"):
            assert len({places[f"f.py::test_contract[{op}-{case}-triton-{dtype}]"] for case in "xyz"}) == 1
    assert set(shares(names, 1)) == {0}


def test_cases_with_a_bar_come_first_and_every_case_comes_once(settings: Settings) -> None:
    jobs = gpu_jobs.parts(settings, FACTS)[1].jobs(150.0)
    seen: list[tuple[str, str, str]] = []
    for job in jobs:
        words = main.commands["kernels"].make_context("kernels", list(job.words[1:])).params
        (op,) = words["op"]
        triples = [(op, case, dtype) for case in words["case"] for dtype in words["dtype"]]
        assert job.extra == (not {case[:3]: case[4] for case in CASES}[triples[0]])
        assert 1 <= words["seconds"] <= 8
        seen += triples
    assert sorted(seen) == sorted(case[:3] for case in CASES)
    assert [job.extra for job in jobs] == sorted(job.extra for job in jobs)
    assert jobs[0].weight == 16  # two cases of eight implementations


def test_every_part_is_a_command_that_exists(settings: Settings) -> None:
    for part in gpu_jobs.parts(settings, FACTS):
        assert not part.absent
        for job in part.jobs(120.0):
            assert job.target.endswith(".json") or job.name == "images"
            if job.module == "benchmarks":
                context = main.commands[job.words[0]].make_context(job.words[0], list(job.words[1:]))
                assert context.params["device"] == "cpu"
                assert context.params["json_path"] == job.record
                if job.words[0] in ("step", "run"):
                    assert context.params["batch"] == 256
    names = {job.target for job in gpu_jobs.parts(settings, FACTS)[3].jobs(120.0)}
    assert names == {"step-cpu.json", "step-cpu-graph-off.json", "step-cpu-bn-torch.json"}


def test_a_smaller_gpu_gets_a_smaller_batch(settings: Settings) -> None:
    assert [gpu_jobs.batch(settings, {"memory_gib": size}) for size in (139.8, 79.1, 39.4, 23.6, 1.0)] == [
        256, 256, 128, 64, 16,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "part", "reason"),
    [
        ({"dali": False}, "loader", "NVIDIA DALI cannot be imported"),
        ({"dali": False}, "run", "NVIDIA DALI cannot be imported"),
        ({"pillow": False}, "loader", "no --data was given"),
        ({"pytest": False}, "tests", "pytest cannot be imported"),
        ({"no_kernels": "ImportError: gone"}, "kernels", "ImportError: gone"),
    ],
)
def test_what_cannot_run_is_absent_with_the_reason(
    facts: dict[str, Any], part: str, reason: str, settings: Settings
) -> None:
    found = {p.name: p.absent for p in gpu_jobs.parts(settings, {**FACTS, **facts})}
    assert found[part].startswith(reason)
    assert not found["step"]


def script(name: str, code: str, settings: Settings, **more: Any) -> Job:
    """A job that runs ``code``; PLACE stands for the file that takes its records."""
    record = settings.work / f"{name}.json"
    module = f"job_{name.replace('-', '_')}"
    text = f"from pathlib import Path\nPLACE = Path({str(record)!r})\n{textwrap.dedent(code)}"
    (settings.work / f"{module}.py").write_text(text, encoding="utf-8")
    return Job(name, module, (), record, **more)


def measured(parts: list[Part], settings: Settings, seconds: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu_jobs, "parts", lambda *_: parts)
    monkeypatch.setattr(gpu, "LEAST_S", 0.2)
    monkeypatch.setattr(gpu_process, "GRACE_S", 1.0)
    outcomes = gpu.measure(settings, FACTS, time.monotonic() + seconds, Stop(), "the words", lambda _: None)
    return {one.part: one for one in outcomes}


def test_a_part_that_crashes_or_hangs_stops_no_other(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = [{"impl": "fastrex", "images_per_s_p50": 2900.0, "error": None}]
    rival = {"impl": "eager", "images_per_s_p50": 1000.0, "error": None}
    lost = {"impl": "eager_cl", "images_per_s_p50": None, "error": "absent: needs more memory than is free"}
    write = "PLACE.write_text('{}')\n"
    parts = [
        Part("kernels", 1.0, "", lambda _: [
            script("kernels-1", "import os; os.kill(os.getpid(), 11)", settings, target="kernels-cpu.json"),
            script("kernels-2", write.format("[]"), settings, target="kernels-cpu.json"),
        ]),
        Part("loader", 5.0, "there is no DALI", lambda _: []),
        Part("step", 1.0, "", lambda _: [
            script("step", write.format(json.dumps([*speed, rival, lost])) + "import time; time.sleep(60)", settings,
                   target="step-cpu.json"),
            script("step-bn", write.format(json.dumps(speed)), settings, target="step-cpu-bn-torch.json"),
        ]),
        Part("run", 2.0, "", lambda _: [
            script("run", write.format(json.dumps(speed)), settings, target="run-cpu.json"),
            script("more", "import time; time.sleep(60)", settings, target="run-cpu.json", extra=True),
        ]),
    ]  # fmt: skip
    found = measured(parts, settings, 8.0, monkeypatch)
    assert {name: one.state for name, one in found.items()} == {
        "kernels": "failed", "loader": "absent", "step": "out of time", "run": "done",
    }  # fmt: skip
    assert found["kernels"].reason == "kernels-1 killed by SIGSEGV"
    # A quarter of 8 s: the absent part asks for none. What it leaves goes to the others, a third of it to the next.
    assert 1.5 < found["kernels"].share <= 2.0
    assert found["kernels"].seconds < 1.8
    assert found["step"].share > 2.0
    assert found["step"].reason.startswith("step ended after ")
    assert found["step"].headline == (
        "images/s: fastrex 2,900, eager 1,000 (we are 2.90x); bn-torch: images/s: fastrex 2,900"
    )
    assert found["step"].details == ["eager_cl is absent: needs more memory than is free"]
    assert found["run"].headline == "images/s: fastrex 2,900"
    text = (settings.out / "gpu.md").read_text(encoding="utf-8")
    assert "| loader | absent |  | there is no DALI |" in text
    assert "torch 2.11.0, triton 3.6.0" in text
    content = json.loads((settings.out / "gpu.json").read_text(encoding="utf-8"))
    assert [part["part"] for part in content["parts"]] == ["kernels", "loader", "step", "run"]
    assert json.loads((settings.out / "step-cpu.json").read_text(encoding="utf-8"))[1] == rival
    absent = json.loads((settings.out / "loader-cpu.json").read_text(encoding="utf-8"))
    assert absent == [{"op": "loader", "error": "absent: there is no DALI"}]


def test_records_of_jobs_with_the_same_target_are_joined(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings.out / "kernels-cpu.json").write_text('["of an earlier run"]', encoding="utf-8")
    record = {"op": "o", "case": "c", "dtype": "fp32", "impl": "cpp", "ms_p50": 1.0, "error": 0.0}
    write = "import json; PLACE.write_text(json.dumps([{}]))"
    jobs = [
        script(f"kernels-{case}", write.format({**record, "case": case}), settings, target="kernels-cpu.json")
        for case in "ab"
    ]
    found = measured([Part("kernels", 1.0, "", lambda _: jobs)], settings, 20.0, monkeypatch)
    joined = json.loads((settings.out / "kernels-cpu.json").read_text(encoding="utf-8"))
    assert [one["case"] for one in joined] == ["a", "b"]
    assert (found["kernels"].state, found["kernels"].headline) == ("done", "2 of 8 cases measured")


def test_kernels_are_told_by_their_bars_and_by_what_has_no_time() -> None:
    record = {"op": "o", "case": "a case", "dtype": "fp32", "impl": "triton", "ms_p50": 1.0, "error": 0.0}
    dead = {**record, "case": "b", "ms_p50": None, "error": "absent: its process was killed by signal 11"}
    wrong = {**record, "case": "c", "ms_p50": None, "error": 0.5, "error_budget": 0.1}
    rival = {**record, "impl": "liger", "ms_p50": None, "error": "absent: liger-kernel is not installed"}
    log = textwrap.dedent("""
        measuring o a case fp32 cuda

        o a case fwd_bwd fp32 (cuda)
        impl                               p50 ms
        bar 3.00x: met, 3.120x over eager
        bar 80% of the roofline: missed, 71%

        o b fwd_bwd fp32 (cuda)
        bars of o b fp32: missed, there is no correct triton

        bars: 1 of 3 met
        o a case fp32: bar 80% of the roofline: missed, 71%
    """)
    headline, details, well = gpu_report.kernels([record, dead, wrong, rival], log, 38, "triton")
    assert headline == "bars: 1 of 3 met; 3 of 38 cases measured; 2 without a time"
    assert details == [
        "triton has no time: o b fp32: its process was killed by signal 11",
        "triton has no time: o c fp32: its error 5.0e-01 is beyond its budget 1.0e-01",
        "o a case fwd_bwd fp32: bar 80% of the roofline: missed, 71%",
        "o b fwd_bwd fp32: bars of o b fp32: missed, there is no correct triton",
        "liger is absent: liger-kernel is not installed",
    ]
    assert not well


def test_a_run_is_told_beside_its_step() -> None:
    record = {"impl": "fastrex", "images_per_s_p50": 2700.0, "step_images_per_s_p50": 2800.0, "ratio": 0.9643}
    assert gpu_report.speeds({"": [record]})[0] == "images/s: fastrex 2,700, 96.4% of its step"


def test_images_that_are_made_can_be_trained_on(tmp_path: Path) -> None:
    from PIL import Image

    gpu_images.write(tmp_path / "images", classes=2, per_class=3, distinct=4)
    files = sorted((tmp_path / "images").rglob("*.jpg"))
    assert [path.parent.name for path in files] == ["class-00"] * 3 + ["class-01"] * 3
    with Image.open(files[0]) as image:
        assert image.size == (500, 375)
        image.load()
    assert list(tmp_path.iterdir()) == [tmp_path / "images"]


def test_children_get_what_a_checkout_needs(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = gpu.environment(settings, {**FACTS, "cpp": False})
    assert found["PYTHONPATH"] == f"{ROOT}:{ROOT / 'kernels'}:/elsewhere"
    assert "TRITON_INTERPRET" not in found
    assert found["FASTREX_NO_CPP"] == "1"
    monkeypatch.delenv("FASTREX_NO_CPP", raising=False)
    assert "FASTREX_NO_CPP" not in gpu.environment(settings, FACTS)


def test_the_facts_name_every_case_and_its_bars() -> None:
    from benchmarks import bars

    facts = gpu_facts.collect("cpu")
    assert not [name for name in facts if name.startswith("no_")]
    assert json.loads(json.dumps(facts))["packages"]["torch"] == torch.__version__
    for device in ("cpu", "cuda"):
        judged = {case[:3] for case in gpu_facts.kernels(device)["cases"] if case[4]}
        assert judged == {(bar.op, bar.case, bar.dtype) for bar in bars.BARS if bar.device == device}


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks", "gpu", *map(str, words)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--out", tmp_path / "out"), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "gpu: this command needs a GPU that torch can use: torch.cuda.is_available() is False\n"


def test_the_whole_command(tmp_path: Path) -> None:
    """From a checkout that is not installed, in real processes."""
    (tmp_path / "test_small.py").write_text("def test_it(): pass\n", encoding="utf-8")
    words = ("--op", "class_means", "--case", "small", "--impl", "cpp", "--dtype", "fp32")
    narrow = [*("--tests", tmp_path / "test_small.py"), *(part for word in words for part in ("--kernels", word))]
    out = tmp_path / "new" / "out"
    env = {**environment(), "PYTHONPATH": ""}
    done = subprocess.run(
        command("--out", out, "--device", "cpu", "--minutes", "2", "--part", "tests", "--part", "kernels", *narrow),
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| tests | done | " in done.stdout
    assert " s | 1 passed, 0 failed |" in done.stdout
    assert " s | 1 of " in done.stdout
    names = {path.name for path in out.iterdir()}
    assert {"gpu.json", "gpu.md", "tests.json", "kernels-cpu.json", "tests-1.log", "kernels-1.log"} <= names
    records = json.loads((out / "kernels-cpu.json").read_text(encoding="utf-8"))
    assert {record["impl"] for record in records} == {"cpp"}
    assert str(tmp_path) not in (out / "kernels-cpu.json").read_text(encoding="utf-8")


def test_whoever_ends_it_gets_the_table(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text("import time\ndef test_it(): time.sleep(63)\n", encoding="utf-8")
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("--out", out, "--device", "cpu", "--part", "tests", "--part", "step", "--tests", tmp_path),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    log, deadline = out / "tests-1.log", time.monotonic() + 40
    while not (log.is_file() and "test_long.py::test_it" in log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "| tests | out of time | " in text
    assert "| step | out of time | " in text
    assert "interrupted by signal 15" in (out / "gpu.md").read_text(encoding="utf-8")
    assert not alive(str(tmp_path))


def test_help_names_the_parts() -> None:
    text = CliRunner().invoke(main, ["gpu", "--help"]).output
    assert "[tests|kernels|loader|step|run]" in text
    assert "--device" not in text
