"""The house rules that a machine can check: who imports whom, what loads lazily, what never appears."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "fastrex").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
STDLIB = set(sys.stdlib_module_names)


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute dotted names that a file imports; relative ones are resolved against its package."""
    root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    package = path.relative_to(root).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree) if not top_level_only else tree.body:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" if node.level and not node.module else stem for alias in node.names}
    return names


def module(path: Path) -> str:
    root = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def outside(path: Path) -> set[str]:
    """Top-level packages beyond the standard library and ourselves."""
    return {n.split(".")[0] for n in imported(path)} - STDLIB - {"fastrex", "fastrex_kernels"}


@pytest.mark.parametrize("path", [p for p in SOURCES if "kernels" in p.parts], ids=module)
def test_kernels_stand_alone(path: Path) -> None:
    triton = {"triton"} if re.fullmatch(r"kernel.*\.py|_triton\.py", path.name) else set()
    assert outside(path) <= {"torch"} | triton
    assert not any(n == "fastrex" or n.startswith("fastrex.") for n in imported(path))


def test_definition_and_kernels_are_independent() -> None:
    for path in SOURCES:
        other = {"reference.py": ".kernel", "kernel.py": ".reference"}.get(path.name)
        assert not other or not [n for n in imported(path) if n.endswith(other)], module(path)


def test_kernels_is_never_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("settings", set()),
        ("config", set()),
        ("errors", set()),
        ("schedule", set()),
        ("data/draws", {"numpy"}),
        ("data/plan", {"numpy"}),
        ("data/scan", {"numpy"}),
        ("data/headers", {"numpy", "PIL"}),
        ("data/lists", set()),
        ("data/tars", set()),
        ("data/shards", {"numpy"}),
        ("data/sources", set()),
        ("data/index", {"numpy"}),
        ("data/sharding", {"numpy"}),
    ],
)
def test_torch_free_files(name: str, allowed: set[str]) -> None:
    path = ROOT / "fastrex" / f"{name}.py"
    assert outside(path) <= allowed
    ours = {n for n in imported(path) if n.startswith("fastrex")}
    data = {f"fastrex.data.{n}" for n in ("draws", "scan", "headers", "lists", "tars", "shards", "sources", "index")}
    assert ours <= {"fastrex.config", "fastrex.settings", "fastrex.errors"} | data


def test_leaves() -> None:
    for name, more in (("apex", ()), ("distributed", ()), ("checkpoint", ()), ("sgd", ("apex",)), ("optim", ("sgd",))):
        ours = {n for n in imported(ROOT / "fastrex" / f"{name}.py") if n.startswith("fastrex.")}
        allowed = {f"fastrex.{n}" for n in ("config", "errors", "distributed", *more)}
        assert ours <= allowed, name


@pytest.mark.parametrize("folder", ["data", "model", "objectives"])
def test_folders_do_not_know_one_another(folder: str) -> None:
    allowed = (
        *("fastrex.config", "fastrex.settings", "fastrex.errors", "fastrex.distributed", "fastrex.apex"),
        "fastrex_kernels",
        f"fastrex.{folder}",
    )
    for path in (ROOT / "fastrex" / folder).glob("*.py"):
        for name in imported(path):
            if name.split(".")[0] in ("fastrex", "fastrex_kernels") and name != "fastrex":
                assert name.startswith(allowed), f"{module(path)} imports {name}"


def test_only_two_files_import_dali() -> None:
    users = {module(p) for p in SOURCES if any(n.startswith("nvidia") for n in imported(p))}
    assert users == {"fastrex.data.dali", "fastrex.data.codec"}


def test_pickle_lives_in_one_file() -> None:
    for path in SOURCES:
        if path.name == "foreign.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imported(path)
        assert not any(n == "pickle" or n.startswith("pickle.") for n in names), module(path)
        calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not [c for c in calls if re.match(r"torch\.load\(|eval\(|yaml\.load\(", c)], module(path)
        assert not [c for c in calls if "allow_pickle=True" in c or "shell=True" in c], module(path)


@pytest.mark.parametrize("name", ["fastrex", "fastrex.cli", "fastrex.config"])
def test_importing_the_command_line_loads_nothing_heavy(name: str) -> None:
    heavy = ("torch", "nvidia.dali", "numpy", "triton", "PIL")
    code = f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "[]"


def test_kernels_import_without_dali_numpy_or_triton() -> None:
    code = "import sys, fastrex_kernels; print([m for m in ('nvidia.dali', 'fastrex', 'triton') if m in sys.modules])"
    env = {"PYTHONPATH": f"{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == "[]"


def test_files_stay_readable() -> None:
    long = {module(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long
