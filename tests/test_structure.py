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
        ("sections", set()),
        ("errors", set()),
        ("schedule", set()),
        ("data/draws", {"numpy"}),
        ("data/mixes", {"numpy"}),
        ("data/plan", {"numpy"}),
        ("data/scan", {"numpy"}),
        ("data/headers", {"numpy", "PIL"}),
        ("data/lists", set()),
        ("data/tars", set()),
        ("data/shards", {"numpy"}),
        ("data/sources", set()),
        ("data/columns", {"numpy"}),
        ("data/places", set()),
        ("data/index", {"numpy"}),
        ("data/reader", {"numpy"}),
        ("data/sharding", {"numpy"}),
        ("transfer/scores", {"numpy"}),
        ("transfer/published", set()),
        ("files", set()),
        ("streams", set()),
        ("cgroup", set()),
        ("signals", set()),
        ("ending", set()),
        ("stall", set()),
        ("agreement", set()),
        ("lifeline", set()),
        ("door", set()),
        ("messages", set()),
        ("verdict", set()),
        ("watch", set()),
        ("transfer/splits", {"numpy"}),
        ("untrusted", set()),
        ("stored", set()),
        ("words", {"numpy"}),
        ("transfer/annotations", {"numpy"}),
        ("transfer/matlab", {"numpy"}),
        ("transfer/official", set()),
        ("transfer/eurosat", {"numpy"}),
        ("transfer/inat", set()),
        ("transfer/opening", {"numpy"}),
        ("transfer/contents", {"numpy"}),
        ("transfer/folder", set()),
        ("transfer/progress", set()),
        ("analysis/outcome", set()),
        ("markup", set()),
        ("scales", set()),
        ("drawing", set()),
        ("charts", set()),
    ],
)
def test_torch_free_files(name: str, allowed: set[str]) -> None:
    path = ROOT / "fastrex" / f"{name}.py"
    assert outside(path) <= allowed
    ours = {n for n in imported(path) if n.startswith("fastrex")}
    names = (
        *("draws", "scan", "headers", "lists", "tars", "shards", "sources", "columns", "places", "index", "reader"),
        *("codec", "mixes"),
    )
    data = {"fastrex.data", *(f"fastrex.data.{n}" for n in names)}
    leaves = {f"fastrex.{n}" for n in ("config", "sections", "settings", "errors", "files", "untrusted", "stored")}
    more = {
        "watch": ("agreement", "door", "ending", "lifeline", "messages", "stall", "verdict"),
        "door": ("cgroup", "lifeline"),
        "messages": ("verdict",),
        "analysis/outcome": ("charts", "markup"),
        "charts": ("markup", "drawing", "scales"),
        "drawing": ("markup", "scales"),
        "signals": ("ending", "verdict"),
        "transfer/official": ("transfer.annotations", "transfer.matlab"),
        "transfer/eurosat": ("transfer.annotations",),
        "transfer/inat": ("transfer.annotations",),
        "stall": ("verdict",),
    }
    leaves |= {f"fastrex.{n}" for n in more.get(name, ())}
    assert ours <= leaves | data | {"fastrex"}


LEAVES = (
    ("apex", ()),
    ("distributed", ("stall", "watch")),
    ("tensorfile", ()),
    ("checkpoint", ("tensorfile",)),
    ("digests", ()),
    ("sgd", ("apex",)),
    ("optim", ("sgd",)),
    ("neighbours", ()),
)


def test_leaves() -> None:
    for name, more in LEAVES:
        ours = {n for n in imported(ROOT / "fastrex" / f"{name}.py") if n.startswith("fastrex.")}
        allowed = {f"fastrex.{n}" for n in ("config", "errors", "distributed", "files", "untrusted", *more)}
        assert ours <= allowed, name


@pytest.mark.parametrize("folder", ["data", "model", "objectives"])
def test_folders_do_not_know_one_another(folder: str) -> None:
    allowed = (
        *("fastrex.config", "fastrex.settings", "fastrex.errors", "fastrex.distributed", "fastrex.apex"),
        *("fastrex.files", "fastrex.untrusted", "fastrex.stored", "fastrex.markup"),
        "fastrex_kernels",
        f"fastrex.{folder}",
    )
    for path in (ROOT / "fastrex" / folder).glob("*.py"):
        for name in imported(path):
            if name.split(".")[0] in ("fastrex", "fastrex_kernels") and name != "fastrex":
                assert name.startswith(allowed), f"{module(path)} imports {name}"


def test_the_report_is_the_end_of_the_line() -> None:
    outside = [p for p in SOURCES if "report" not in p.parts]
    users = {module(p) for p in outside if any(n.startswith("fastrex.report") for n in imported(p))}
    assert users == {"fastrex.cli_transfer"}


def test_only_two_files_import_dali() -> None:
    users = {module(p) for p in SOURCES if any(n.startswith("nvidia") for n in imported(p))}
    assert users == {"fastrex.data.dali", "fastrex.data.codec"}


# What runs code that a file holds, unpacks wherever a file says, or hands words to a shell.
FORBIDDEN_MODULES = (
    *("pickle", "_pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"),
    *("torch.distributed.checkpoint", "torch.package", "torch.hub"),
)
FORBIDDEN_CALLS = re.compile(
    r"(eval|exec|compile|(tempfile\.)?mktemp"
    r"|(\w+\.)*(system|popen|extractall|unpack_archive|read_pickle|unsafe_load|get_object|\w+_object|\w+_object_list)"
    r"|torch\.load|torch\.jit\.load|(torch\.)?hub\.load\w*|yaml\.(load|full_load|load_all))\("
)
# Where they are meant, and why.
ALLOWED = {
    ("fastrex/foreign.py", "pickle"),  # the one Unpickler, which knows tensors and plain containers
    ("tests/test_foreign.py", "pickle"),  # makes hostile pickles
    ("tests/test_words.py", "pickle"),  # makes plain and hostile pickles
    ("tests/layouts_of_sets.py", "pickle"),  # makes the files of ImageNet-CoG
    ("tests/test_foreign.py", "torch.load"),  # shows that the bomb is real, and that weights_only refuses
    ("tests/test_faults_hostile.py", "pickle"),  # makes hostile pickles
    ("tests/test_modules.py", "torch.load"),  # what users of the kernels do with a state of their own
    ("tests/test_readme.py", "compile"),  # runs the README's examples
    ("tests/test_readme.py", "exec"),  # the same
}
EVERYTHING = sorted(
    path
    for folder in ("fastrex", "kernels", "benchmarks", "tests", "examples", ".ci")
    for path in (ROOT / folder).rglob("*.py")
)


def forbidden(tree: ast.AST) -> set[str]:
    """Names of what the file should not use, with an attribute's whole path."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {
                *base, *(f"{stem}.{alias.name}" for stem in base for alias in node.names)
            }  # fmt: skip
            found |= {m for m in FORBIDDEN_MODULES for n in names if n == m or n.startswith(f"{m}.")}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if FORBIDDEN_CALLS.match(f"{name}("):
                found.add(name)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if options.get("shell", "False") != "False" or options.get("allow_pickle", "False") != "False":
                found.add(name)
            # Of an archive; fastrex.transfer.features.extract takes features.
            if name.endswith(".extract") and name != "features.extract" and "filter" not in options:
                found.add(name)
    return found


def test_nothing_runs_what_a_file_holds() -> None:
    assert len(EVERYTHING) > 100
    used = {
        (str(path.relative_to(ROOT)), name)
        for path in EVERYTHING
        for name in forbidden(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert used == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch.distributed.checkpoint as dcp", "import shelve",
        "from torch.distributed import checkpoint", "torch.load(x, weights_only=True)", "eval(x)", "exec(x)",
        "os.system(x)", "subprocess.run(x, shell=True)", "np.load(x, allow_pickle=True)", "yaml.load(x)",
        "dist.all_gather_object(x, y)", "torch.distributed.broadcast_object_list(x)", "tempfile.mktemp()",
        "tar.extractall(x)", "tar.extract(x)", "shutil.unpack_archive(x)", "torch.jit.load(x)", "os.popen(x)",
    ],
)  # fmt: skip
def test_what_runs_code_is_recognised(code: str) -> None:
    assert forbidden(ast.parse(code))


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
