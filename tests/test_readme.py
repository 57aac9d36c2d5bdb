"""What the documents show runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from fastrex import config as c


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


# torch.compile uses parts of torch that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("number", range(len(python_blocks(ROOT / "kernels" / "README.md"))))
def test_examples_of_the_kernels(number: int, tmp_path: Path) -> None:
    code = python_blocks(ROOT / "kernels" / "README.md")[number]
    if "init_process_group" not in code:
        exec(compile(code, "kernels/README.md", "exec"), {})
        return
    script = tmp_path / "train.py"
    # The interpreter's teardown may abort with gloo's threads (see fastrex.cli._leave): not the example's fault.
    script.write_text(f"{code}\nimport os\n\nos._exit(0)\n", encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    result = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_examples_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 2
    for block in blocks:
        # The same lines at a size for a test: one step instead of an epoch.
        code = block.replace('out="runs/mine")', 'out="runs/mine", max_steps=1, device="cpu")')
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "export" / "model.safetensors").is_file()


def test_recipes_and_settings_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in c.recipes():
        assert f"`{name}`" in text
    known = {f"{section}.{key}" for section, key, _, _ in c.items(c.load("trex"))}
    for section, key in re.findall(r"\b(data|augment|model|projector|optim|eval|checkpoint|run)\.([a-z_]+)=", text):
        assert f"{section}.{key}" in known


def test_every_picture_and_file_that_is_linked_exists() -> None:
    for document in (ROOT / "README.md", ROOT / "kernels" / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
