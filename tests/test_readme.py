"""What the documents show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

from fastrex import config as c


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("number", range(len(python_blocks(ROOT / "kernels" / "README.md"))))
def test_examples_of_the_kernels(number: int) -> None:
    exec(compile(python_blocks(ROOT / "kernels" / "README.md")[number], "kernels/README.md", "exec"), {})


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
