"""The C++ library: found for this torch only, built with threads that run, on torch's own OpenMP runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment

from fastrex_kernels import _cpp

VERSION = torch.__version__.split("+")[0]
built = pytest.mark.skipif(not _cpp.LOADED, reason=f"the C++ operators are not loaded: {_cpp.REASON}")


def python(code: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {**environment(), **extra}
    return subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env=env)


def test_a_library_for_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpp, "FOLDER", tmp_path)
    monkeypatch.delenv("FASTREX_NO_CPP", raising=False)
    path, reason = _cpp.library()
    assert path is None
    assert "not built" in reason
    (tmp_path / "_C.torch-1.0.0.so").touch()
    path, reason = _cpp.library()
    assert path is None
    assert reason == f"they were built for torch 1.0.0 and this is torch {VERSION}; install fastrex again"
    (tmp_path / f"_C.torch-{VERSION}.so").touch()
    assert _cpp.library() == (tmp_path / f"_C.torch-{VERSION}.so", "")


def test_a_missing_library_is_said_once(tmp_path: Path) -> None:
    code = f"""
import pathlib, warnings
import importlib.util, sys, types
import torch
spec = importlib.util.spec_from_file_location("probe", {str(_cpp.__file__)!r})
text = pathlib.Path(spec.origin).read_text().replace("Path(__file__).parent", "Path({str(tmp_path)!r})")
exec(compile(text, spec.origin, "exec"), {{"__name__": "probe"}})
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("RuntimeWarning: fastrex_kernels runs on CPUs without its C++ operators") == 1


def test_the_environment_switches_it_off_quietly() -> None:
    code = """
import torch, fastrex_kernels as k
x, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
print(k.cosine_cross_entropy(x, w, y).isfinite().item())
try:
    k.cosine_cross_entropy(x, w, y, impl="cpp")
except RuntimeError as error:
    print(error)
"""
    run = python(code, FASTREX_NO_CPP="1")
    assert run.stdout.splitlines() == [
        "True",
        "cosine_cross_entropy: impl='cpp' needs the C++ operators: FASTREX_NO_CPP=1 is set",
    ]
    assert "Warning" not in run.stderr


@built
def test_two_threads_run_on_one_openmp_runtime() -> None:
    # A second thread exists only once an operator of ours has asked for it: nothing before it is large enough.
    code = """
import os, torch, fastrex_kernels as k
torch.set_num_threads(1)
z, y = torch.zeros(8192, 256), torch.arange(8192) % 1000
before = len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
k.class_means(z, y, 1000, impl="cpp")
print(len(os.listdir("/proc/self/task")) - before)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}))
"""
    run = python(code, OMP_NUM_THREADS="2")
    assert run.stdout.split() == ["1", "1"], run.stderr


@built
def test_a_thread_keeps_its_own_number_of_threads() -> None:
    """Without care the first loop of a library in a thread sets it back to the process's default."""
    code = """
import threading, torch, fastrex_kernels as k
from fastrex.data.ahead import compute_alone
torch.set_num_threads(2)
z, y = torch.zeros(8192, 256), torch.arange(8192) % 1000
def work():
    compute_alone()
    k.class_means(z, y, 1000, impl="cpp")
    print(torch.get_num_threads())
for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
k.class_means(z, y, 1000, impl="cpp")
print(torch.get_num_threads())
"""
    run = python(code, OMP_NUM_THREADS="2")
    assert run.stdout.split() == ["1", "1", "2"], run.stderr
