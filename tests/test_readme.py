"""What the documents show runs as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from fastrex import config as c
from fastrex import objectives


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
    assert len(blocks) == 3
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


def test_the_rivals_of_schane_in_the_readme_differ_in_the_objective_alone() -> None:
    (block,) = (
        block
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
        if "train schane objective.name=softmax" in block
    )
    few = re.search(r'^FEW="(.*)"$', block, re.M)
    assert few is not None
    lines = [line.replace("$FEW", few[1]) for line in block.splitlines() if line.startswith("fastrex train")]
    runs: list[tuple[list[str], c.Config]] = []
    for line in lines:
        words = shlex.split(line, comments=True)[2:]
        settings = [word for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+=.*", word)]
        others = [word for word in words[1:] if word not in settings]
        del others[others.index("--out") :]
        runs.append((others, objectives.resolve(c.load(words[0], settings))))
    assert len(runs) == 4
    for (rivals_words, rival), (words, schane) in zip(runs[::2], runs[1::2], strict=True):
        assert rivals_words == words
        assert (rival.objective.name, schane.objective.name) == ("softmax", "schane")
        assert {line.split(".")[0] for line in c.diff(rival, schane)} == {"objective"}
    (full, few_shot) = runs[1][1], runs[3][1]
    assert (full.data.shots, few_shot.data.shots) == (0, 5)
    assert few_shot.optim.batch_size < full.optim.batch_size


def test_every_picture_and_file_that_is_linked_exists() -> None:
    others = ("kernels/README.md", "CONTRIBUTING.md", "fastrex/objectives/README.md")
    for document in (ROOT / "README.md", *(ROOT / name for name in others)):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
