"""Every Triton kernel compiles for today's GPUs within its budget of registers, spills and shared memory."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

KERNELS = ROOT / "kernels" / "fastrex_kernels"
MODULES = sorted(
    ".".join(path.relative_to(KERNELS.parent).with_suffix("").parts)
    for path in KERNELS.rglob("kernel*.py")
    if "\nAOT" in path.read_text(encoding="utf-8")
)
ARCHITECTURES = ("80", "90", "100")


def test_every_operator_with_kernels_has_specialisations() -> None:
    listed = {module.split(".")[1] for module in MODULES}
    assert listed == {path.parent.name for path in KERNELS.glob("*/kernel.py")}


@pytest.mark.parametrize("operator", sorted(path.parent.name for path in KERNELS.glob("*/kernel.py")))
def test_every_kernel_is_compiled(operator: str) -> None:
    defined: set[str] = set()
    listed: set[str] = set()
    for path in (KERNELS / operator).glob("kernel*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                defined |= {node.name} if node.name.endswith("_kernel") else set()
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AOT":
                listed |= {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    assert defined
    assert defined <= listed, f"not in AOT: {sorted(defined - listed)}"


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_within_their_budgets(module: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    paths = [str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": ":".join(paths), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "aot_compile.py"), module, *ARCHITECTURES]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) >= 3
    for result in results:
        registers, spills, shared = result["budget"]
        assert 0 < result["registers"] <= registers, result
        assert result["spill_bytes"] <= spills, result
        assert result["shared_bytes"] <= shared, result
