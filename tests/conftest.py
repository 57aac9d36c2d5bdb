"""Small image folders that the tests write, and the real ones that FASTREX_TEST_DATA points to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_report import FAULT, FaultReport
from PIL import Image

# Without a GPU the Triton kernels run in Triton's interpreter; Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Tests that ask torch for deterministic algorithms would be refused by cuBLAS without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Two test processes that spin for each other's cores are slower than one thread each.
torch.set_num_threads(1)

# A shell (or nohup) lets what it starts aside ignore these two, and so would every process that a test starts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data.global_size=32",
    "data.local_crops=2",
    "data.local_size=16",
    "data.local_scale=[0.2,0.5]",
    "data.eval_resize=32",
    "data.eval_size=32",
    "model.arch=resnet18",
    "model.stem=small",
    "model.width=4",
    "projector.hidden_layers=1",
    "projector.hidden_dim=32",
    "projector.out_dim=16",
    "objective.bank_size=64",
    "optim.batch_size=16",
    "optim.epochs=4",
    "optim.warmup_epochs=1",
    "optim.precision=fp32",
    "eval.batch_size=32",
    "checkpoint.every_epochs=1",
    "run.log_every=1",
]


def settings_for(objective: str) -> list[str]:
    """SETTINGS for an objective, without the options of the others."""
    bank = () if objective == "class_means" else ("objective.bank_size",)
    return [f"objective.name={objective}", *(s for s in SETTINGS if not s.startswith(bank))] if bank else list(SETTINGS)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices and demo images of the tests stay out of the user's cache, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of striped images (direction x colour), 16 for training and 4 held out of each, as JPEG folders."""
    root = tmp_path_factory.mktemp("stripes")
    write_stripes(root / "train", 16, seed=0)
    write_stripes(root / "val", 4, seed=1)
    return root


def write_stripes(folder: Path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for label in range(4):
        target = folder / f"class-{label}"
        target.mkdir(parents=True)
        for number in range(count):
            height, width = random.integers(40, 64, 2)
            wave = 127 + 120 * np.sin(np.arange(64) * random.uniform(0.5, 0.7) + random.uniform(0, 6))
            plane = np.broadcast_to(wave[:height, None] if label % 2 else wave[:width], (height, width))
            image = np.zeros((height, width, 3), np.uint8)
            image[..., 0 if label < 2 else 2] = plane
            Image.fromarray(image).save(target / f"{number:02d}.jpg", quality=90)


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """Real ImageNet files, one per class."""
    folder = os.environ.get("FASTREX_TEST_DATA")
    if not folder or not (Path(folder) / "imagenet-sample").is_dir():
        pytest.skip("FASTREX_TEST_DATA does not point to a folder with imagenet-sample")
    return Path(folder) / "imagenet-sample"


OUTER = ("TORCHELASTIC_", "MASTER_", "PET_", "SLURM_")


def environment() -> dict[str, str]:
    """For processes that tests start: the checkout on the path, one thread, nothing of an outer launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OUTER) and k != "RANK"}
    return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", metavar="FILE", help="write what the fault tests injected and what survived, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    # Also in the processes of pytest-xdist, whose lines travel to this one; only this one writes.
    path = config.getoption("--report")
    if path:
        config.pluginmanager.register(FaultReport(None if hasattr(config, "workerinput") else Path(path)))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``report("T14", "a rank raises at step 5", injected=1, survived=1, bits_equal=True)``: a line of the table of
    faults. Called once per kind of fault, after what it says was asserted; further keywords are kept as they are."""

    def note(
        number: str, fault: str, *, injected: int, survived: int, bits_equal: bool | None = None, **more: object
    ) -> None:
        line = {"id": number, "fault": fault, "injected": injected, "survived": survived, "bits_equal": bits_equal}
        request.node.user_properties.append((FAULT, {**line, **more, "test": request.node.nodeid}))

    return note
